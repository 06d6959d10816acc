"""A man in the middle for one Redis socket: passes bytes on, and loses replies when told to.

Losing means: the server did what it was asked, and the client's connection dies before it hears so.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self
from urllib.parse import urlparse


class Proxy:
    """Async context manager. `url` is what clients connect to; `lose(text, times)` arms the fault.

    A request that contains `text` is passed on; its reply is read from the server and thrown away with the connection.
    `num_lost` proves that the fault happened.
    """

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._server_path = urlparse(redis_url).path
        self._path = folder / "proxy.sock"
        self.url = f"unix://{self._path}"
        self._needle, self._times = b"", 0
        self.num_lost = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose(self, text: str, times: int = 1) -> None:
        self._needle, self._times = text.encode(), times

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._connect(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self._server_path)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        is_losing = asyncio.Event()
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(
                self._forward(reader, server_writer, is_losing), self._backward(server_reader, writer, is_losing)
            )
        self._writers -= {writer, server_writer}

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_losing: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            if self._times and self._needle in data:
                self._times -= 1
                is_losing.set()
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _backward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_losing: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 20):
            if is_losing.is_set():
                self.num_lost += 1
                writer.transport.abort()
                return
            writer.write(data)
            await writer.drain()
        writer.close()
