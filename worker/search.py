"""A look for files that nobody has to wait for: it may be a download, which may hang in the network for minutes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from worker.hub import ProgressFunction, Stopped
from worker.pipe import Progress

STOP_LIMIT_S = 2.0

Found = TypeVar("Found")


class Search(Generic[Found]):
    """`find` in a thread of its own; what it is called with tells how far it is. `progress` is that of a download."""

    def __init__(self, find: Callable[[ProgressFunction], Found]) -> None:
        self._find = find
        self._found: Future[Found] = Future()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.progress = Progress("starting", 0, 0)

    async def result(self) -> Found:
        """Search; called once. Raises what `find` raises."""
        # from here on a cancellation of whoever waits leaves the future to the thread
        self._found.set_running_or_notify_cancel()
        self._thread.start()
        return await asyncio.wrap_future(self._found)

    async def close(self) -> None:
        """Have a download stop, and give it a moment to clear away what it holds of files that are not whole."""
        self._is_stopped.set()
        if self.is_running:
            await asyncio.to_thread(self._thread.join, STOP_LIMIT_S)

    @property
    def is_running(self) -> bool:
        """Whether there is a thread still, which after `close` waits for the network."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._found.set_result(self._find(self._note))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future meets it
            self._found.set_exception(error)

    def _note(self, done: int, total: int) -> None:
        if self._is_stopped.is_set():
            raise Stopped
        self.progress = Progress("download", done, total)
