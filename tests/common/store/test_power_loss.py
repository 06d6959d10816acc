"""Redis dies, with and without the end of its append-only file: what workers re-assert, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from common import wire
from common.errors import StepGap, UnknownIncarnation
from common.job import JobState
from common.store.connection import Connection
from common.store.jobs import JobStore
from common.store.reaper import Reaper
from tests.support.protocol import LANE, FakeAgent, columns, make_job, submit
from tests.support.redis_server import ServerUnderTest


@pytest.fixture()
async def link(own_redis: ServerUnderTest) -> AsyncIterator[Connection]:
    opened = await Connection.open(own_redis.url)
    yield opened
    await opened.close()


@pytest.fixture()
def jobs(link: Connection) -> JobStore:
    return JobStore(link)


@pytest.fixture()
async def agent(link: Connection) -> FakeAgent:
    return await FakeAgent(link).start()


def lose_power(server: ServerUnderTest, size: int) -> None:
    """Everything written after the append-only file had `size` bytes never reached the disk."""
    server.kill()
    assert server.truncate_aof(size) > 0
    server.restart()


async def come_back(agent: FakeAgent) -> None:
    """As agents do: no step before hello, mine and adopt."""
    with pytest.raises(UnknownIncarnation):
        await agent.step()
    await agent.start()


async def adopt_all(agent: FakeAgent) -> dict[str, bool]:
    return {
        job_id: await agent.store.adopt(job_id, held.epoch, wire.encode_job(held.job), columns(0, agent.ends[job_id]))
        for job_id, held in agent.held.items()
    }


async def test_a_killed_server_forgets_nothing(jobs: JobStore, agent: FakeAgent, own_redis: ServerUnderTest) -> None:
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 5})
    own_redis.kill()
    own_redis.restart()
    await come_back(agent)
    assert [owned.job_id for owned in await agent.store.mine()] == [job.job_id]
    await agent.step({job.job_id: 1})
    await agent.finish(job.job_id)
    assert await jobs.log(job.job_id) == columns(0, 6)


async def test_worker_and_redis_killed_together_lose_no_shown_token(
    jobs: JobStore, agent: FakeAgent, link: Connection, own_redis: ServerUnderTest
) -> None:
    """The write-ahead stream goes into the append-only file like everything else."""
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 5})
    own_redis.kill()
    own_redis.restart()
    assert (await jobs.log(job.job_id)).ids == []
    other = await FakeAgent(link, nonce="bbbbbbbbbbbbbbbb").start()
    assert await jobs.log(job.job_id) == columns(0, 5)
    (taken,) = await other.take()
    assert taken.num_tokens == 5


async def test_a_lost_take_is_re_asserted(jobs: JobStore, agent: FakeAgent, own_redis: ServerUnderTest) -> None:
    job = make_job()
    await submit(jobs, job, gateway="g1")
    size = own_redis.aof_size()
    await agent.take()
    await agent.step({job.job_id: 5}, flush=[job.job_id])
    lose_power(own_redis, size)
    await come_back(agent)
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.num_tokens) == (JobState.QUEUED, 0), "take and tokens were lost"
    assert await agent.store.mine() == []
    assert await adopt_all(agent) == {job.job_id: True}
    assert await jobs.log(job.job_id) == columns(0, 5)
    assert await agent.take() == [], "nobody gets it a second time"
    await agent.step({job.job_id: 2})
    await agent.finish(job.job_id)
    assert await jobs.log(job.job_id) == columns(0, 7)


async def test_a_lost_submission_is_made_again_from_the_worker_s_copy(
    jobs: JobStore, agent: FakeAgent, own_redis: ServerUnderTest
) -> None:
    job = make_job(idempotency_key="k", body_hash="h", timeout_s=77, tenant="team")
    size = own_redis.aof_size()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 5})
    lose_power(own_redis, size)
    await come_back(agent)
    assert await jobs.record(job.job_id) is None
    assert await adopt_all(agent) == {job.job_id: True}
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.view, record.tenant) == (JobState.IN_PROGRESS, job.view, "team")
    assert record.deadline_ms - record.created_ms == 77_000
    again = await submit(jobs, make_job(idempotency_key="k", body_hash="h", tenant="team"))
    assert (again.job_id, again.is_duplicate) == (job.job_id, True)
    await agent.store.release([(job.job_id, 1)], count_attempt=False)
    (taken,) = await agent.take()
    assert (taken.job, taken.num_tokens) == (job, 5), "the next worker has all it needs"
    await agent.finish(job.job_id)
    assert await jobs.log(job.job_id) == columns(0, 5)


async def test_lost_steps_are_a_gap_from_which_the_worker_goes_on(
    jobs: JobStore, agent: FakeAgent, own_redis: ServerUnderTest
) -> None:
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 2}, flush=[job.job_id])
    size = own_redis.aof_size()
    await agent.step({job.job_id: 2}, flush=[job.job_id])
    await agent.step({job.job_id: 2}, flush=[job.job_id])
    lose_power(own_redis, size)
    num_steps = agent.num_steps
    await come_back(agent)
    assert agent.num_steps == 1
    with pytest.raises(StepGap) as gap:
        await agent.step(step=num_steps + 1, previous=num_steps)
    assert (gap.value.subject, gap.value.last) == ("step", 1)
    with pytest.raises(StepGap) as gap:
        await agent.step({job.job_id: 1}, flush=[job.job_id])
    assert (gap.value.subject, gap.value.last) == (job.job_id, 2)
    assert await adopt_all(agent) == {job.job_id: True}
    assert (await jobs.log(job.job_id)) == columns(0, 7)


async def test_adopt_refuses_what_another_worker_has(jobs: JobStore, agent: FakeAgent, link: Connection) -> None:
    job = make_job()
    await submit(jobs, job)
    other = await FakeAgent(link, "w2").start()
    (taken,) = await other.take()
    assert not await agent.store.adopt(job.job_id, taken.epoch, wire.encode_job(job), columns(0, 9))
    assert (await jobs.log(job.job_id)).ids == []
    assert [owned.job_id for owned in await other.store.mine()] == [job.job_id]


async def test_adopt_refuses_a_newer_epoch_a_longer_log_and_the_ended(
    jobs: JobStore, agent: FakeAgent, link: Connection
) -> None:
    job = make_job()
    body = wire.encode_job(job)
    await submit(jobs, job)
    other = await FakeAgent(link, "w2").start()
    (taken,) = await other.take()
    await other.step({job.job_id: 4})
    await other.store.release([(job.job_id, taken.epoch)], count_attempt=False)
    assert (await jobs.log(job.job_id)).end == 4
    assert not await agent.store.adopt(job.job_id, 0 + 1, body, columns(0, 3)), "the log is longer"
    await other.take()
    await other.store.release([(job.job_id, 2)], count_attempt=False)
    assert not await agent.store.adopt(job.job_id, 1, body, columns(0, 9)), "the epoch is newer"
    assert await agent.store.adopt(job.job_id, 2, body, columns(0, 9))
    await jobs.cancel(job.job_id)
    agent.held[job.job_id], agent.ends[job.job_id], agent.flushed[job.job_id] = other.held[job.job_id], 9, 9
    await agent.finish(job.job_id)
    assert not await agent.store.adopt(job.job_id, 2, body, columns(0, 9)), "it has ended"


async def test_adopt_refuses_the_erased(jobs: JobStore, agent: FakeAgent) -> None:
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await jobs.erase(job.job_id, "default")
    assert await adopt_all(agent) == {job.job_id: False}
    assert await jobs.record(job.job_id) is None


async def test_adopt_with_a_hole_before_it_is_a_gap(jobs: JobStore, agent: FakeAgent) -> None:
    job = make_job()
    with pytest.raises(StepGap) as gap:
        await agent.store.adopt(job.job_id, 1, wire.encode_job(job), columns(3, 5))
    assert (gap.value.subject, gap.value.last) == (job.job_id, 0)
    assert await jobs.record(job.job_id) is None


async def test_a_sealed_and_buried_worker_that_wakes_up_may_still_adopt_what_nobody_took(
    jobs: JobStore, agent: FakeAgent, link: Connection, own_redis: ServerUnderTest
) -> None:
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 5})
    await agent.store.bye()
    with own_redis.client() as client:
        assert client.delete("{abcdef}:w:w1") == 1
    with pytest.raises(UnknownIncarnation):
        await agent.step()
    await agent.start()
    assert await adopt_all(agent) == {job.job_id: True}
    other = await FakeAgent(link, "w2").start()
    assert await other.take() == []


async def test_an_outage_of_redis_seals_nobody(
    jobs: JobStore, agent: FakeAgent, link: Connection, own_redis: ServerUnderTest
) -> None:
    now = 0.0
    reaper = Reaper(link, lease_s=5, lanes=[LANE], clock=lambda: now)
    await submit(jobs, make_job())
    await agent.take()
    for now in range(5):
        await reaper.round()
    own_redis.kill()
    own_redis.restart()
    for now in range(5, 10):
        assert await reaper.round() == 0
    await come_back(agent)
    assert len(await agent.store.mine()) == 1
