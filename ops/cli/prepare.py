"""`inferfleet prepare`: a model as it comes to a folder that can be served."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from common.settings import PrepareSettings, parse

INTERRUPTED = 130


class Work:
    """How far each kind of work is: bars on a terminal, else a line every few seconds.

    Ctrl-C reaches the main thread alone, so that downloads, which run in others, learn here that they have to stop.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._shown: dict[str, Callable[[int, int], None]] = {}
        self._is_stopped = threading.Event()

    def show(self, word: str, done: int, total: int) -> None:
        if self._is_stopped.is_set():
            raise KeyboardInterrupt
        if word not in self._shown:
            self._shown[word] = self._lines(word) if self.bars.disable else self._bar(word)
        self._shown[word](done, total)

    def _bar(self, word: str) -> Callable[[int, int], None]:
        task = self.bars.add_task(word)
        return lambda done, total: self.bars.update(task, completed=done, total=total)

    def _lines(self, word: str) -> Callable[[int, int], None]:
        from worker.hub import ProgressLines

        return ProgressLines(word, _say)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """First let the threads end, which takes a moment; the second time do not wait for them."""
        if self._is_stopped.is_set():
            os._exit(INTERRUPTED)
        self._is_stopped.set()
        sys.stderr.write("inferfleet prepare: stopped; run the same command again to go on\n")
        raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    settings = parse(PrepareSettings, arguments, program="inferfleet prepare")
    work = Work(Console(stderr=True))
    signal.signal(signal.SIGINT, work.stop)
    try:
        # Imported here: torch takes its time, and wrong options should not wait for it.
        from worker.prepare import Screen, prepare

        with work.bars:
            options = prepare(settings, Screen(_say, work.show))
    except KeyboardInterrupt:
        return INTERRUPTED
    _say(f"serve it with: {shlex.join(['inferfleet', 'up', *options])}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
