"""The reaper: finds incarnations that are dead, replays what they had shown and gives their jobs to others.

Any worker and any gateway runs one; nobody elects it, and every part of a round may be done twice or by two at once.
No wall clock is involved: a worker is dead when its heartbeat counter stood still for one lease on *this* process' own
monotonic clock, seen without a break. After a lost connection, a slow reply or a stall of its own the watch starts
anew, because then the standstill may have been ours.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

from common import keys, wire
from common.card import decode_card
from common.errors import StoreError
from common.job import TokenColumns
from common.store.connection import Connection
from common.store.replies import integer, stream_entries, string

WAL_PAGE = 64
SWEEP_LIMIT = 100
MAX_SWEEPS = 20
SHORTEST_WAIT, LONGEST_WAIT = 0.8, 1.2
"""In periods."""
MAX_ATTEMPTS = 3
CARD_REFRESH_S = 600.0
TOKENIZER_TTL_S = 7 * 86400

logger = logging.getLogger(__name__)

Tail = tuple[int, int, bytes]
"""(start, end, payload) for a job's log: `wire.encode_columns` of tokens [start, end), b"" when there are none."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One incarnation as the sweep reports it."""

    worker_id: str
    incarnation: str
    is_alive: bool
    counter: int
    num_owned: int


class Reaper:
    """`clock` gives monotonic seconds, `sleep` waits; tests pass their own. `lanes` None means every known lane."""

    def __init__(
        self,
        connection: Connection,
        *,
        lease_s: float,
        max_attempts: int = MAX_ATTEMPTS,
        lanes: list[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.connection, self.lease_s, self.max_attempts = connection, lease_s, max_attempts
        self._fixed_lanes, self._clock, self._sleep = lanes, clock, sleep
        self._lanes: list[str] = []
        self._lanes_until = 0.0
        self._seen: dict[tuple[str, str, str], tuple[int, float]] = {}
        self._rested_since = clock()
        self._last_refresh: dict[str, float] = {}
        self._generation = connection.generation

    @property
    def period_s(self) -> float:
        return self.lease_s / 5

    async def run(self) -> None:
        """Rounds for ever, with jitter so that many reapers do not look at the same moment."""
        while True:
            try:
                await self.round()
            except StoreError as error:
                logger.warning("reaper: %s", error)
            await self._sleep(self.period_s * random.uniform(SHORTEST_WAIT, LONGEST_WAIT))

    async def round(self) -> int:
        """Look at every lane once. Returns the number of jobs given back to a queue.

        Raises:
            StoreError: Redis failed; the observation starts anew.
        """
        if self._clock() - self._rested_since > LONGEST_WAIT * self.period_s + self.lease_s / 4:
            self._forget()
        try:
            return sum([await self._look_at(lane) for lane in await self._known_lanes()])
        except StoreError:
            self._forget()
            raise
        finally:
            self._rested_since = self._clock()

    def _forget(self) -> None:
        self._seen.clear()
        self._lanes_until = 0.0

    async def _known_lanes(self) -> list[str]:
        """Asked for once per lease: a lane that is new has nobody who could have been silent for that long."""
        if self._fixed_lanes is not None:
            return self._fixed_lanes
        now = self._clock()
        if self._lanes_until <= now:
            self._lanes = sorted(string(lane) for lane in await self.connection.run("SMEMBERS", keys.LANES))
            self._lanes_until = now + (self.lease_s if self._lanes else 0)
        return self._lanes

    async def _look_at(self, lane: str) -> int:
        asked = self._clock()
        num_swept, has_card, num_unfinished, rows = await self.connection.call("sweep", lane, SWEEP_LIMIT)
        now = self._clock()
        if now - asked > self.lease_s / 4 or self.connection.generation != self._generation:
            self._generation = self.connection.generation
            self._forget()
        beats = [_beat(row) for row in rows]
        num_recovered = 0
        for beat in beats:
            if not beat.is_alive or (self._is_late(lane, beat, now) and await self._seal(lane, beat)):
                num_recovered += await recover(
                    self.connection, lane, beat.worker_id, beat.incarnation, max_attempts=self.max_attempts
                )
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != lane or _is_listed(key, beats)}
        await self._sweep_on(lane, integer(num_swept))
        await self._keep_or_forget_lane(lane, bool(has_card), integer(num_unfinished))
        return num_recovered

    async def _sweep_on(self, lane: str, num_swept: int) -> None:
        """Many deadlines may be due at once; no single call of the server does more than its share."""
        for _ in range(MAX_SWEEPS):
            if num_swept < SWEEP_LIMIT:
                return
            num_swept = integer((await self.connection.call("sweep", lane, SWEEP_LIMIT))[0])

    def _is_late(self, lane: str, beat: Beat, now: float) -> bool:
        key = (lane, beat.worker_id, beat.incarnation)
        counter, since = self._seen.get(key, (-1, now))
        if counter != beat.counter:
            self._seen[key] = (beat.counter, now)
            return False
        return now - since >= self.lease_s

    async def _seal(self, lane: str, beat: Beat) -> bool:
        reply = await self.connection.call("seal", lane, beat.worker_id, beat.incarnation, beat.counter)
        if integer(reply):
            logger.warning("worker %s sealed: no heartbeat for %.1f s", beat.worker_id, self.lease_s)
        return bool(integer(reply))

    async def _keep_or_forget_lane(self, lane: str, has_card: bool, num_unfinished: int) -> None:
        if has_card:
            await self._refresh(lane)
        elif not num_unfinished and self._fixed_lanes is None:
            await self.connection.run("SREM", keys.LANES, lane)

    async def _refresh(self, lane: str) -> None:
        """A tokenizer lives outside of its lanes, so its time to live is renewed from here."""
        now = self._clock()
        if now - self._last_refresh.get(lane, -CARD_REFRESH_S) < CARD_REFRESH_S:
            return
        self._last_refresh[lane] = now
        card = await self.connection.run("GET", keys.model(lane))
        if card is not None:
            digest = decode_card(card).tokenizer_digest
            await self.connection.run("EXPIRE", keys.tokenizer(digest), TOKENIZER_TTL_S)


def _beat(row: list[bytes | int]) -> Beat:
    return Beat(string(row[0]), string(row[1]), bool(integer(row[2])), integer(row[3]), integer(row[4]))


def _is_listed(key: tuple[str, str, str], beats: Iterable[Beat]) -> bool:
    return any((beat.worker_id, beat.incarnation) == key[1:] for beat in beats)


async def recover(
    connection: Connection, lane: str, worker_id: str, incarnation: str, *, max_attempts: int = MAX_ATTEMPTS
) -> int:
    """Give back every job of a dead incarnation with the tail it had shown, then remove its keys.

    Safe to repeat, to interrupt and to run twice at once. Returns the number of jobs that were given back by this call.
    """
    members = await connection.run("SMEMBERS", keys.owned(lane, worker_id, incarnation))
    jobs = sorted(string(member) for member in members)
    tails = await tails_of(connection, lane, worker_id, incarnation, jobs)
    num_recovered = 0
    for job_id in jobs:
        start, end, payload = tails[job_id]
        args = (worker_id, incarnation, job_id, start, end, payload, max_attempts)
        num_recovered += bool(integer(await connection.call("requeue", lane, *args)))
    await connection.call("bury", lane, worker_id, incarnation)
    return num_recovered


async def tails_of(
    connection: Connection, lane: str, worker_id: str, incarnation: str, jobs: list[str]
) -> dict[str, Tail]:
    """Per job what its worker has shown and its log lacks: write-ahead stream and log together are the truth."""
    if not jobs:
        return {}
    rows = await connection.call("states", lane, *jobs)
    ends = {job_id: integer(row[2]) if row else 0 for job_id, row in zip(jobs, rows, strict=True)}
    tails = {job_id: TokenColumns(end, [], [], []) for job_id, end in ends.items()}
    async for frame in _frames(connection, keys.write_ahead(lane, worker_id, incarnation)):
        for job_id, columns in wire.decode_frame(frame):
            tail = tails.get(job_id)
            if tail is not None and columns.start <= tail.end < columns.end:
                tail.extend(columns.slice(tail.end))
    return {job_id: (c.start, c.end, wire.encode_columns(c) if c.ids else b"") for job_id, c in tails.items()}


async def _frames(connection: Connection, key: str) -> AsyncIterator[bytes]:
    """Frames of a write-ahead stream in order, a page at a time."""
    after = "-"
    while True:
        entries = stream_entries(await connection.run("XRANGE", key, after, "+", "COUNT", WAL_PAGE))
        for _, frame in entries:
            yield frame
        if len(entries) < WAL_PAGE:
            return
        after = f"({entries[-1][0]}"
