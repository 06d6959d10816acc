"""The hub against a store that loses, repeats and reorders frames, loses its last writes, and is away at times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import NotFound, OffsetBeyondEnd, StoreUnavailable, Unavailable
from common.job import Job, JobRecord, JobState, TokenColumns, TopToken
from common.store.frames import Ended, Frame, Message, Reconnected, StatusChanged
from common.store.replies import Submission
from gateway.hub import LONGEST_PERIOD_S, End, Event, Hub, Rewind, Status, Stopped, Tokens
from gateway.shared_job import RING_BYTES, Ring, SharedJob, fresh_record
from tests.support.protocol import make_job

JOB = make_job()
JOB_ID = JOB.job_id
LANE = JOB_ID[:6]


def run_of(ids: list[int], start: int, end: int) -> TokenColumns:
    part = ids[start:end]
    return TokenColumns(start, part, [f"<{token}>" for token in part], [-1.0] * len(part))


@dataclass
class FakeJobs:
    """One job on a Redis of our own, with its worker. Nothing is sent before `attach`."""

    ids: list[int] = field(default_factory=list)
    flushed: int = 0
    state: JobState = JobState.IN_PROGRESS
    attempts: int = 1
    exists: bool = True
    followers: set[str] = field(default_factory=set)
    queue: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    held: list[Message] = field(default_factory=list)
    fate: str = ""
    salt: int = 0
    num_failures: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    submitted: list[Job] = field(default_factory=list)
    now: float = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    # the worker

    def write(self, count: int) -> None:
        start = len(self.ids)
        self.ids += [(position * 7 + self.salt) % 50_000 for position in range(start, start + count)]
        self.send(run_of(self.ids, start, len(self.ids)))

    def send(self, columns: TokenColumns) -> None:
        if columns.ids and self.followers:
            self.publish(Frame([(JOB_ID, columns)]))

    def flush(self) -> None:
        self.flushed = len(self.ids)

    def finish(self, state: JobState = JobState.COMPLETED) -> None:
        self.flush()
        self.state = state
        self.publish(Ended(JOB_ID, state, self.flushed))

    # the wire

    def publish(self, message: Message) -> None:
        fate, self.fate = self.fate, ""
        if fate == "hold":
            self.held.append(message)
            return
        for _ in range({"lose": 0, "repeat": 2}.get(fate, 1)):
            self.queue.put_nowait(message)
        for message in self.held:
            self.queue.put_nowait(message)
        self.held.clear()

    def reconnect(self) -> None:
        self.held.clear()
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(Reconnected())

    def lose_tail(self, count: int) -> None:
        """Worker and Redis die together: the log is shorter, and what comes next is different."""
        self.flushed = max(self.flushed - count, 0)
        del self.ids[self.flushed :]
        self.salt += 1
        self.reconnect()

    # the store

    def _call(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.num_failures > 0:
            self.num_failures -= 1
            raise StoreUnavailable("away")

    def row(self) -> JobRecord | None:
        if not self.exists:
            return None
        return replace(
            fresh_record(JOB), state=self.state, attempts=self.attempts, num_tokens=self.flushed, worker="w1"
        )

    @asynccontextmanager
    async def frames(self, gateway: str, lanes: list[str]) -> AsyncIterator[FakeJobs]:
        yield self

    async def add_lane(self, lane: str) -> None:
        assert lane == LANE

    def __aiter__(self) -> FakeJobs:
        return self

    async def __anext__(self) -> Message:
        return await self.queue.get()

    async def attach(self, job_id: str, gateway: str) -> JobRecord | None:
        self._call("attach")
        if job_id != JOB_ID:
            return None
        record = self.row()
        if record is not None and not record.state.is_terminal:
            self.followers.add(gateway)
            self.send(run_of(self.ids, self.flushed, len(self.ids)))
        return record

    async def detach(self, job_id: str, gateway: str) -> None:
        self._call("detach")
        self.followers.discard(gateway)

    async def record(self, job_id: str) -> JobRecord | None:
        self._call("record")
        return self.row()

    async def states(self, lane: str, job_ids: list[str]) -> dict[str, tuple[JobState, int, int]]:
        self._call("states")
        return {JOB_ID: (self.state, self.attempts, self.flushed)} if self.exists and JOB_ID in job_ids else {}

    async def log(self, job_id: str, start: int = 0, *, max_entries: int = 4096) -> TokenColumns:
        self._call("log")
        await asyncio.sleep(0)
        return run_of(self.ids, start, min(self.flushed, start + 8 * max_entries))

    async def submit(self, job: Job, **_: Any) -> Submission:
        self._call("submit")
        self.submitted.append(job)
        self.exists, self.state = True, JobState.QUEUED
        return Submission(job.job_id, False, JobState.QUEUED)


@asynccontextmanager
async def hub_of(jobs: FakeJobs) -> AsyncIterator[Hub]:
    hub = Hub(jobs, "g1", clock=jobs.clock, sleep=jobs.sleep)
    await hub.start()
    try:
        yield hub
    finally:
        await hub.close()


async def settle(rounds: int = 30) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)


@dataclass
class Reader:
    """A client that applies what it is told."""

    start: int
    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    obeys_rewinds: bool = True

    def apply(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Tokens):
            assert event.columns.start == self.start + len(self.ids), "a gap or an overlap"
            self.ids += event.columns.ids
        elif isinstance(event, Rewind) and self.obeys_rewinds:
            if event.end < self.start:
                self.start, self.ids = event.end, []
            del self.ids[event.end - self.start :]

    async def run(self, hub: Hub) -> None:
        async with hub.follow(JOB_ID, self.start) as follower:
            async for event in follower:
                self.apply(event)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["lose", "repeat", "hold", "flush", "reconnect", "join", "wait"]), st.just(0)),
        st.tuples(st.sampled_from(["tail", "away"]), st.integers(0, 6)),
    ),
    max_size=40,
)


async def play(actions: list[tuple[str, int]], jobs: FakeJobs, *, obeys_rewinds: bool = True) -> list[Reader]:
    """Run a schedule to the job's end; all readers, each after its last event."""
    readers: list[Reader] = []
    tasks: list[asyncio.Task[None]] = []

    def join(hub: Hub) -> None:
        readers.append(Reader(min(jobs.flushed, len(jobs.ids)), obeys_rewinds=obeys_rewinds))
        tasks.append(asyncio.create_task(readers[-1].run(hub)))

    async with hub_of(jobs) as hub:
        join(hub)
        await settle()
        for verb, number in actions:
            match verb:
                case "write":
                    jobs.write(number)
                case "flush":
                    jobs.flush()
                case "reconnect":
                    jobs.reconnect()
                case "join":
                    join(hub)
                    await settle()
                case "wait":
                    await settle()
                case "tail":
                    jobs.lose_tail(number)
                case "away":
                    jobs.num_failures = number if tasks and not tasks[-1].done() else 0
                case fate:
                    jobs.fate = fate
            if number % 2:
                await settle(5)
        await settle()
        jobs.num_failures = 0
        jobs.finish()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
    return readers


def check(readers: list[Reader], jobs: FakeJobs) -> None:
    for reader in readers:
        assert reader.ids == jobs.ids[reader.start :]
        assert isinstance(reader.events[-1], End)
        assert sum(isinstance(event, End) for event in reader.events) == 1
        assert reader.events[-1].record.num_tokens == len(jobs.ids)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS.filter(lambda actions: all(verb != "away" for verb, _ in actions)))
def test_every_follower_ends_with_the_log(actions: list[tuple[str, int]]) -> None:
    jobs = FakeJobs()
    check(asyncio.run(play(actions, jobs)), jobs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS.filter(lambda actions: all(verb != "join" for verb, _ in actions)))
def test_a_store_that_is_away_only_delays(actions: list[tuple[str, int]]) -> None:
    jobs = FakeJobs()
    check(asyncio.run(play(actions, jobs)), jobs)


LOST_FRAME = [("write", 3), ("lose", 0), ("write", 3), ("write", 3)]
LOST_TAIL = [("write", 5), ("flush", 0), ("write", 3), ("wait", 0), ("tail", 2), ("write", 5), ("wait", 0)]


async def test_a_lost_frame_is_healed_and_counted() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as follower:
        jobs.write(3)
        await settle()
        jobs.fate = "lose"
        jobs.write(3)
        jobs.write(3)
        await settle(100)
        assert follower.num_tokens == 9
        assert hub.counters.gaps_healed == 1


def test_a_hub_that_takes_any_frame_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def splice(shared: SharedJob, columns: TokenColumns) -> None:
        shared._advance(replace(columns, start=shared.end))

    jobs = FakeJobs()
    check(asyncio.run(play(LOST_FRAME, jobs)), jobs)
    monkeypatch.setattr(SharedJob, "hear", splice)
    with pytest.raises(AssertionError):
        jobs = FakeJobs()
        check(asyncio.run(play(LOST_FRAME, jobs)), jobs)


def test_a_client_that_ignores_rewinds_fails_the_check() -> None:
    jobs = FakeJobs()
    check(asyncio.run(play(LOST_TAIL, jobs)), jobs)
    with pytest.raises(AssertionError):
        jobs = FakeJobs()
        check(asyncio.run(play(LOST_TAIL, jobs, obeys_rewinds=False)), jobs)


def test_divergence_is_a_rewind_to_the_first_difference() -> None:
    jobs = FakeJobs()
    [reader] = asyncio.run(play(LOST_TAIL, jobs))
    assert [event.end for event in reader.events if isinstance(event, Rewind)] == [3]


def test_equal_tokens_after_a_loss_are_no_rewind() -> None:
    jobs = FakeJobs()
    schedule = [("write", 5), ("flush", 0), ("write", 3), ("wait", 0), ("reconnect", 0), ("write", 4)]
    [reader] = asyncio.run(play(schedule, jobs))
    assert not any(isinstance(event, Rewind) for event in reader.events)


async def test_followers_share_one_attachment_and_the_last_one_detaches() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub:
        async with hub.follow(JOB_ID), hub.follow(JOB_ID) as second:
            assert (hub.num_jobs, hub.num_followers) == (1, 2)
            jobs.write(2)
            await settle()
            assert second.num_tokens == 2
            assert jobs.calls["attach"] == 1 and "detach" not in jobs.calls
        await settle()
        assert jobs.calls["detach"] == 1 and not jobs.followers
        assert hub.num_jobs == 0


async def test_a_finished_job_is_neither_attached_nor_detached() -> None:
    jobs = FakeJobs()
    jobs.write(20)
    jobs.finish()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID, 5) as follower:
        events = [event async for event in follower]
        assert [type(event) for event in events] == [Status, Tokens, End]
        assert events[1].columns.start == 5 and events[1].columns.end == 20
    await settle()
    assert "detach" not in jobs.calls


async def test_a_submitted_job_costs_no_question_until_its_end() -> None:
    jobs = FakeJobs(state=JobState.QUEUED, attempts=0)
    async with hub_of(jobs) as hub:
        await hub.listen(LANE)
        jobs.followers.add("g1")
        async with hub.follow(JOB_ID, submitted=JOB) as follower:
            jobs.publish(StatusChanged(JOB_ID, JobState.IN_PROGRESS, 1))
            jobs.state = JobState.IN_PROGRESS
            jobs.write(5)
            await settle(3)
            jobs.finish()
            record = await follower.ended()
            assert record is not None and record.state is JobState.COMPLETED
            assert (await follower.columns()).ids == jobs.ids
    assert "attach" not in jobs.calls and "log" not in jobs.calls and jobs.calls["record"] == 1


async def test_a_job_that_redis_forgot_is_submitted_again() -> None:
    jobs = FakeJobs(state=JobState.QUEUED, attempts=0)
    async with hub_of(jobs) as hub:
        await hub.listen(LANE)
        async with hub.follow(JOB_ID, submitted=JOB):
            jobs.exists = False
            jobs.reconnect()
            async with asyncio.timeout(5):
                while not jobs.submitted:
                    await asyncio.sleep(0)
            assert jobs.submitted == [JOB] and hub.counters.resubmitted == 1


async def test_a_job_that_stays_unknown_ends_as_failed() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as follower:
        jobs.write(3)
        jobs.flush()
        await settle()
        jobs.exists = False
        record = await follower.ended()
        assert record is not None
        assert (record.state, record.error_code, record.num_tokens) == (JobState.FAILED, "job_lost", 3)


async def test_unknown_jobs_and_foreign_tenants_are_not_found() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub:
        for job_id, tenant in (("x", None), (LANE + "z" * 22, None), (JOB_ID, "other")):
            with pytest.raises(NotFound):
                async with hub.follow(job_id, tenant=tenant):
                    pytest.fail("followed")
        await settle()
        assert hub.num_jobs == 0 and not jobs.followers


async def test_an_offset_beyond_what_the_worker_has_is_refused() -> None:
    jobs = FakeJobs()
    jobs.write(4)
    async with hub_of(jobs) as hub:
        async with hub.follow(JOB_ID, 4) as follower:
            assert follower.offset == 4, "the worker had not flushed, and sent its tokens"
        with pytest.raises(OffsetBeyondEnd) as refused:
            async with hub.follow(JOB_ID, 5):
                pytest.fail("followed")
        assert refused.value.num_tokens == 4


async def test_idle_jobs_are_asked_for_ever_more_rarely() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID):
        asked: list[float] = []
        while len(asked) < 8:
            before = jobs.calls.get("states", 0)
            await asyncio.sleep(0)
            asked += [jobs.now] if jobs.calls.get("states", 0) > before else []
        gaps = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
        assert gaps == sorted(gaps) and gaps[0] < 5 and gaps[-1] == pytest.approx(LONGEST_PERIOD_S, abs=1)
        hub.is_stopping = True


async def test_the_end_is_noticed_when_its_message_is_lost() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as follower:
        jobs.write(3)
        jobs.fate = "lose"
        jobs.finish()
        record = await follower.ended()
        assert record is not None and record.state is JobState.COMPLETED


async def test_status_changes_are_told_once() -> None:
    jobs = FakeJobs(state=JobState.QUEUED, attempts=0)
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as follower:
        assert await follower.next() == Status(JobState.QUEUED, 0, False)
        jobs.state, jobs.attempts = JobState.IN_PROGRESS, 1
        for _ in range(2):
            jobs.publish(StatusChanged(JOB_ID, JobState.IN_PROGRESS, 1))
        assert await follower.next() == Status(JobState.IN_PROGRESS, 1, False)
        record = jobs.row()
        assert record is not None
        hub.note(replace(record, cancelling=True))
        assert await follower.next() == Status(JobState.IN_PROGRESS, 1, True)
        assert follower.ready() == []


async def test_a_gateway_that_stops_tells_its_followers() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as follower:
        assert isinstance(await follower.next(), Status)
        waiting = asyncio.create_task(follower.next())
        await settle()
        hub.stop_followers()
        assert await waiting == Stopped()
        assert await follower.next() is None
        with pytest.raises(Unavailable):
            async with hub.follow(JOB_ID, 3):
                pytest.fail("followed")
    await settle()
    assert "detach" not in jobs.calls, "the client comes back elsewhere"


async def test_frames_of_a_job_that_nobody_follows_are_stopped() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs):
        jobs.followers.add("g1")
        jobs.write(1)
        async with asyncio.timeout(5):
            while jobs.followers:
                await asyncio.sleep(0)
        assert jobs.calls["detach"] == 1


async def test_a_slow_follower_reads_what_left_the_ring_from_the_log() -> None:
    jobs = FakeJobs()
    async with hub_of(jobs) as hub, hub.follow(JOB_ID) as slow, hub.follow(JOB_ID) as fast:
        assert isinstance(await slow.next(), Status)
        num_tokens = 3 * RING_BYTES // 150
        for _ in range(num_tokens // 50):
            jobs.write(50)
            jobs.flush()
            await settle(3)
        ring = slow._shared.ring
        assert ring.start > 0 and ring.num_bytes <= RING_BYTES, "tokens have left the ring"
        jobs.finish()
        for follower in (slow, fast):
            ids: list[int] = []
            async for event in follower:
                ids += event.columns.ids if isinstance(event, Tokens) else []
            assert ids == jobs.ids
        assert hub.counters.log_reads > 0


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(0, 1000), st.integers(0, 1000))
def test_a_ring_is_a_bounded_window(sizes: list[int], start: int, cut: int) -> None:
    ring = Ring(0, 20_000)
    ids = list(range(sum(sizes)))
    position = 0
    for size in sizes:
        ring.append(run_of(ids, position, position + size))
        position += size
        assert ring.num_bytes <= ring.limit or ring.end - ring.start <= 90 + 64
    assert ring.end == position
    start = min(max(start, ring.start), ring.end)
    assert ring.read(start, 10_000).ids == ids[start : ring.end]
    ring.truncate(cut)
    assert ring.end == min(position, cut)
    if ring.start < ring.end:
        assert ring.read(ring.start, 10_000).ids == ids[ring.start : ring.end]


def test_ring_blocks_are_copies() -> None:
    ring = Ring(0)
    first = TokenColumns(0, [1], ["a"], [0.0], [[TopToken(1, "a", 0.0)]])
    ring.append(first)
    read = ring.read(0)
    ring.append(TokenColumns(1, [2], ["b"], [0.0], [[TopToken(2, "b", 0.0)]]))
    assert first.ids == [1] and read.ids == [1] and ring.read(0).ids == [1, 2]
