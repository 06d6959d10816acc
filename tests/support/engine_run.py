"""The engine core in one thread around any device, without agent and socket."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from worker.engine.device import Device
from worker.engine.loop import EngineLoop
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.pipe import Commit, Ready, Step, Submit, TokenRun


@dataclass
class Engine:
    """A loaded device, and the transformers model that it must agree with."""

    device: Device
    ready: Ready
    reference: Any = None


class Run:
    """One engine core over the device, from its first request to its last."""

    def __init__(
        self, engine: Engine, scheduler_class: type[Scheduler] = Scheduler, max_loras: int = 1, max_drafts: int = 0
    ) -> None:
        limits = limits_of(engine.ready, prefix_caching=True, max_loras=max_loras, max_drafts=max_drafts)
        self.scheduler = scheduler_class(limits)
        self.inbox: SimpleQueue = SimpleQueue()
        self.runs: dict[str, list[TokenRun]] = {}
        pacer = PrefillPacer(engine.ready.max_batch_prefill_tokens, 0.0)
        self.loop = EngineLoop(engine.device, self.scheduler, pacer, self.inbox, self._receive)

    def submit(self, message: Submit) -> None:
        self.runs[message.request_id] = []
        self.inbox.put(message)

    def run_pass(self) -> None:
        if self.scheduler.has_requests or not self.inbox.empty():
            assert self.loop.take_messages()
            self.loop.run_pass()

    def finish(self) -> None:
        while self.scheduler.has_requests or not self.inbox.empty():
            self.run_pass()
            self.scheduler.check()

    def outcome(self, request_id: str) -> tuple[list[int], str]:
        runs = self.runs[request_id]
        return [token for run in runs for token in run.ids], runs[-1].finish if runs else ""

    def logprobs(self, request_id: str) -> list[float]:
        return [value for run in self.runs[request_id] for value in run.logprobs]

    def _receive(self, step: Step) -> None:
        for run in step.runs:
            self.runs[run.request_id].append(run)
        self.inbox.put(Commit(step.step))
