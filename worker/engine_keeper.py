"""Keeps one engine running: starts it, listens, notices when it hangs, starts another one when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from common.errors import ConfigurationError, WireError
from worker.engine_client import EngineProcess
from worker.pipe import AdapterChecked, Commit, Failed, Message, Progress, Ready, Step, Stop
from worker.process import ending_of

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.2, 30.0
MAX_DEATHS_WHILE_LOADING = 3
COMMIT_STEPS, COMMIT_S = 16, 0.25

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """Who is told what the engine does."""

    def on_ready(self, ready: Ready) -> None: ...

    def on_step(self, step: Step) -> None: ...

    def on_adapter_checked(self, answer: AdapterChecked) -> None: ...

    def on_engine_lost(self) -> None: ...


class EngineKeeper:
    """`is_ready` between Ready and death. Loading counts as `progress`; `phase_began` is when its phase began."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], clock: Callable[[], float], owner: Owner
    ) -> None:
        self._command, self._environment, self._clock, self._owner = command, environment, clock, owner
        self._process: EngineProcess | None = None
        self._ready: Ready | None = None
        self._was_ever_ready = False
        self._committed = self._told = 0
        self._told_at = 0.0
        self._last_sign_of_life = clock()
        self.num_deaths = 0
        self._reset_progress()

    @property
    def is_ready(self) -> bool:
        return self._ready is not None

    async def run(self, settings: str) -> None:
        """Start the engine with `settings` (JSON), and again after each death, later each time.

        Raises:
            ConfigurationError: it cannot be started at all; the message is its own word on it when there is one.
        """
        back_off_s = FIRST_BACK_OFF_S
        while True:
            started = self._clock()
            self._reset_progress()
            self._process = await EngineProcess.start(self._command, settings, self._environment)
            failure = await self._listen(self._process)
            status = await self._process.close()
            self._on_death(status, failure)
            if self._clock() - started > LONGEST_BACK_OFF_S:
                back_off_s = FIRST_BACK_OFF_S
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)

    async def close(self) -> None:
        """End the engine: politely when it serves, at once when it still loads."""
        if self._process is None:
            return
        self._process.send(Stop())
        if not self.is_ready:
            self._process.kill()
        await self._process.close()

    async def _listen(self, process: EngineProcess) -> str:
        """Take messages until the pipe ends; the engine's own words on why it cannot go on, "" if it said none."""
        try:
            while (message := await process.receive()) is not None:
                if isinstance(message, Failed):
                    return message.message
                self._on_message(message)
        except WireError as error:
            process.kill()
            return str(error)
        return ""

    def _on_message(self, message: Message) -> None:
        self._last_sign_of_life = self._clock()
        if isinstance(message, Step):
            self._owner.on_step(message)
        elif isinstance(message, AdapterChecked):
            self._owner.on_adapter_checked(message)
        elif isinstance(message, Progress):
            self._on_progress(message)
        elif isinstance(message, Ready):
            self._ready, self._was_ever_ready = message, True
            self._committed = self._told = 0
            self._owner.on_ready(message)

    def _reset_progress(self) -> None:
        self.progress, self.phase_began = Progress("starting", 0, 0), self._clock()

    def _on_progress(self, progress: Progress) -> None:
        if progress.phase != self.progress.phase:
            logger.info("loading: %s", progress.phase)
            self.phase_began = self._clock()
        self.progress = progress

    def log_progress(self) -> None:
        """One line on how far loading is and how long it will still take."""
        progress = self.progress
        if not 0 < progress.done <= progress.total:
            return
        left_s = (self._clock() - self.phase_began) * (progress.total - progress.done) / progress.done
        sizes = progress.done / 1e6, progress.total / 1e6
        logger.info("loading: %s, %.0f of %.0f MB, about %.0f s left", progress.phase, *sizes, left_s)

    def _on_death(self, status: int, failure: str) -> None:
        how = failure or f"it {ending_of(status)}"
        self._ready, self.num_deaths = None, self.num_deaths + 1
        if failure and not self._was_ever_ready:
            raise ConfigurationError(failure)
        if not self._was_ever_ready and self.num_deaths >= MAX_DEATHS_WHILE_LOADING:
            times = f"{self.num_deaths} times while loading"
            raise ConfigurationError(f"the engine died {times}: {how}; is there enough memory?")
        logger.error("engine lost, starting it again: %s", how)
        self._owner.on_engine_lost()

    def send(self, message: Message) -> None:
        """Pass a message on; without an engine it is lost."""
        if self.is_ready and self._process is not None:
            self._process.send(message)

    def commit(self, step: int, *, at_once: bool) -> None:
        """Steps up to `step` are on Redis. The engine, which pauses when that is too far behind, is told now and then,
        as each message costs it time; `at_once` when no step of it will bring the next occasion."""
        if step != self._committed:
            self._committed = step
            self.rest()
        now = self._clock()
        is_due = at_once or step - self._told >= COMMIT_STEPS or now - self._told_at >= COMMIT_S
        if step != self._told and is_due:
            self._told, self._told_at = step, now
            self.send(Commit(step))

    def rest(self) -> None:
        """What comes next is a fresh start: nothing before it counts as silence."""
        self._last_sign_of_life = self._clock()

    def check(self, newest_step: int) -> None:
        """Kill an engine that owes a step and does not end it, unless it waits for `newest_step` to be committed."""
        if self._ready is None or self._process is None or newest_step != self._committed:
            self.rest()
        elif self._clock() - self._last_sign_of_life > self._ready.step_limit_s:
            logger.error("no step for %.0f s: killing the engine", self._ready.step_limit_s)
            self._process.kill()
