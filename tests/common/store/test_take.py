"""take and mine: ownership, epochs, repeated answers, order of classes, deadlines, suspects."""

from __future__ import annotations

import asyncio

import pytest

from common import keys
from common.errors import ConfigurationError, Fenced, UnknownIncarnation
from common.job import JobState, Priority
from common.store.connection import Connection
from common.store.jobs import PROTOCOL, JobStore
from common.store.replies import Owned
from common.store.workers import WorkerStore
from tests.support.protocol import LANE, FakeAgent, columns, make_job, submit
from tests.support.redis_server import ServerUnderTest


async def test_a_taken_job_is_owned_and_gone_from_the_queue(jobs: JobStore, agent: FakeAgent) -> None:
    job = make_job(timeout_s=60)
    await submit(jobs, job, gateway="g1")
    (taken,) = await agent.take()
    assert taken.job == job
    assert (taken.epoch, taken.attempts, taken.num_tokens, taken.gateways) == (1, 0, 0, ["g1"])
    assert not taken.cancelling
    assert not taken.is_suspect
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.worker, record.epoch, record.attempts) == (JobState.IN_PROGRESS, "w1", 1, 1)
    assert record.started_ms >= record.created_ms > 0
    assert await agent.store.mine() == [Owned(job.job_id, 1, "", taken.deadline_ms)]
    assert await agent.take() == []


async def test_the_same_request_repeats_its_answer(jobs: JobStore, agent: FakeAgent) -> None:
    for _ in range(3):
        await submit(jobs, make_job())
    first = await agent.store.take(2, 7)
    assert len(first) == 2
    assert await agent.store.take(2, 7) == first
    assert len(await agent.store.take(2, 8)) == 1


async def test_a_repeated_answer_leaves_out_what_ended_meanwhile(jobs: JobStore, agent: FakeAgent) -> None:
    await submit(jobs, make_job())
    (taken,) = await agent.take()
    await agent.finish(taken.job.job_id)
    assert await agent.store.take(8, agent.num_requests) == []


async def test_no_more_than_asked_for_and_never_twice(jobs: JobStore, connection: Connection) -> None:
    expected = [make_job() for _ in range(40)]
    for job in expected:
        await submit(jobs, job)
    agents = [await FakeAgent(connection, f"w{i}").start() for i in range(4)]
    rounds = await asyncio.gather(*[agent.take(15) for agent in agents])
    assert all(len(taken) <= 15 for taken in rounds)
    found = [taken.job.job_id for taken_by_one in rounds for taken in taken_by_one]
    assert sorted(found) == sorted(job.job_id for job in expected)


async def test_interactive_jobs_go_before_batch_jobs(jobs: JobStore, agent: FakeAgent) -> None:
    batch = [make_job(priority=Priority.BATCH) for _ in range(3)]
    interactive = [make_job() for _ in range(3)]
    for job in batch + interactive:
        await submit(jobs, job)
    taken = await agent.take(6)
    assert [item.job.job_id for item in taken] == [job.job_id for job in interactive + batch]


async def test_every_tenth_job_is_a_batch_job(jobs: JobStore, agent: FakeAgent) -> None:
    for _ in range(40):
        await submit(jobs, make_job())
        await submit(jobs, make_job(priority=Priority.BATCH))
    taken = [item for _ in range(20) for item in await agent.take(1)]
    assert len(taken) == 20
    assert sum(item.job.priority is Priority.BATCH for item in taken) == 2


async def test_an_expired_job_is_dropped_on_the_way(jobs: JobStore, agent: FakeAgent) -> None:
    late, good = make_job(timeout_s=0.001), make_job()
    await submit(jobs, late)
    await submit(jobs, good)
    await asyncio.sleep(0.005)
    assert [item.job.job_id for item in await agent.take()] == [good.job_id]
    record = await jobs.record(late.job_id)
    assert record is not None
    assert record.state is JobState.EXPIRED


async def test_a_cancelled_job_is_never_handed_out(jobs: JobStore, agent: FakeAgent) -> None:
    cancelled = [make_job() for _ in range(20)]
    for job in cancelled:
        await submit(jobs, job)
        await jobs.cancel(job.job_id)
    good = make_job()
    await submit(jobs, good)
    assert [item.job.job_id for item in await agent.take()] == [good.job_id]


async def test_a_job_of_a_newer_protocol_is_left_for_newer_workers(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    newer, ours = make_job(), make_job()
    await submit(jobs, newer)
    await submit(jobs, ours)
    with redis_server.client() as client:
        client.hset(keys.record(LANE, newer.job_id), "pv", PROTOCOL + 1)
    assert [item.job.job_id for item in await agent.take()] == [ours.job_id]
    with redis_server.client() as client:
        client.hset(keys.record(LANE, newer.job_id), "pv", PROTOCOL)
    assert [item.job.job_id for item in await agent.take()] == [newer.job_id]


async def test_a_draining_worker_gets_nothing(jobs: JobStore, agent: FakeAgent) -> None:
    await submit(jobs, make_job())
    await agent.store.drain()
    assert await agent.take() == []


async def test_the_fenced_get_nothing(jobs: JobStore, agent: FakeAgent, connection: Connection) -> None:
    await submit(jobs, make_job())
    await agent.store.bye()
    with pytest.raises(Fenced):
        await agent.take()
    with pytest.raises(Fenced):
        await agent.store.mine()
    newer = await FakeAgent(connection, nonce="bbbbbbbbbbbbbbbb").start()
    with pytest.raises(Fenced):
        await agent.take()
    assert len(await newer.take()) == 1


async def test_an_unknown_incarnation_is_told_so(agent: FakeAgent, redis_server: ServerUnderTest) -> None:
    with redis_server.client() as client:
        assert client.delete(keys.worker(LANE, "w1")) == 1
    with pytest.raises(UnknownIncarnation):
        await agent.take()


async def test_before_hello_nothing_works(connection: Connection) -> None:
    with pytest.raises(UnknownIncarnation):
        await WorkerStore(connection, LANE, "w1", "aaaaaaaaaaaaaaaa").take(1, 1)


async def test_names_that_cannot_be_part_of_a_key_are_refused(connection: Connection, jobs: JobStore) -> None:
    for name in ("", "a.b", "a b", "{x}", "w" * 65):
        with pytest.raises(ConfigurationError, match="worker id"):
            WorkerStore(connection, LANE, name, "aaaa")
        with pytest.raises(ConfigurationError, match="gateway id"):
            jobs.frames(name, [])


async def test_hello_again_with_the_same_nonce_is_the_same_incarnation(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    await submit(jobs, make_job())
    (taken,) = await agent.take()
    await agent.step({taken.job.job_id: 2})
    again = WorkerStore(connection, LANE, "w1", "aaaaaaaaaaaaaaaa")
    hello = await again.hello({})
    assert (hello.incarnation, hello.num_recovered, hello.last_step) == (agent.store.incarnation, 0, 1)
    other = WorkerStore(connection, LANE, "w1", "bbbbbbbbbbbbbbbb")
    hello = await other.hello({})
    assert hello.incarnation != agent.store.incarnation
    assert (hello.num_recovered, hello.last_step) == (1, 0)


async def test_hello_recovers_what_a_predecessor_held_at_once(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 5})
    assert (await jobs.log(job.job_id)).ids == []
    newer = await FakeAgent(connection, nonce="bbbbbbbbbbbbbbbb").start()
    assert (await jobs.log(job.job_id)).ids == columns(0, 5).ids
    (taken,) = await newer.take()
    assert (taken.job.job_id, taken.num_tokens, taken.epoch) == (job.job_id, 5, 2)


async def test_the_body_of_an_owned_job_can_be_asked_for(jobs: JobStore, agent: FakeAgent) -> None:
    job, waiting = make_job(), make_job()
    await submit(jobs, job)
    (taken,) = await agent.take()
    assert await agent.store.body(job.job_id) == taken
    await submit(jobs, waiting)
    assert await agent.store.body(waiting.job_id) is None
