"""A server that answers each request with bytes of a script, so that a test knows all that a client can have seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOSE = b""
"""At the end of a script: the connection is closed; else it is kept."""

SSE = "text/event-stream; charset=utf-8"


@dataclass
class Request:
    """One request as it came: its head, and its body read as JSON."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int


def head(status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(status: str, body: str, content_type: str = "application/json") -> list[bytes]:
    """A response with a length."""
    return [head(status, content_type=content_type, content_length=str(len(body.encode()))) + body.encode()]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def stream(*pieces: bytes) -> list[bytes]:
    """A chunked stream of events that is complete; each piece is written by itself."""
    return [head(content_type=SSE, transfer_encoding="chunked"), *map(chunk, pieces), b"0\r\n\r\n"]


def completion(*texts: str, usage: dict[str, int] | None = None) -> list[bytes]:
    """Events of /v1/completions, to the end."""
    events = [event({"choices": [{"text": text, "finish_reason": None}]}) for text in texts]
    return [*events, *([event({"choices": [], "usage": usage})] if usage else []), b"data: [DONE]\n\n"]


def usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


Script = Callable[[Request], Sequence[bytes]]


@dataclass
class ScriptedServer:
    """`async with ScriptedServer(script) as server:`; `requests` are those that came."""

    script: Script
    pause_s: float = 0.002
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    most_connections: int = 0
    _num_connections: int = 0
    _num_now: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        self._num_now += 1
        self.most_connections = max(self.most_connections, self._num_now)
        number, is_open = self._num_connections, True
        try:
            while is_open:
                request = await self._read(reader, number)
                self.requests.append(request)
                is_open = await self._write(writer, self.script(request))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._num_now -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Request:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split(" ")
        return Request(method, path, headers, json.loads(body or b"{}"), number)

    async def _write(self, writer: asyncio.StreamWriter, pieces: Sequence[bytes]) -> bool:
        for piece in pieces:
            if piece == CLOSE:
                return False
            writer.write(piece)
            await writer.drain()
            # so that each piece is a read of its own at the other end
            await asyncio.sleep(self.pause_s)
        return True
