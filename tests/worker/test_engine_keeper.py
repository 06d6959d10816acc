"""What the keeper tells a running engine, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.fake_engine import Vocabulary, ready
from tests.support.tiny_model import byte_tokenizer_json
from worker.engine_keeper import COMMIT_S, COMMIT_STEPS, EngineKeeper
from worker.pipe import Commit, Message


class SilentProcess:
    """Says that it is ready, and then nothing; keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self._messages: list[Message] = [ready({}, Vocabulary(byte_tokenizer_json()), 4)]

    def send(self, message: Message) -> None:
        self.told.append(message)

    async def receive(self) -> Message | None:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop()

    @property
    def commits(self) -> list[int]:
        return [message.step for message in self.told if isinstance(message, Commit)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Owner:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@asynccontextmanager
async def keeping(process: SilentProcess, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineKeeper]:
    async def start(*_: Any) -> SilentProcess:
        return process

    monkeypatch.setattr("worker.engine_keeper.EngineProcess.start", start)
    keeper = EngineKeeper([], {}, clock, Owner())
    running = asyncio.create_task(keeper.run("{}"))
    while not keeper.is_ready:
        await asyncio.sleep(0)
    yield keeper
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_commits_are_told_now_and_then_and_the_last_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process, clock = SilentProcess(), Clock()
    async with keeping(process, clock, monkeypatch) as keeper:
        keeper.commit(1, at_once=False)
        assert process.commits == [1], "it is long ago that anything was told"
        for step in range(2, 2 * COMMIT_STEPS + 2):
            keeper.commit(step, at_once=False)
        assert process.commits == [1, 1 + COMMIT_STEPS, 1 + 2 * COMMIT_STEPS]
        keeper.commit(2 * COMMIT_STEPS + 2, at_once=False)
        clock.now += COMMIT_S
        keeper.commit(2 * COMMIT_STEPS + 2, at_once=False)
        assert process.commits[-1] == 2 * COMMIT_STEPS + 2
        keeper.commit(2 * COMMIT_STEPS + 3, at_once=True)
        assert process.commits[-1] == 2 * COMMIT_STEPS + 3
        keeper.commit(2 * COMMIT_STEPS + 3, at_once=True)
        assert len(process.commits) == 5, "nothing is told twice"
