"""cancel, attach, detach, states, list, erase; who keeps a job alive; what only time brings."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common import keys
from common.errors import NotFound
from common.job import JobRecord, JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import Ended, StatusChanged
from common.store.jobs import JobStore, new_job_id
from common.store.replies import Chunk
from tests.support.protocol import LANE, FakeAgent, columns, eventually, make_job, payload, submit
from tests.support.redis_server import ServerUnderTest


async def queued(jobs: JobStore, gateway: str | None = None, **options: Any) -> str:
    job = make_job(**options)
    await submit(jobs, job, gateway=gateway)
    return job.job_id


async def running(jobs: JobStore, agent: FakeAgent, gateway: str | None = None, **options: Any) -> str:
    job_id = await queued(jobs, gateway, **options)
    assert [taken.job.job_id for taken in await agent.take()] == [job_id]
    return job_id


async def state_of(jobs: JobStore, job_id: str) -> JobState | None:
    record = await jobs.record(job_id)
    return None if record is None else record.state


async def sweep(connection: Connection) -> None:
    await connection.call("sweep", LANE, 100)


async def swept_to(jobs: JobStore, job_id: str, state: JobState) -> JobRecord:
    """Sweep until the job is in `state`."""

    async def look() -> JobRecord | None:
        await sweep(jobs.connection)
        record = await jobs.record(job_id)
        return record if record is not None and record.state is state else None

    record: JobRecord = await eventually(look, what=f"state {state}")
    return record


async def verbs(agent: FakeAgent) -> list[tuple[str, str, str]]:
    return [(control.verb, control.job_id, control.gateway) for control in (await agent.step()).controls]


async def test_a_queued_job_is_cancelled_at_once(jobs: JobStore, fleet: FleetStore) -> None:
    job_id = await queued(jobs)
    record = await jobs.cancel(job_id)
    assert record is not None
    assert (record.state, record.cancelling) == (JobState.CANCELLED, False)
    assert (await fleet.queue(LANE))["queued_tokens"] == 0
    assert await jobs.cancel(job_id) == record


async def test_an_unknown_job_is_none_everywhere(jobs: JobStore) -> None:
    for job_id in (new_job_id(LANE), "no such id", "", "{x}", "chatcmpl-" + new_job_id(LANE)):
        assert await jobs.cancel(job_id) is None
        assert await jobs.attach(job_id, "g1") is None
        assert await jobs.record(job_id) is None
        assert not await jobs.erase(job_id, "default")
        await jobs.detach(job_id, "g1")


async def test_a_running_job_is_cancelled_by_its_worker(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running(jobs, agent)
    for _ in range(2):
        record = await jobs.cancel(job_id)
        assert record is not None
        assert (record.state, record.cancelling) == (JobState.IN_PROGRESS, True)
    assert await verbs(agent) == [("cancel", job_id, "")], "a second cancel says nothing new"
    assert [owned.cancel_reason for owned in await agent.store.mine()] == ["cancelled"]
    await agent.finish(job_id, JobState.CANCELLED)
    assert await state_of(jobs, job_id) is JobState.CANCELLED


async def test_attach_tells_the_worker_and_the_end_comes_to_the_gateway(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running(jobs, agent)
    async with jobs.frames("g7", [LANE]) as subscription:
        record = await jobs.attach(job_id, "g7")
        assert record is not None
        assert record.state is JobState.IN_PROGRESS
        assert await verbs(agent) == [("attach", job_id, "g7")]
        await agent.finish(job_id)
        assert await anext(subscription) == Ended(job_id, JobState.COMPLETED, 0)


async def test_attach_to_a_queued_job_reaches_its_later_worker(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await queued(jobs)
    async with jobs.frames("g7", [LANE]) as subscription:
        await jobs.attach(job_id, "g7")
        (taken,) = await agent.take()
        assert taken.gateways == ["g7"]
        assert await anext(subscription) == StatusChanged(job_id, JobState.IN_PROGRESS, 1)


async def test_attach_to_a_finished_job_leaves_no_follower(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    job_id = await running(jobs, agent)
    await agent.finish(job_id)
    record = await jobs.attach(job_id, "g1")
    assert record is not None
    assert record.state is JobState.COMPLETED
    with redis_server.client() as client:
        assert not client.exists(keys.followers(LANE, job_id), keys.followed(LANE, "g1"))


async def test_states_of_many_in_one_call(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running(jobs, agent)
    await agent.step({job_id: 3}, flush=[job_id])
    waiting = await queued(jobs)
    found = await jobs.states(LANE, [waiting, job_id, new_job_id(LANE)])
    assert found == {waiting: (JobState.QUEUED, 0, 0), job_id: (JobState.IN_PROGRESS, 1, 3)}
    assert await jobs.states(LANE, []) == {}


async def test_a_followed_job_that_everybody_left_is_cancelled_after_its_grace(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running(jobs, agent, "g1", orphan_grace_s=0.2)
    await jobs.attach(job_id, "g2")
    await jobs.detach(job_id, "g1")
    await asyncio.sleep(0.25)
    await sweep(connection)
    assert "cancel" not in [verb for verb, _, _ in await verbs(agent)]
    await jobs.detach(job_id, "g2")
    await sweep(connection)
    assert [verb for verb, _, _ in await verbs(agent)] == ["detach"], "the grace has just begun"

    async def is_cancelling() -> bool:
        await sweep(connection)
        record = await jobs.record(job_id)
        return record is not None and record.cancelling

    await eventually(is_cancelling)
    assert await verbs(agent) == [("cancel", job_id, "")]


async def test_coming_back_within_the_grace_keeps_the_job(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running(jobs, agent, "g1", orphan_grace_s=0.1)
    await jobs.detach(job_id, "g1")
    await jobs.attach(job_id, "g2")
    await asyncio.sleep(0.15)
    await sweep(connection)
    record = await jobs.record(job_id)
    assert record is not None
    assert not record.cancelling


async def test_without_grace_leaving_cancels_at_once(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await queued(jobs, "g1", orphan_grace_s=0)
    await jobs.detach(job_id, "g2")
    assert await state_of(jobs, job_id) is JobState.QUEUED, "somebody else left"
    await jobs.detach(job_id, "g1")
    assert await state_of(jobs, job_id) is JobState.CANCELLED


async def test_jobs_that_need_no_follower_run_on(jobs: JobStore, agent: FakeAgent, connection: Connection) -> None:
    job_id = await running(jobs, agent, "g1")
    await jobs.detach(job_id, "g1")
    await sweep(connection)
    assert await verbs(agent) == [("detach", job_id, "g1")]
    assert await state_of(jobs, job_id) is JobState.IN_PROGRESS


async def test_a_queued_job_nobody_ever_followed_is_swept(jobs: JobStore) -> None:
    job_id = await queued(jobs, None, orphan_grace_s=0.01)
    await swept_to(jobs, job_id, JobState.CANCELLED)


async def test_a_gateway_that_is_gone_counts_as_having_left(
    jobs: JobStore, connection: Connection, redis_server: ServerUnderTest
) -> None:
    orphan = await queued(jobs, "gone", orphan_grace_s=10)
    async with jobs.frames("here", [LANE]):
        followed = await queued(jobs, "here", orphan_grace_s=10)
        await sweep(connection)
        with redis_server.client() as client:
            since = int(client.hget(keys.gateways(LANE), "gone"))
            assert since > 0, "the absence was noticed"
            client.hset(keys.gateways(LANE), "gone", since - 2001)
            assert client.zscore(keys.orphans(LANE), orphan) is None
            await sweep(connection)
            assert client.zscore(keys.orphans(LANE), orphan) is not None
            assert client.zscore(keys.orphans(LANE), followed) is None
            assert client.hgetall(keys.gateways(LANE)) == {b"here": b"0"}
            client.zadd(keys.orphans(LANE), {orphan: 1})
    await swept_to(jobs, orphan, JobState.CANCELLED)
    assert await state_of(jobs, followed) is JobState.QUEUED


async def test_a_queued_job_past_its_deadline_expires(jobs: JobStore) -> None:
    job_id = await queued(jobs, timeout_s=0.02)
    record = await swept_to(jobs, job_id, JobState.EXPIRED)
    assert record.finished_ms >= record.deadline_ms


async def test_a_running_job_past_its_deadline_is_stopped_and_keeps_its_text(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    job_id = await running(jobs, agent, timeout_s=0.05)
    await agent.step({job_id: 3})

    async def told() -> list[tuple[str, str, str]]:
        await sweep(connection)
        return await verbs(agent)

    assert await eventually(told) == [("expire", job_id, "")]
    assert [owned.cancel_reason for owned in await agent.store.mine()] == ["expired"]
    await agent.finish(job_id, JobState.COMPLETED)
    assert await state_of(jobs, job_id) is JobState.EXPIRED
    assert await jobs.log(job_id) == columns(0, 3)


async def test_listing_is_newest_first_by_tenant_and_in_pages(jobs: JobStore, agent: FakeAgent) -> None:
    ids = [await queued(jobs) for _ in range(5)]
    await queued(jobs, tenant="other")
    records, has_more = await jobs.list_jobs([LANE], "default", limit=3)
    newest = [record.job_id for record in records]
    assert has_more
    rest, has_more = await jobs.list_jobs([LANE], "default", limit=3, after=newest[-1])
    assert not has_more
    everything = newest + [record.job_id for record in rest]
    assert sorted(everything) == sorted(ids)
    created = [record.created_ms for record in records + rest]
    assert created == sorted(created, reverse=True)


async def test_listing_by_state_and_over_lanes(jobs: JobStore, agent: FakeAgent) -> None:
    done = await running(jobs, agent)
    await agent.finish(done)
    await queued(jobs)
    elsewhere = make_job(job_id=new_job_id("bbbbbb"))
    await submit(jobs, elsewhere)
    records, _ = await jobs.list_jobs([LANE], "default", status=JobState.COMPLETED)
    assert [record.job_id for record in records] == [done]
    records, has_more = await jobs.list_jobs([LANE, "bbbbbb"], "default")
    assert len(records) == 3
    assert not has_more
    assert elsewhere.job_id in [record.job_id for record in records]


async def test_listing_after_a_job_of_somebody_else_is_not_found(jobs: JobStore) -> None:
    theirs = await queued(jobs, tenant="other")
    with pytest.raises(NotFound):
        await jobs.list_jobs([LANE], "default", after=theirs)


async def test_expired_records_leave_the_list(
    jobs: JobStore, agent: FakeAgent, connection: Connection, redis_server: ServerUnderTest
) -> None:
    job_id = await running(jobs, agent, result_ttl_s=1)
    await agent.finish(job_id)
    with redis_server.client() as client:
        index = keys.tenant_index(LANE, "default")
        assert client.zscore(index, job_id) is not None

        async def is_gone() -> bool:
            await sweep(connection)
            return client.zscore(index, job_id) is None

        await eventually(is_gone)
        assert client.zcard(keys.expiries(LANE)) == 0
    assert await jobs.list_jobs([LANE], "default") == ([], False)


async def test_erase_of_a_queued_job_leaves_only_a_mark(jobs: JobStore, redis_server: ServerUnderTest) -> None:
    job = make_job(idempotency_key="k", body_hash="h")
    await submit(jobs, job, gateway="g1")
    assert not await jobs.erase(job.job_id, "other")
    assert await jobs.erase(job.job_id, "default")
    assert not await jobs.erase(job.job_id, "default")
    assert await jobs.record(job.job_id) is None
    with redis_server.client() as client:
        left = [key for key in client.keys() if job.job_id.encode() in key]
        assert left == [keys.erased(LANE, job.job_id).encode()]
        assert client.ttl(left[0]) > 0
    assert (await submit(jobs, job)).state is JobState.CANCELLED, "a late resubmission does not bring it back"
    assert await jobs.record(job.job_id) is None


async def test_erase_of_a_running_job_stops_its_worker(jobs: JobStore, agent: FakeAgent) -> None:
    job_id = await running(jobs, agent, "g1")
    async with jobs.frames("g1", [LANE]) as subscription:
        assert await jobs.erase(job_id, "default")
        assert await anext(subscription) == Ended(job_id, JobState.CANCELLED, 0)
    assert await agent.store.mine() == []
    reply = await agent.step(chunks=[Chunk(job_id, 1, 0, 2, payload(0, 2))])
    assert [control.verb for control in reply.controls] == ["cancel"]
    assert reply.lost == [job_id]
    assert (await jobs.log(job_id)).ids == []


async def test_erase_of_a_finished_job_removes_its_log(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    job_id = await running(jobs, agent)
    await agent.step({job_id: 3})
    await agent.finish(job_id)
    assert (await jobs.log(job_id)).end == 3
    assert await jobs.erase(job_id, "default")
    assert (await jobs.log(job_id)).ids == []
    assert await jobs.list_jobs([LANE], "default") == ([], False)
