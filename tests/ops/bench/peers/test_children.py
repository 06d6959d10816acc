"""Engines in processes of their own: asked, put to sleep with what they started, measured and ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.bench.peers import children
from ops.bench.peers.children import Child, ChildFailed, group_members, memory_of
from ops.bench.peers.compare import awake
from ops.bench.peers.pipe import Request

REQUESTS = [Request([5, 6], 3), Request([7], 2)]
FAKE = [sys.executable, "-m", "tests.support.fake_peer"]
HUNGRY = """
import subprocess, sys
taken = bytearray(b"x") * (50 << 20)
if len(sys.argv) < 2:
    subprocess.Popen([sys.executable, __file__, "inner"], stdin=subprocess.DEVNULL)
taken = taken[: 10 << 20]
print("{}", flush=True)
while True:
    sys.stdin.readline() or __import__("time").sleep(60)
"""
"""It and a process that it starts have 50 MiB each for a moment, then 10."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def begin(words: list[str], *, is_loaded: bool = True, **settings: Any) -> Child:
        started.append(Child("fake", words, {"FOR_IT": "x"}, tmp_path / "log"))
        if is_loaded:
            started[-1].load({"settings": settings})
        return started[-1]

    yield begin
    for child in started:
        child.close()
        assert not list(group_members(child.pid))


def states(group: int) -> set[str]:
    return {Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] for number in group_members(group)}


def wait_for(condition: Callable[[], bool]) -> None:
    # a signal takes a moment; what never comes is ended by the limit on every test
    while not condition():
        time.sleep(0.01)


def test_an_engine_answers_orders_and_what_it_prints_is_no_answer(start: Callable[..., Child], tmp_path: Path):
    child = start(FAKE)
    assert child.run(REQUESTS) >= 0.0
    assert child.ask("versions") == {"fake": "1.0"}
    assert child.ask("top", [5], 2, 1) == [[[7, -2.0]]] * 2
    assert child.age() > 0.0
    assert "this is no answer" in (tmp_path / "log").read_text()


def test_a_count_of_tokens_that_is_not_what_was_asked_for_fails(start: Callable[..., Child]):
    with pytest.raises(ChildFailed, match="fake gave 3 tokens, 5 were asked for"):
        start(FAKE, short=True).run(REQUESTS)


def test_an_engine_that_ends_is_a_sentence_with_what_it_said_last(start: Callable[..., Child]):
    with pytest.raises(ChildFailed, match="fake gave no answer; the last it said: no such model"):
        start(FAKE, says="no such model")


def test_an_engine_that_hangs_is_ended(start: Callable[..., Child], monkeypatch):
    monkeypatch.setattr(children, "LIMIT_S", 0.2)
    with pytest.raises(ChildFailed, match="gave no answer"):
        start([sys.executable, "-c", "import time; time.sleep(600)"])


def test_an_engine_sleeps_with_what_it_started_and_wakes_to_be_asked(start: Callable[..., Child], tmp_path: Path):
    program = tmp_path / "hungry.py"
    program.write_text(HUNGRY)
    child = start([sys.executable, str(program)])
    wait_for(lambda: len(list(group_members(child.pid))) == 2)
    child.pause()
    wait_for(lambda: states(child.pid) == {"T"})
    with awake(child):
        wait_for(lambda: "T" not in states(child.pid))
    wait_for(lambda: states(child.pid) == {"T"})
    assert child.pid in group_members(child.pid) and os.getpid() not in group_members(child.pid)


def test_memory_counts_all_processes_of_an_engine_at_their_peak_and_now(start: Callable[..., Child], tmp_path: Path):
    program = tmp_path / "hungry.py"
    program.write_text(HUNGRY)
    child = start([sys.executable, str(program)])
    wait_for(lambda: len(list(group_members(child.pid))) == 2)
    wait_for(
        lambda: all(memory_of(number).peak > memory_of(number).held + (30 << 20) for number in group_members(child.pid))
    )
    memory = child.memory()
    assert 100 << 20 < memory.peak < 300 << 20
    assert 20 << 20 < memory.held < 90 << 20
    assert memory_of(0) == (0, 0), "no such process"
