"""Rank 0's side of the group: starts the other ranks, adds up how far they have loaded, and ends with any of them.

    agent ──pipe── rank 0 ─┬─ socket pair ── rank 1         one thread of rank 0 listens to each of them;
                           ├─ socket pair ── rank 2         the first that hears of an end ends everything
                           └─ TCP ── node 1 ─┬─ rank 3
                                             └─ rank 4

A rank that is gone leaves the others waiting in a collective operation, some of them until its time-out. So nobody
relies on what a collective says: the process that started a rank sees its end at once and has the last word, and when
rank 0 is gone all others go with it, killed by the kernel as its children or because their socket closed.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import NoReturn

from common.errors import ConfigurationError, WireError
from common.settings import WorkerSettings
from worker.engine.device import Device
from worker.parallel.device import ParallelDevice
from worker.parallel.group import LAST_WORDS_S, Meeting, RankLost
from worker.parallel.local_ranks import REAL_RANK, LocalRanks
from worker.parallel.plans import anonymous_file, send_plan, send_stop
from worker.parallel.rendezvous import gather_nodes, host_and_port, listen, welcome
from worker.parallel.reports import read_report
from worker.parallel.shard import Shard
from worker.pipe import Failed, Message, Progress, Ready

LOCAL_HOST = "127.0.0.1"

logger = logging.getLogger(__name__)


class LoadProgress:
    """Adds up what `size` ranks report. A phase counts once all of them are in it: before, its total is unknown."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._phases: dict[str, dict[int, Progress]] = {}

    def note(self, rank: int, progress: Progress) -> Progress | None:
        reports = self._phases.setdefault(progress.phase, {})
        reports[rank] = progress
        if len(reports) < self._size:
            return None
        done, total = (sum(getattr(report, name) for report in reports.values()) for name in ("done", "total"))
        return Progress(progress.phase, done, total)


class Leader:
    """The other ranks, as rank 0 sees them. Made in the main thread; `send` reaches the agent from any thread."""

    def __init__(
        self, settings: WorkerSettings, send: Callable[[Message], None], *, command: Sequence[str] = REAL_RANK
    ) -> None:
        self._num_others, self._send = settings.num_shard - 1, send
        self._progress = LoadProgress(settings.num_shard)
        self._ready: dict[int, Ready] = {}
        self._news = threading.Condition()
        self._last_words = threading.Lock()
        self._is_serving = False
        self._is_stopping = False
        self._nodes = self._gather(settings)
        host = host_and_port(settings.rendezvous)[0] if self._nodes else LOCAL_HOST
        store = listen(host)
        exchange_fd = None if self._nodes else anonymous_file("exchange")
        self.meeting = Meeting(Shard(0, settings.num_shard), host, store.getsockname()[1], store, exchange_fd)
        for node, connection in self._nodes.items():
            threading.Thread(target=self._watch, args=(node, connection), daemon=True).start()
            welcome(connection, self.meeting.port)
        beside = settings.local_ranks[1:]
        self._local = LocalRanks(beside, settings, self.meeting, self._on_report, self._on_end, command=command)

    def _gather(self, settings: WorkerSettings) -> dict[int, socket.socket]:
        if settings.num_nodes == 1:
            return {}
        self._send(Progress("waiting for the other nodes", 0, settings.num_nodes - 1))
        return gather_nodes(settings)

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """How far rank 0 itself is."""
        self._on_report(0, Progress(phase, done, total))

    def lead(self, device: Device, ready: Ready) -> ParallelDevice:
        """Wait until the others are where rank 0 is; the device of all of them.

        Raises:
            ConfigurationError: if they have loaded something else.
        """
        with self._news:
            self._news.wait_for(lambda: len(self._ready) == self._num_others)
            self._is_serving = True
        for rank, other in sorted(self._ready.items()):
            _check_equal(ready, rank, other)
        return ParallelDevice(device, self._publish)

    def stop(self) -> None:
        """Let the others leave."""
        self._is_stopping = True
        for connection in self._nodes.values():
            with suppress(RankLost):
                send_stop(connection)
        self._local.stop()

    def fail(self, sentence: str) -> NoReturn:
        """End this process, and with it the others. Only the first who comes here is heard."""
        self._end(sentence, is_final=True)

    def fail_later(self, sentence: str) -> NoReturn:
        """As `fail` where rank 0 only lost another rank: whoever knows why may speak first."""
        time.sleep(LAST_WORDS_S)
        self.fail(sentence)

    def _publish(self, data: bytes) -> None:
        for connection in self._nodes.values():
            send_plan(connection, data, is_shared=False)
        self._local.publish(data)

    def _watch(self, node: int, connection: socket.socket) -> None:
        """Hear what the ranks of another node report until its leader is gone."""
        how = "ended"
        try:
            stream = connection.makefile("rb")
            while (report := read_report(stream)) is not None:
                self._on_report(*report)
        except (OSError, WireError) as error:
            how = f"broke: {error}"
        if not self._is_stopping:
            self._on_end(f"the connection to node {node} {how}")

    def _on_report(self, rank: int, message: Message) -> None:
        if isinstance(message, Failed):
            self.fail(message.message)
        with self._news:
            if isinstance(message, Ready):
                self._ready[rank] = message
                self._news.notify()
            elif isinstance(message, Progress) and (whole := self._progress.note(rank, message)):
                self._send(whole)

    def _on_end(self, sentence: str) -> None:
        """A rank is gone without a word. While it loads that may be an accident, so that the agent tries again."""
        self._end(sentence, is_final=self._is_serving)

    def _end(self, sentence: str, *, is_final: bool) -> NoReturn:
        self._last_words.acquire()
        logger.error("%s", sentence)
        if is_final:
            with suppress(OSError):
                self._send(Failed(sentence))
        os._exit(1)


def _check_equal(own: Ready, rank: int, other: Ready) -> None:
    for name in (field.name for field in fields(Ready) if field.name != "reasons"):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs:
            raise ConfigurationError(f"rank {rank} has {name} {theirs} but rank 0 has {ours}; all need the same model")
