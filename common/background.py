"""Ending background tasks for sure, and waiting for news with a limit at little cost."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for them; errors they ended with are not raised.

    A cancellation can get lost: `asyncio.wait_for` of Python 3.11 returns normally when its result arrives at the same
    moment (CPython issue 86296). So it is repeated.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


class News:
    """An event for one waiter, who may give up after a time. It is waited for with every write to every client and with
    every step of an engine, where the task or the scope of `wait_for` and `timeout` costs more than all else."""

    __slots__ = ("_is_there", "_waiter")

    def __init__(self) -> None:
        self._is_there = False
        self._waiter: asyncio.Future[bool] | None = None

    def set(self) -> None:
        self._is_there = True
        if self._waiter is not None:
            _settle(self._waiter, True)

    def clear(self) -> None:
        self._is_there = False

    async def within(self, timeout_s: float | None) -> bool:
        """Whether `set` was called since the last `clear`, or is within the time; None: whenever it is."""
        if self._is_there:
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiter = waiter
        timer = None if timeout_s is None else loop.call_later(timeout_s, _settle, waiter, False)
        try:
            return await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


def _settle(waiter: asyncio.Future[bool], is_there: bool) -> None:
    if not waiter.done():
        waiter.set_result(is_there)
