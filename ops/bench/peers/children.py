"""The processes of engines as the comparison sees them: started, asked, stopped while others are measured, ended.

Each is in a process group of its own, with what it starts itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ops.bench.peers.checkpoints import ROOT
from ops.bench.peers.pipe import Request

LIMIT_S = 3600.0
"""No answer takes that long; an engine that hangs is ended."""
NUM_LAST_LINES = 12


class ChildFailed(Exception):
    """An engine ended, or gave no answer. The message has the end of what it printed."""


class Memory(NamedTuple):
    """Bytes of a process group: the sum of each process's most resident memory until now, what is mapped from files
    included; and of RssAnon + RssShmem now."""

    peak: int
    held: int


class Child:
    def __init__(self, name: str, words: list[str], variables: Mapping[str, str], log: Path) -> None:
        self.name, self._started_at = name, time.perf_counter()
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Of the first process, and of the group."""
        return self._process.pid

    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._started_at

    def load(self, order: Mapping[str, Any]) -> None:
        """Raises ChildFailed, as all that asks."""
        self._exchange(order)

    def ask(self, method: str, *arguments: Any) -> Any:
        return self._exchange([method, arguments])["result"]

    def run(self, requests: list[Request]) -> float:
        """Seconds until all have ended.

        Raises:
            ChildFailed: also if one got more or less tokens than were asked for.
        """
        answer = self._exchange(["run", [requests]])
        wanted = [request.num_output for request in requests]
        if answer["result"] != wanted:
            raise ChildFailed(f"{self.name} gave {sum(answer['result'])} tokens, {sum(wanted)} were asked for")
        return float(answer["seconds"])

    def memory(self) -> Memory:
        each = [memory_of(number) for number in group_members(self.pid)]
        return Memory(sum(one.peak for one in each), sum(one.held for one in each))

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _exchange(self, line: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        watch = threading.Timer(LIMIT_S, os.killpg, (self.pid, signal.SIGKILL))
        watch.start()
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watch.cancel()
        if not answer:
            raise ChildFailed(f"{self.name} gave no answer; the last it said: {self._last_lines()}")
        return json.loads(answer)

    def _last_lines(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:])


def group_members(group: int) -> Iterator[int]:
    """Processes of a group, that have not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(number) == group and state != "Z":
            yield int(path.parent.name)


def memory_of(pid: int) -> Memory:
    """VmHWM, and RssAnon + RssShmem; nothing of a process that has ended meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    rows = [line.split() for line in lines if line.endswith(" kB")]
    sizes = {name: 1024 * int(number) for name, number, _ in rows}
    return Memory(sizes.get("VmHWM:", 0), sizes.get("RssAnon:", 0) + sizes.get("RssShmem:", 0))
