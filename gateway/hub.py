"""From frames to followers: one subscription per gateway, one shared state per job, any number of followers of each.

Pub/sub is the fast path and may lose messages; a job's log is the truth. The shared state keeps a bounded ring of the
newest tokens and the ids of all it delivered; a follower is only an offset into it and reads from the log what has
left the ring, so a slow client costs no memory. A gap is healed from the log; what the log contradicts is rewound.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from common.background import News, end
from common.errors import NotFound, OffsetBeyondEnd, StoreError, Unavailable, WireError
from common.job import Job, JobRecord, JobState, TokenColumns
from common.keys import JOB_ID
from common.store.frames import Ended, Frame, Message, Reconnected, StatusChanged
from common.store.replies import Submission
from gateway.shared_job import FIRST_PERIOD_S, SharedJob, cut_columns, empty_columns, fresh_record

LOG_PAGE = 32
TICK_S = 0.5
LONGEST_PERIOD_S = 15.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
UNKNOWN_S, RESUBMIT_S = 10.0, 2.0
OFFSET_WAIT_S, OFFSET_GRACE_S = 15.0, 1.0
STRAY_S = 2.0
MAX_STRAYS = 10_000
MAX_REPAIRS = 16
UNLIMITED = 2**40

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that follow what this follower has seen."""

    columns: TokenColumns


@dataclass(frozen=True, slots=True)
class Status:
    """How the job stands: the first event of every follower, then one for each change but the last."""

    state: JobState
    attempts: int
    cancelling: bool


@dataclass(frozen=True, slots=True)
class Rewind:
    """Forget the tokens from offset `end` on: Redis lost them together with their worker."""

    end: int


@dataclass(frozen=True, slots=True)
class End:
    """The job is terminal and every token was delivered. Nothing comes after it."""

    record: JobRecord


@dataclass(frozen=True, slots=True)
class Stopped:
    """This gateway stops: go on at another one from the same offset. Nothing comes after it."""


Event = Tokens | Status | Rewind | End | Stopped


class FrameSource(Protocol):
    async def add_lane(self, lane: str) -> None: ...

    def __aiter__(self) -> AsyncIterator[Message]: ...


class FollowedJobs(Protocol):
    """What the hub needs of `common.store.jobs.JobStore`."""

    def frames(self, gateway: str, lanes: list[str]) -> AbstractAsyncContextManager[FrameSource]: ...

    async def attach(self, job_id: str, gateway: str) -> JobRecord | None: ...

    async def detach(self, job_id: str, gateway: str) -> None: ...

    async def record(self, job_id: str) -> JobRecord | None: ...

    async def states(self, lane: str, job_ids: list[str]) -> dict[str, tuple[JobState, int, int]]: ...

    async def log(self, job_id: str, start: int = 0, *, max_entries: int = ...) -> TokenColumns: ...

    async def submit(
        self,
        job: Job,
        *,
        gateway: str | None,
        max_queued_tokens: int,
        tenant_max_jobs: int,
        scale_from_zero: bool = ...,
    ) -> Submission: ...


@dataclass(slots=True)
class HubCounters:
    """Since the start of this gateway."""

    gaps_healed: int = 0
    rewinds: int = 0
    resubscribed: int = 0
    resubmitted: int = 0
    log_reads: int = 0


class Follower:
    """One reader of a job: an offset, and what it was last told of the state. Also an async iterator of events."""

    def __init__(self, hub: Hub, shared: SharedJob, start: int) -> None:
        self._hub, self._shared = hub, shared
        self.offset = start
        self._rewound_to: int | None = None
        self._told: Status | None = None
        self._is_done = False
        self._news = News()

    @property
    def job_id(self) -> str:
        return self._shared.job_id

    @property
    def record(self) -> JobRecord:
        """The record when the job was opened here, or the final one."""
        record = self._shared.final or self._shared.record
        if record is None:
            raise NotFound("no such job")
        return record

    @property
    def num_tokens(self) -> int:
        """Tokens this gateway has seen of the job."""
        return self._shared.end

    @property
    def first_token_ms(self) -> int:
        """Unix milliseconds at which this gateway saw the job's first new token, 0 before it."""
        return self._shared.first_token_ms

    def wake(self) -> None:
        self._news.set()

    def rewind(self, end: int) -> None:
        if self.offset > end:
            self.offset = end
            self._rewound_to = end if self._rewound_to is None else min(end, self._rewound_to)
        self.wake()

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None when `timeout_s` seconds passed without one. After End or Stopped: None at once."""
        if self._is_done:
            return None
        while True:
            self._news.clear()
            event = self._at_hand()
            if event is None and self.offset < self._shared.end:
                event = await self._from_log()
            if event is not None:
                return event
            if not await self._wait(timeout_s):
                return None

    def ready(self) -> list[Event]:
        """All further events that are there without waiting: to be sent in one write with the one before."""
        events: list[Event] = []
        while not self._is_done and len(events) < 16 and (event := self._at_hand()) is not None:
            events.append(event)
        return events

    async def ended(self, timeout_s: float | None = None) -> JobRecord | None:
        """Wait for the end without reading tokens; None when it did not come in time or this gateway stops."""
        limit = None if timeout_s is None else self._hub.clock() + timeout_s
        while self._shared.final is None and not self._hub.is_stopping:
            rest = None if limit is None else limit - self._hub.clock()
            self._news.clear()
            if (rest is not None and rest <= 0) or not await self._wait(rest):
                break
        return self._shared.final

    async def columns(self) -> TokenColumns:
        """All tokens so far, from offset 0."""
        found = empty_columns(0)
        while found.end < self._shared.end or (self._shared.final and found.end < self._shared.final.num_tokens):
            ring = self._shared.ring
            part = ring.read(found.end) if ring.start <= found.end < ring.end else await self._hub.read_log(self, found)
            if not part.ids:
                break
            found.extend(part)
        return found

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def _at_hand(self) -> Event | None:
        if self._hub.is_stopping:
            self._is_done = True
            return Stopped()
        if self._rewound_to is not None:
            end, self._rewound_to = self._rewound_to, None
            return Rewind(end)
        return self._status() or self._tokens() or self._end()

    def _status(self) -> Status | None:
        shared, told = self._shared, self._told
        if told is not None:
            is_same = told.state is shared.state and told.attempts == shared.attempts
            if (is_same and told.cancelling is shared.cancelling) or shared.state.is_terminal:
                return None
        self._told = Status(shared.state, shared.attempts, shared.cancelling)
        return self._told

    def _tokens(self) -> Tokens | None:
        ring = self._shared.ring
        if not ring.start <= self.offset < ring.end:
            return None
        columns = ring.read(self.offset)
        self.offset = columns.end
        return Tokens(columns)

    def _end(self) -> End | None:
        final = self._shared.final
        if final is None or self.offset < final.num_tokens:
            return None
        self._is_done = True
        return End(final)

    async def _from_log(self) -> Tokens | None:
        """What has left the ring, or was never in it."""
        start = self.offset
        columns = await self._hub.read_log(self, empty_columns(start))
        if not columns.ids or self.offset != start or self._rewound_to is not None:
            return None
        self.offset = columns.end
        return Tokens(columns)

    async def arrived(self, timeout_s: float) -> None:
        """Wait until something happened to the job, or `timeout_s` seconds."""
        self._news.clear()
        await self._news.within(timeout_s)

    async def _wait(self, timeout_s: float | None) -> bool:
        """False after `timeout_s`. One that is behind the ring only waits for Redis, and tries again by itself."""
        is_behind = self.offset < self._shared.ring.start
        limit = LONGEST_PAUSE_S if is_behind else timeout_s
        if self._shared.final is not None and not is_behind:
            return True
        return await self._news.within(limit) or is_behind


class Hub:
    """All followed jobs of one gateway. `lanes` are listened to before anybody follows a job there.

    `clock` gives monotonic seconds, `sleep` waits; tests pass their own.
    """

    def __init__(
        self,
        jobs: FollowedJobs,
        gateway_id: str,
        *,
        lanes: Callable[[], Iterable[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.jobs, self.gateway_id, self.clock, self._known_lanes = jobs, gateway_id, clock, lanes
        self.counters = HubCounters()
        self.is_stopping = False
        self._sleep = sleep
        self._shared: dict[str, SharedJob] = {}
        self._strays: dict[str, float] = {}
        self._detaches: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._source: FrameSource | None = None
        self._is_listening = asyncio.Event()
        self._lanes: set[str] = set()
        self._repairs = asyncio.Semaphore(MAX_REPAIRS)

    @property
    def num_jobs(self) -> int:
        return len(self._shared)

    @property
    def num_followers(self) -> int:
        return sum(len(shared.followers) for shared in self._shared.values())

    async def start(self) -> None:
        self._spawn(self._listen())
        self._spawn(self._tick_for_ever())
        await self._is_listening.wait()

    def stop_followers(self) -> None:
        """Every follower gets Stopped, now and later: this gateway is about to go."""
        self.is_stopping = True
        for shared in self._shared.values():
            shared.wake()

    async def close(self) -> None:
        self.stop_followers()
        await end(*self._tasks)

    @asynccontextmanager
    async def follow(
        self, job_id: str, start: int = 0, *, tenant: str | None = None, submitted: Job | None = None
    ) -> AsyncIterator[Follower]:
        """Follow a job from offset `start` on. With `submitted`, a job that this gateway made a moment ago with itself
        as follower, Redis is not asked; should Redis forget the job before its first token, it is submitted again.

        Raises:
            NotFound: no such job, or not one of `tenant`.
            OffsetBeyondEnd: the job has (or had at its end) fewer than `start` tokens.
            StoreUnavailable: Redis is away.
            Unavailable: this gateway stops.
        """
        if self.is_stopping:
            raise stopping()
        shared = self._shared.setdefault(job_id, SharedJob(job_id))
        follower = Follower(self, shared, start)
        shared.followers.add(follower)
        try:
            await self._open(shared, submitted)
            if tenant is not None and follower.record.tenant != tenant:
                raise unknown_job(job_id)
            await self._await_offset(shared, follower)
            yield follower
        finally:
            shared.followers.discard(follower)
            if not shared.followers:
                self._leave(shared)

    def note(self, record: JobRecord) -> None:
        """A route learned the newest record of a job, for example by cancelling it."""
        shared = self._shared.get(record.job_id)
        if shared is not None and shared.record is not None and shared.final is None:
            shared.note(record)
            self._repair(shared)

    async def tick(self) -> None:
        """Ask, in one call per lane, how the jobs stand of which nothing was heard for their period."""
        now = self.clock()
        for lane in list(self._known_lanes()):
            with suppress(StoreError):
                await self.listen(lane)
        due: defaultdict[str, list[SharedJob]] = defaultdict(list)
        for shared in self._shared.values():
            if shared.record is not None and shared.final is None and now >= shared.next_check:
                due[shared.lane].append(shared)
        for lane, group in due.items():
            await self._check(lane, group)
        await self._detach_strays(now)

    async def read_log(self, follower: Follower, after: TokenColumns) -> TokenColumns:
        """A page of the log from the end of `after` on, empty while Redis is away or has no more."""
        shared = self._shared.get(follower.job_id)
        try:
            self.counters.log_reads += 1
            columns = await self.jobs.log(follower.job_id, after.end, max_entries=LOG_PAGE)
        except (StoreError, WireError) as error:
            logger.warning("cannot read a log: %s", error, extra={"job_id": follower.job_id})
            return empty_columns(after.end)
        if shared is None:
            return columns
        if shared.final is None and columns.end > shared.end:
            self._take_log(shared, columns)
        return cut_columns(columns, max(shared.end, after.end))

    # opening and leaving

    async def _open(self, shared: SharedJob, submitted: Job | None) -> None:
        async with shared.opening:
            if shared.record is not None:
                return
            if not JOB_ID.fullmatch(shared.job_id):
                raise unknown_job(shared.job_id)
            if detach := self._detaches.get(shared.job_id):
                await asyncio.wait([detach])
            was_listening = await self.listen(shared.lane)
            if submitted is not None and was_listening:
                record: JobRecord | None = fresh_record(submitted)
            else:
                record = await self.jobs.attach(shared.job_id, self.gateway_id)
            if record is None:
                raise unknown_job(shared.job_id)
            shared.submitted = submitted
            shared.next_check = self.clock() + shared.period_s
            shared.open(record)
            self._strays.pop(shared.job_id, None)

    async def listen(self, lane: str) -> bool:
        """Hear a lane from now on; best before submitting a job there. False if it was not heard until now.

        Raises:
            StoreUnavailable: Redis is away.
        """
        if lane in self._lanes:
            return True
        assert self._source is not None, "start the hub first"
        await self._source.add_lane(lane)
        self._lanes.add(lane)
        return False

    async def _await_offset(self, shared: SharedJob, follower: Follower) -> None:
        """A client may have seen more than is in the log yet: its worker, or who replays it, sends that in a moment."""
        limit = self.clock() + OFFSET_WAIT_S
        num_frames = shared.num_frames
        while follower.offset > shared.end and shared.final is None and shared.state is not JobState.QUEUED:
            if shared.num_frames > num_frames:
                limit = min(limit, self.clock() + OFFSET_GRACE_S)
                num_frames = UNLIMITED
            if self.is_stopping:
                raise stopping()
            if self.clock() >= limit:
                break
            await follower.arrived(0.25)
        if follower.offset > shared.end:
            raise OffsetBeyondEnd(shared.end)

    def _leave(self, shared: SharedJob) -> None:
        if self._shared.get(shared.job_id) is not shared:
            return
        del self._shared[shared.job_id]
        if shared.repair is not None:
            shared.repair.cancel()
        if shared.record is not None and shared.final is None and not self.is_stopping:
            self._detach(shared.job_id)

    def _detach(self, job_id: str) -> None:
        async def detach() -> None:
            with suppress(StoreError):
                await self.jobs.detach(job_id, self.gateway_id)

        task = self._spawn(detach())
        self._detaches[job_id] = task
        task.add_done_callback(lambda _: self._detaches.pop(job_id, None))

    # hearing

    async def _listen(self) -> None:
        async with self.jobs.frames(self.gateway_id, []) as source:
            self._source = source
            self._is_listening.set()
            async for message in source:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Frame(runs):
                for job_id, columns in runs:
                    self._hear(job_id, columns)
            case Ended(job_id, state, num_tokens):
                if (shared := self._known(job_id)) is not None:
                    shared.known_end = max(shared.known_end, num_tokens)
                    shared.note_state(state, shared.attempts)
                    self._repair(shared)
            case StatusChanged(job_id, state, attempts):
                if (shared := self._known(job_id)) is not None and shared.ended_state is None:
                    self._heard(shared)
                    shared.note_state(state, attempts)
            case Reconnected():
                self._resubscribed()

    def _hear(self, job_id: str, columns: TokenColumns) -> None:
        shared = self._known(job_id)
        if shared is None:
            if len(self._strays) < MAX_STRAYS and job_id not in self._shared:
                self._strays.setdefault(job_id, self.clock())
            return
        self._heard(shared)
        shared.hear(columns)
        self._repair(shared)

    def _known(self, job_id: str) -> SharedJob | None:
        shared = self._shared.get(job_id)
        return shared if shared is not None and shared.record is not None and shared.final is None else None

    def _heard(self, shared: SharedJob) -> None:
        shared.period_s = FIRST_PERIOD_S
        shared.next_check = self.clock() + FIRST_PERIOD_S

    def _resubscribed(self) -> None:
        """Anything may have happened meanwhile, the loss of Redis' last writes included."""
        self.counters.resubscribed += 1
        for shared in self._shared.values():
            shared.must_attach = True
            shared.known_end = max(shared.known_end, shared.end)
            shared.cursor = shared.base
            self._repair(shared)

    # asking

    async def _tick_for_ever(self) -> None:
        while True:
            await self._sleep(TICK_S)
            await self.tick()

    async def _check(self, lane: str, group: list[SharedJob]) -> None:
        try:
            states = await self.jobs.states(lane, [shared.job_id for shared in group])
        except StoreError as error:
            logger.warning("cannot ask for states: %s", error)
            return
        for shared in group:
            shared.period_s = min(2 * shared.period_s, LONGEST_PERIOD_S)
            shared.next_check = self.clock() + shared.period_s
            found = states.get(shared.job_id)
            if found is None:
                shared.unknown_since = self.clock() if shared.unknown_since is None else shared.unknown_since
            else:
                state, attempts, num_tokens = found
                shared.known_end = max(shared.known_end, num_tokens)
                shared.note_state(state, attempts)
            self._repair(shared)

    async def _detach_strays(self, now: float) -> None:
        """Frames of a job that nobody follows here: our detach got lost."""
        for job_id, since in list(self._strays.items()):
            if job_id in self._shared or now - since > STRAY_S:
                del self._strays[job_id]
            if job_id not in self._shared and now - since > STRAY_S:
                self._detach(job_id)

    # repairing

    def _repair(self, shared: SharedJob) -> None:
        if shared.needs_repair and (shared.repair is None or shared.repair.done()):
            shared.repair = self._spawn(self._repair_until_whole(shared))

    async def _repair_until_whole(self, shared: SharedJob) -> None:
        pause = FIRST_PAUSE_S
        had_gap = shared.has_gap
        while shared.needs_repair and shared.followers:
            try:
                async with self._repairs:
                    await self._repair_once(shared)
            except (StoreError, WireError) as error:
                logger.warning("cannot repair a stream yet: %s", error, extra={"job_id": shared.job_id})
            if shared.needs_repair:
                await self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        self.counters.gaps_healed += had_gap

    async def _repair_once(self, shared: SharedJob) -> None:
        if shared.has_gap:
            await self._heal(shared)
        if not shared.needs_repair:
            return
        record = await self._ask(shared)
        if record is None:
            await self._miss(shared)
            return
        shared.must_attach = False
        shared.note(record)
        if record.state.is_terminal:
            await self._finish(shared, record)

    async def _ask(self, shared: SharedJob) -> JobRecord | None:
        if shared.ended_state is not None:
            return await self.jobs.record(shared.job_id)
        return await self.jobs.attach(shared.job_id, self.gateway_id)

    async def _heal(self, shared: SharedJob) -> None:
        while True:
            self.counters.log_reads += 1
            columns = await self.jobs.log(shared.job_id, shared.cursor, max_entries=LOG_PAGE)
            if not columns.ids:
                return
            self._take_log(shared, columns)

    def _take_log(self, shared: SharedJob, columns: TokenColumns) -> None:
        if shared.read(columns):
            self.counters.rewinds += 1
            logger.warning("delivered tokens were taken back", extra={"job_id": shared.job_id, "end": shared.end})

    async def _finish(self, shared: SharedJob, record: JobRecord) -> None:
        """The log of a terminal job is complete and never changes."""
        shared.known_end = max(shared.known_end, record.num_tokens)
        if shared.has_gap:
            await self._heal(shared)
        if shared.end > record.num_tokens:
            shared.rewind(record.num_tokens)
            self.counters.rewinds += 1
        if shared.end >= record.num_tokens:
            shared.finish(record)

    async def _miss(self, shared: SharedJob) -> None:
        """Redis has no such job: erased, or lost with the last writes; then its worker, or we, bring it back."""
        now = self.clock()
        shared.unknown_since = now if shared.unknown_since is None else shared.unknown_since
        if shared.ended_state is not None:
            shared.finish(self._last_words(shared, shared.ended_state))
        elif shared.submitted is not None and now - shared.unknown_since > RESUBMIT_S:
            self.counters.resubmitted += 1
            await self.jobs.submit(
                shared.submitted,
                gateway=self.gateway_id,
                max_queued_tokens=UNLIMITED,
                tenant_max_jobs=UNLIMITED,
                scale_from_zero=True,
            )
        elif now - shared.unknown_since > UNKNOWN_S:
            shared.finish(self._last_words(shared, JobState.FAILED))

    def _last_words(self, shared: SharedJob, state: JobState) -> JobRecord:
        record = shared.record
        assert record is not None, "only opened jobs are repaired"
        message = "the job was erased or lost" if state is JobState.FAILED else ""
        return dataclasses.replace(
            record,
            state=state,
            cancelling=False,
            num_tokens=shared.end,
            finished_ms=int(time.time() * 1000),
            error_code="job_lost" if message else "",
            error_message=message,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the hub ended", exc_info=error)


def stopping() -> Unavailable:
    """What requests hear that come while this gateway goes away."""
    return Unavailable("this gateway stops; ask another one", code="gateway_stops", retry_after_s=1.0)


def unknown_job(job_id: str) -> NotFound:
    """The same text for unknown, erased and other tenants' jobs, whichever form of its id the client knows."""
    shown = f"job_{job_id}" if JOB_ID.fullmatch(job_id) else job_id[:80]
    return NotFound(f"no job {shown!r}", code="job_not_found")
