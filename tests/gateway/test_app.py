"""The application around its routes: errors in both shapes, limits, CORS, request ids, start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}
GOOD = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
BODIES: list[tuple[bytes, dict[str, str], int]] = [
    (b"", JSON, 400),
    (b"{", JSON, 400),
    (b'{"inputs": "\xff"}', JSON, 400),
    (b'{"inputs": NaN}', JSON, 400),
    (b"[" * 2000, JSON, 400),
    (b"1", JSON, 422),
    (b"null", JSON, 422),
    (b"{}", {"content-type": "text/plain"}, 415),
    (b"{}", {}, 415),
]


async def test_bad_bodies_have_their_status_in_both_shapes(gateway: LiveGateway) -> None:
    for body, headers, status in BODIES:
        native = await gateway.client.post("/generate", content=body, headers=headers)
        openai = await gateway.client.post("/v1/chat/completions", content=body, headers=headers)
        assert native.status_code == openai.status_code == status, body
        assert set(native.json()) == {"error", "error_type"}
        assert list(openai.json()["error"]) == ["message", "type", "param", "code"]
        assert (await gateway.client.post("/generate", json=GOOD)).status_code == 200


async def chunks(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(0, num_bytes, 1000):
        yield b" " * 1000


async def test_too_large_is_413_with_and_without_a_declared_length(
    start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway(payload_limit=10_000)
    for path in ("/generate", "/v1/jobs"):
        declared = await gateway.client.post(path, content=b" " * 11_000, headers=JSON)
        chunked = await gateway.client.post(path, content=chunks(11_000), headers=JSON)
        assert "content-length" not in chunked.request.headers
        assert declared.status_code == chunked.status_code == 413
    assert declared.json()["error"]["code"] == "payload_too_large"
    padded = json.dumps(GOOD) + " " * (10_000 - len(json.dumps(GOOD)))
    assert (await gateway.client.post("/generate", content=padded, headers=JSON)).status_code == 200


async def test_unknown_routes_and_methods(gateway: LiveGateway) -> None:
    for path in ("/nothing", "/generate/", "/docs", "/v1/ws"):
        assert (await gateway.client.get(path)).status_code == 404, path
    assert (await gateway.client.get("/nothing")).json() == {
        "error": "no route GET /nothing",
        "error_type": "not_found",
    }
    assert (await gateway.client.get("/v1/nothing")).json()["error"]["code"] == "route_not_found"
    response = await gateway.client.get("/generate")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error_type"] == "method_not_allowed"
    assert (await gateway.client.put("/v1/jobs")).json()["error"]["code"] == "method_not_allowed"


async def test_an_error_of_ours_is_500_without_its_text(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(gateway.services.jobs, "record", broken)
    response = await gateway.client.get("/v1/jobs/job_" + "a" * 28)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "internal error")
    assert (await gateway.client.get("/health")).status_code == 200


async def test_preflight_allows_authorization(gateway: LiveGateway) -> None:
    origin = {"origin": "https://example.org"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = await gateway.client.options("/v1/jobs", headers=origin | preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]
    response = await gateway.client.post("/generate", json=GOOD, headers=origin)
    assert response.headers["access-control-allow-origin"] == "*"
    assert "x-job-id" in response.headers["access-control-expose-headers"].lower()
    response = await gateway.client.post("/generate", json={}, headers=origin)
    assert response.status_code == 422 and response.headers["access-control-allow-origin"] == "*"


async def test_other_origins_are_refused_when_some_are_named(
    start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway(cors_allow_origin=["https://ours.example"])
    for origin, allowed in (("https://ours.example", True), ("https://theirs.example", False)):
        response = await gateway.client.get("/health", headers={"origin": origin})
        assert ("access-control-allow-origin" in response.headers) is allowed


async def test_request_ids_are_echoed_when_they_are_sensible(gateway: LiveGateway) -> None:
    for given in ("abc-1", "a/b:c=", "x" * 128):
        response = await gateway.client.get("/health", headers={"x-request-id": given})
        assert response.headers["x-request-id"] == given
    for given in ("", "x" * 129, "a b", "ü".encode(), '"'):
        response = await gateway.client.get("/health", headers={"x-request-id": given})
        assert response.headers["x-request-id"] not in (given, ""), given
        assert len(response.headers["x-request-id"]) == 32


async def test_the_log_line_cannot_be_forged(gateway: LiveGateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gateway.access")
    await gateway.client.get("/x%0aINFO%20forged?key=secret")
    [record] = [one for one in caplog.records if one.name == "gateway.access"]
    assert record.getMessage() == "GET /x%0AINFO%20forged 404"


def gateway_process(redis_url: str, port: int, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "gateway", "--port", str(port), "--hostname", "127.0.0.1"],
        cwd=ROOT,
        env=os.environ | {"REDIS_URL": redis_url} | environment,
        stderr=subprocess.PIPE,
    )


def test_the_gateway_imports_neither_torch_nor_transformers_nor_celery() -> None:
    code = (
        "import sys, gateway.app\n"
        "from common.settings import GatewaySettings\n"
        "gateway.app.create_app(GatewaySettings())\n"
        "found = {'torch', 'transformers', 'celery', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    wrong = subprocess.run([sys.executable, "-c", "import numpy\n" + code], cwd=ROOT, check=False, capture_output=True)
    assert b"numpy" in wrong.stderr, "the check finds what it looks for"


async def test_sigterm_ends_streams_at_once_and_clients_go_on(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 3
    job_id = await gateway.submit()
    port = 20_000 + os.getpid() % 20_000
    process = gateway_process(gateway.settings.redis_url.get_secret_value(), port)  # type: ignore[union-attr]
    try:
        url = f"http://127.0.0.1:{port}"
        await eventually(lambda: _is_up(gateway, url), limit_s=20, what="the process serves")
        async with gateway.client.stream("GET", f"{url}/v1/jobs/{job_id}/stream") as response:
            text = ""
            async for part in response.aiter_text():
                text += part
                if "id: 3" in text and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        assert "job.done" not in text and '"end":3' in text
        assert await asyncio.to_thread(process.wait, 10) is not None
    finally:
        process.kill()
        process.communicate()
    worker.hold_at = 1000
    assert (await gateway.finished(job_id))["status"] == "completed"


async def _is_up(gateway: LiveGateway, url: str) -> bool:
    try:
        return (await gateway.client.get(f"{url}/health/live")).status_code == 200
    except httpx.TransportError:
        return False
