"""`inferfleet edge`: spreads TCP connections over all addresses behind one name, as compose gives them to gateways.

It passes bytes and knows no HTTP: resumable streams need nothing from a proxy but another gateway to connect to.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import socket
from contextlib import suppress

CHUNK_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 2.0


async def addresses(host: str, port: int) -> list[str]:
    """All addresses that `host` stands for right now, in a stable order; empty while the name is unknown."""
    with suppress(socket.gaierror):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return sorted({str(entry[4][0]) for entry in found})
    return []


class Edge:
    """Round robin over the addresses of `host`; an address that refuses is skipped for this connection."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.turns = itertools.count()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        found = await addresses(self.host, self.port)
        first = next(self.turns)
        for step in range(len(found)):
            address = found[(first + step) % len(found)]
            with suppress(OSError, TimeoutError):
                return await asyncio.wait_for(asyncio.open_connection(address, self.port), CONNECT_TIMEOUT_S)
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one client's connection until either side closes it."""
        upstream = await self.connect()
        if upstream is None:
            writer.write(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            with suppress(OSError):
                await writer.drain()
            writer.close()
            return
        await self._carry((reader, writer), upstream)

    async def _carry(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        there = asyncio.create_task(_copy(client[0], upstream[1]))
        back = asyncio.create_task(_copy(upstream[0], client[1]))
        # the answer's end ends the connection; a client that only closed its sending half still gets its answer
        await back
        there.cancel()
        for _, writer in (client, upstream):
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def run(listen: str, port: int, host: str, upstream_port: int) -> None:
    server = await asyncio.start_server(Edge(host, upstream_port).serve, listen, port, backlog=1024)
    async with server:
        await server.serve_forever()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="inferfleet edge", description=__doc__)
    parser.add_argument("--hostname", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on")
    parser.add_argument("--upstream", default="gateway:80", help="NAME:PORT of the gateways")
    options = parser.parse_args(arguments)
    host, _, port = options.upstream.rpartition(":")
    with suppress(KeyboardInterrupt):
        asyncio.run(run(options.hostname, options.port, host, int(port)))
    return 0
