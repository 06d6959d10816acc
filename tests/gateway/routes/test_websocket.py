"""The one-job WebSocket: events, keys, cancel, refusals as close codes, bad messages and slow clients."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gateway.routes import websocket as route
from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker, text_of

UNKNOWN = "job_" + "abcdef" + "a" * 22


async def read_all(socket: ClientConnection) -> tuple[list[dict[str, Any]], int, str]:
    """All messages, then close code and reason."""
    messages = []
    try:
        async with asyncio.timeout(15):
            while True:
                messages.append(json.loads(await socket.recv()))
    except ConnectionClosed:
        return messages, socket.close_code or 0, socket.close_reason or ""


async def follow(gateway: LiveGateway, job_id: str, query: str = "", **options: Any) -> tuple[list[Any], int, str]:
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws{query}", **options) as socket:
        return await read_all(socket)


def texts(messages: list[dict[str, Any]]) -> str:
    return "".join(message["text"] for message in messages if message["type"] == "job.delta")


async def test_a_job_comes_whole_and_closes_with_1000(gateway: LiveGateway) -> None:
    job_id = await gateway.submit(max_new_tokens=30)
    messages, code, _ = await follow(gateway, job_id)
    assert (messages[0]["type"], messages[-1]["type"], code) == ("job.status", "job.done", 1000)
    assert texts(messages) == text_of(30)
    assert messages[-1]["job"] == await gateway.finished(job_id)


@pytest.mark.parametrize("start", [0, 9, 30])
async def test_from_goes_on_at_an_offset(gateway: LiveGateway, start: int) -> None:
    job_id = await gateway.submit(max_new_tokens=30)
    await gateway.finished(job_id)
    messages, code, _ = await follow(gateway, job_id, f"?from={start}")
    assert (texts(messages), code) == (text_of(30)[start:], 1000)


async def test_refusals_are_close_codes(gateway: LiveGateway) -> None:
    job_id = await gateway.submit(max_new_tokens=3)
    await gateway.finished(job_id)
    assert await follow(gateway, UNKNOWN) == ([], 4404, f"no job '{UNKNOWN}'")
    assert (await follow(gateway, "nonsense"))[1] == 4404
    assert await follow(gateway, job_id, "?from=4") == ([], 4409, "3")
    assert (await follow(gateway, job_id, "?from=x"))[1] == 4400


async def test_keys_by_header_or_first_message(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway(api_key="right")
    gateway.client.headers["authorization"] = "Bearer right"
    job_id = await gateway.submit(max_new_tokens=3)
    await gateway.finished(job_id)
    assert (await follow(gateway, job_id, additional_headers={"authorization": "Bearer wrong"}))[1] == 4401
    assert (await follow(gateway, job_id, additional_headers={"authorization": "Bearer right"}))[1] == 1000
    for first, expected in (
        ({"type": "auth", "api_key": "right"}, 1000),
        ({"type": "auth", "api_key": "wrong"}, 4401),
        ({"type": "auth", "api_key": 5}, 4401),
        ({"type": "cancel"}, 4401),
        ([], 4401),
    ):
        async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
            await socket.send(json.dumps(first))
            messages, code, _ = await read_all(socket)
        assert (code, bool(messages)) == (expected, expected == 1000), first


async def test_no_key_in_time_is_4401(
    start_gateway: StartGateway, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "AUTH_TIMEOUT_S", 0.05)
    gateway = await start_gateway(api_key="right")
    assert await follow(gateway, UNKNOWN) == ([], 4401, "no key came in time")


async def test_cancel_by_message(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 4
    job_id = await gateway.submit()
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
        await eventually(lambda: any(job.end == 4 for job in worker.running.values()))
        await socket.send('{"type": "cancel"}')
        messages, code, _ = await read_all(socket)
    assert code == 1000 and messages[-1]["job"]["status"] == "cancelled"
    assert messages[-1]["job"]["output_text"] == text_of(4) == texts(messages)


async def test_bad_messages_get_an_error_and_ten_close(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 0
    job_id = await gateway.submit()
    bad: list[str | bytes] = [
        "{",
        "[]",
        "1",
        '{"type": "follow"}',
        "{}",
        b"\x00\xff",
        '"auth"',
        "null",
        "\x00",
        '{"a":',
    ]
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
        for message in bad[:9]:
            await socket.send(message)
        await socket.send('{"type": "auth", "api_key": "any"}')  # a good one: counting starts anew
        for message in bad:
            await socket.send(message)
        messages, code, _ = await read_all(socket)
    errors = [message["error"] for message in messages if message["type"] == "error"]
    assert (code, len(errors)) == (4400, 19)
    assert list(errors[0]) == ["message", "type", "param", "code"]
    worker.hold_at = 1000
    assert (await gateway.finished(job_id))["status"] == "completed"


async def test_a_message_beyond_the_limit_is_1009(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway(payload_limit=2000)
    worker.hold_at = 0
    job_id = await gateway.submit()
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
        await socket.send("x" * 2001)
        assert (await read_all(socket))[1] == 1009
    await eventually(lambda: gateway.services.hub.num_followers == 0)


async def test_a_gateway_that_stops_closes_with_1012(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 4
    job_id = await gateway.submit()
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
        await eventually(lambda: gateway.services.hub.num_followers == 1)
        gateway.services.hub.stop_followers()
        messages, code, _ = await read_all(socket)
    assert code == 1012 and not any(message["type"] == "job.done" for message in messages)


async def test_a_client_that_leaves_is_forgotten(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 4
    job_id = await gateway.submit()
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws"):
        await eventually(lambda: gateway.services.hub.num_followers == 1)
    await eventually(lambda: gateway.services.hub.num_jobs == 0)
    await eventually(lambda: not any(job.gateways for job in worker.running.values()), what="the worker was told")


async def test_a_client_that_accepts_nothing_is_let_go(
    gateway: LiveGateway, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "SEND_TIMEOUT_S", 0.1)
    monkeypatch.setattr(route, "CLOSE_TIMEOUT_S", 0.1)
    sending = asyncio.Event()

    async def stuck(self: Any, text: str) -> None:
        sending.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("starlette.websockets.WebSocket.send_text", stuck)
    job_id = await gateway.submit()
    async with connect(f"{gateway.ws_url}/v1/jobs/{job_id}/ws") as socket:
        messages, code, _ = await read_all(socket)
    assert sending.is_set() and (messages, code) == ([], 4408)
    await eventually(lambda: gateway.services.hub.num_followers == 0)
