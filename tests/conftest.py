"""Fixtures of the whole suite: real Redis servers, one process per session and flavour, emptied between tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from common.store.connection import Connection
from tests.support.redis_server import FLAVOURS, ServerUnderTest


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ServerUnderTest]]:
    running: dict[str, ServerUnderTest] = {}

    def get(flavour: str) -> ServerUnderTest:
        if flavour not in running:
            folder = tmp_path_factory.mktemp(f"redis-{flavour}")
            running[flavour] = ServerUnderTest(folder, flavour=flavour, ephemeral=True)
        return running[flavour]

    yield get
    for server in running.values():
        server.stop()


@pytest.fixture()
def redis_server(_servers: Callable[[str], ServerUnderTest]) -> ServerUnderTest:
    """Debian's Redis 7.0, shared by the session and empty. Do not kill it: use `own_redis` for that."""
    server = _servers("debian")
    server.reset()
    return server


@pytest.fixture()
def redis_url(redis_server: ServerUnderTest) -> str:
    return redis_server.url


@pytest.fixture(params=FLAVOURS)
def each_redis(request: pytest.FixtureRequest, _servers: Callable[[str], ServerUnderTest]) -> ServerUnderTest:
    """Each test runs twice: on Debian's Redis 7.0 and on the embedded server."""
    server = _servers(request.param)
    server.reset()
    return server


@pytest.fixture()
def own_redis(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """A server of this test alone, with an append-only file: to kill, restart and cut."""
    server = ServerUnderTest(tmp_path)
    yield server
    server.stop()


@pytest.fixture()
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    opened = await Connection.open(redis_url)
    yield opened
    await opened.close()
