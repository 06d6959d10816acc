"""step: fence, write-ahead, frames, chunks, finishes, heartbeat and controls in one call; nothing or all of it."""

from __future__ import annotations

import pytest

from common import keys, wire
from common.errors import Fenced, StepGap, StoreError
from common.job import FinishReason, JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import Ended, Frame
from common.store.jobs import JobStore
from common.store.replies import Chunk, Control, Finish, StepCall
from tests.support.protocol import LANE, FakeAgent, columns, make_job, payload, snapshot, submit
from tests.support.redis_server import ServerUnderTest


async def begin(jobs: JobStore, agent: FakeAgent, num_jobs: int = 1, **options: object) -> list[str]:
    ids = []
    for _ in range(num_jobs):
        job = make_job()
        await submit(jobs, job, **options)
        ids.append(job.job_id)
    assert sorted(taken.job.job_id for taken in await agent.take(num_jobs)) == sorted(ids)
    return ids


async def test_tokens_are_written_ahead_and_the_heart_beats(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    (job_id,) = await begin(jobs, agent)
    reply = await agent.step({job_id: 3})
    assert (reply.is_duplicate, reply.lost, reply.dead_gateways) == (False, [], [])
    with redis_server.client() as client:
        ((entry, fields),) = client.xrange(keys.write_ahead(LANE, "w1", agent.store.incarnation))
        assert client.hget(keys.worker(LANE, "w1"), "hb") == b"1"
    assert entry == b"1-0"
    assert wire.decode_frame(fields[b"f"]) == [(job_id, columns(0, 3))]
    await agent.step()
    with redis_server.client() as client:
        assert client.hget(keys.worker(LANE, "w1"), "hb") == b"2"
        assert client.xlen(keys.write_ahead(LANE, "w1", agent.store.incarnation)) == 1


async def test_a_repeated_step_writes_nothing_twice(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    first, second = await begin(jobs, agent, 2)
    await agent.step({first: 3, second: 4})
    call = StepCall(
        step=2,
        previous=1,
        min_step=0,
        frame=wire.encode_frame([(first, columns(3, 4))]),
        chunks=[Chunk(first, 1, 0, 4, payload(0, 4))],
        finishes=[Finish(job_id=second, epoch=1, start=0, end=4, tail=payload(0, 4), state=JobState.COMPLETED)],
    )
    assert not (await agent.store.step(call)).is_duplicate
    with redis_server.client() as client:
        before = snapshot(client)
        again = await agent.store.step(call)
        after = snapshot(client)
    assert again.is_duplicate
    assert again.lost == []
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == {keys.worker(LANE, "w1").encode()}


async def test_a_late_duplicate_of_an_old_step_changes_no_log(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    old = StepCall(step=1, previous=0, min_step=0, chunks=[Chunk(job_id, 1, 0, 2, payload(0, 2))])
    await agent.store.step(old)
    agent.num_steps, agent.ends[job_id], agent.flushed[job_id] = 1, 2, 2
    await agent.step({job_id: 40}, flush=[job_id])
    assert (await agent.store.step(old)).is_duplicate
    record = await jobs.record(job_id)
    assert record is not None
    assert record.num_tokens == 42
    assert (await jobs.log(job_id)).ids == columns(0, 42).ids


async def test_a_step_that_skips_one_is_a_gap_and_writes_nothing(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.step({job_id: 1})
    with redis_server.client() as client:
        before = snapshot(client)
        with pytest.raises(StepGap) as gap:
            await agent.step({job_id: 1}, step=5, previous=4)
        assert snapshot(client) == before
    assert (gap.value.subject, gap.value.last) == ("step", 1)
    await agent.store.step(StepCall(step=5, previous=1, min_step=0))


async def test_a_chunk_beyond_the_end_of_the_log_is_a_gap_and_writes_nothing(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    first, second = await begin(jobs, agent, 2)
    good, hole = Chunk(first, 1, 0, 2, payload(0, 2)), Chunk(second, 1, 10, 42, payload(10, 42))
    with redis_server.client() as client:
        before = snapshot(client)
        with pytest.raises(StepGap) as gap:
            await agent.store.step(StepCall(step=1, previous=0, min_step=0, frame=b"x", chunks=[good, hole]))
        assert snapshot(client) == before
    assert (gap.value.subject, gap.value.last) == (second, 0)


async def test_chunks_that_overlap_merge_into_one_log(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    spans = [(0, 4), (2, 4), (2, 7), (7, 9), (0, 9)]
    chunks = [Chunk(job_id, 1, start, end, payload(start, end)) for start, end in spans]
    await agent.store.step(StepCall(step=1, previous=0, min_step=0, chunks=chunks))
    assert await jobs.log(job_id) == columns(0, 9)
    assert await jobs.log(job_id, 5) == columns(5, 9)
    assert (await jobs.log(job_id, 9)).ids == []
    assert (await jobs.log(job_id, 3, max_entries=1)) == columns(3, 4)


async def test_the_job_of_another_worker_is_lost_and_untouched(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    (job_id,) = await begin(jobs, agent)
    intruder = await FakeAgent(connection, "w2").start()
    call = StepCall(
        step=1,
        previous=0,
        min_step=0,
        chunks=[Chunk(job_id, 1, 0, 2, payload(0, 2))],
        finishes=[Finish(job_id=job_id, epoch=1, start=0, end=2, state=JobState.COMPLETED)],
    )
    reply = await intruder.store.step(call)
    assert reply.lost == [job_id]
    assert (await intruder.store.step(call)).lost == [job_id]
    record = await jobs.record(job_id)
    assert record is not None
    assert (record.state, record.num_tokens, record.worker) == (JobState.IN_PROGRESS, 0, "w1")


async def test_an_older_epoch_of_the_same_worker_is_lost(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.store.release([(job_id, 1)], count_attempt=False)
    (taken,) = await agent.take()
    assert taken.epoch == 2
    reply = await agent.step(chunks=[Chunk(job_id, 1, 0, 2, payload(0, 2))])
    assert reply.lost == [job_id]
    assert (await jobs.log(job_id)).ids == []


async def test_a_finish_brings_the_tail_and_the_end(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    job = make_job(result_ttl_s=300)
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 3}, flush=[job.job_id])
    agent.ends[job.job_id] = 5
    await agent.finish(job.job_id)
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.num_tokens, record.worker) == (JobState.COMPLETED, 5, "")
    assert record.finish_reason is FinishReason.LENGTH
    assert record.usage.total_tokens == 8
    assert record.expires_ms - record.finished_ms == 300_000
    assert await jobs.log(job.job_id) == columns(0, 5)
    assert await agent.store.mine() == []
    with redis_server.client() as client:
        assert not client.exists(keys.body(LANE, job.job_id))
        assert 290 < client.ttl(keys.log(LANE, job.job_id)) <= 300


async def test_a_finish_that_would_leave_a_hole_is_a_gap(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    finish = Finish(job_id=job_id, epoch=1, start=0, end=4, tail=b"", state=JobState.COMPLETED)
    with pytest.raises(StepGap) as gap:
        await agent.store.step(StepCall(step=1, previous=0, min_step=0, finishes=[finish]))
    assert (gap.value.subject, gap.value.last) == (job_id, 0)
    record = await jobs.record(job_id)
    assert record is not None
    assert record.state is JobState.IN_PROGRESS


async def test_a_second_finish_is_lost_and_changes_nothing(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.finish(job_id)
    before = await jobs.record(job_id)
    reply = await agent.finish(job_id, JobState.FAILED, error_code="late")
    assert reply.lost == [job_id]
    assert await jobs.record(job_id) == before


async def test_a_cancel_beats_the_finish_that_comes_after_it(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.step({job_id: 2})
    record = await jobs.cancel(job_id)
    assert record is not None
    assert (record.state, record.cancelling) == (JobState.IN_PROGRESS, True)
    await agent.finish(job_id)
    record = await jobs.record(job_id)
    assert record is not None
    assert (record.state, record.cancelling, record.finish_reason) == (JobState.CANCELLED, False, None)
    assert record.num_tokens == 2


async def test_a_failed_job_says_why(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.finish(job_id, JobState.FAILED, error_code="engine_error", error_message="out of memory")
    record = await jobs.record(job_id)
    assert record is not None
    assert (record.state, record.error_code, record.error_message) == (
        JobState.FAILED,
        "engine_error",
        "out of memory",
    )


async def test_a_long_error_is_cut_and_does_not_stop_the_step(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.finish(job_id, JobState.FAILED, error_code="c" * 500, error_message="é" * 10_000)
    record = await jobs.record(job_id)
    assert record is not None
    assert (record.error_code, record.error_message) == ("c" * 64, "é" * 1000)


async def test_frames_go_to_gateways_and_the_unheard_are_named(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent, gateway="g1")
    async with jobs.frames("g1", [LANE]) as subscription:
        reply = await agent.step({job_id: 2}, gateways=["g1", "gone"])
        assert reply.dead_gateways == ["gone"]
        assert await anext(subscription) == Frame([(job_id, columns(0, 2))])
        agent.ends[job_id] = 3
        frame = wire.encode_frame([(job_id, columns(2, 3))])
        finish = agent.finish_of(job_id)
        await agent.step(frame=frame, gateway_frames={"g1": frame}, finishes=[finish])
        assert await anext(subscription) == Frame([(job_id, columns(2, 3))])
        assert await anext(subscription) == Ended(job_id, JobState.COMPLETED, 3)


async def test_controls_come_by_cursor_until_they_are_acknowledged(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    await jobs.attach(job_id, "g1")
    await jobs.detach(job_id, "g1")
    await jobs.cancel(job_id)
    await agent.store.drain()
    call = StepCall(step=1, previous=0, min_step=0)
    reply = await agent.store.step(call)
    verbs = [(control.verb, control.job_id, control.gateway) for control in reply.controls]
    assert verbs == [("attach", job_id, "g1"), ("detach", job_id, "g1"), ("cancel", job_id, ""), ("drain", "", "")]
    assert (await agent.store.step(call)).controls == reply.controls
    later = await agent.store.step(StepCall(step=2, previous=1, min_step=0, control_cursor=reply.controls[1].cursor))
    assert later.controls == reply.controls[2:]
    done = await agent.store.step(StepCall(step=3, previous=2, min_step=0, control_cursor=later.control_cursor))
    assert done.controls == []
    assert isinstance(later.controls[0], Control)


async def test_what_is_in_logs_leaves_the_write_ahead_stream(
    jobs: JobStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    (job_id,) = await begin(jobs, agent)
    wal = keys.write_ahead(LANE, "w1", agent.store.incarnation)
    for _ in range(300):
        await agent.step({job_id: 1}, min_step=max(agent.num_steps - 2, 0))
    with redis_server.client() as client:
        assert 3 <= client.xlen(wal) <= 204
        await agent.step(min_step=agent.num_steps)
        assert client.xlen(wal) == 1


async def test_statistics_reach_the_list_of_workers(agent: FakeAgent, fleet: FleetStore) -> None:
    await agent.step(stats={"waiting": 2.0, "blocks_free": 30.0})
    (info,) = await fleet.workers(LANE)
    assert (info.id, info.pid, info.host, info.state) == ("w1", 1, "here", "ready")
    assert (info.waiting, info.kv_free, info.stats) == (2, 30, {"waiting": 2.0, "blocks_free": 30.0})


async def test_the_sealed_write_nothing(
    jobs: JobStore, agent: FakeAgent, connection: Connection, redis_server: ServerUnderTest
) -> None:
    (job_id,) = await begin(jobs, agent)
    await connection.call("seal", LANE, "w1", agent.store.incarnation, -1)
    with redis_server.client() as client:
        before = snapshot(client)
        with pytest.raises(Fenced):
            await agent.step({job_id: 2}, flush=[job_id])
        assert snapshot(client) == before


async def test_a_state_that_is_not_final_cannot_end_a_job(jobs: JobStore, agent: FakeAgent) -> None:
    (job_id,) = await begin(jobs, agent)
    with pytest.raises(StoreError, match="state is not final"):
        await agent.finish(job_id, JobState.QUEUED)


async def test_a_step_below_the_last_one_known_is_refused_before_it_is_sent(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    (job_id,) = await begin(jobs, agent)
    await agent.step({job_id: 2})
    again = FakeAgent(connection)
    await again.start()
    again.num_steps = 0
    with pytest.raises(StepGap) as gap:
        await again.step()
    assert (gap.value.subject, gap.value.last) == ("step", 1)
