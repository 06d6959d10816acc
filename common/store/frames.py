"""What a gateway hears: one pub/sub channel per lane, read by one task, handed on as typed messages in order.

Pub/sub may lose messages and says nothing about it. It is the fast path and the wake-up; the log is the truth.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import redis
from redis.asyncio.client import PubSub

from common import keys, wire
from common.background import end
from common.errors import ConfigurationError, StoreUnavailable, WireError
from common.job import JobState, TokenColumns
from common.store.connection import AWAY, Connection

MAX_WAITING = 4096
POLL_S = 1.0
PING_AFTER_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """New tokens of jobs this gateway follows, from one engine step."""

    runs: list[tuple[str, TokenColumns]]


@dataclass(frozen=True, slots=True)
class Ended:
    job_id: str
    state: JobState
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """A worker took the job, or it went back to the queue. `attempts`: times taken."""

    job_id: str
    state: JobState
    attempts: int


@dataclass(frozen=True, slots=True)
class Reconnected:
    """Messages may have been lost: ask for the states of all live jobs, and attach to them again."""


Message = Frame | Ended | StatusChanged | Reconnected


def decode_message(data: bytes) -> Frame | Ended | StatusChanged:
    """One message of a gateway's channel.

    Raises:
        WireError: if it is none of this version.
    """
    value = wire.unpack(data)
    if not isinstance(value, list) or len(value) < 3 or value[0] != wire.VERSION:
        raise WireError("not a message of this version")
    if value[1] == "T" and len(value) == 3:
        return Frame(wire.runs_of(value[2]))
    try:
        _, verb, job_id, state, number = value
        if verb == "E":
            return Ended(job_id, JobState(state), int(number))
        if verb == "S":
            return StatusChanged(job_id, JobState(state), int(number))
    except (TypeError, ValueError) as error:
        raise WireError(f"not a control message: {error}") from error
    raise WireError(f"unknown message {value[1]!r}")


class Subscription:
    """Async context manager and iterator. A subscription is in force when `__aenter__` or `add_lane` returns."""

    def __init__(self, connection: Connection, gateway: str, lanes: list[str]) -> None:
        if not keys.WORKER_ID.fullmatch(gateway):
            raise ConfigurationError(f"a gateway id is 1 to 64 of [A-Za-z0-9_-], not {gateway!r}")
        self._connection, self._gateway = connection, gateway
        self._lanes = dict.fromkeys(lanes)
        self._queue: asyncio.Queue[Message] = asyncio.Queue(MAX_WAITING)
        self._confirmed: dict[bytes, asyncio.Event] = {}
        self._pubsub: PubSub | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read_for_ever())
        try:
            for lane in list(self._lanes):
                await self._confirmation(lane)
        except BaseException:
            # without __aenter__ there is no __aexit__, and a cancellation too must not leave the reader behind
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        if self._reader is not None:
            await end(self._reader)
        await self._disconnect()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        return await self._queue.get()

    async def add_lane(self, lane: str) -> None:
        """Hear this lane, too.

        Raises:
            StoreUnavailable: Redis did not confirm it in time; it will be subscribed when Redis is back.
        """
        if lane not in self._lanes:
            self._lanes[lane] = None
            if self._pubsub is not None:
                with suppress(*AWAY):
                    await self._pubsub.subscribe(keys.channel(lane, self._gateway))
        await self._confirmation(lane)

    async def _confirmation(self, lane: str) -> None:
        try:
            await asyncio.wait_for(self._event(lane).wait(), self._connection.timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable("Redis did not confirm a subscription") from error

    def _event(self, lane: str) -> asyncio.Event:
        return self._confirmed.setdefault(keys.channel(lane, self._gateway).encode(), asyncio.Event())

    async def _read_for_ever(self) -> None:
        pause, is_first = FIRST_PAUSE_S, True
        while True:
            try:
                await self._connect()
                if not is_first:
                    for lane in list(self._lanes):
                        await self._await_subscribed(lane)
                    await self._queue.put(Reconnected())
                is_first, pause = False, FIRST_PAUSE_S
                await self._read()
            except (redis.RedisError, *AWAY) as error:
                logger.warning("subscription lost: %s", error)
            await self._disconnect()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _connect(self) -> None:
        for event in self._confirmed.values():
            event.clear()
        self._pubsub = self._connection.redis.pubsub()
        if self._lanes:
            await self._pubsub.subscribe(*[keys.channel(lane, self._gateway) for lane in self._lanes])

    async def _await_subscribed(self, lane: str) -> None:
        """Read until the server confirmed `lane`; tokens that come in between are kept."""
        limit = time.monotonic() + self._connection.timeout_s
        while not self._event(lane).is_set():
            if time.monotonic() > limit:
                raise redis.TimeoutError("no confirmation of a subscription")
            await self._read_one()

    async def _read(self) -> None:
        last_heard = time.monotonic()
        while True:
            if await self._read_one():
                last_heard = time.monotonic()
            silence = time.monotonic() - last_heard
            if silence > PING_AFTER_S + self._connection.timeout_s:
                raise redis.ConnectionError("the subscription's connection is dead")
            if silence > PING_AFTER_S and self._pubsub is not None and self._lanes:
                await self._pubsub.ping()

    async def _read_one(self) -> bool:
        """Wait up to POLL_S for one message and hand it on. False when none came."""
        if self._pubsub is None or not self._lanes:
            await asyncio.sleep(POLL_S / 10)
            if self._pubsub is not None and self._lanes and not self._pubsub.subscribed:
                await self._pubsub.subscribe(*[keys.channel(lane, self._gateway) for lane in self._lanes])
            return True
        message: dict[str, Any] | None = await self._pubsub.get_message(timeout=POLL_S)
        if message is None:
            return False
        if message["type"] == "subscribe":
            self._confirmed.setdefault(message["channel"], asyncio.Event()).set()
        elif message["type"] == "message":
            await self._hand_on(message["data"])
        return True

    async def _hand_on(self, data: bytes) -> None:
        try:
            await self._queue.put(decode_message(data))
        except WireError as error:
            logger.warning("message dropped: %s", error)

    async def _disconnect(self) -> None:
        if self._pubsub is not None:
            with suppress(*AWAY):
                await self._pubsub.aclose()  # type: ignore[no-untyped-call]
            self._pubsub = None
