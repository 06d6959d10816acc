"""The engine process as its agent sees it: a real process at the other end of a real socket, around the fake device."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.worker.engine.fake_device import Oracle
from tests.worker.engine.fake_process import LIMITS
from tests.worker.engine.harness import submit
from worker.pipe import Commit, Failed, Message, Progress, Ready, Step, Stop, encode, read_message

DEADLINE_S = 30.0
COMMAND = [sys.executable, "-m", "tests.worker.engine.fake_process"]
ROOT = Path(__file__).parents[2]
# A parent that starts the command it is given, says its pid and waits.
PARENT = (
    "import subprocess, sys; child = subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])]); "
    "print(child.pid, flush=True); child.wait()"
)


class Engine:
    """A running engine process and the agent's end of its socket."""

    def __init__(self, mode: str, command: Callable[[list[str], int], list[str]] = lambda command, fd: command) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(DEADLINE_S)
        fd = theirs.fileno()
        with theirs:
            self.process = subprocess.Popen(
                command([*COMMAND, mode, str(fd)], fd),
                pass_fds=[fd],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self.stream = self.connection.makefile("rb")

    def send(self, message: Message) -> None:
        self.connection.sendall(encode(message))

    def receive(self) -> Message | None:
        return read_message(self.stream)

    def start(self) -> list[Message]:
        """Everything up to Ready."""
        messages = [self.receive()]
        while not isinstance(messages[-1], Ready):
            assert messages[-1] is not None
            messages.append(self.receive())
        return messages

    def hang_up(self) -> None:
        self.stream.close()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


@pytest.fixture()
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*arguments: object) -> Engine:
        engines.append(Engine(*arguments))
        return engines[-1]

    yield make
    for engine in engines:
        engine.process.kill()
        engine.process.communicate()
        engine.hang_up()


def serve_one(engine: Engine) -> tuple[list[int], str]:
    """Run one request to its end, as an agent would."""
    engine.send(submit("a", [10, 11, 12], max_new_tokens=100, ignore_eos=True))
    ids: list[int] = []
    while True:
        step = engine.receive()
        assert isinstance(step, Step)
        engine.send(Commit(step.step))
        for run in step.runs:
            ids += run.ids
            if run.finish:
                return ids, run.finish


def test_it_loads_serves_and_leaves_when_told(start: Callable[..., Engine]) -> None:
    engine = start("good")
    assert engine.start()[:2] == [Progress("weights", 1, 2), Progress("weights", 2, 2)]
    message = submit("a", [10, 11, 12], max_new_tokens=100, ignore_eos=True)
    assert serve_one(engine) == Oracle(LIMITS.vocab_size).generate([10, 11, 12], [], message.params, [])
    engine.send(Stop())
    assert engine.wait() == 0
    assert not isinstance(engine.receive(), Failed)


def test_signals_are_the_agents_matter(start: Callable[..., Engine]) -> None:
    engine = start("good")
    engine.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        engine.process.send_signal(number)
    assert len(serve_one(engine)[0]) == 100
    assert engine.process.poll() is None


def test_it_leaves_when_the_agent_hangs_up(start: Callable[..., Engine]) -> None:
    engine = start("good")
    engine.start()
    engine.hang_up()
    assert engine.wait() == 0


def test_a_hung_device_does_not_outlive_the_connection(start: Callable[..., Engine]) -> None:
    engine = start("hangs")
    engine.start()
    engine.send(submit("a", [10]))
    assert engine.process.stdout is not None
    assert engine.process.stdout.readline() == b"hanging\n"
    assert engine.process.poll() is None
    engine.hang_up()
    assert engine.wait() == 1


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("refuses", "the folder holds no model; name another one"),
        ("breaks", "RuntimeError: the device fell over"),
    ],
)
def test_any_failure_is_one_sentence_and_an_exit(start: Callable[..., Engine], mode: str, sentence: str) -> None:
    engine = start(mode)
    if mode == "breaks":
        engine.start()
        engine.send(submit("a", [10]))
    messages = [engine.receive()]
    while messages[-1] is not None:
        messages.append(engine.receive())
    assert messages[-2] == Failed(sentence)
    assert engine.wait() == 1


def test_garbage_from_the_agent_ends_it(start: Callable[..., Engine]) -> None:
    engine = start("good")
    engine.start()
    engine.connection.sendall(b"\x04\x00\x00\x00oops")
    assert engine.wait() == 0
    _, log = engine.process.communicate()
    assert b"the connection to the agent broke" in log


def is_alive(pid: int) -> bool:
    """A process that only waits to be reaped counts as gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def test_it_dies_with_the_process_that_started_it(start: Callable[..., Engine]) -> None:
    engine = start("good", lambda command, fd: [sys.executable, "-c", PARENT, str(fd), *command])
    engine.start()
    assert engine.process.stdout is not None
    pid = int(engine.process.stdout.readline())
    assert pid != engine.process.pid
    assert is_alive(pid)
    os.kill(engine.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, "the engine outlives its parent"
        time.sleep(0.01)
