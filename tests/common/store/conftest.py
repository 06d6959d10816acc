"""Every test of the protocol runs on Debian's Redis 7.0 and on the embedded server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from tests.support.protocol import FakeAgent
from tests.support.redis_server import FLAVOURS, ServerUnderTest


@pytest.fixture(params=FLAVOURS)
def redis_server(request: pytest.FixtureRequest, _servers: Callable[[str], ServerUnderTest]) -> ServerUnderTest:
    server = _servers(request.param)
    server.reset()
    return server


@pytest.fixture()
def jobs(connection: Connection) -> JobStore:
    return JobStore(connection)


@pytest.fixture()
def fleet(connection: Connection) -> FleetStore:
    return FleetStore(connection)


@pytest.fixture()
async def agent(connection: Connection) -> FakeAgent:
    return await FakeAgent(connection).start()
