"""Entry of the worker process: opens Redis, catches signals, runs the agent, turns what went wrong into one line."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from common.store.connection import Connection
from worker.agent import Agent
from worker.engine_client import REAL_ENGINE

logger = logging.getLogger(__name__)


def run(settings: WorkerSettings, engine_command: Sequence[str] = REAL_ENGINE) -> int:
    """Serve until drained by SIGTERM or SIGINT; the exit status.

    Raises:
        ConfigurationError: model, options or server cannot work; starting again would not help.
    """
    try:
        with asyncio.Runner(loop_factory=_event_loop) as runner:
            return runner.run(_serve(settings, engine_command))
    except* ConfigurationError as group:
        raise _first(group) from None


def _event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it exists, as in the gateway: a wake-up costs a third less."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _first(group: BaseExceptionGroup[ConfigurationError]) -> ConfigurationError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigurationError)
    return error


async def _serve(settings: WorkerSettings, engine_command: Sequence[str]) -> int:
    if settings.redis_url is None:
        raise ConfigurationError("a worker needs REDIS_URL")
    opening = asyncio.create_task(Connection.open_patiently(settings.redis_url.get_secret_value()))
    _at_signals(opening.cancel)
    try:
        connection = await opening
    except asyncio.CancelledError:
        logger.info("stopped before Redis answered")
        return 0
    try:
        agent = Agent(settings, connection, command=engine_command)
        _at_signals(agent.drain)
        status = await agent.run()
    finally:
        await connection.close()
    if agent.is_downloading:
        # the hub's client has threads that the interpreter would wait for, and they wait for the network
        os._exit(status)
    return status


def _at_signals(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act)
