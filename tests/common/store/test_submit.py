"""submit: OK, DUP, CONFLICT, BUSY, QUOTA, NOWORKER; idempotency; fields of the record."""

from __future__ import annotations

import pytest

from common import keys
from common.errors import Overloaded, Unavailable, ValidationError
from common.job import JobState, Priority
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.replies import WorkerInfo
from tests.support.protocol import LANE, FakeAgent, eventually, make_card, make_job, submit
from tests.support.redis_server import ServerUnderTest


async def test_a_new_job_is_queued_with_all_its_fields(jobs: JobStore) -> None:
    job = make_job(priority=Priority.BATCH, timeout_s=90.5, view={"door": "generate", "created": 7})
    assert await jobs.record(job.job_id) is None
    submission = await submit(jobs, job)
    assert (submission.job_id, submission.is_duplicate, submission.state) == (job.job_id, False, JobState.QUEUED)
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.tenant, record.priority, record.dialect) == (
        JobState.QUEUED,
        "default",
        Priority.BATCH,
        job.dialect,
    )
    assert (record.view, record.prompt_tokens, record.num_tokens) == ({"door": "generate", "created": 7}, 3, 0)
    assert record.deadline_ms - record.created_ms == 90_500
    assert (record.started_ms, record.finished_ms, record.attempts, record.cancelling) == (0, 0, 0, False)


async def test_the_same_id_never_makes_a_second_job(jobs: JobStore, agent: FakeAgent) -> None:
    job = make_job()
    assert not (await submit(jobs, job)).is_duplicate
    again = await submit(jobs, job)
    assert again.is_duplicate
    assert again.job_id == job.job_id
    assert [taken.job.job_id for taken in await agent.take()] == [job.job_id]
    assert await agent.take() == []


async def test_the_same_key_and_body_give_the_first_job(jobs: JobStore) -> None:
    first, second = [make_job(idempotency_key="order 1", body_hash="h1") for _ in range(2)]
    assert first.job_id != second.job_id
    await submit(jobs, first)
    again = await submit(jobs, second)
    assert (again.is_duplicate, again.job_id) == (True, first.job_id)
    assert await jobs.record(second.job_id) is None


async def test_the_same_key_with_another_body_is_refused(jobs: JobStore) -> None:
    await submit(jobs, make_job(idempotency_key="order 1", body_hash="h1"))
    with pytest.raises(ValidationError) as refusal:
        await submit(jobs, make_job(idempotency_key="order 1", body_hash="h2"))
    assert refusal.value.code == "idempotency_key_reused"


async def test_a_key_belongs_to_its_tenant(jobs: JobStore) -> None:
    ours = make_job(idempotency_key="order 1", body_hash="h1")
    theirs = make_job(idempotency_key="order 1", body_hash="h2", tenant="other")
    await submit(jobs, ours)
    assert not (await submit(jobs, theirs)).is_duplicate


async def test_a_key_lives_as_long_as_its_job_and_then_as_its_record(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    job = make_job(idempotency_key="k", body_hash="h", result_ttl_s=120)
    await submit(jobs, job)
    key = keys.idempotency(LANE, "default", keys.digest_of("k"))
    with redis_server.client() as client:
        assert client.ttl(key) == -1
        await agent.take()
        await agent.finish(job.job_id)
        assert 110 < client.ttl(key) <= 120
        assert 110 < client.ttl(keys.record(LANE, job.job_id)) <= 120


async def test_a_key_whose_record_is_gone_makes_a_new_job(jobs: JobStore, redis_server: ServerUnderTest) -> None:
    job = make_job(idempotency_key="k", body_hash="h")
    await submit(jobs, job)
    with redis_server.client() as client:
        assert client.delete(keys.record(LANE, job.job_id)) == 1
    second = make_job(idempotency_key="k", body_hash="another")
    assert (await submit(jobs, second)).job_id == second.job_id
    assert (await submit(jobs, make_job(idempotency_key="k", body_hash="another"))).job_id == second.job_id


async def test_over_the_token_budget_is_refused_with_a_wait(jobs: JobStore, agent: FakeAgent) -> None:
    await submit(jobs, make_job(cost=60), max_queued_tokens=100)
    with pytest.raises(Overloaded) as refusal:
        await submit(jobs, make_job(cost=41), max_queued_tokens=100)
    assert refusal.value.code == "overloaded"
    assert refusal.value.retry_after_s is not None
    assert 1 <= refusal.value.retry_after_s <= 90
    await submit(jobs, make_job(cost=40), max_queued_tokens=100)
    assert len(await agent.take()) == 2
    await submit(jobs, make_job(cost=41), max_queued_tokens=100)


async def test_a_job_above_the_budget_alone_is_taken_when_nothing_waits(jobs: JobStore) -> None:
    await submit(jobs, make_job(cost=500), max_queued_tokens=100)
    with pytest.raises(Overloaded):
        await submit(jobs, make_job(cost=1), max_queued_tokens=100)


async def test_a_tenant_at_its_limit_is_refused_and_others_are_not(jobs: JobStore, agent: FakeAgent) -> None:
    job = make_job()
    await submit(jobs, job, tenant_max_jobs=1)
    with pytest.raises(Overloaded) as refusal:
        await submit(jobs, make_job(), tenant_max_jobs=1)
    assert refusal.value.code == "quota_exceeded"
    await submit(jobs, make_job(tenant="other"), tenant_max_jobs=1)
    await agent.take()
    await agent.finish(job.job_id)
    await submit(jobs, make_job(), tenant_max_jobs=1)


async def test_a_waiting_client_is_told_that_no_worker_lives(jobs: JobStore, fleet: FleetStore) -> None:
    assert await fleet.workers(LANE) == []
    with pytest.raises(Unavailable) as refusal:
        await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=False)
    assert refusal.value.code == "no_worker"
    assert refusal.value.retry_after_s is not None


async def test_jobs_that_may_wait_are_queued_without_a_worker(jobs: JobStore) -> None:
    await submit(jobs, make_job(), scale_from_zero=False)
    await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=True)


async def test_a_worker_dead_for_less_than_half_a_minute_still_counts(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    await agent.store.bye()
    await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=False)
    with redis_server.client() as client:
        client.set(keys.last_life(LANE), int(client.time()[0] * 1000) - 31_000)
    with pytest.raises(Unavailable):
        await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=False)


async def test_while_a_worker_loads_its_model_jobs_wait_for_it(
    jobs: JobStore, fleet: FleetStore, connection: Connection
) -> None:
    await fleet.announce(make_card(), b"{}")
    with pytest.raises(Unavailable):
        await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=False)
    await fleet.report(WorkerInfo(id="w9", state="loading", model="demo"))
    assert not (await submit(jobs, make_job(orphan_grace_s=10), gateway="g1", scale_from_zero=False)).is_duplicate


async def test_a_resubmission_restores_the_view_of_an_adopted_job(
    jobs: JobStore, redis_server: ServerUnderTest
) -> None:
    job = make_job()
    await submit(jobs, job)
    with redis_server.client() as client:
        client.hset(keys.record(LANE, job.job_id), "vw", "")
    assert (await submit(jobs, job)).is_duplicate
    record = await jobs.record(job.job_id)
    assert record is not None
    assert record.view == job.view


async def test_a_sleeping_worker_hears_the_doorbell(jobs: JobStore, agent: FakeAgent) -> None:
    assert not await agent.store.wait_for_work(0.05)
    await submit(jobs, make_job())
    assert await agent.store.wait_for_work(5)
    await agent.store.close()
    await eventually(agent.take, what="the job")
