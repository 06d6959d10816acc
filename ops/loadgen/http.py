"""HTTP as a load client needs it: one socket, one answer at a time, one timestamp for each read.

The client shares its cores with the server that it measures, so what counts is its own time per event. Readers of 32
streams, one event a read, its JSON parsed, all on uvloop, took 7 microseconds as a protocol of asyncio over httptools
(the C parser that uvicorn brings); without the JSON aiohttp took 14 and httpx 48.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast

import httptools

MAX_EVENT_BYTES = 1 << 24
MAX_HEADERS = 200

OnBody = Callable[[bytes, float], None]


class ExchangeError(Exception):
    """An exchange that came to no good end. `kind` can be counted."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message or kind)
        self.kind = kind


class Connection(asyncio.Protocol):
    """One connection, which is used again as long as the server keeps it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_open = False
        self.num_exchanges = 0
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._on_body: OnBody = _refuse
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._is_heard = self._is_whole = self._has_head = False

    async def exchange(self, request: bytes, on_body: OnBody) -> None:
        """Send a request; `on_body` gets what each read brings of the body, until it has ended.

        Raises:
            ExchangeError: the connection was lost on the way, or what came is not HTTP.
        """
        assert self._transport is not None and self._waiter is None, "one exchange at a time"
        self.status, self.headers = 0, {}
        self._parser = httptools.HttpResponseParser(self)
        self._is_heard = self._is_whole = self._has_head = False
        self._on_body, self._waiter = on_body, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._waiter
        finally:
            self._waiter, self._on_body = None, _refuse
            self.num_exchanges += 1
            if not self._is_whole:
                # what else comes on it would be taken for the next answer
                self.close()

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    @property
    def has_answered(self) -> bool:
        """A response has begun."""
        return self._has_head

    @property
    def was_stale(self) -> bool:
        """The server had closed a connection that it kept before, and heard nothing of the request."""
        return self.num_exchanges > 1 and not self._is_heard

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do as asyncio's but do not descend from them
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._is_heard = True
        try:
            self._parser.feed_data(data)
            if self._parts:
                body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                self._on_body(body, now)
        except ExchangeError as error:
            self._give_up(error)
        except httptools.HttpParserError as error:
            self._give_up(ExchangeError("not HTTP", str(error)))
        if self._is_whole:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        has_length = b"content-length" in self.headers or b"transfer-encoding" in self.headers
        if self._has_head and not has_length and exc is None:
            self._is_whole = True
            self._end(None)
        else:
            self._end(ExchangeError("connection lost", str(exc or "the server closed it")))

    def _give_up(self, error: ExchangeError) -> None:
        self.close()
        self._end(error)

    def _end(self, error: ExchangeError | None) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if error is None:
            self._waiter.set_result(None)
        else:
            self._waiter.set_exception(error)

    # what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) < MAX_HEADERS:
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status, self._has_head = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._is_whole = True
        if not self._parser.should_keep_alive():
            self.close()


def _refuse(body: bytes, now: float) -> None:
    raise ExchangeError("not HTTP", "the server speaks unasked")


class EventReader:
    """The `data:` lines of a stream of server-sent events, of which one has the whole of an event's data here."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, body: bytes) -> list[bytes]:
        """Data of the lines that are whole now.

        Raises:
            ExchangeError: a line without end.
        """
        text = self._rest + body if self._rest else body
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *lines, self._rest = text.split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ExchangeError("not an event stream", f"a line of more than {MAX_EVENT_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Pool:
    """Connections to one server; as many as are in use at once."""

    def __init__(self, host: str, port: int, *, is_secure: bool) -> None:
        self._host, self._port = host, port
        self._tls = ssl.create_default_context() if is_secure else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, open_body: Callable[[Connection], OnBody]) -> Connection:
        """One request on a connection that is free. A kept one that turns out to be closed is replaced once.

        Raises:
            ExchangeError: as `Connection.exchange`, or nobody is there.
        """
        connection = self._kept() or await self._open()
        try:
            await connection.exchange(request, open_body(connection))
        except ExchangeError:
            if not connection.was_stale:
                raise
            connection = await self._open()
            await connection.exchange(request, open_body(connection))
        if connection.is_open:
            self._idle.append(connection)
        return connection

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        except ConnectionRefusedError as error:
            raise ExchangeError("connection refused", error.strerror or "") from None
        except OSError as error:
            raise ExchangeError("cannot connect", error.strerror or str(error)) from None
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
