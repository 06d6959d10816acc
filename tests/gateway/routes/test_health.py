"""Health of process, gateway and fleet, and what GET / is to whom."""

from __future__ import annotations

from common.store.connection import Connection
from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.redis_server import ServerUnderTest
from tests.support.scripted_worker import ScriptedWorker

UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}


async def test_health_is_503_with_tgis_body_until_a_worker_serves(
    start_gateway: StartGateway, connection: Connection
) -> None:
    gateway = await start_gateway()
    for path in ("/health", "/ping", "/", "/health/ready"):
        response = await gateway.client.get(path)
        assert (response.status_code, response.json()) == (503, UNHEALTHY), path
    assert (await gateway.client.get("/health/live")).status_code == 200
    async with ScriptedWorker(connection):
        await eventually(lambda: gateway.services.registry.models, what="the card arrives")
        for path in ("/health", "/ping", "/", "/health/ready"):
            response = await gateway.client.get(path)
            assert (response.status_code, response.content) == (200, b""), path


async def test_a_card_without_a_live_worker_is_not_healthy(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    assert (await gateway.client.get("/health")).status_code == 200
    await worker.stop()
    await worker.store.bye()
    assert gateway.services.registry.models
    assert (await gateway.client.get("/health")).status_code == 503
    assert (await gateway.client.get("/health/ready")).status_code == 200


async def test_index_is_the_page_for_browsers(gateway: LiveGateway) -> None:
    response = await gateway.client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<!doctype html>" in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert (await gateway.client.get("/")).content == b""


async def test_without_redis_only_the_process_is_well(own_redis: ServerUnderTest) -> None:
    async with LiveGateway(own_redis.url) as gateway:
        gateway.services.connection.timeout_s = 0.3
        own_redis.kill()
        assert (await gateway.client.get("/health/live")).status_code == 200
        assert (await gateway.client.get("/health")).status_code == 503
        assert (await gateway.client.get("/health/ready")).status_code == 503
        response = await gateway.client.get("/v1/jobs/job_" + "a" * 28)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "redis_unavailable"
        assert int(response.headers["retry-after"]) >= 1
        own_redis.restart()
