"""Fixtures of gateway tests: a gateway on a real socket inside the test's event loop, a worker beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from common.store.connection import Connection
from tests.support.live_gateway import LiveGateway
from tests.support.scripted_worker import ScriptedWorker

StartGateway = Callable[..., Awaitable[LiveGateway]]


@pytest.fixture()
async def start_gateway(redis_url: str) -> AsyncIterator[StartGateway]:
    """Start gateways with the options given; all of them stop at the end."""
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> LiveGateway:
            return await stack.enter_async_context(LiveGateway(redis_url, **options))

        yield start


@pytest.fixture()
async def worker(connection: Connection) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(connection) as running:
        yield running


@pytest.fixture()
async def gateway(start_gateway: StartGateway, worker: ScriptedWorker) -> LiveGateway:
    """A gateway that serves the model of `worker`."""
    return await start_gateway()
