"""Server-sent events: bytes on the wire, silence, writes, clients that leave, and the log's line about it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from common.job import JobState
from gateway.formats.base import ServerEvent
from gateway.streaming import encode_event
from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway, Seen
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker, text_of

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 20}}


def test_an_event_on_the_wire() -> None:
    assert encode_event(ServerEvent(b"[DONE]")) == b"data: [DONE]\n\n"
    event = ServerEvent(b"{}", id="7", event="job.delta")
    assert encode_event(event) == b"id: 7\nevent: job.delta\ndata: {}\n\n"


async def test_comments_fill_the_silence_before_the_first_token(
    start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway(keep_alive=0.05)
    worker.may_take = False
    async with gateway.stream("POST", "/generate_stream", json=BODY) as reader:
        assert reader.response.status_code == 200
        chunks = reader.response.aiter_text()
        seen = await anext(chunks)
        while seen.count(":\n") < 3:
            seen += await anext(chunks)
        assert seen.replace("retry: 1000\n", "").strip(":\n") == "", "nothing but the retry line and comments"
        worker.may_take = True
        while 'generated_text":"' not in seen:
            seen += await anext(chunks)
    assert text_of(20) in seen


async def test_ids_are_offsets_and_all_ready_events_are_one_write(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    job_id = await gateway.submit()
    await gateway.finished(job_id)
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream?format=native") as reader:
        events = await reader.events()
        assert [event.id for event in events] == [str(n) for n in range(1, 21)]
        assert len(reader.chunks) <= 3, "the retry line, all tokens, the end"


async def test_a_refused_stream_has_its_real_status(gateway: LiveGateway) -> None:
    response = await gateway.client.post("/generate_stream", json={"inputs": ""})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    body = {"messages": [], "stream": True}
    response = await gateway.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 422 and "message" in response.json()["error"]


async def test_a_client_that_leaves_cancels_its_job_after_the_grace(
    start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway(disconnect_grace=0)
    worker.hold_at = 3
    async with gateway.stream("POST", "/generate_stream", json=BODY) as reader:
        job_id = reader.response.headers["x-job-id"]
        await eventually(lambda: any(job.gateways for job in worker.running.values()))
    await eventually(lambda: gateway.services.hub.num_jobs == 0, what="the gateway noticed")
    await eventually(lambda: not any(job.gateways for job in worker.running.values()), what="the worker was told")

    async def is_cancelled() -> bool:
        record = await gateway.services.jobs.record(job_id[4:])
        return record is not None and record.state is JobState.CANCELLED

    await eventually(is_cancelled, what="a job without a grace ends when nobody follows it")


async def test_a_waiting_client_that_leaves_is_noticed(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 3
    waiting = asyncio.create_task(gateway.client.post("/generate", json=BODY))
    await eventually(lambda: gateway.services.hub.num_followers == 1)
    waiting.cancel()
    await eventually(lambda: gateway.services.hub.num_followers == 0)


async def test_a_gateway_that_stops_ends_streams_without_done(
    start_gateway: StartGateway, gateway: LiveGateway, worker: ScriptedWorker
) -> None:
    other = await start_gateway()
    worker.hold_at = 5
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20, "stream": True}
    seen: list[Seen] = []
    async with gateway.stream("POST", "/v1/chat/completions", json=body) as reader:
        async for event in reader:
            seen += [event] if event.data else []
            if event.id == "5":
                gateway.services.hub.stop_followers()
    assert seen[-1].data != "[DONE]" and seen[-1].id == "5"
    worker.hold_at = 1000
    headers = {"last-event-id": "5"}
    url = f"/v1/jobs/{reader.response.headers['x-job-id']}/stream?format=native"
    async with other.stream("GET", url, headers=headers) as reader:
        seen += await reader.events()
    assert seen[-1].data == "[DONE]"
    assert _content(seen) == text_of(20)


def _content(events: list[Seen]) -> str:
    chunks = [event.json for event in events if event.data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def test_the_access_log_has_one_line_a_request(
    gateway: LiveGateway, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.access")
    headers = {"x-request-id": "req-1"}
    response = await gateway.client.post("/generate_stream", json=BODY, headers=headers)
    assert response.headers["x-request-id"] == "req-1"
    await eventually(lambda: caplog.records, what="the line is written after the last byte")
    [line] = [record for record in caplog.records if record.name == "gateway.access"]
    fields: dict[str, Any] = vars(line)
    assert line.getMessage() == "POST /generate_stream 200"
    assert (fields["request_id"], fields["tokens"], fields["finish_reason"]) == ("req-1", 20, "length")
    assert "job_" + fields["job_id"] == response.headers["x-job-id"]
    for name in ("duration_ms", "queue_ms", "prefill_ms", "decode_ms", "prompt_tokens", "tenant"):
        assert name in fields, name


async def test_clients_that_read_nothing_do_not_hold_up_others(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    job_id = await gateway.submit(max_new_tokens=200)
    request = f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    deaf = [await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024) for _ in range(20)]
    for _, writer in deaf:
        writer.write(request)
    await eventually(lambda: gateway.services.hub.num_followers == 20)
    assert gateway.services.hub.num_jobs == 1
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        events = await reader.events()
    assert "".join(event.json["text"] for event in events if event.event == "job.delta") == text_of(200)
    for _, writer in deaf:
        writer.close()
    await eventually(lambda: gateway.services.hub.num_followers == 0)
