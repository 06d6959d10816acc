"""A group of fake ranks under way, as its agent sees it, and what the system knows of its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.support.fleet import process_state, wait_for
from tests.worker.engine.harness import submit
from tests.worker.parallel.fake_ranks import THIS
from worker.pipe import Commit, Failed, Message, Progress, Ready, Step, Stop, encode, read_message

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0
GONE_S = 5.0


def is_alive(pid: int) -> bool:
    """A process that only waits to be reaped counts as gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return process_state(pid) not in "ZX"
    return False


def wait_until_gone(pids: list[int]) -> None:
    wait_for(lambda: not any(map(is_alive, pids)), "the end of all processes of the group", GONE_S)


class Group:
    """Rank 0 as a child, with the agent's end of its socket. `lines` is what all ranks have printed."""

    def __init__(self, mode: str, **settings: object) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(DEADLINE_S)
        self.stream = self.connection.makefile("rb")
        self.settings = {"num_shard": 3, "threads": 1} | settings
        with theirs:
            self.process = subprocess.Popen(
                [*THIS, mode, "--fd", str(theirs.fileno()), "--settings", json.dumps(self.settings)],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
            )
        self.lines: list[str] = []
        self.progress: list[Progress] = []

    def wait_for_line(self, text: str) -> None:
        """Read what the ranks print until one prints that."""
        while text not in self.lines:
            self._read_line()

    def pid(self, rank: int) -> int:
        pattern = re.compile(f"rank {rank} is ([0-9]+)")
        return next(int(found[1]) for line in self.lines if (found := pattern.fullmatch(line)))

    def wait_for_pids(self) -> list[int]:
        """Of the ranks here, each of which prints its own when it begins to load."""
        ranks = range(int(str(self.settings["num_shard"])) // int(str(self.settings.get("num_nodes", 1))))
        while not all(any(line.startswith(f"rank {rank} is ") for line in self.lines) for rank in ranks):
            self._read_line()
        return [self.pid(rank) for rank in ranks]

    def _read_line(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the group has ended"
        self.lines.append(line.decode().rstrip())

    def receive(self) -> Message | None:
        try:
            return read_message(self.stream)
        except ConnectionResetError:
            return None

    def send(self, message: Message) -> None:
        self.connection.sendall(encode(message))

    def start(self) -> Ready:
        while not isinstance(message := self.receive(), Ready):
            assert isinstance(message, Progress), message
            self.progress.append(message)
        return message

    def begin(self) -> None:
        """Submit a request of a hundred tokens."""
        self.send(submit("a", [10, 11, 12], max_new_tokens=100, ignore_eos=True))

    def serve(self) -> list[int]:
        """The tokens of that request."""
        self.begin()
        ids: list[int] = []
        while len(ids) < 100:
            step = self.receive()
            assert isinstance(step, Step)
            self.send(Commit(step.step))
            ids += [token for run in step.runs for token in run.ids]
        return ids

    def last_words(self) -> str | None:
        """Why it cannot go on; None if it left without a word. Steps under way come first."""
        while (message := self.receive()) is not None:
            if isinstance(message, Failed):
                assert self.receive() is None, "nothing comes after the last words"
                return message.message
        return None

    def kill(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGKILL)

    def stop(self) -> int:
        self.send(Stop())
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stream.close()
        self.connection.close()


class Node:
    """The leader of another node as a child, and what it and its ranks print."""

    def __init__(self, mode: str, settings: dict[str, object]) -> None:
        self.process = subprocess.Popen(
            [*THIS, mode, "--settings", json.dumps(settings)],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "REDIS_URL"} | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        self.num_per_life = int(str(settings["num_shard"])) // int(str(settings["num_nodes"]))

    def wait_for_pids(self) -> list[int]:
        """Of the ranks that it has started last."""
        return [int(self.wait_for(r"rank [0-9]+ is ([0-9]+)")) for _ in range(self.num_per_life)]

    def wait_for(self, pattern: str) -> str:
        """Read until a line matches; its first group."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline().decode().rstrip():
            if found := re.fullmatch(pattern, line):
                return found[1]
        raise AssertionError(f"the node ended without {pattern!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
