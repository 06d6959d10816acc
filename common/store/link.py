"""One connection to Redis that many calls share: written one behind the other, answered in that order.

A client with a pool takes a connection out of it for each command and waits for the answer through layers of streams
and time-outs. That was most of what a call costs a process which makes one with every step of an engine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis
import redis
from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import DefaultParser, parse_url

from common.errors import ConfigurationError

Argument = bytes | str | int | float
OnPush = Callable[[Any], None]


class Link(asyncio.Protocol):
    """`loss` says why the connection is gone, None while it is there. What comes while no call waits for an answer goes
    to `on_push`: a link that subscribes makes no calls.
    """

    def __init__(self, timeout_s: float, on_push: OnPush | None = None) -> None:
        self._timeout_s, self._on_push = timeout_s, on_push
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=DefaultParser.parse_error)
        self._calls: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self.loss: redis.RedisError | None = None

    async def call(self, *command: Argument, timeout_s: float | None = None) -> Any:
        """Send a command and wait for its answer. A caller that is cancelled leaves the connection as it is.

        Raises:
            redis.ResponseError: the answer is an error.
            redis.ConnectionError, redis.TimeoutError: no answer came; whether the command was done is not known.
        """
        answer: asyncio.Future[Any] = self._loop.create_future()
        self.write(*command)
        limit = self._timeout_s if timeout_s is None else timeout_s
        self._calls.append((answer, self._loop.time() + limit))
        if self._watch is None:
            self._watch = self._loop.call_later(limit, self._check_oldest)
        reply = await answer
        if isinstance(reply, Exception):
            raise reply
        return reply

    def write(self, *command: Argument) -> None:
        """Send a command to whose answer nobody waits.

        Raises:
            redis.ConnectionError: the connection is gone.
        """
        if self.loss is not None or self._transport is None:
            raise redis.ConnectionError(str(self.loss or "not connected"))
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]

    async def gone(self) -> None:
        """Wait until the connection is gone."""
        await self._gone.wait()

    async def close(self) -> None:
        self.abort(redis.ConnectionError("the connection was closed"))
        if self._transport is not None:
            await self._gone.wait()

    def abort(self, loss: redis.RedisError) -> None:
        """End the connection; every call under way gets `loss`."""
        self.loss = self.loss or loss
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._calls:
            _settle(self._calls.popleft()[0], loss)
        if self._transport is not None:
            self._transport.abort()

    def _check_oldest(self) -> None:
        self._watch = None
        if not self._calls:
            return
        rest = self._calls[0][1] - self._loop.time()
        if rest <= 0:
            self.abort(redis.TimeoutError("Redis did not answer in time"))
        else:
            self._watch = self._loop.call_later(rest, self._check_oldest)

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # not every event loop's transports are instances of it
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while self.loss is None and (reply := self._reader.gets()) is not False:
                if self._calls:
                    _settle(self._calls.popleft()[0], reply)
                elif self._on_push is not None:
                    self._on_push(reply)
        except hiredis.HiredisError as error:
            self.abort(redis.InvalidResponse(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self.abort(redis.ConnectionError(f"the connection to Redis broke: {error or 'closed by the server'}"))
        self._gone.set()


def _settle(answer: asyncio.Future[Any], reply: Any) -> None:
    """An error is a result like others: who was cancelled never fetches it."""
    if not answer.done():
        answer.set_result(reply)


class Address:
    """Where a Redis is and as whom to speak to it. `url` may say all that URLs of redis-py may.

    Raises:
        ConfigurationError: it is no such URL.
    """

    def __init__(self, url: str) -> None:
        try:
            options: dict[str, Any] = dict(parse_url(url))
            self._client = options.pop("connection_class", Connection)(**options)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"not a URL of a Redis: {error}") from error

    async def connect(self, timeout_s: float, on_push: OnPush | None = None) -> Link:
        """A link past authentication.

        Raises:
            OSError, TimeoutError, redis.RedisError: there is none.
        """
        link = Link(timeout_s, on_push)
        try:
            async with asyncio.timeout(timeout_s):
                await self._open(link)
                await self._introduce(link)
        except BaseException:
            # a cancellation too must not leave the socket open
            await link.close()
            raise
        return link

    async def _open(self, link: Link) -> None:
        loop, client = asyncio.get_running_loop(), self._client
        if isinstance(client, UnixDomainSocketConnection):
            await loop.create_unix_connection(lambda: link, client.path)
            return
        tls = client.ssl_context.get() if isinstance(client, SSLConnection) else None
        await loop.create_connection(lambda: link, client.host, client.port, ssl=tls)

    async def _introduce(self, link: Link) -> None:
        client = self._client
        secret = [client.username, client.password] if client.username else [client.password] if client.password else []
        if str(client.protocol) == "3":
            name = ["default"] if len(secret) == 1 else []
            await link.call("HELLO", 3, *(["AUTH", *name, *secret] if secret else []))
        elif secret:
            await link.call("AUTH", *secret)
        if client.db:
            await link.call("SELECT", client.db)
