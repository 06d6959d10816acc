"""A gateway application over a real Redis, with a scripted worker behind it, called in this process."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.settings import GatewaySettings
from common.store.connection import Connection
from gateway.app import create_app
from gateway.dependencies import Services
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.support import card


@dataclass
class House:
    """What a test of routes talks to."""

    client: httpx.AsyncClient
    worker: ScriptedWorker
    services: Services
    sent: list[bytes]
    """Pieces of bodies in the order in which the application sent them, while they are on their way."""

    async def events(self, url: str, body: dict[str, Any], **options: Any) -> tuple[httpx.Response, list[Event]]:
        """All server-sent events of a POST."""
        response = await self.client.post(url, json=body, **options)
        return response, events_of(response.text)


@dataclass
class Event:
    id: str | None
    data: Any


def events_of(text: str) -> list[Event]:
    """Events of a whole stream: JSON, or the text `[DONE]`. Comments and `retry` are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in lines:
            data = lines["data"]
            found.append(Event(lines.get("id"), data if data == "[DONE]" else json.loads(data)))
    return found


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 10.0) -> None:
    """Poll until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


def _tapped(app: ASGIApp, sent: list[bytes]) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def tap(message: Message) -> None:
            sent.append(message.get("body", b""))
            await send(message)

        await app(scope, receive, tap)

    return call


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        traceback.print_exception(error)


OpenHouse = Callable[..., Awaitable[House]]


@asynccontextmanager
async def _house(redis_url: str, **options: Any) -> AsyncIterator[House]:
    card_changes = options.pop("card_changes", {})
    settings = GatewaySettings(redis_url=SecretStr(redis_url), **options)
    async with AsyncExitStack() as stack:
        connection = await Connection.open(redis_url)
        stack.push_async_callback(connection.close)
        worker = ScriptedWorker(connection, card(**card_changes))
        await worker.begin()
        task = asyncio.create_task(worker.run())
        task.add_done_callback(_report)
        app = create_app(settings)
        await stack.enter_async_context(app.router.lifespan_context(app))
        sent: list[bytes] = []
        transport = httpx.ASGITransport(_tapped(app, sent), raise_app_exceptions=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
        try:
            yield House(client, worker, app.state.services, sent)
            assert not task.done() or task.exception() is None
        finally:
            worker.is_stopping = True
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture()
async def open_house(redis_url: str) -> AsyncIterator[OpenHouse]:
    """Opens a house with gateway options of the test's choice."""
    async with AsyncExitStack() as stack:

        async def opened(**options: Any) -> House:
            return await stack.enter_async_context(_house(redis_url, **options))

        yield opened


@pytest.fixture()
async def house(open_house: OpenHouse) -> House:
    return await open_house()
