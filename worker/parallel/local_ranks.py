"""The rank processes that one process starts on its machine: rank 0 those beside it, another node's leader its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from common.errors import WireError
from common.settings import WorkerSettings
from worker.engine_client import settings_json
from worker.parallel.group import Meeting, RankLost
from worker.parallel.plans import PlanMemory, send_plan, send_stop
from worker.parallel.reports import read_report
from worker.pipe import Message
from worker.process import ending_of

REAL_RANK = (sys.executable, "-m", "worker.parallel.rank_process")
STOP_LIMIT_S = 2.0

OnReport = Callable[[int, Message], None]
OnEnd = Callable[[str], None]


class LocalRanks:
    """Started at once, from the main thread: ranks die with the thread that starts them.

    `on_report(rank, message)` and `on_end(sentence)` are called from a thread for each rank.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        settings: WorkerSettings,
        meeting: Meeting,
        on_report: OnReport,
        on_end: OnEnd,
        *,
        command: Sequence[str] = REAL_RANK,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._on_report, self._on_end = on_report, on_end
        self._memory = PlanMemory.create(len(ranks)) if ranks else None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        self._is_stopping = False
        options = ["--meet", f"{meeting.host}:{meeting.port}"]
        options += ["--settings", settings_json(settings, settings.model_id)]
        self._shared_fds = () if meeting.exchange_fd is None else (meeting.exchange_fd,)
        options += [f"--exchange-fd={fd}" for fd in self._shared_fds]
        for reader, rank in enumerate(ranks):
            self._start([*command, "--rank", str(rank), "--reader", str(reader), *options], environment or {})
            threading.Thread(target=self._watch, args=(reader, rank), daemon=True).start()

    def _start(self, command: list[str], environment: Mapping[str, str]) -> None:
        assert self._memory is not None
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), self._memory.fd)
            process = subprocess.Popen(
                [*command, "--fd", str(fds[0]), "--memory-fd", str(fds[1])],
                pass_fds=(*fds, *self._shared_fds),
                env=os.environ | dict(environment),
                stdin=subprocess.DEVNULL,
            )
        self._processes.append(process)
        self._connections.append(ours)

    def _watch(self, index: int, rank: int) -> None:
        """Pass on what a rank says until it is gone, and then how it went."""
        garbage = ""
        try:
            stream = self._connections[index].makefile("rb")
            while (report := read_report(stream)) is not None:
                self._on_report(rank, report[1])
        except WireError as error:
            garbage = f" after {error}"
        except OSError:
            # it went with announcements unread
            pass
        if not self._is_stopping:
            self._on_end(f"rank {rank} {ending_of(self._reap(self._processes[index]))}{garbage}")

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> int:
        """Exit status of a process that is leaving, or should be."""
        with suppress(subprocess.TimeoutExpired):
            return process.wait(STOP_LIMIT_S)
        process.kill()
        return process.wait()

    def publish(self, data: bytes) -> None:
        """Give all of them the next plan. Raises RankLost."""
        if self._memory is None:
            return
        is_shared = self._memory.write(data)
        for connection in self._connections:
            send_plan(connection, data, is_shared=is_shared)

    def stop(self) -> None:
        """Let them leave, and see to it that they have."""
        self._is_stopping = True
        for connection in self._connections:
            with suppress(RankLost):
                send_stop(connection)
        for process in self._processes:
            self._reap(process)
        self._close()

    def kill(self) -> None:
        self._is_stopping = True
        for process in self._processes:
            process.kill()
            process.wait()
        self._close()

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._memory is not None:
            self._memory.close()
