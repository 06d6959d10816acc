"""Keys: whose they are, how long an answer is remembered, and what is never shown."""

from __future__ import annotations

import logging

import pytest
from pydantic import SecretStr

from common.errors import Forbidden, Unauthorized
from common.store.connection import Connection
from common.store.fleet import FleetStore
from gateway.auth import CACHE_S, KeyRing
from tests.gateway.conftest import StartGateway
from tests.support.scripted_worker import ScriptedWorker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_without_any_key_everybody_is_default(connection: Connection) -> None:
    keys = KeyRing(FleetStore(connection), None)
    assert await keys.tenant_of(None) == await keys.tenant_of("anything") == "default"
    await keys.check_admin(None)


async def test_the_own_key_is_default_and_admin(connection: Connection) -> None:
    keys = KeyRing(FleetStore(connection), SecretStr("right"))
    assert await keys.tenant_of("right") == "default"
    await keys.check_admin("right")
    for wrong in (None, "", "Right", "right ", "wrong", "x" * 10_000):
        with pytest.raises(Unauthorized):
            await keys.tenant_of(wrong)
        with pytest.raises(Unauthorized):
            await keys.check_admin(wrong)


async def test_a_tenants_key_is_no_admin(connection: Connection) -> None:
    fleet = FleetStore(connection)
    text = await fleet.create_key("acme")
    for own in (None, SecretStr("right")):
        keys = KeyRing(fleet, own)
        assert await keys.tenant_of(text) == "acme"
        with pytest.raises(Forbidden):
            await keys.check_admin(text)


async def test_answers_are_remembered_for_ten_seconds(connection: Connection) -> None:
    fleet, clock = FleetStore(connection), Clock()
    text = await fleet.create_key("acme")
    keys = KeyRing(fleet, None, clock=clock)
    assert await keys.tenant_of(text) == "acme"
    [key] = await fleet.keys()
    await fleet.revoke_key(key.key_id)
    await fleet.create_key("other")
    clock.now = CACHE_S - 0.1
    assert await keys.tenant_of(text) == "acme"
    clock.now = CACHE_S
    with pytest.raises(Unauthorized):
        await keys.tenant_of(text)


async def test_refusals_have_the_routes_shape_and_logs_no_key(
    start_gateway: StartGateway, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = await start_gateway(api_key="root-secret")
    wrong = {"authorization": "Bearer wrong-secret"}
    for path in ("/generate", "/generate_stream", "/", "/tokenize"):
        response = await gateway.client.post(path, json={"inputs": "x"}, headers=wrong)
        assert response.status_code == 401, path
        assert response.json() == {"error": "this key is not known here", "error_type": "unauthorized"}
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/jobs"):
        response = await gateway.client.post(path, json={}, headers={})
        assert response.status_code == 401, path
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert (await gateway.client.get(path)).status_code == 200, path
    right = {"authorization": "bearer root-secret"}
    assert (await gateway.client.get("/v1/jobs", headers=right)).status_code == 200
    assert caplog.records and "secret" not in caplog.text
    assert "root-secret" not in repr(gateway.services)


async def test_metrics_can_be_guarded(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway(api_key="right", metrics_need_key=True)
    assert (await gateway.client.get("/metrics")).status_code == 401
    assert (await gateway.client.get("/metrics", headers={"authorization": "Bearer right"})).status_code == 200
