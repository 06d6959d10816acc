"""An engine in this process: scheduler, loop and device as in a worker, without agent, Redis and gateway."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

from common.settings import WorkerSettings
from worker.engine.loop import EngineLoop, Inbox
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.engine.stats import EngineStats
from worker.engine_client import engine_environment
from worker.pipe import AdapterChecked, Commit, Message, Ready, Step, Submit, TokenRun
from worker.torch_import import import_torch

if TYPE_CHECKING:
    from worker.engine.device import Device

WAIT_POLICY = "OMP_WAIT_POLICY"

log = logging.getLogger(__name__)


def wait_as_workers_do(threads: int = 0, num_ranks: int = 1) -> None:
    """Give this process, and ranks that it starts, the environment that an agent gives its engine of so many threads
    (0: all cores). torch reads it when it is imported; its threads would spin beside the kernels' own. What the
    C library reads when a process starts reaches children alone."""
    environment = engine_environment(threads, num_ranks)
    if "torch" not in sys.modules:
        os.environ.update(environment)
    elif os.environ.get(WAIT_POLICY) != environment.get(WAIT_POLICY):
        log.warning("torch was imported before %s could be set: its threads wait as they like", WAIT_POLICY)


@dataclass(frozen=True, slots=True)
class Run:
    """`decode_s` begins when every request has its first token. `outputs` are by request, and `num_tokens` counts those
    of all; `num_drafts` were guessed ahead, of which `num_accepted` were right."""

    seconds: float
    decode_s: float
    num_tokens: int
    num_decoded: int
    largest_batch: int
    num_drafts: int
    num_accepted: int
    outputs: dict[str, list[int]]


class OfflineEngine:
    """Around a device of its own, or one that was `loaded` before, which others may use between runs."""

    def __init__(self, settings: WorkerSettings, loaded: tuple[Device, Ready] | None = None) -> None:
        wait_as_workers_do(settings.threads, settings.ranks_per_node)
        # not above: torch is to find that environment
        import_torch()
        from worker.runner.load import load_device

        self.device, self.ready = loaded or load_device(settings, lambda phase, done, total: None)
        self._inbox: Inbox = SimpleQueue()
        limits = limits_of(
            self.ready,
            prefix_caching=settings.prefix_caching,
            max_loras=settings.max_loras,
            max_drafts=settings.speculate,
        )
        scheduler = Scheduler(limits)
        pacer = PrefillPacer(self.ready.max_batch_prefill_tokens, settings.prefill_step)
        self._loop = EngineLoop(self.device, scheduler, pacer, self._inbox, self._note)
        self._runs: list[TokenRun] = []
        self._outputs: dict[str, list[int]] = {}
        self._num_running = 0
        self._all_started_at = 0.0

    @property
    def stats(self) -> EngineStats:
        return self._loop.scheduler.stats

    def send(self, message: Message) -> None:
        self._inbox.put(message)

    def turn(self) -> list[TokenRun]:
        """One pass of the engine, and what came of it. Without a request that runs or was sent it waits for ever."""
        self._runs = []
        self._loop.take_messages()
        self._loop.run_pass()
        return self._runs

    def run(self, submits: Sequence[Submit]) -> Run:
        """All requests at once, to their ends.

        Raises:
            RuntimeError: one of them failed.
        """
        self._outputs = {submit.request_id: [] for submit in submits}
        self._num_running, self._all_started_at = len(submits), 0.0
        before = replace(self.stats)
        started = time.perf_counter()
        for submit in submits:
            self.send(submit)
        while self._num_running:
            self._take(self.turn())
        ended, counts = time.perf_counter(), [len(ids) for ids in self._outputs.values()]
        stats = self.stats
        return Run(
            seconds=ended - started,
            decode_s=ended - self._all_started_at,
            num_tokens=sum(counts),
            num_decoded=sum(counts) - self._num_at_start,
            largest_batch=stats.batch_max,
            num_drafts=stats.draft_tokens - before.draft_tokens,
            num_accepted=stats.accepted_tokens - before.accepted_tokens,
            outputs=self._outputs,
        )

    def _note(self, step: Step | AdapterChecked) -> None:
        assert isinstance(step, Step), "nobody asked for a check"
        self.send(Commit(step.step))
        self._runs += step.runs

    def _take(self, runs: Sequence[TokenRun]) -> None:
        for run in runs:
            if run.error:
                raise RuntimeError(run.error)
            self._outputs[run.request_id] += run.ids
            self._num_running -= bool(run.finish)
        if not self._all_started_at and all(self._outputs.values()):
            self._all_started_at = time.perf_counter()
            self._num_at_start = sum(map(len, self._outputs.values()))
