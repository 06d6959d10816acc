"""What one gateway knows of a followed job: a bounded ring of its newest tokens, and how far they agree with Redis."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from common.job import Job, JobRecord, JobState, TokenColumns
from common.keys import lane_of_job

RING_BYTES = 256 * 1024
BLOCK_TOKENS = 64
MAX_TOKENS_PER_EVENT = 1024
FIRST_PERIOD_S = 2.0


def fresh_record(job: Job) -> JobRecord:
    """The record of a job that was just submitted, as far as its gateway knows it without asking."""
    now_ms = int(time.time() * 1000)
    return JobRecord(
        job_id=job.job_id,
        state=JobState.QUEUED,
        tenant=job.tenant,
        priority=job.priority,
        dialect=job.dialect,
        epoch=0,
        attempts=0,
        worker="",
        cancelling=False,
        num_tokens=0,
        prompt_tokens=len(job.prompt_ids),
        created_ms=now_ms,
        started_ms=0,
        finished_ms=0,
        deadline_ms=now_ms + round(job.timeout_s * 1000),
        expires_ms=0,
        finish_reason=None,
        error_code="",
        error_message="",
        view=job.view,
    )


def empty_columns(start: int) -> TokenColumns:
    return TokenColumns(start, [], [], [])


def cut_columns(columns: TokenColumns, end: int) -> TokenColumns:
    """The part before absolute offset `end`."""
    keep = max(end - columns.start, 0)
    tops = None if columns.top_tokens is None else columns.top_tokens[:keep]
    return TokenColumns(columns.start, columns.ids[:keep], columns.pieces[:keep], columns.logprobs[:keep], tops)


def _num_bytes(columns: TokenColumns) -> int:
    """About what these columns occupy in memory."""
    tops = columns.top_tokens or ()
    text = sum(map(len, columns.pieces))
    return 150 * len(columns.ids) + 2 * text + 250 * sum(map(len, tops))


class Ring:
    """The newest tokens of one job, in blocks, bounded by bytes. Reading copies: blocks grow in place. Whoever has read
    all before them gets the run that came last as it is."""

    __slots__ = ("_blocks", "_last", "end", "limit", "num_bytes", "start")

    def __init__(self, start: int, limit: int = RING_BYTES) -> None:
        self._blocks: deque[TokenColumns] = deque()
        self._last: TokenColumns | None = None
        self.start = self.end = start
        self.limit, self.num_bytes = limit, 0

    def append(self, columns: TokenColumns) -> None:
        """Add the run that begins at `end`; the oldest blocks go when there is no room."""
        if self._blocks and len(self._blocks[-1].ids) + len(columns.ids) <= BLOCK_TOKENS:
            self._blocks[-1].extend(columns)
        else:
            block = empty_columns(columns.start)
            block.extend(columns)
            self._blocks.append(block)
        self.end, self._last = columns.end, columns
        self.num_bytes += _num_bytes(columns)
        while self.num_bytes > self.limit and len(self._blocks) > 1:
            oldest = self._blocks.popleft()
            self.start = oldest.end
            self.num_bytes -= _num_bytes(oldest)

    def truncate(self, end: int) -> None:
        """Drop the tokens from offset `end` on."""
        self._last = None
        while self._blocks and self._blocks[-1].end > end:
            block = self._blocks.pop()
            self.num_bytes -= _num_bytes(block)
            if block.start < end:
                kept = cut_columns(block, end)
                self._blocks.append(kept)
                self.num_bytes += _num_bytes(kept)
        self.end = min(self.end, end)
        self.start = min(self.start, end)

    def read(self, start: int, max_tokens: int = MAX_TOKENS_PER_EVENT) -> TokenColumns:
        """Up to `max_tokens` tokens (whole blocks) from offset `start`, which must lie within the ring. Not to be
        changed."""
        if self._last is not None and self._last.start == start:
            return self._last
        found = empty_columns(start)
        for block in self._blocks:
            if block.end <= start:
                continue
            found.extend(block.slice(found.end))
            if len(found.ids) >= max_tokens:
                break
        return found


class Listener(Protocol):
    """Who hears of changes: `gateway.hub.Follower`."""

    def wake(self) -> None: ...

    def rewind(self, end: int) -> None: ...


@dataclass(slots=True, eq=False)
class SharedJob:
    """What this gateway knows of one followed job.

    `ids` are the tokens [base, end) that were delivered. `cursor` <= end is the offset up to which they are known to
    agree with Redis: after a reconnect it goes back to `base` and all is compared again. `known_end` is the highest
    offset anyone spoke of: as long as the cursor is behind it, there is a gap.
    """

    job_id: str
    record: JobRecord | None = None
    state: JobState = JobState.QUEUED
    attempts: int = 0
    cancelling: bool = False
    base: int = 0
    ids: array[int] = field(default_factory=lambda: array("I"))
    ring: Ring = field(default_factory=lambda: Ring(0))
    cursor: int = 0
    known_end: int = 0
    final: JobRecord | None = None
    followers: set[Listener] = field(default_factory=set)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    repair: asyncio.Task[None] | None = None
    submitted: Job | None = None
    ended_state: JobState | None = None
    unknown_since: float | None = None
    must_attach: bool = False
    num_frames: int = 0
    first_token_ms: int = 0
    period_s: float = FIRST_PERIOD_S
    next_check: float = 0.0

    @property
    def lane(self) -> str:
        return lane_of_job(self.job_id)

    @property
    def end(self) -> int:
        return self.base + len(self.ids)

    @property
    def has_gap(self) -> bool:
        return self.cursor < self.known_end

    @property
    def needs_repair(self) -> bool:
        is_open = self.record is not None and self.final is None
        return is_open and (
            self.has_gap or self.must_attach or self.ended_state is not None or self.unknown_since is not None
        )

    def open(self, record: JobRecord) -> None:
        self.base = self.cursor = self.known_end = record.num_tokens
        self.ring = Ring(record.num_tokens)
        self.record = record
        if record.state.is_terminal:
            self.finish(record)
        else:
            self.note(record)

    def note(self, record: JobRecord) -> None:
        """Take over what a newer record says of the job's state."""
        self.unknown_since = None
        self.cancelling = record.cancelling
        self.note_state(record.state, record.attempts)

    def note_state(self, state: JobState, attempts: int) -> None:
        if state.is_terminal:
            self.ended_state = state
            return
        self.ended_state = None
        self.state, self.attempts = state, attempts
        self.wake()

    def hear(self, columns: TokenColumns) -> None:
        """Tokens from a frame. They count if they continue what is known; else the log has to decide."""
        self.num_frames += 1
        self.known_end = max(self.known_end, columns.end)
        if columns.start > self.cursor or not columns.ids:
            return
        if columns.start < self.end and self._first_difference(columns) is not None:
            self.cursor = self.base
            return
        self._advance(columns)

    def read(self, columns: TokenColumns) -> bool:
        """Tokens from the log, which begin at or before the cursor. True if delivered tokens had to be taken back."""
        if columns.start > self.cursor:
            return False
        difference = self._first_difference(columns)
        if difference is not None:
            self.rewind(difference)
        self._advance(columns)
        return difference is not None

    def rewind(self, end: int) -> None:
        del self.ids[max(end - self.base, 0) :]
        self.base = min(self.base, end)
        self.ring.truncate(end)
        self.cursor = min(self.cursor, end)
        self.known_end = end
        for follower in self.followers:
            follower.rewind(end)

    def finish(self, record: JobRecord) -> None:
        self.final = record
        self.state, self.attempts, self.cancelling = record.state, record.attempts, False
        self.wake()

    def wake(self) -> None:
        for follower in self.followers:
            follower.wake()

    def _first_difference(self, columns: TokenColumns) -> int | None:
        """The first offset at which delivered tokens differ from `columns`."""
        start, end = max(columns.start, self.base), min(columns.end, self.end)
        if start >= end:
            return None
        mine = self.ids[start - self.base : end - self.base]
        theirs = columns.ids[start - columns.start : end - columns.start]
        if mine.tolist() == theirs:
            return None
        return start + next(index for index, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other)

    def _advance(self, columns: TokenColumns) -> None:
        end = self.end
        news = columns if columns.start == end else columns.slice(end)
        self.cursor = max(self.cursor, columns.end)
        self.known_end = max(self.known_end, self.cursor)
        if not news.ids:
            return
        if not self.first_token_ms:
            self.first_token_ms = int(time.time() * 1000)
        self.ids.extend(news.ids)
        self.ring.append(news)
        self.submitted = None
        self.wake()
