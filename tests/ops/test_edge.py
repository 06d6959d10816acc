"""The edge proxy spreads connections, skips addresses that refuse, and says 503 when nobody is there."""

from __future__ import annotations

import asyncio

import pytest

from ops.cli import edge
from tests.support.fleet import free_port


async def answer(name: bytes, port: int, host: str) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name + await reader.readline())
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, host, port)


async def ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\n")
    reply = await reader.read()
    writer.close()
    return reply


@pytest.fixture()
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "127.0.0.2"]

    monkeypatch.setattr(edge, "addresses", found)


async def test_connections_take_turns(two_addresses: None) -> None:
    upstream, listen = free_port(), free_port()
    servers = [await answer(b"a ", upstream, "127.0.0.1"), await answer(b"b ", upstream, "127.0.0.2")]
    proxy = await asyncio.start_server(edge.Edge("gateway", upstream).serve, "127.0.0.1", listen)
    assert [await ask(listen) for _ in range(4)] == [b"a hello\n", b"b hello\n"] * 2
    servers[0].close()
    assert [await ask(listen) for _ in range(2)] == [b"b hello\n"] * 2
    servers[1].close()
    assert (await ask(listen)).startswith(b"HTTP/1.1 503 ")
    proxy.close()


async def test_an_unknown_name_has_no_addresses() -> None:
    assert await edge.addresses("no-such-name.invalid", 80) == []
    assert await edge.addresses("127.0.0.1", 80) == ["127.0.0.1"]
