"""The Jobs API over HTTP: every field, every way to wait, resume and refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway, Seen
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker, text_of

GENERATE = {"inputs": "hello", "parameters": {"max_new_tokens": 12}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
UNKNOWN = "job_" + "abcdef" + "a" * 22
FIELDS = [
    "id",
    "object",
    "status",
    "model",
    "adapter",
    "priority",
    "created_at",
    "started_at",
    "finished_at",
    "expires_at",
    "attempts",
    "num_tokens",
    "output_text",
    "output",
    "finish_reason",
    "error",
    "usage",
    "metadata",
    "urls",
]


def texts(events: list[Seen]) -> str:
    return "".join(event.json["text"] for event in events if event.event == "job.delta")


def offsets(events: list[Seen]) -> list[tuple[int, int]]:
    return [(event.json["start"], event.json["end"]) for event in events if event.event == "job.delta"]


def is_contiguous(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether the spans follow each other without gap or overlap from `start` to `end`."""
    bounds = [start, *[span[1] for span in spans]]
    return bounds[-1] == end and all(span[0] == bound for span, bound in zip(spans, bounds, strict=False))


def test_the_check_for_contiguity_finds_gaps_and_overlaps() -> None:
    assert is_contiguous([(0, 3), (3, 5)], 0, 5)
    assert not is_contiguous([(0, 3), (4, 5)], 0, 5)
    assert not is_contiguous([(0, 3), (2, 5)], 0, 5)
    assert not is_contiguous([(0, 3)], 0, 5)


async def test_a_new_job_is_202_with_all_fields(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.may_take = False
    body = {"input": GENERATE, "model": "demo", "priority": "batch", "metadata": {"a": "b"}, "timeout": 60}
    response = await gateway.client.post("/v1/jobs", json=body)
    job = response.json()
    assert response.status_code == 202
    assert list(job) == FIELDS
    assert response.headers["location"] == f"/v1/jobs/{job['id']}" == job["urls"]["self"]
    assert response.headers["x-job-id"] == job["id"]
    assert job["status"] == "queued" and job["object"] == "job" and job["priority"] == "batch"
    assert job["model"] == "demo" and job["metadata"] == {"a": "b"} and job["num_tokens"] == 0
    assert job["expires_at"] == pytest.approx(job["created_at"] + 60, abs=1)
    for name in ("adapter", "started_at", "finished_at", "output", "finish_reason", "error", "usage"):
        assert job[name] is None, name
    assert job["urls"]["stream"] == f"/v1/jobs/{job['id']}/stream"
    assert job["urls"]["websocket"] == f"/v1/jobs/{job['id']}/ws"
    assert job["urls"]["cancel"] == f"/v1/jobs/{job['id']}/cancel"


async def test_wait_gives_the_finished_job(gateway: LiveGateway) -> None:
    response = await gateway.client.post("/v1/jobs?wait=20", json={"input": GENERATE})
    job = response.json()
    assert response.status_code == 200
    assert (job["status"], job["output_text"], job["finish_reason"]) == ("completed", text_of(12), "length")
    assert job["output"] == {"generated_text": text_of(12)}
    assert job["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert job["attempts"] == 1 and job["num_tokens"] == 12
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["expires_at"]


async def test_a_chat_job_answers_as_its_route_does(gateway: LiveGateway) -> None:
    job = (await gateway.client.post("/v1/jobs?wait=20", json={"input": CHAT})).json()
    assert job["output"]["object"] == "chat.completion"
    assert job["output"]["choices"][0]["message"]["content"] == text_of(12) == job["output_text"]
    assert job["output"]["id"].removeprefix("chatcmpl-") == job["id"].removeprefix("job_")
    assert job["finish_reason"] == "length"
    for name in (job["output"]["id"], "cmpl-" + job["id"][4:], "resp_" + job["id"][4:], job["id"][4:]):
        assert (await gateway.client.get(f"/v1/jobs/{name}")).json()["id"] == job["id"], name


async def test_wait_that_is_too_short_gives_the_job_as_it_is(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 5
    response = await gateway.client.post("/v1/jobs?wait=1", json={"input": GENERATE})
    assert response.status_code == 202
    job = response.json()
    assert (job["status"], job["attempts"]) == ("in_progress", 1)
    response = await gateway.client.get(job["urls"]["self"], params={"wait": 1})
    assert response.headers["retry-after"] == "1"
    assert response.json()["output_text"] == text_of(5)
    assert response.json()["num_tokens"] == 5
    waiting = asyncio.create_task(gateway.client.get(job["urls"]["self"], params={"wait": 20}))
    await eventually(lambda: gateway.services.hub.num_followers == 1)
    worker.hold_at = 1000
    response = await waiting
    assert response.json()["status"] == "completed"
    assert "retry-after" not in response.headers
    await eventually(lambda: gateway.services.hub.num_jobs == 0, what="nobody follows any more")


async def test_list_is_newest_first_and_pages(gateway: LiveGateway) -> None:
    ids = [await gateway.submit() for _ in range(5)]
    for job_id in ids:
        await gateway.finished(job_id)
    first = (await gateway.client.get("/v1/jobs?limit=3")).json()
    assert [job["id"] for job in first["data"]] == ids[:1:-1]
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, ids[2])
    assert list(first["data"][0]) == [name for name in FIELDS if name not in ("output_text", "output")]
    second = (await gateway.client.get(f"/v1/jobs?limit=3&after={first['last_id']}")).json()
    assert [job["id"] for job in second["data"]] == ids[1::-1]
    assert second["has_more"] is False
    assert (await gateway.client.get("/v1/jobs?status=queued")).json()["data"] == []
    assert len((await gateway.client.get("/v1/jobs?status=completed")).json()["data"]) == 5


async def test_cancel_keeps_the_partial_text(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 5
    job_id = await gateway.submit()
    await eventually(lambda: any(job.end == 5 for job in worker.running.values()))
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        response = await gateway.client.post(f"/v1/jobs/{job_id}/cancel")
        assert response.status_code == 200 and response.json()["status"] in ("cancelling", "cancelled")
        events = await reader.events()
    assert events[-1].json["job"]["status"] == "cancelled"
    for _ in range(2):
        job = (await gateway.client.post(f"/v1/jobs/{job_id}/cancel")).json()
        assert (job["status"], job["output_text"], job["output"]) == ("cancelled", text_of(5), None)
        assert job["usage"]["completion_tokens"] == 5 and job["error"] is None and job["finish_reason"] is None


async def test_erased_jobs_are_gone(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    finished = await gateway.submit()
    await gateway.finished(finished)
    worker.hold_at = 3
    running = await gateway.submit()
    await eventually(lambda: any(job.end == 3 for job in worker.running.values()))
    for job_id in (finished, running):
        assert (await gateway.client.delete(f"/v1/jobs/{job_id}")).status_code == 204
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/stream")):
            response = await gateway.client.request(method, f"/v1/jobs/{job_id}{path}")
            assert response.status_code == 404, (method, path)
    await eventually(lambda: not worker.running, what="the worker drops it")


async def test_a_stream_of_an_erased_job_ends(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 3
    job_id = await gateway.submit()
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        await eventually(lambda: any(job.end == 3 for job in worker.running.values()))
        await gateway.client.delete(f"/v1/jobs/{job_id}")
        events = await reader.events()
    assert events[-1].json["job"]["status"] == "cancelled"


async def test_a_stream_has_all_events_in_order(gateway: LiveGateway) -> None:
    job_id = await gateway.submit(max_new_tokens=40)
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        assert reader.response.headers["content-type"].startswith("text/event-stream")
        assert reader.response.headers["cache-control"] == "no-cache"
        assert reader.response.headers["x-accel-buffering"] == "no"
        assert reader.response.headers["x-job-id"] == job_id
        everything = [event async for event in reader]
    assert everything[0].retry == "1000" and reader.chunks[0].startswith("retry: 1000\n")
    events = [event for event in everything if event.data]
    kinds = [event.event for event in events]
    assert kinds[0] == "job.status" and kinds[-1] == "job.done" and kinds.count("job.done") == 1
    assert all(event.json["type"] == event.event and event.json["job_id"] == job_id for event in events)
    assert all(event.id is None for event in events if event.event == "job.status")
    assert all(event.id == str(event.json["end"]) for event in events if event.event == "job.delta")
    assert events[-1].id == "end"
    assert is_contiguous(offsets(events), 0, 40) and texts(events) == text_of(40)
    assert events[-1].json["job"] == await gateway.finished(job_id)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 39, 40])
async def test_a_finished_job_can_be_streamed_from_anywhere(gateway: LiveGateway, start: int) -> None:
    job_id = await gateway.submit(max_new_tokens=40)
    await gateway.finished(job_id)
    wholly: dict[str, Any] = {"headers": {"last-event-id": str(start)}, "params": {"from": 3}}
    for arguments in (wholly, {"params": {"from": start}}):
        async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream", **arguments) as reader:
            events = await reader.events()
        assert is_contiguous(offsets(events), start, 40) and texts(events) == text_of(40)[start:]
        assert events[0].json["status"] == "completed" and events[-1].event == "job.done"


async def test_a_stream_goes_on_at_another_gateway(
    start_gateway: StartGateway, gateway: LiveGateway, worker: ScriptedWorker
) -> None:
    other = await start_gateway()
    await eventually(lambda: other.services.registry.models)
    worker.hold_at = 13  # 8 are in the log, 5 only in the write-ahead stream
    job_id = await gateway.submit(max_new_tokens=30)
    seen: list[Seen] = []
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        async for event in reader:
            seen += [event] if event.data else []
            if event.id == "13":
                break
    record = await gateway.services.jobs.record(job_id[4:])
    assert record is not None and record.num_tokens < 13, "the log is behind what the client has"
    headers = {"last-event-id": "13"}
    resumed = asyncio.create_task(_read(other, job_id, headers))
    await eventually(lambda: other.services.hub.num_followers == 1)
    worker.hold_at = 1000
    events = await resumed
    assert is_contiguous(offsets([*seen, *events]), 0, 30)
    assert texts([*seen, *events]) == text_of(30)


async def _read(gateway: LiveGateway, job_id: str, headers: dict[str, str]) -> list[Seen]:
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream", headers=headers) as reader:
        assert reader.response.status_code == 200
        return await reader.events()


@pytest.mark.parametrize("start", [0, 5, 20])
async def test_native_format_is_the_routes_own(gateway: LiveGateway, start: int) -> None:
    async with gateway.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 20}) as reader:
        live = await reader.events()
        job_id = reader.response.headers["x-job-id"]
    assert live[-1].data == "[DONE]"
    url = f"/v1/jobs/chatcmpl-{job_id[4:]}/stream?format=native"
    async with gateway.stream("GET", url, headers={"last-event-id": str(start)} if start else {}) as reader:
        replayed = await reader.events()
    assert [event.data for event in replayed] == [event.data for event in live][-len(replayed) :]
    deltas = [event.json["choices"][0]["delta"] for event in replayed[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == text_of(20)[start:]


async def test_details_bring_token_objects(gateway: LiveGateway) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 3, "details": True}}
    job_id = (await gateway.client.post("/v1/jobs?wait=20", json={"input": body})).json()["id"]
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream") as reader:
        events = await reader.events()
    tokens = [token for event in events if event.event == "job.delta" for token in event.json["tokens"]]
    assert tokens[0] == {"id": 97, "text": "a", "logprob": -0.5, "special": False}
    assert len(tokens) == 3


async def test_last_event_id_end_stops_an_event_source(gateway: LiveGateway) -> None:
    job_id = await gateway.submit()
    response = await gateway.client.get(f"/v1/jobs/{job_id}/stream", headers={"last-event-id": "end"})
    assert (response.status_code, response.content) == (204, b"")


async def test_an_offset_beyond_the_end_is_409(gateway: LiveGateway) -> None:
    job_id = await gateway.submit(max_new_tokens=4)
    await gateway.finished(job_id)
    response = await gateway.client.get(f"/v1/jobs/{job_id}/stream?from=5")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "offset_beyond_end"
    assert response.json()["error"]["num_tokens"] == 4


async def test_an_offset_beyond_a_running_jobs_tokens_is_409(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 4
    job_id = await gateway.submit()
    await eventually(lambda: any(job.end == 4 for job in worker.running.values()))
    response = await gateway.client.get(f"/v1/jobs/{job_id}/stream?from=5")
    assert (response.status_code, response.json()["error"]["num_tokens"]) == (409, 4)


async def test_an_idempotency_key_makes_one_job(gateway: LiveGateway) -> None:
    headers = {"idempotency-key": "once"}
    first = await gateway.client.post("/v1/jobs", json={"input": GENERATE}, headers=headers)
    again = await gateway.client.post("/v1/jobs", json={"input": GENERATE}, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    assert again.json()["id"] == first.json()["id"]
    other = await gateway.client.post("/v1/jobs", json={"input": CHAT}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_a_failed_job_says_why(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.fail_with = "out of luck"
    job = await gateway.finished(await gateway.submit(max_new_tokens=3))
    assert (job["status"], job["output"], job["output_text"]) == ("failed", None, "abc")
    assert job["error"]["message"] == "out of luck" and job["error"]["code"] == "engine"


async def test_another_tenants_job_is_unknown(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway(api_key="admin")
    key = await gateway.services.fleet.create_key("other")
    mine, theirs = {"authorization": "Bearer admin"}, {"authorization": f"Bearer {key}"}
    job_id = (await gateway.client.post("/v1/jobs", json={"input": GENERATE}, headers=mine)).json()["id"]
    assert (await gateway.client.get(f"/v1/jobs/{job_id}", headers=mine)).status_code == 200
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/stream"), ("DELETE", "")):
        foreign = await gateway.client.request(method, f"/v1/jobs/{job_id}{path}", headers=theirs)
        unknown = await gateway.client.request(method, f"/v1/jobs/{UNKNOWN}{path}", headers=theirs)
        assert foreign.status_code == unknown.status_code == 404, path
        assert foreign.text.replace(job_id[4:], "?") == unknown.text.replace(UNKNOWN[4:], "?")
    assert (await gateway.client.get("/v1/jobs", headers=theirs)).json()["data"] == []


REFUSED: list[tuple[Any, int, str, str | None]] = [
    ({}, 422, "validation", "input"),
    ({"input": "text"}, 422, "validation", "input"),
    ({"input": {}}, 422, "validation", "input"),
    ({"input": GENERATE | CHAT}, 422, "validation", "input"),
    ({"input": CHAT | {"stream": True}}, 422, "validation", "input.stream"),
    ({"input": GENERATE, "webhook": "http://x"}, 422, "unsupported_parameter", "webhook"),
    ({"input": GENERATE, "webhooks": 1}, 422, "unsupported_parameter", "webhooks"),
    ({"input": GENERATE, "priority": "high"}, 422, "validation", "priority"),
    ({"input": GENERATE, "timeout": 0}, 422, "validation", "timeout"),
    ({"input": GENERATE, "timeout": "1"}, 422, "validation", "timeout"),
    ({"input": GENERATE, "result_ttl": 59}, 422, "validation", "result_ttl"),
    ({"input": GENERATE, "metadata": {"a": 1}}, 422, "validation", "metadata"),
    ({"input": GENERATE, "metadata": {str(n): "" for n in range(17)}}, 422, "validation", "metadata"),
    ({"input": GENERATE, "metadata": {"k": "v" * 513}}, 422, "validation", "metadata"),
    ({"input": GENERATE, "model": "other"}, 404, "model_not_found", "model"),
    ({"input": CHAT | {"model": "demo"}, "model": "other"}, 422, "validation", "model"),
    ([], 422, "validation", None),
]


async def test_bad_bodies_are_refused_and_change_nothing(gateway: LiveGateway) -> None:
    for body, status, code, param in REFUSED:
        response = await gateway.client.post("/v1/jobs", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), (body, error)
        assert list(error) == ["message", "type", "param", "code"]
    assert (await gateway.client.get("/v1/jobs")).json()["data"] == []


async def test_bad_queries_are_400(gateway: LiveGateway) -> None:
    job_id = await gateway.submit()
    paths = ["?wait=61", "?wait=-1", "?wait=x", "/stream?from=-1", "/stream?from=1e3", "/stream?format=xml"]
    for path in paths:
        response = await gateway.client.get(f"/v1/jobs/{job_id}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_query"), path
    for query in ("limit=0", "limit=101", "status=done"):
        assert (await gateway.client.get(f"/v1/jobs?{query}")).status_code == 400, query
    for last_id in ("x", "-1", "1.5", "٣"):
        headers = {"last-event-id": last_id.encode()}
        response = await gateway.client.get(f"/v1/jobs/{job_id}/stream", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_last_event_id"), last_id
    for name in ("job_", "x", "job_" + "A" * 28, "../" + job_id, UNKNOWN):
        assert (await gateway.client.get(f"/v1/jobs/{name}")).status_code == 404, name
    assert (await gateway.finished(job_id))["status"] == "completed"
