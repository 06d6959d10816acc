"""A whole gateway, served by uvicorn on a real socket within the test's own event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from common.settings import GatewaySettings
from gateway.app import create_app
from gateway.dependencies import Services


class LiveGateway:
    """`async with LiveGateway(redis_url, api_key="…") as gateway:` with options of `GatewaySettings`."""

    def __init__(self, redis_url: str, **options: Any) -> None:
        self.settings = GatewaySettings(redis_url=redis_url, **options)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.app = create_app(self.settings)
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="on", ws_max_size=self.settings.payload_limit
        )
        config.timeout_graceful_shutdown = 5
        self.server = uvicorn.Server(config)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=20)
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    async def __aenter__(self) -> LiveGateway:
        self._task = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        while not self.server.started:
            assert not self._task.done(), "the gateway did not start"
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.stop()

    async def stop(self) -> None:
        """As after SIGTERM: streams are told, then the server waits for them."""
        if self._task is None:
            return
        self.services.hub.stop_followers()
        self.server.should_exit = True
        await self._task
        self._task = None
        self.listener.close()

    async def submit(self, *, max_new_tokens: int = 20, **fields: Any) -> str:
        """A new job through the Jobs API; its public id."""
        body = {"input": {"inputs": "hello", "parameters": {"max_new_tokens": max_new_tokens}}} | fields
        response = await self.client.post("/v1/jobs", json=body)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    async def finished(self, job_id: str) -> dict[str, Any]:
        response = await self.client.get(f"/v1/jobs/{job_id}", params={"wait": 20})
        job: dict[str, Any] = response.json()
        assert job["finished_at"] is not None, job
        return job

    @asynccontextmanager
    async def stream(self, method: str, path: str, **arguments: Any) -> AsyncIterator[EventReader]:
        async with self.client.stream(method, path, **arguments) as response:
            yield EventReader(response)


@dataclass
class Seen:
    """One server-sent event; `comment` when it was only a comment."""

    data: str = ""
    id: str | None = None
    event: str | None = None
    retry: str | None = None
    comment: bool = False

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.data)
        return value


@dataclass
class EventReader:
    """Server-sent events off a response, read by the rules of the standard."""

    response: httpx.Response
    rest: str = ""
    chunks: list[str] = field(default_factory=list)

    async def __aiter__(self) -> AsyncIterator[Seen]:
        async for text in self.response.aiter_text():
            self.chunks.append(text)
            *blocks, self.rest = (self.rest + text).split("\n\n")
            for block in blocks:
                yield _parse(block)

    async def events(self) -> list[Seen]:
        """All events up to the end of the response, without the retry line and comments."""
        return [event async for event in self if event.data]


def _parse(block: str) -> Seen:
    seen = Seen(comment=block.startswith(":") or "\n:" in block)
    for line in block.split("\n"):
        name, _, value = line.partition(": ")
        match name:
            case "data":
                seen.data = value
            case "id":
                seen.id = value
            case "event":
                seen.event = value
            case "retry":
                seen.retry = value
    return seen
