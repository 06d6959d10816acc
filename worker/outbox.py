"""What the agent still has to tell Redis: new tokens, due log chunks, ends of jobs. Builds step calls; does no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from common import wire
from common.job import FinishReason, JobState, TokenColumns
from common.store.replies import Chunk, Finish, StepCall, StepReply

CHUNK_TOKENS = 64
CHUNK_AGE_STEPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job ends, waiting for its last tokens to go."""

    state: JobState
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error_message: str = ""


@dataclass(slots=True)
class Outgoing:
    """One job on its way out. `pending` are the tokens after the log's end, of which those before `framed_end` are in
    an answered step call; `payloads` are the log entries that hold all tokens before.

    `first_step` is the oldest call that carried a token of `pending`: the write-ahead stream must keep it.
    """

    job_id: str
    epoch: int
    gateways: set[str]
    payloads: list[bytes]
    pending: TokenColumns
    framed_end: int
    taken_at: int
    first_step: int | None = None
    newcomers: set[str] = field(default_factory=set)
    end: JobEnd | None = None

    @property
    def flushed_end(self) -> int:
        return self.pending.start

    @property
    def fresh(self) -> TokenColumns:
        """Tokens that no answered call holds."""
        return self.pending.slice(self.framed_end)

    @property
    def is_urgent(self) -> bool:
        """Somebody waits to see anything at all."""
        is_beginning = self.framed_end == self.taken_at and self.framed_end < self.pending.end
        return is_beginning or bool(self.newcomers)

    def columns(self, end: int) -> TokenColumns:
        """All tokens before `end`, from the job's first."""
        merged = TokenColumns(0, [], [], [])
        for payload in self.payloads:
            merged.extend(wire.decode_columns(payload).slice(merged.end))
        merged.extend(_before(self.pending, end))
        return merged


@dataclass(slots=True)
class _InFlight:
    call: StepCall
    framed: dict[str, int]
    flushed: dict[str, bytes]
    newcomers: dict[str, set[str]]
    finished: list[str]
    engine_step: int


def _before(columns: TokenColumns, end: int) -> TokenColumns:
    count = max(0, end - columns.start)
    tops = None if columns.top_tokens is None else columns.top_tokens[:count]
    return TokenColumns(columns.start, columns.ids[:count], columns.pieces[:count], columns.logprobs[:count], tops)


class Outbox:
    """Merges everything that happened since the last step call into the next one, or what is urgent of it; at most one
    is under way.

    A token leaves `pending` only when the call that put it into the job's log was answered, and a job leaves the outbox
    only when its end was answered; until then its oldest unlogged token pins the write-ahead stream.

    `engine_step` is the newest engine step whose tokens are here, `settled_step` the newest that is wholly on Redis.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Outgoing] = {}
        self._in_flight: _InFlight | None = None
        self._step = 0
        self._cursor = "0-0"
        self.engine_step = self._settled_step = 0

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def get(self, job_id: str) -> Outgoing | None:
        return self._jobs.get(job_id)

    @property
    def jobs(self) -> list[Outgoing]:
        return list(self._jobs.values())

    @property
    def has_news(self) -> bool:
        """Whether a call would carry more than a heartbeat."""
        if self._in_flight is not None:
            return True
        return any(j.end is not None or j.newcomers or j.framed_end < j.pending.end for j in self._jobs.values())

    @property
    def last_step(self) -> int:
        """The last call that was answered."""
        return self._step

    @property
    def settled_step(self) -> int:
        return self._settled_step if self.has_news else self.engine_step

    @property
    def is_urgent(self) -> bool:
        return any(job.is_urgent for job in self._jobs.values())

    def add(self, job_id: str, epoch: int, logged: TokenColumns, gateways: list[str]) -> None:
        """A job that now belongs to this worker, with the tokens its log holds already."""
        payloads = [wire.encode_columns(logged)] if logged.ids else []
        pending = TokenColumns(logged.end, [], [], [])
        self._jobs[job_id] = Outgoing(job_id, epoch, set(gateways), payloads, pending, logged.end, logged.end)

    def restore(self, job: Outgoing) -> None:
        """A job whose end may have been lost comes back, to end once more."""
        self._jobs[job.job_id] = job

    def push(self, job_id: str, columns: TokenColumns) -> None:
        """New tokens of a job, following those given before."""
        job = self._jobs.get(job_id)
        if job is not None and columns.ids:
            job.pending.extend(columns)

    def end(self, job_id: str, end: JobEnd) -> None:
        job = self._jobs.get(job_id)
        if job is not None and job.end is None:
            job.end = end

    def drop(self, job_id: str) -> None:
        """The job is no longer ours."""
        self._jobs.pop(job_id, None)

    def attach(self, job_id: str, gateway: str) -> None:
        """The gateway first gets what the log does not hold yet, then every frame."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.gateways.add(gateway)
            job.newcomers.add(gateway)

    def detach(self, job_id: str, gateway: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            job.gateways.discard(gateway)
            job.newcomers.discard(gateway)

    def has_followers(self, job_id: str) -> bool:
        job = self._jobs.get(job_id)
        return job is not None and bool(job.gateways)

    def next_call(self, stats: dict[str, float], *, only_urgent: bool = False) -> StepCall:
        """The call to make: the one without an answer again, unchanged, or a new one with all the news, or with those
        of the jobs that are urgent."""
        if self._in_flight is None:
            chosen = [job for job in self._jobs.values() if job.is_urgent or not only_urgent]
            self._in_flight = self._build(chosen, stats, self._settled_step if only_urgent else self.engine_step)
        return self._in_flight.call

    def _build(self, jobs: list[Outgoing], stats: dict[str, float], settled_step: int) -> _InFlight:
        """`settled_step` as it is once the call is answered."""
        step = self._step + 1
        for job in jobs:
            if job.first_step is None and job.pending.ids:
                job.first_step = step
        flushed = {job.job_id: wire.encode_columns(job.pending) for job in jobs if self._is_due(job, step)}
        fresh = {job.job_id: job.fresh for job in jobs}
        runs = [(job_id, columns) for job_id, columns in fresh.items() if columns.ids]
        frame = wire.encode_frame(runs) if runs else b""
        ends = [job for job in jobs if job.end is not None]
        call = StepCall(
            step=step,
            previous=self._step,
            min_step=min((j.first_step for j in self._jobs.values() if j.first_step is not None), default=step),
            frame=frame,
            control_cursor=self._cursor,
            gateway_frames=self._gateway_frames(jobs, fresh, len(runs), frame),
            chunks=[_chunk(job, flushed[job.job_id]) for job in jobs if job.job_id in flushed and job.end is None],
            finishes=[_finish(job, flushed.get(job.job_id, b"")) for job in ends],
            stats=stats,
        )
        framed = {job.job_id: job.pending.end for job in jobs}
        newcomers = {job.job_id: set(job.newcomers) for job in jobs if job.newcomers}
        return _InFlight(call, framed, flushed, newcomers, [job.job_id for job in ends], settled_step)

    @staticmethod
    def _is_due(job: Outgoing, step: int) -> bool:
        """Enough tokens, or old enough ones that a quiet job does not hold the write-ahead stream for ever."""
        if not job.pending.ids or job.first_step is None:
            return False
        is_old = step - job.first_step >= CHUNK_AGE_STEPS
        return is_old or job.end is not None or len(job.pending.ids) >= CHUNK_TOKENS

    @staticmethod
    def _gateway_frames(
        jobs: list[Outgoing], fresh: dict[str, TokenColumns], num_runs: int, frame: bytes
    ) -> dict[str, bytes]:
        parts: dict[str, list[tuple[str, TokenColumns]]] = {}
        num_plain: dict[str, int] = {}
        for job in jobs:
            for gateway in sorted(job.gateways):
                is_new = gateway in job.newcomers
                columns = job.pending if is_new else fresh[job.job_id]
                if columns.ids:
                    parts.setdefault(gateway, []).append((job.job_id, columns))
                    num_plain[gateway] = num_plain.get(gateway, 0) + (not is_new)
        return {
            gateway: frame if num_plain[gateway] == len(part) == num_runs else wire.encode_frame(part)
            for gateway, part in parts.items()
        }

    def answered(self, reply: StepReply) -> list[str]:
        """Settle the call under way; the jobs that are gone now: ended, or lost to another worker."""
        sent = self._in_flight
        assert sent is not None, "no call is under way"
        self._in_flight = None
        self._step, self._settled_step = sent.call.step, sent.engine_step
        self._cursor = reply.control_cursor
        for job in self._jobs.values():
            self._settle(job, sent)
        for gateway in reply.dead_gateways:
            for job in self._jobs.values():
                job.gateways.discard(gateway)
        gone = [*sent.finished, *reply.lost]
        for job_id in gone:
            self.drop(job_id)
        return gone

    @staticmethod
    def _settle(job: Outgoing, sent: _InFlight) -> None:
        end = sent.framed.get(job.job_id)
        if end is None or end < job.pending.start:
            return
        job.framed_end = max(job.framed_end, end)
        job.newcomers -= sent.newcomers.get(job.job_id, set())
        payload = sent.flushed.get(job.job_id)
        if payload is not None:
            job.payloads.append(payload)
            job.pending = job.pending.slice(end)
            job.first_step = None

    def begin_engine(self) -> None:
        """A new engine numbers its steps from the beginning."""
        self.engine_step = self._settled_step = 0
        if self._in_flight is not None:
            self._in_flight.engine_step = 0

    def continue_after(self, last_step: int) -> None:
        """Redis' last step is `last_step`, not what we thought: number the next call accordingly and say all again."""
        self._in_flight = None
        self._step = last_step

    def begin_incarnation(self) -> None:
        """A new incarnation numbers its steps and its control messages from the beginning."""
        self.continue_after(0)
        self._cursor = "0-0"
        for job in self._jobs.values():
            job.first_step = None

    def adopted(self, job_id: str, end: int) -> None:
        """Redis has every token before `end` in the job's log again."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        flushed = _before(job.pending, end)
        if flushed.ids:
            job.payloads.append(wire.encode_columns(flushed))
        job.pending = job.pending.slice(end)
        job.first_step = None

    def reopen(self, job_id: str, last_end: int) -> None:
        """The job's log ends at `last_end`, earlier than we thought: send everything from there once more."""
        self._in_flight = None
        job = self._jobs.get(job_id)
        if job is None:
            return
        everything = job.columns(job.pending.end)
        kept = _before(everything, last_end)
        job.payloads = [wire.encode_columns(kept)] if kept.ids else []
        job.pending = everything.slice(last_end)
        job.framed_end = min(job.framed_end, last_end)
        job.first_step = None


def _chunk(job: Outgoing, payload: bytes) -> Chunk:
    return Chunk(job.job_id, job.epoch, job.pending.start, job.pending.end, payload)


def _finish(job: Outgoing, tail: bytes) -> Finish:
    assert job.end is not None
    return Finish(
        job_id=job.job_id,
        epoch=job.epoch,
        start=job.pending.start,
        end=job.pending.end,
        tail=tail,
        state=job.end.state,
        finish_reason=job.end.finish_reason,
        error_code=job.end.error_code,
        error_message=job.end.error_message,
    )
