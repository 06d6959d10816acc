"""Faults of worker processes: killed, frozen, engines that die or hang, poison, drains. Two workers serve all tests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from common.job import Adapter, JobState
from common.store.connection import Connection
from tests.support.fake_engine import adapted, oracle, write_adapter
from tests.support.fake_fleet import (
    LEASE_S,
    VOCABULARY,
    Follower,
    Worker,
    WorkerFleet,
    assert_same,
    following,
    workers_ready,
)
from tests.support.fleet import process_state
from tests.support.protocol import eventually
from tests.support.redis_server import ServerUnderTest

NUM_TOKENS = 150
NAMES = ("w1", "w2")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    server = ServerUnderTest(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fleet(redis: ServerUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerFleet]:
    with WorkerFleet(tmp_path_factory.mktemp("workers"), redis.url) as running:
        yield running


@pytest.fixture()
async def follower(redis: ServerUnderTest, fleet: WorkerFleet) -> AsyncIterator[Follower]:
    """Both workers live, and somebody listens."""
    for name in NAMES:
        if name not in fleet.workers or fleet.workers[name].process.poll() is not None:
            fleet.start(name)
    connection = await Connection.open(redis.url)
    await workers_ready(connection, set(NAMES))
    await connection.close()
    async with following(redis.url) as running:
        yield running


async def serving(fleet: WorkerFleet, follower: Follower, job) -> Worker:
    return fleet.workers[await follower.owner(job)]


def between(position: int, num_tokens: int = NUM_TOKENS) -> bool:
    return 2 <= position <= num_tokens - 2


async def test_killed_worker_hands_over_at_the_very_next_token(fleet: WorkerFleet, follower: Follower) -> None:
    jobs = [await follower.submit(seed, NUM_TOKENS) for seed in (1, 2, 3)]
    position = await follower.reach(jobs[0], 40)
    worker = await serving(fleet, follower, jobs[0])
    worker.kill()
    assert between(position)
    assert worker.process.returncode == -signal.SIGKILL
    for job in jobs:
        record = await follower.assert_exact(job)
    first = await follower.end(jobs[0])
    assert first.worker != worker.name or first.epoch > 1
    assert first.attempts == 2, "it ran on two workers"
    assert record.state is JobState.COMPLETED


async def test_a_killed_workers_job_goes_on_with_its_adapter(
    fleet: WorkerFleet, follower: Follower, tmp_path: Path
) -> None:
    """The other worker never heard of it: the adapter was unloaded before its job got there."""
    adapter = Adapter("fr", str(tmp_path / "fr"), write_adapter(tmp_path / "fr"))
    job = await follower.submit(6, NUM_TOKENS, adapter=adapter)
    position = await follower.reach(job, 40)
    worker = await serving(fleet, follower, job)
    worker.kill()
    assert between(position)
    assert await follower.fleet.adapters(follower.lane) == []
    expected = oracle(VOCABULARY, adapted(6, adapter.digest), NUM_TOKENS)
    assert expected.ids[position:] != oracle(VOCABULARY, 6, NUM_TOKENS).ids[position:], "the base goes on differently"
    record = await follower.assert_exact(job, expected)
    assert record.attempts == 2, "it ran on two workers"


def test_the_comparison_finds_a_repeated_and_a_missing_token() -> None:
    answer = oracle(VOCABULARY, 1, 50)
    heard = dict(enumerate(answer.ids))
    assert_same(answer.ids, answer.text, heard, answer)
    for wrong in (answer.ids[:20] + answer.ids[19:], answer.ids[:20] + answer.ids[21:]):
        with pytest.raises(AssertionError):
            assert_same(wrong, answer.text, heard, answer)
    with pytest.raises(AssertionError):
        assert_same(answer.ids, answer.text, heard | {7: 1}, answer)


async def test_frozen_worker_is_fenced_when_it_wakes_up(fleet: WorkerFleet, follower: Follower) -> None:
    job = await follower.submit(4, NUM_TOKENS)
    position = await follower.reach(job, 30)
    worker = await serving(fleet, follower, job)
    fenced = worker.metric("inferfleet_worker_fenced_total")
    worker.process.send_signal(signal.SIGSTOP)
    await eventually(lambda: process_state(worker.pid) == "T", what="the worker is frozen")
    assert between(position)
    await eventually(
        lambda: follower.position(job.job_id) > position + 40, limit_s=10 + LEASE_S, what="the other goes on"
    )
    assert await follower.owner(job) != worker.name
    assert process_state(worker.pid) == "T"
    worker.process.send_signal(signal.SIGCONT)
    await follower.assert_exact(job)
    await eventually(lambda: worker.metric("inferfleet_worker_fenced_total") > fenced, what="it was fenced")
    again = await follower.submit(5, 20)
    await follower.assert_exact(again)


async def test_engine_that_is_killed_costs_no_incarnation(fleet: WorkerFleet, follower: Follower) -> None:
    job = await follower.submit(6, NUM_TOKENS)
    position = await follower.reach(job, 30)
    worker = await serving(fleet, follower, job)
    before = {info.id: info.incarnation for info in await follower.fleet.workers()}
    deaths = worker.metric("inferfleet_worker_engine_deaths_total")
    os.kill(worker.engine_pid(), signal.SIGKILL)
    assert between(position)
    record = await follower.assert_exact(job)
    assert record.attempts == 2
    assert worker.metric("inferfleet_worker_engine_deaths_total") == deaths + 1
    assert worker.process.poll() is None
    after = {info.id: info.incarnation for info in await follower.fleet.workers()}
    assert after == before
    await eventually(lambda: worker.engine_pid() > 0, what="a new engine")


async def test_poison_job_ends_as_dead_letter_and_its_neighbours_live(fleet: WorkerFleet, follower: Follower) -> None:
    neighbours = [await follower.submit(seed, NUM_TOKENS, prompt="!slow@20") for seed in (10, 11, 12)]
    await follower.reach(neighbours[0], 3)
    deaths = [worker.metric("inferfleet_worker_engine_deaths_total") for worker in fleet.workers.values()]
    poison = await follower.submit(13, NUM_TOKENS, prompt="!exit@2")
    record = await follower.end(poison)
    assert (record.state, record.error_code) == (JobState.FAILED, "poison")
    assert sum(w.metric("inferfleet_worker_engine_deaths_total") for w in fleet.workers.values()) >= sum(deaths) + 3
    assert [letter.job_id for letter in await follower.fleet.dead_letters(follower.lane)] == [poison.job_id]
    for job in neighbours:
        await follower.assert_exact(job)


async def test_engine_that_hangs_is_killed_after_the_step_limit(fleet: WorkerFleet, follower: Follower) -> None:
    for name in NAMES:
        fleet.workers[name].stop()
    worker = fleet.start("w1", INFERFLEET_STEP_LIMIT="1")
    job = await follower.submit(14, 40, prompt="!hang@9")
    await follower.reach(job, 9)
    engine = worker.engine_pid()
    await eventually(lambda: worker.metric("inferfleet_worker_engine_deaths_total") >= 1, limit_s=10, what="the kill")
    assert not Path(f"/proc/{engine}").exists() or process_state(engine) == "Z"
    assert worker.process.poll() is None
    await follower.jobs.cancel(job.job_id)
    record = await follower.end(job)
    assert record.state is JobState.CANCELLED
    assert (await follower.jobs.log(job.job_id)).ids == oracle(VOCABULARY, 14, 9).ids
    worker.stop()


async def test_drain_gives_jobs_back_without_counting_it(fleet: WorkerFleet, follower: Follower) -> None:
    job = await follower.submit(20, NUM_TOKENS, prompt="!slow@20")
    position = await follower.reach(job, 20)
    worker = await serving(fleet, follower, job)
    assert await asyncio.to_thread(worker.stop) == 0
    assert between(position)
    record = await follower.assert_exact(job)
    assert record.attempts == 2
    assert worker.name not in {info.id for info in await follower.fleet.workers()}
    counters = await follower.fleet.queue(follower.lane)
    assert counters["released"] >= 1


async def test_rolling_restart_in_one_stream(fleet: WorkerFleet, follower: Follower) -> None:
    job = await follower.submit(21, 2 * NUM_TOKENS, prompt="!slow@15")
    owners = []
    for name in NAMES:
        await follower.reach(job, follower.position(job.job_id) + 20)
        owners.append(await follower.owner(job))
        assert await asyncio.to_thread(fleet.workers[name].stop) == 0
        fleet.start(name)
        await workers_ready(follower.fleet.connection, set(NAMES))
    assert between(follower.position(job.job_id), 2 * NUM_TOKENS)
    record = await follower.assert_exact(job)
    assert record.attempts >= 2, owners
