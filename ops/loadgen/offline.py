"""Puts a workload to an engine in this process: what is left of a measurement without HTTP, Redis and text."""

from __future__ import annotations

import itertools
import time
from typing import cast

from common.job import SamplingParams
from ops.bench.offline import OfflineEngine
from ops.loadgen.answer import Answer
from ops.loadgen.result import LoadResult
from ops.loadgen.run import SHOW_EVERY_S, OnProgress, Running
from ops.loadgen.workload import Ask, Workload, arrival_times
from worker.pipe import Submit, TokenRun

SHORTEST_SLEEP_S = 1e-5
"""Differences of moments are rounded: what is due in no time is never quite due."""


class OfflineLoad(Running):
    """One run of a workload whose prompts are token ids. Answers have full length, since no token ends them.

    Tokens arrive when the engine has them; a request that comes while a step runs is taken after it.
    """

    def __init__(self, engine: OfflineEngine, workload: Workload) -> None:
        super().__init__(workload)
        self.engine = engine
        self._running: dict[str, Answer] = {}
        self._num_sent = 0
        self._is_exhausted = False
        rate = workload.rate
        self._moments = itertools.repeat(0.0) if rate is None else arrival_times(rate, workload.seed)
        self._moment = next(self._moments)
        self._shown = 0.0

    @property
    def num_open(self) -> int:
        return len(self._running)

    def run(self, on_progress: OnProgress | None = None) -> LoadResult:
        """Warm up, then measure; Ctrl-C ends it early."""
        is_interrupted = False
        try:
            for ask in self.workload.warmup:
                self._send(ask, time.perf_counter())
            while self._running:
                self._turn()
            self._begin()
            self._measure(on_progress)
        except KeyboardInterrupt:
            is_interrupted = True
        return self._result(is_interrupted)

    def _measure(self, on_progress: OnProgress | None) -> None:
        while True:
            self._send_what_is_due()
            if self._running:
                self._turn()
            elif self._is_exhausted:
                return
            else:
                time.sleep(max(self.started + self._moment - time.perf_counter(), SHORTEST_SLEEP_S))
            self._show(on_progress)

    def _send_what_is_due(self) -> None:
        is_open_loop = self.workload.rate is not None
        while not self._is_exhausted:
            elapsed_s = time.perf_counter() - self.started
            if self._moment > elapsed_s if is_open_loop else self.num_open >= self.workload.clients:
                return
            moment = self._moment if is_open_loop else elapsed_s
            ask = self._supply.next(moment)
            if ask is None:
                self._is_exhausted = True
                return
            self._send(ask, self.started + moment)
            self._moment = next(self._moments)

    def _send(self, ask: Ask, due: float) -> None:
        assert isinstance(ask.prompt, list), "an engine takes token ids"
        self._num_sent += 1
        answer = Answer(ask.max_tokens, due, time.perf_counter(), prompt_tokens=len(ask.prompt), output_tokens=0)
        request_id = str(self._num_sent)
        self._running[request_id] = answer
        self.most_open = max(self.most_open, self.num_open)
        self.engine.send(
            Submit(
                request_id=request_id,
                epoch=1,
                prompt_ids=cast(list[int], ask.prompt),
                output_ids=[],
                params=SamplingParams(max_new_tokens=ask.max_tokens, ignore_eos=True),
                eos_token_ids=[],
            )
        )

    def _turn(self) -> None:
        runs = self.engine.turn()
        now = time.perf_counter()
        for run in runs:
            self._note(run, now)

    def _note(self, run: TokenRun, now: float) -> None:
        answer = self._running[run.request_id]
        answer.ended, answer.output_tokens = now, answer.num_tokens + len(run.ids)
        if run.ids:
            answer.note_text(now, len(run.ids))
        if run.error:
            answer.fail("engine error", run.error)
        if run.finish:
            answer.is_complete = True
            self.answers.append(self._running.pop(run.request_id))

    def _show(self, on_progress: OnProgress | None) -> None:
        now = time.perf_counter()
        if on_progress is not None and now - self._shown >= SHOW_EVERY_S:
            self._shown = now
            on_progress(self)


def run_offline(engine: OfflineEngine, workload: Workload, on_progress: OnProgress | None = None) -> LoadResult:
    """Put the workload to the engine and wait for its end. CPU time is that of the engine here."""
    return OfflineLoad(engine, workload).run(on_progress)
