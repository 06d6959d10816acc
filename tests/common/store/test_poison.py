"""Jobs that kill their workers are found, and their neighbours are not blamed."""

from __future__ import annotations

from common.job import JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.replies import Taken
from tests.support.protocol import LANE, FakeAgent, make_job, submit


class Crashes(Exception):
    """The worker is gone."""


async def run_worker(connection: Connection, number: int, poison: str, *, max_jobs: int = 4) -> list[Taken]:
    """A worker that runs what it takes to the end, or dies before its first token if the poison is among it."""
    agent = await FakeAgent(connection, f"w{number}").start()
    taken = await agent.take(max_jobs)
    if any(item.job.job_id == poison for item in taken):
        await agent.store.bye()
        return taken
    for item in taken:
        await agent.step({item.job.job_id: 2})
        await agent.finish(item.job.job_id)
    await agent.store.bye()
    return taken


async def test_only_the_poison_is_dead_lettered(jobs: JobStore, fleet: FleetStore, connection: Connection) -> None:
    poison, *innocents = [make_job() for _ in range(4)]
    for job in [poison, *innocents]:
        await submit(jobs, job)
    first = await run_worker(connection, 0, poison.job_id)
    assert len(first) == 4, "all were in one batch with the poison"
    for number in range(1, 12):
        taken = await run_worker(connection, number, poison.job_id)
        assert sum(item.is_suspect for item in taken) <= 1
    (letter,) = await fleet.dead_letters(LANE)
    assert (letter.job_id, letter.error_code) == (poison.job_id, "poison")
    for job in innocents:
        record = await jobs.record(job.job_id)
        assert record is not None
        assert record.state is JobState.COMPLETED


async def test_a_worker_holds_one_suspect_at_a_time(jobs: JobStore, connection: Connection, agent: FakeAgent) -> None:
    for _ in range(3):
        await submit(jobs, make_job())
    assert len(await agent.take()) == 3
    await agent.store.bye()
    fresh = make_job()
    await submit(jobs, fresh)
    other = await FakeAgent(connection, "w2").start()
    taken = await other.take(8)
    assert sorted(item.is_suspect for item in taken) == [False, True]
    (suspect,) = [item for item in taken if item.is_suspect]
    assert await other.take(8) == []
    await other.finish(suspect.job.job_id)
    assert [item.is_suspect for item in await other.take(8)] == [True]
    assert await other.take(8, max_suspects=0) == []


async def test_a_stream_that_moves_is_never_dead_lettered(jobs: JobStore, connection: Connection) -> None:
    job = make_job()
    await submit(jobs, job)
    for number in range(30):
        agent = await FakeAgent(connection, f"w{number}").start()
        (taken,) = await agent.take()
        assert (taken.attempts, taken.num_tokens) == (0, number)
        await agent.step({job.job_id: 1})
        await agent.store.bye()
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.attempts, record.num_tokens) == (JobState.QUEUED, 30, 30)


async def test_a_job_that_kills_at_the_same_token_is_charged(
    jobs: JobStore, connection: Connection, fleet: FleetStore
) -> None:
    job = make_job()
    await submit(jobs, job)
    num_deaths = 0
    while (record := await jobs.record(job.job_id)) is not None and not record.state.is_terminal:
        agent = await FakeAgent(connection, f"w{num_deaths}").start()
        (taken,) = await agent.take()
        if taken.num_tokens < 50:
            await agent.step({job.job_id: 50 - taken.num_tokens})
        await agent.store.bye()
        num_deaths += 1
    assert num_deaths == 4, "one death with growth, three without"
    assert (record.state, record.error_code, record.num_tokens) == (JobState.FAILED, "poison", 50)
    assert len(await fleet.dead_letters(LANE)) == 1


async def test_a_drain_is_not_a_death(jobs: JobStore, connection: Connection) -> None:
    job = make_job()
    await submit(jobs, job)
    for number in range(10):
        agent = await FakeAgent(connection, f"w{number}").start()
        (taken,) = await agent.take()
        assert not taken.is_suspect
        await agent.store.release([(job.job_id, taken.epoch)], count_attempt=False)
        await agent.store.bye()


async def test_a_dead_engine_is_charged_like_a_dead_worker(jobs: JobStore, agent: FakeAgent, fleet: FleetStore) -> None:
    job = make_job()
    await submit(jobs, job)
    for _ in range(3):
        (taken,) = await agent.take()
        await agent.store.release([(job.job_id, taken.epoch)], count_attempt=True)
    assert [letter.job_id for letter in await fleet.dead_letters(LANE)] == [job.job_id]
