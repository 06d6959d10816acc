"""Exactly-once through the whole stack: HTTP clients, gateways, Redis, workers with the demo model in float64.

`make test` runs 4 kills and 2 freezes; `make soak` 30 and 10.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from tests.faults.streams import BODIES, NUM_TOKENS, Seen, assert_exact, dead_letters, final_job, undisturbed
from tests.support.fleet import Fleet, FleetProcess, process_state, wait_for
from tests.support.redis_server import ServerUnderTest

LEASE_S = 1.5


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    server = ServerUnderTest(tmp_path_factory.mktemp("faults-redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fleet(redis: ServerUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    options = {"DTYPE": "float64", "INFERFLEET_LEASE": str(LEASE_S)}
    folder = tmp_path_factory.mktemp("faults")
    with Fleet(folder, redis.url, num_gateways=2, num_workers=2, options=options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, str]:
    texts = {name: undisturbed(fleet, body) for name, body in BODIES.items()}
    assert len(set(texts.values())) == len(texts)
    assert any(ord(character) > 0x3000 for character in texts["japanese"])
    return texts


def stream(fleet: Fleet, body: dict[str, Any], at: int, act: Any, *, gateway: int = 0) -> Seen:
    """One chat stream on one TCP connection; calls `act(job_id)` once when offset `at` was seen."""
    seen, acted = Seen(), []

    def on_token(offset: int) -> None:
        if offset >= at and not acted:
            acted.append(offset)
            act(seen.job_id)

    with fleet.client(gateway) as client:
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            seen.job_id = response.headers["x-job-id"]
            seen.read(response, on_token)
    assert acted, "the fault was never injected"
    assert 2 <= acted[0] <= NUM_TOKENS - 2
    return seen


def owner_process(fleet: Fleet, job_id: str) -> FleetProcess:
    name = wait_for(lambda: fleet.owner(job_id), "the job has a worker")
    return fleet.worker(name)


def kill_serving_worker(fleet: Fleet, expected: dict[str, str], kind: str, at: int) -> None:
    killed: list[FleetProcess] = []

    def kill(job_id: str) -> None:
        worker = owner_process(fleet, job_id)
        assert fleet_job(fleet, job_id)["num_tokens"] <= NUM_TOKENS - 2
        worker.kill()
        killed.append(worker)

    seen = stream(fleet, BODIES[kind], at, kill)
    job = final_job(fleet, seen.job_id)
    try:
        assert job["attempts"] >= 2, "the job never moved to another worker"
        assert seen.is_done
        assert_exact(seen, job, expected[kind])
    finally:
        killed[0].start()
        fleet.wait_until_ready()


def fleet_job(fleet: Fleet, job_id: str) -> dict[str, Any]:
    with fleet.client() as client:
        job: dict[str, Any] = client.get(f"/v1/fleet/jobs/{job_id}").raise_for_status().json()
    return job


def fenced(fleet: Fleet) -> float:
    """How often workers were refused because their incarnation was sealed."""
    return sum(worker["stats"].get("fenced", 0) for worker in fleet.worker_states())


def freeze_serving_worker(fleet: Fleet, expected: dict[str, str], kind: str, at: int) -> None:
    frozen: list[FleetProcess] = []
    before = fenced(fleet)

    def freeze(job_id: str) -> None:
        worker = owner_process(fleet, job_id)
        worker.signal(signal.SIGSTOP)
        wait_for(lambda: process_state(worker.pid) == "T", "the worker is stopped", 5)
        frozen.append(worker)

    seen = stream(fleet, BODIES[kind], at, freeze)
    job = final_job(fleet, seen.job_id)
    assert process_state(frozen[0].pid) == "T", "the worker woke up before its job was finished elsewhere"
    frozen[0].signal(signal.SIGCONT)
    wait_for(lambda: fenced(fleet) > before, "the zombie was fenced off")
    assert job["attempts"] >= 2
    assert_exact(seen, job, expected[kind])
    fleet.wait_until_ready()


@pytest.mark.parametrize(("kind", "at"), [("greedy", 3), ("seeded", 40), ("japanese", 90), ("greedy", 150)])
def test_worker_killed(fleet: Fleet, expected: dict[str, str], kind: str, at: int) -> None:
    kill_serving_worker(fleet, expected, kind, at)
    assert dead_letters(fleet) == []


@pytest.mark.parametrize(("kind", "at"), [("seeded", 20), ("japanese", 60)])
def test_worker_frozen_beyond_its_lease(fleet: Fleet, expected: dict[str, str], kind: str, at: int) -> None:
    freeze_serving_worker(fleet, expected, kind, at)
    assert dead_letters(fleet) == []


def test_a_text_of_another_run_is_not_accepted(fleet: Fleet, expected: dict[str, str]) -> None:
    """The comparison can fail: a stream of one prompt against the text of another."""
    seen = stream(fleet, BODIES["greedy"], 10, lambda _: None)
    with pytest.raises(AssertionError):
        assert_exact(seen, final_job(fleet, seen.job_id), expected["japanese"])


def resume_sse(fleet: Fleet, seen: Seen, gateway: int) -> None:
    headers = {"Last-Event-ID": seen.last_id}
    with fleet.client(gateway) as client:
        url = f"/v1/jobs/{seen.job_id}/stream?format=native"
        with client.stream("GET", url, headers=headers) as response:
            seen.read(response)


async def resume_websocket(fleet: Fleet, job_id: str, start: int, gateway: int) -> tuple[str, dict[str, Any]]:
    address = fleet.gateways[gateway].url.replace("http", "ws", 1)
    pieces, done = [], {}
    async with websockets.connect(f"{address}/v1/jobs/{job_id}/ws?from={start}") as socket:
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "job.delta":
                assert event["start"] == start
                start = event["end"]
                pieces.append(event["text"])
            elif event["type"] == "job.done":
                done = event["job"]
    return "".join(pieces), done


def resume_job_events(fleet: Fleet, job_id: str, last_id: str, gateway: int) -> str:
    pieces = []
    with fleet.client(gateway) as client:
        with client.stream("GET", f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": last_id}) as response:
            assert response.status_code == httpx.codes.OK
            for line in response.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if event.get("type") == "job.delta":
                    pieces.append(event["text"])
    return "".join(pieces)


def test_gateway_killed(fleet: Fleet, expected: dict[str, str]) -> None:
    """The other gateway carries on: in the route's own format, as job events, and on a WebSocket with from=."""
    seen = Seen()
    gateway = fleet.gateways[1]

    def kill(offset: int) -> None:
        if offset >= 30 and gateway.process is not None and gateway.process.poll() is None:
            gateway.kill()

    with fleet.client(1) as client, suppress(httpx.TransportError):
        with client.stream("POST", "/v1/chat/completions", json=BODIES["seeded"] | {"stream": True}) as response:
            seen.read(response, kill)
    assert not seen.is_done
    assert 2 <= int(seen.last_id) <= NUM_TOKENS - 2
    head, last_id = seen.text, seen.last_id
    try:
        resume_sse(fleet, seen, 0)
        assert seen.is_done
        assert_exact(seen, final_job(fleet, seen.job_id), expected["seeded"])
        assert head + resume_job_events(fleet, seen.job_id, last_id, 0) == expected["seeded"]
        tail, job = asyncio.run(resume_websocket(fleet, seen.job_id, int(last_id), 0))
        assert head + tail == expected["seeded"]
        assert job["status"] == "completed"
    finally:
        gateway.start()
        fleet.wait_until_ready()


def test_redis_killed_and_restarted(fleet: Fleet, redis: ServerUnderTest, expected: dict[str, str]) -> None:
    run_ids = [redis.client().info("server")["run_id"]]

    def restart(job_id: str) -> None:
        redis.kill()
        redis.restart()
        run_ids.append(redis.client().info("server")["run_id"])

    seen = stream(fleet, BODIES["japanese"], 40, restart)
    assert run_ids[0] != run_ids[1]
    assert_exact(seen, final_job(fleet, seen.job_id), expected["japanese"])
    fleet.wait_until_ready()


def test_redis_loses_the_tail_of_its_file(fleet: Fleet, redis: ServerUnderTest, expected: dict[str, str]) -> None:
    cut: list[int] = []

    def lose(job_id: str) -> None:
        redis.kill()
        cut.append(redis.cut_aof_tail(64 * 1024))
        redis.restart()

    seen = stream(fleet, BODIES["greedy"], 60, lose)
    assert cut[0] > 0
    assert_exact(seen, final_job(fleet, seen.job_id), expected["greedy"])
    fleet.wait_until_ready()
    assert dead_letters(fleet) == []


@pytest.mark.soak
def test_soak_kills_and_freezes(fleet: Fleet, expected: dict[str, str]) -> None:
    generator = random.Random(20)
    for index in range(30):
        kill_serving_worker(fleet, expected, list(BODIES)[index % 3], generator.randint(2, NUM_TOKENS - 40))
    for index in range(10):
        freeze_serving_worker(fleet, expected, list(BODIES)[index % 3], generator.randint(2, NUM_TOKENS - 40))
    assert dead_letters(fleet) == []


def test_logs_are_clean(fleet: Fleet) -> None:
    """After all of that no process has shown a traceback."""
    logs: list[Path] = [process.log for process in [*fleet.gateways, *fleet.workers]]
    assert all(log.stat().st_size > 0 for log in logs)
    tracebacks = [log.read_text().partition("Traceback")[2] for log in logs]
    assert [text[-3000:] for text in tracebacks if text] == []
