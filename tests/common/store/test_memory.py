"""At the memory limit of Redis submissions are refused and everything else goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from common.errors import StoreFull
from common.job import JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.reaper import Reaper
from common.store.replies import WorkerInfo
from tests.support.protocol import LANE, FakeAgent, columns, make_card, make_job, submit
from tests.support.redis_server import ServerUnderTest


@pytest.fixture()
def client(redis_server: ServerUnderTest) -> Iterator[redis.Redis]:
    with redis_server.client() as opened:
        yield opened
        opened.config_set("maxmemory", redis_server.maxmemory)


def fill(client: redis.Redis, share: float) -> None:
    """Set the limit so that `share` of it is in use."""
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] / share))


async def test_submit_is_refused_at_eighty_per_cent(jobs: JobStore, client: redis.Redis) -> None:
    fill(client, 0.70)
    known = make_job()
    await submit(jobs, known)
    fill(client, 0.85)
    job = make_job()
    with pytest.raises(StoreFull):
        await submit(jobs, job)
    assert await jobs.record(job.job_id) is None
    assert (await submit(jobs, known)).is_duplicate
    fill(client, 0.70)
    await submit(jobs, job)


async def test_beyond_the_limit_all_but_submit_works_and_nobody_is_sealed(
    jobs: JobStore, fleet: FleetStore, agent: FakeAgent, connection: Connection, client: redis.Redis
) -> None:
    ids = []
    for _ in range(6):
        job = make_job(orphan_grace_s=60)
        await submit(jobs, job, gateway="g1")
        ids.append(job.job_id)
    now = 0.0
    reaper = Reaper(connection, lease_s=5, lanes=[LANE], clock=lambda: now)
    await reaper.round()
    fill(client, 1.5)
    with pytest.raises(redis.OutOfMemoryError):
        client.set("x", "y")
    with pytest.raises(StoreFull):
        await submit(jobs, make_job())

    for now in range(1, 12):
        await agent.step()
        assert await reaper.round() == 0
    done, cancelled, released, failed, given_up, waiting = ids
    assert len(await agent.take(5)) == 5
    await agent.step({done: 40, released: 3}, flush=[done], gateways=["g1"], stats={"waiting": 1.0})
    await agent.finish(done)
    await jobs.cancel(cancelled)
    await agent.finish(cancelled)
    await agent.store.release([(released, 1)], count_attempt=False)
    await agent.finish(failed, JobState.FAILED)
    assert await fleet.redrive(LANE, failed) == 1
    assert await jobs.attach(waiting, "g2") is not None
    await jobs.detach(waiting, "g2")
    assert len(await agent.store.mine()) == 1
    await agent.store.bye()
    other = await FakeAgent(connection, "w2").start()
    await other.step({})
    assert {taken.job.job_id for taken in await other.take()} >= {released, failed}
    await fleet.announce(make_card(), b"{}")
    await fleet.report(WorkerInfo(id="w3", state="loading"))
    await fleet.create_key("default")
    assert await jobs.erase(done, "default")

    states = await jobs.states(LANE, [cancelled, released, failed])
    assert [state for state, _, _ in states.values()] == [
        JobState.CANCELLED,
        JobState.IN_PROGRESS,
        JobState.IN_PROGRESS,
    ]
    assert await jobs.log(released) == columns(0, 3)
    assert client.info("stats")["evicted_keys"] == 0
    assert (await fleet.queue(LANE))["sealed"] == 1, "the one that said good-bye"
    assert given_up in await jobs.states(LANE, [given_up])
