"""Workers of two ranks: what happens to streams when one rank is killed, or raises in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.streams import BODIES, NUM_TOKENS, Seen, assert_exact, dead_letters, final_job, undisturbed
from tests.faults.test_full_stack import fleet_job, stream
from tests.support.failing_ranks import SENTENCE
from tests.support.fleet import Fleet, FleetProcess, children_of, wait_for
from tests.support.redis_server import ServerUnderTest

LONGEST_END_S = 5
KIND = "greedy"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("ranks")
    server = ServerUnderTest(folder / "redis")
    options = {"DTYPE": "float64", "NUM_SHARD": "2", "FAIL_FILE": str(folder / "fail")}
    try:
        running = Fleet(folder, server.url, options=options)
        running.add_gateway("g1")
        running.add_worker("w1", module="tests.support.failing_ranks")
        running.add_worker("w2", module="tests.support.failing_ranks")
        running.wait_until_ready()
        yield running
    finally:
        running.__exit__()
        server.stop()


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> str:
    return undisturbed(fleet, BODIES[KIND])


def group_of(worker: FleetProcess) -> list[int]:
    """The engine, which is rank 0, and the other rank."""
    engine = worker.engine_pid
    return [engine, *children_of(engine)]


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def stream_through(fleet: Fleet, expected: str, act: Callable[[list[int]], None]) -> FleetProcess:
    """A stream during which `act` is done to the ranks that compute it; who had computed it."""
    owners: list[str] = []

    def disturb(job_id: str) -> None:
        owner = wait_for(lambda: fleet.owner(job_id), "the job has a worker")
        ranks = group_of(fleet.worker(owner))
        assert len(ranks) == 2
        act(ranks)
        wait_for(lambda: all(map(is_gone, ranks)), "the whole group is gone", LONGEST_END_S)
        assert fleet_job(fleet, job_id)["num_tokens"] <= NUM_TOKENS - 2, "it ended before anything went wrong"
        owners.append(owner)

    seen = stream(fleet, BODIES[KIND], 20, disturb)
    job = final_job(fleet, seen.job_id)
    assert job["attempts"] >= 2, "the job never moved to another worker"
    assert fleet_job(fleet, seen.job_id)["worker"] != owners[0]
    assert_exact(seen, job, expected)
    assert dead_letters(fleet) == []
    fleet.wait_until_ready()
    return fleet.worker(owners[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_its_group_along_and_no_token(fleet: Fleet, expected: str, rank: int) -> None:
    def kill(ranks: list[int]) -> None:
        os.kill(ranks[rank], signal.SIGKILL)

    stream_through(fleet, expected, kill)


def test_a_rank_that_raises_in_a_step_says_why_and_ends_its_group(fleet: Fleet, expected: str) -> None:
    signal_file = Path(fleet.options["FAIL_FILE"])

    def fail(ranks: list[int]) -> None:
        signal_file.touch()
        wait_for(lambda: not signal_file.exists(), "the rank has raised")

    worker = stream_through(fleet, expected, fail)
    assert f"rank 1: RuntimeError: {SENTENCE}" in worker.log.read_text()


def test_a_group_that_loses_nobody_stays(fleet: Fleet, expected: str) -> None:
    """The comparison above would notice a group that ends by itself."""
    groups = [group_of(worker) for worker in fleet.workers]
    seen: Seen = stream(fleet, BODIES[KIND], 20, lambda _: None)
    assert_exact(seen, final_job(fleet, seen.job_id), expected)
    assert final_job(fleet, seen.job_id)["attempts"] == 1
    assert [group_of(worker) for worker in fleet.workers] == groups
