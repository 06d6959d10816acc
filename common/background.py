"""Ending background tasks for sure."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for them; errors they ended with are not raised.

    A cancellation can get lost: `asyncio.wait_for` of Python 3.11, which redis-py uses for every command it sends,
    returns normally when its result arrives at the same moment (CPython issue 86296). So it is repeated.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
