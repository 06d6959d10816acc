"""Entry of the worker process: opens Redis, catches signals, runs the agent, turns what went wrong into one line."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

from common.errors import ConfigurationError, StoreUnavailable, StoreUnsupported
from common.settings import WorkerSettings
from common.store.connection import Connection
from worker.agent import Agent
from worker.engine_client import REAL_ENGINE

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0

logger = logging.getLogger(__name__)


def run(settings: WorkerSettings, engine_command: Sequence[str] = REAL_ENGINE) -> int:
    """Serve until drained by SIGTERM or SIGINT; the exit status.

    Raises:
        ConfigurationError: model, options or server cannot work; starting again would not help.
    """
    try:
        return asyncio.run(_serve(settings, engine_command))
    except* ConfigurationError as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[ConfigurationError]) -> ConfigurationError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigurationError)
    return error


async def _serve(settings: WorkerSettings, engine_command: Sequence[str]) -> int:
    connection = await _open(settings)
    try:
        agent = Agent(settings, connection, command=engine_command)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.drain)
        return await agent.run()
    finally:
        await connection.close()


async def _open(settings: WorkerSettings) -> Connection:
    """Connect, waiting for a Redis that is not up yet."""
    if settings.redis_url is None:
        raise ConfigurationError("a worker needs REDIS_URL")
    pause = FIRST_PAUSE_S
    while True:
        try:
            return await Connection.open(settings.redis_url.get_secret_value())
        except StoreUnsupported as error:
            raise ConfigurationError(str(error)) from error
        except StoreUnavailable as error:
            logger.warning("waiting for Redis: %s", error)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
