"""The reaper: who is dead, what was shown, where jobs go; with a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from common import keys
from common.errors import Fenced, StoreUnavailable
from common.job import JobState, Priority
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import StatusChanged
from common.store.jobs import JobStore
from common.store.reaper import Reaper, recover, tails_of
from tests.support.protocol import LANE, FakeAgent, columns, make_card, make_job, payload, submit
from tests.support.redis_server import ServerUnderTest

LEASE_S = 5.0


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture()
def clock() -> Clock:
    return Clock()


@pytest.fixture()
def reaper(connection: Connection, clock: Clock) -> Reaper:
    return Reaper(connection, lease_s=LEASE_S, lanes=[LANE], clock=clock)


async def rounds(reaper: Reaper, clock: Clock, seconds: float) -> int:
    """Rounds at the usual pace for so long. Returns how many jobs were given back."""
    num_recovered = await reaper.round()
    for _ in range(int(seconds / reaper.period_s)):
        clock.now += reaper.period_s
        num_recovered += await reaper.round()
    return num_recovered


async def running_job(jobs: JobStore, agent: FakeAgent, num_tokens: int = 0, **options: object) -> str:
    gateway = options.pop("gateway", None)
    job = make_job(**options)
    await submit(jobs, job, gateway=gateway)
    await agent.take()
    if num_tokens:
        await agent.step({job.job_id: num_tokens})
    return job.job_id


async def is_sealed(connection: Connection) -> bool:
    return await connection.call("workers", LANE) == []


async def test_a_silent_worker_is_sealed_after_its_lease_and_its_tokens_go_on(
    jobs: JobStore, agent: FakeAgent, connection: Connection, reaper: Reaper, clock: Clock
) -> None:
    job_id = await running_job(jobs, agent, 3)
    await agent.step({job_id: 4}, flush=[job_id])
    await agent.step({job_id: 5})
    assert (await jobs.log(job_id)).end == 7
    assert await rounds(reaper, clock, LEASE_S * 0.9) == 0
    assert await rounds(reaper, clock, LEASE_S * 0.3) == 1
    assert await jobs.log(job_id) == columns(0, 12)
    with pytest.raises(Fenced):
        await agent.step({job_id: 1})
    (taken,) = await (await FakeAgent(connection, "w2").start()).take()
    assert (taken.job.job_id, taken.num_tokens, taken.epoch, taken.attempts) == (job_id, 12, 2, 0)


async def test_a_beating_worker_is_left_alone(
    jobs: JobStore, agent: FakeAgent, reaper: Reaper, clock: Clock, connection: Connection
) -> None:
    await running_job(jobs, agent)
    for _ in range(30):
        await agent.step()
        assert await rounds(reaper, clock, LEASE_S * 0.5) == 0
    assert not await is_sealed(connection)


async def test_seal_compares_the_heartbeat(agent: FakeAgent, connection: Connection) -> None:
    await agent.step()
    await agent.step()
    assert await connection.call("seal", LANE, "w1", agent.store.incarnation, 1) == 0
    await agent.step()
    assert await connection.call("seal", LANE, "w1", agent.store.incarnation, 3) == 1
    assert await connection.call("seal", LANE, "w1", agent.store.incarnation, 9) == 1
    with pytest.raises(Fenced):
        await agent.step()


async def test_a_stall_of_the_reaper_itself_starts_the_watch_anew(
    jobs: JobStore, agent: FakeAgent, reaper: Reaper, clock: Clock, connection: Connection
) -> None:
    await running_job(jobs, agent)
    await rounds(reaper, clock, LEASE_S * 0.8)
    clock.now += LEASE_S * 10
    assert await reaper.round() == 0
    assert await rounds(reaper, clock, LEASE_S * 0.8) == 0
    assert not await is_sealed(connection)
    assert await rounds(reaper, clock, LEASE_S) == 1


async def test_an_error_of_redis_starts_the_watch_anew(
    jobs: JobStore,
    agent: FakeAgent,
    reaper: Reaper,
    clock: Clock,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await running_job(jobs, agent)
    await rounds(reaper, clock, LEASE_S * 0.9)

    async def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "call", fail)
        with pytest.raises(StoreUnavailable):
            await reaper.round()
    clock.now += reaper.period_s
    assert await rounds(reaper, clock, LEASE_S * 0.8) == 0
    assert not await is_sealed(connection)


async def test_a_slow_reply_starts_the_watch_anew(
    jobs: JobStore,
    agent: FakeAgent,
    reaper: Reaper,
    clock: Clock,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await running_job(jobs, agent)
    await rounds(reaper, clock, LEASE_S * 0.8)
    call = connection.call

    async def slow(function: str, *args: object, **options: object) -> object:
        clock.now += LEASE_S * 0.3
        return await call(function, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(connection, "call", slow)
        await reaper.round()
    assert not await is_sealed(connection)
    assert await rounds(reaper, clock, LEASE_S * 0.5) == 0


async def test_a_new_server_starts_the_watch_anew(
    jobs: JobStore, agent: FakeAgent, reaper: Reaper, clock: Clock, connection: Connection
) -> None:
    await running_job(jobs, agent)
    await rounds(reaper, clock, LEASE_S * 0.9)
    connection.generation += 1
    assert await rounds(reaper, clock, LEASE_S * 0.8) == 0
    assert not await is_sealed(connection)


async def test_a_reaper_that_died_after_the_seal_is_replaced(
    jobs: JobStore, agent: FakeAgent, connection: Connection, reaper: Reaper
) -> None:
    job_id = await running_job(jobs, agent, 2)
    assert await connection.call("seal", LANE, "w1", agent.store.incarnation, -1) == 1
    assert await reaper.round() == 1
    assert await jobs.log(job_id) == columns(0, 2)


async def test_two_reapers_at_once_requeue_each_job_once(
    jobs: JobStore, agent: FakeAgent, connection: Connection, redis_url: str
) -> None:
    expected = []
    for _ in range(20):
        expected.append(await running_job(jobs, agent, 1))
    await connection.call("seal", LANE, "w1", agent.store.incarnation, -1)
    second = await Connection.open(redis_url)
    found = await asyncio.gather(
        *[recover(link, LANE, "w1", agent.store.incarnation) for link in (connection, second, connection)]
    )
    await second.close()
    assert sum(found) == len(expected)
    other = await FakeAgent(connection, "w2").start()
    taken = await other.take(100)
    assert sorted(item.job.job_id for item in taken) == sorted(expected)
    assert all(item.epoch == 2 for item in taken)


async def test_a_living_incarnation_is_never_emptied(jobs: JobStore, agent: FakeAgent, connection: Connection) -> None:
    job_id = await running_job(jobs, agent)
    with pytest.raises(Exception, match="NOTSEALED"):
        await connection.call("requeue", LANE, "w1", agent.store.incarnation, job_id, 0, 0, b"", 3)
    assert len(await agent.store.mine()) == 1


async def test_what_is_in_neither_log_nor_stream_is_not_invented(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running_job(jobs, agent, 6)
    tails = await tails_of(connection, LANE, "w1", agent.store.incarnation, [job_id])
    assert tails[job_id] == (0, 6, payload(0, 6))
    await agent.step(flush=[job_id])
    tails = await tails_of(connection, LANE, "w1", agent.store.incarnation, [job_id])
    assert tails[job_id] == (6, 6, b"")


async def test_the_buried_leave_only_a_mark_that_expires(
    jobs: JobStore, agent: FakeAgent, connection: Connection, reaper: Reaper, redis_server: ServerUnderTest
) -> None:
    job_id = await running_job(jobs, agent, 2)
    await jobs.attach(job_id, "g1")
    incarnation = agent.store.incarnation
    gone = [
        keys.write_ahead(LANE, "w1", incarnation),
        keys.control(LANE, "w1", incarnation),
        keys.owned(LANE, "w1", incarnation),
    ]
    with redis_server.client() as client:
        assert client.exists(*gone) == 3
        await connection.call("seal", LANE, "w1", incarnation, -1)
        await reaper.round()
        assert client.exists(*gone) == 0
        assert client.scard(keys.incarnations(LANE)) == 0
        assert 0 < client.ttl(keys.worker(LANE, "w1")) <= 3600
    with pytest.raises(Fenced):
        await agent.step()
    await jobs.cancel(job_id)
    with redis_server.client() as client:
        assert client.exists(*gone) == 0


async def test_an_incarnation_that_owns_something_is_not_buried(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    await running_job(jobs, agent)
    await connection.call("seal", LANE, "w1", agent.store.incarnation, -1)
    assert await connection.call("bury", LANE, "w1", agent.store.incarnation) == 0


async def test_a_followed_job_resumes_first_and_others_before_their_class(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    ids = [
        await running_job(jobs, agent, 1, gateway="g1"),
        await running_job(jobs, agent, 1),
        await running_job(jobs, agent, 1, priority=Priority.BATCH),
    ]
    fresh = [make_job(), make_job(priority=Priority.BATCH)]
    for job in fresh:
        await submit(jobs, job)
    await agent.store.bye()
    other = await FakeAgent(connection, "w2").start()
    order = [taken.job.job_id for _ in range(5) for taken in await other.take(1)]
    assert order[0] == ids[0]
    assert set(order[1:3]) == {ids[1], fresh[0].job_id}
    assert set(order[3:]) == {ids[2], fresh[1].job_id}


async def test_a_backlog_does_not_stand_before_a_job_that_came_back(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running_job(jobs, agent, 1)
    for _ in range(100):
        await submit(jobs, make_job())
    await agent.store.bye()
    other = await FakeAgent(connection, "w2").start()
    first = [taken.job.job_id for taken in await other.take(10)]
    assert job_id in first


async def test_a_cancel_the_dead_worker_never_saw_is_honoured(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running_job(jobs, agent, 2)
    await jobs.cancel(job_id)
    await agent.store.bye()
    record = await jobs.record(job_id)
    assert record is not None
    assert (record.state, record.num_tokens) == (JobState.CANCELLED, 2)


async def test_a_job_past_its_deadline_expires_instead_of_coming_back(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running_job(jobs, agent, timeout_s=0.05)
    await asyncio.sleep(0.06)
    await agent.store.bye()
    record = await jobs.record(job_id)
    assert record is not None
    assert record.state is JobState.EXPIRED


async def test_followers_hear_that_the_job_waits_and_runs_again(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    async with jobs.frames("g1", [LANE]) as subscription:
        job_id = await running_job(jobs, agent, 1, gateway="g1")
        await agent.store.bye()
        await (await FakeAgent(connection, "w2").start()).take()
        heard = [await anext(subscription) for _ in range(3)]
    assert heard == [
        StatusChanged(job_id, JobState.IN_PROGRESS, 1),
        StatusChanged(job_id, JobState.QUEUED, 1),
        StatusChanged(job_id, JobState.IN_PROGRESS, 2),
    ]


async def test_release_counts_no_attempt_and_loses_no_token(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running_job(jobs, agent, 3)
    assert (await jobs.log(job_id)).ids == []
    await agent.store.release([(job_id, 1)], count_attempt=False)
    assert await jobs.log(job_id) == columns(0, 3)
    (taken,) = await (await FakeAgent(connection, "w2").start()).take()
    assert (taken.attempts, taken.num_tokens) == (0, 3)


async def test_release_of_a_job_of_another_epoch_does_nothing(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running_job(jobs, agent)
    await agent.store.release([(job_id, 9)], count_attempt=False)
    assert [owned.job_id for owned in await agent.store.mine()] == [job_id]


async def test_an_empty_lane_without_a_card_is_forgotten(
    fleet: FleetStore, connection: Connection, clock: Clock
) -> None:
    await fleet.announce(make_card(), b"{}")
    reaper = Reaper(connection, lease_s=LEASE_S, clock=clock)
    await reaper.round()
    assert await fleet.lanes() == [LANE]
    await fleet.retire(LANE)
    await reaper.round()
    assert await fleet.lanes() == []


async def test_run_goes_on_after_an_error_and_waits_with_jitter(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            raise asyncio.CancelledError

    reaper = Reaper(connection, lease_s=LEASE_S, lanes=[LANE], sleep=sleep)
    outcomes = iter([StoreUnavailable("away"), None, None, None, None])

    async def look() -> int:
        outcome = next(outcomes)
        if outcome:
            raise outcome
        return 0

    monkeypatch.setattr(reaper, "round", look)
    with pytest.raises(asyncio.CancelledError):
        await reaper.run()
    assert len(set(waits)) == 5
    assert all(0.8 * reaper.period_s <= wait <= 1.2 * reaper.period_s for wait in waits)


async def test_every_job_that_comes_back_rings_the_doorbell(
    jobs: JobStore, agent: FakeAgent, fleet: FleetStore, redis_server: ServerUnderTest
) -> None:
    bell = keys.bell(LANE)
    with redis_server.client() as client:

        def has_rung() -> bool:
            return bool(client.delete(bell))

        released, dead, failed = [await running_job(jobs, agent) for _ in range(3)]
        assert has_rung()
        await agent.store.release([(released, 1)], count_attempt=False)
        assert has_rung()
        await agent.finish(failed, JobState.FAILED)
        assert not has_rung()
        await fleet.redrive(LANE, failed)
        assert has_rung()
        await agent.store.bye()
        assert has_rung(), f"{dead} came back"
