"""The agent in this process, with a fake engine as its child and a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from common.store.connection import Connection
from tests.support.fake_fleet import Follower, following
from tests.support.fake_worker import FAKE_ENGINE
from tests.support.tiny_model import write_tiny_model
from worker.agent import Agent

LEASE_S = 1.0


@dataclass
class Running:
    agent: Agent
    task: asyncio.Task[int]
    follower: Follower

    def metric(self, name: str, **labels: str) -> float:
        return self.agent.metrics.registry.get_sample_value(f"inferfleet_{name}", labels) or 0.0


def worker_settings(redis_url: str, folder: Path, **fields: Any) -> WorkerSettings:
    base = {
        "redis_url": SecretStr(redis_url),
        "model_id": str(write_tiny_model(folder / "tiny")),
        "load_format": "dummy",
        "worker_id": "w1",
        "lease": LEASE_S,
        "graceful_termination_timeout": 0.1,
    }
    return WorkerSettings(**base | fields)


@asynccontextmanager
async def agent_on(redis_url: str, folder: Path, *engine: str, **fields: Any) -> AsyncIterator[Running]:
    connection = await Connection.open(redis_url)
    agent = Agent(worker_settings(redis_url, folder, **fields), connection, command=(*FAKE_ENGINE, *engine))
    task = asyncio.create_task(agent.run())
    try:
        async with following(redis_url) as follower:
            yield Running(agent, task, follower)
            agent.drain()
            agent.drain()
            assert await asyncio.wait_for(task, 20) == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await connection.close()


async def fail_to_start(redis_url: str, folder: Path, *engine: str, **fields: Any) -> str:
    connection = await Connection.open(redis_url)
    agent = Agent(worker_settings(redis_url, folder, **fields), connection, command=(*FAKE_ENGINE, *engine))
    try:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError), allow_unwrapped=True) as caught:
            await asyncio.wait_for(agent.run(), 20)
        error = caught.value
        return str(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
    finally:
        await connection.close()
