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

from common import keys, wire
from common.background import end
from common.errors import ConfigurationError, StoreUnavailable, WireError
from common.job import JobState, TokenColumns
from common.store.connection import AWAY, Connection
from common.store.link import Link

MAX_WAITING = 4096
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
        self._link: Link | None = None
        self._last_heard = 0.0
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep_for_ever())
        try:
            for lane in list(self._lanes):
                await self._confirmation(lane)
        except BaseException:
            # without __aenter__ there is no __aexit__, and a cancellation too must not leave the keeper behind
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        if self._keeper is not None:
            await end(self._keeper)
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
            if self._link is not None:
                with suppress(*AWAY):
                    self._link.write("SUBSCRIBE", keys.channel(lane, self._gateway))
        await self._confirmation(lane)

    async def _confirmation(self, lane: str) -> None:
        try:
            await asyncio.wait_for(self._event(lane).wait(), self._connection.timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable("Redis did not confirm a subscription") from error

    def _event(self, lane: str) -> asyncio.Event:
        return self._confirmed.setdefault(keys.channel(lane, self._gateway).encode(), asyncio.Event())

    async def _keep_for_ever(self) -> None:
        pause, is_first = FIRST_PAUSE_S, True
        while True:
            try:
                await self._connect()
                if not is_first:
                    async with asyncio.timeout(self._connection.timeout_s):
                        for lane in list(self._lanes):
                            await self._event(lane).wait()
                    await self._queue.put(Reconnected())
                is_first, pause = False, FIRST_PAUSE_S
                await self._watch()
            except (redis.RedisError, *AWAY) as error:
                logger.warning("subscription lost: %s", error)
            await self._disconnect()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _connect(self) -> None:
        for event in self._confirmed.values():
            event.clear()
        link = await self._connection.open_link(self._on_push)
        self._link, self._last_heard = link, time.monotonic()
        if self._lanes:
            link.write("SUBSCRIBE", *[keys.channel(lane, self._gateway) for lane in self._lanes])

    async def _watch(self) -> None:
        """Until the connection is gone: a server that is silent is asked whether it is still there.

        Raises:
            redis.RedisError: why it is gone.
        """
        link = self._link
        assert link is not None, "connect first"
        while link.loss is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(PING_AFTER_S / 2):
                    await link.gone()
            silence = time.monotonic() - self._last_heard
            if silence > PING_AFTER_S + self._connection.timeout_s:
                raise redis.ConnectionError("the subscription's connection is dead")
            if silence > PING_AFTER_S and link.loss is None:
                link.write("PING")
        raise link.loss

    def _on_push(self, reply: Any) -> None:
        self._last_heard = time.monotonic()
        match reply:
            case [b"message", _, bytes(data)]:
                self._hand_on(data)
            case [b"subscribe", bytes(channel), _]:
                self._confirmed.setdefault(channel, asyncio.Event()).set()

    def _hand_on(self, data: bytes) -> None:
        try:
            self._queue.put_nowait(decode_message(data))
        except WireError as error:
            logger.warning("message dropped: %s", error)
        except asyncio.QueueFull:
            # what is lost is found in the logs after reconnecting
            assert self._link is not None, "it is the one that brought this"
            self._link.abort(redis.ConnectionError("more messages came than were taken"))

    async def _disconnect(self) -> None:
        if self._link is not None:
            await self._link.close()
            self._link = None
