"""Redis at its memory limit under the whole stack: submissions get 503, what was accepted ends as it should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from tests.faults.streams import BODIES, NUM_TOKENS, Seen, assert_exact, dead_letters, final_job, undisturbed
from tests.support.fleet import Fleet, wait_for
from tests.support.redis_server import ServerUnderTest

LEASE_S = 1.0
NUM_JOBS = 5
OPTIONS = {"DTYPE": "float64", "MAX_NUM_SEQS": "2", "INFERFLEET_LEASE": str(LEASE_S)}

ASKS: dict[str, dict[str, Any]] = {
    "/": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}, "stream": False},
    "/generate": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}},
    "/generate_stream": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "/v1/jobs": {"input": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}},
}
MESSAGE = "the queue is out of memory"
NATIVE_BODY = {"error": MESSAGE, "error_type": "unavailable"}
OPENAI_BODY = {"error": {"message": MESSAGE, "type": "server_error", "param": None, "code": "queue_full"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    started = ServerUnderTest(tmp_path_factory.mktemp("full-redis"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def fleet(server: ServerUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("full"), server.url, options=OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, str]:
    return {name: undisturbed(fleet, body) for name, body in BODIES.items()}


class Limit:
    """The memory limit of the server, and how long it has been exceeded by its own clock."""

    def __init__(self, server: ServerUnderTest) -> None:
        self.client, self.normal, self.since_s = server.client(), server.maxmemory, 0.0

    def reach(self) -> None:
        self.client.config_set("maxmemory", self.client.info("memory")["used_memory"] // 2)
        self.since_s = self._now_s()
        self.check()

    def check(self) -> None:
        """It is exceeded indeed: a client that stores something is refused."""
        memory = self.client.info("memory")
        assert memory["used_memory"] > memory["maxmemory"] > 0
        with pytest.raises(redis.OutOfMemoryError):
            self.client.set("something", "more")

    def age_s(self) -> float:
        return self._now_s() - self.since_s

    def lift(self) -> None:
        self.client.config_set("maxmemory", self.normal)

    def _now_s(self) -> float:
        seconds, microseconds = self.client.time()
        return float(seconds) + microseconds / 1e6


@pytest.fixture()
def limit(server: ServerUnderTest) -> Iterator[Limit]:
    made = Limit(server)
    yield made
    made.lift()
    made.client.close()


def answers(fleet: Fleet) -> dict[str, httpx.Response]:
    with fleet.client() as client:
        return {path: client.post(path, json=body) for path, body in ASKS.items()}


def assert_refused(fleet: Fleet) -> None:
    for path, response in answers(fleet).items():
        assert response.status_code == httpx.codes.SERVICE_UNAVAILABLE, (path, response.text)
        assert response.json() == (OPENAI_BODY if path.startswith("/v1/") else NATIVE_BODY), path
        assert int(response.headers["retry-after"]) >= 1


def assert_accepted(fleet: Fleet) -> None:
    for path, response in answers(fleet).items():
        assert response.is_success, (path, response.text)


def workers(fleet: Fleet) -> list[tuple[str, str, int]]:
    """Who they are; and none was ever refused as a dead one."""
    states = fleet.worker_states()
    assert [state["stats"]["fenced"] for state in states] == [0]
    return [(state["id"], state["incarnation"], state["pid"]) for state in states]


def num_sealed(fleet: Fleet) -> int:
    """Workers that were declared dead; a counter that never counted is not there."""
    with fleet.client() as client:
        return sum(row.get("sealed", 0) for row in client.get("/v1/fleet/queue").raise_for_status().json()["data"])


def submit_jobs(fleet: Fleet) -> list[tuple[str, str]]:
    """(job id, kind) of more jobs than the worker can hold."""
    kinds = [list(BODIES)[index % len(BODIES)] for index in range(NUM_JOBS)]
    with fleet.client() as client:
        made = [client.post("/v1/jobs", json={"input": BODIES[kind]}).raise_for_status().json() for kind in kinds]
    return [(job["id"], kind) for job, kind in zip(made, kinds, strict=True)]


def statuses(fleet: Fleet, jobs: list[tuple[str, str]]) -> list[str]:
    with fleet.client() as client:
        return [client.get(f"/v1/jobs/{job_id}").raise_for_status().json()["status"] for job_id, _ in jobs]


def test_what_was_accepted_finishes_and_the_rest_is_refused(
    fleet: Fleet, limit: Limit, expected: dict[str, str]
) -> None:
    assert_accepted(fleet)
    before, seen, jobs = workers(fleet), Seen(), []

    def reach_limit(offset: int) -> None:
        if offset < 10 or jobs:
            return
        jobs.extend(submit_jobs(fleet))
        wait_for(lambda: "in_progress" in statuses(fleet, jobs), "a job beside the stream")
        limit.reach()
        assert {"in_progress", "queued"} <= set(statuses(fleet, jobs))
        assert_refused(fleet)

    with (
        fleet.client() as client,
        client.stream("POST", "/v1/chat/completions", json=BODIES["japanese"] | {"stream": True}) as response,
    ):
        seen.read(response, reach_limit)
    assert seen.is_done
    assert "queued" in statuses(fleet, jobs), "nothing was left for a worker to take beyond the limit"
    assert_exact(seen, final_job(fleet, seen.job_id), expected["japanese"])

    for job_id, kind in jobs:
        job = final_job(fleet, job_id)
        assert (job["status"], job["num_tokens"], job["attempts"]) == ("completed", NUM_TOKENS, 1)
        assert job["output_text"] == expected[kind]
    wait_for(lambda: limit.age_s() > 2 * LEASE_S, "two leases beyond the limit")
    limit.check()
    assert_refused(fleet)
    assert workers(fleet) == before
    assert num_sealed(fleet) == 0
    assert dead_letters(fleet) == []

    limit.lift()
    assert_accepted(fleet)
    assert undisturbed(fleet, BODIES["seeded"]) == expected["seeded"]
    assert workers(fleet) == before


def test_the_comparisons_can_fail(fleet: Fleet, limit: Limit) -> None:
    """Below the limit nothing is refused and the check of the limit says so; a worker that dies is counted."""
    with pytest.raises(AssertionError):
        assert_refused(fleet)
    with pytest.raises(AssertionError):
        limit.check()
    before = num_sealed(fleet)
    fleet.workers[0].kill()
    wait_for(lambda: num_sealed(fleet) > before, "the dead worker is sealed")
