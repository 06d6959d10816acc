"""The engine loop: takes messages, keeps the device busy, applies results, sends tokens.

One pass launches a step and applies the one that is due. With depth 1 two steps overlap; while the device computes the
forward pass of N+1, the host settles N, and only then is N+1 sampled, so that whatever sampling must know of token N
(a grammar's state, say) can be known:

    host    schedule  forward  collect, apply,  sample │ schedule  forward  collect, apply,  sample │
            N+1       N+1      send N           N+1    │ N+2       N+2      send N+1         N+2    │
    device  ░ sample N ░░░░░│░░░░░░░ forward N+1 ░░░░░░░░░│ sample N+1 │░░░░░░░ forward N+2 ░░░░░░░░░░│

With depth 0 (calls return when done) a pass is schedule, forward, sample, collect, apply, send of the same step. With
depth 2 two steps are pending while a third one is launched.

State changes at two points only, both between launches: messages are taken at the beginning of a pass, results are
applied once per pass. What a request held goes back when the last launched step that names it was applied.

A step for which the device has no memory is taken back: all launched before it are applied, so that nothing is in
flight, and its requests wait for their next step as if preempted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from common.errors import InferfleetError
from worker.engine.device import Device, StepTooLarge
from worker.engine.pacing import PrefillPacer
from worker.engine.plan import Launch
from worker.engine.request import end_without_token, request_of
from worker.engine.scheduler import Scheduler
from worker.pipe import Abort, AdapterChecked, CheckAdapter, Commit, Message, Step, Stop, Submit, TokenRun

MAX_UNCOMMITTED_STEPS = 64
MAX_UNCOMMITTED_S = 2.0

STATS_EVERY_S = 0.05
"""To count and to write down takes as long as a small kernel."""

Inbox = SimpleQueue[Message | None]

logger = logging.getLogger(__name__)


class EngineStalled(InferfleetError):
    """Requests wait, nothing is under way and nothing can be launched: a mistake in the scheduler."""


@dataclass(slots=True, eq=False)
class Pending:
    """A launched step whose result is not applied yet."""

    launch: Launch
    handle: Any
    launched_at: float


class Uncommitted:
    """The steps with tokens that are not durable yet. Too many or too old ones stop the launching of new steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sent: deque[tuple[int, float]] = deque()

    def sent(self, step: int) -> None:
        self._sent.append((step, self._clock()))

    def commit(self, step: int) -> None:
        while self._sent and self._sent[0][0] <= step:
            self._sent.popleft()

    @property
    def is_full(self) -> bool:
        sent = self._sent
        return len(sent) >= MAX_UNCOMMITTED_STEPS or (bool(sent) and self._clock() - sent[0][1] > MAX_UNCOMMITTED_S)


class EngineLoop:
    """Runs in the main thread of the engine process. `inbox` is filled by another thread; None means the agent is
    gone."""

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        pacer: PrefillPacer,
        inbox: Inbox,
        send: Callable[[Step | AdapterChecked], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.scheduler, self.pacer = device, scheduler, pacer
        self.inbox, self.send, self.clock = inbox, send, clock
        self._pending: deque[Pending] = deque()
        self._answers: list[TokenRun] = []
        self._uncommitted = Uncommitted(clock)
        self._num_arrivals = 0
        self._num_sent = 0
        self._last_applied_at = 0.0
        self._stats_due_at = 0.0

    def run(self) -> None:
        """Until the agent says Stop or is gone. Steps under way are applied and sent first.

        Raises:
            EngineStalled: instead of waiting for ever.
        """
        while self.take_messages():
            self.run_pass()
        while self._pending:
            self._apply_oldest()

    def take_messages(self) -> bool:
        """Everything that has arrived; waits only when there is nothing to do. False when it is time to leave."""
        must_wait = not self._has_work()
        while True:
            try:
                message = self.inbox.get(block=must_wait)
            except Empty:
                return True
            if message is None or isinstance(message, Stop):
                return False
            must_wait = False
            self._take(message)

    def run_pass(self) -> None:
        """Launch a step, apply the one that is due."""
        launch = self._schedule()
        if launch is not None:
            try:
                self._launch(launch)
            except StepTooLarge as error:
                self._take_back(launch, error)
        elif self._pending:
            self._apply_oldest()
        self._send_answers()

    def _launch(self, launch: Launch) -> None:
        depth, launched_at = self.device.depth, self.clock()
        self.device.forward(launch.plan)
        if self._pending and len(self._pending) >= depth:
            self._apply_oldest()
        self._pending.append(Pending(launch, self.device.sample(launch.plan), launched_at))
        if len(self._pending) > depth:
            self._apply_oldest()

    def _take_back(self, launch: Launch, error: StepTooLarge) -> None:
        while self._pending:
            self._apply_oldest()
        if not self.scheduler.take_back(launch):
            raise error
        logger.warning("step %d is tried again, smaller: %s", launch.plan.step, error)

    def _has_work(self) -> bool:
        return bool(self._pending) or (self.scheduler.has_requests and not self._uncommitted.is_full)

    def _take(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(request_ids):
                for request_id in request_ids:
                    self.scheduler.abort(request_id)
            case Commit(step):
                self._uncommitted.commit(step)
            case CheckAdapter(name, source):
                self.send(self.device.check_adapter(name, source))
            case _:
                raise InferfleetError(f"the agent sent a message of the engine: {type(message).__name__}")

    def _submit(self, submit: Submit) -> None:
        self._num_arrivals += 1
        try:
            request = request_of(submit, self._num_arrivals, self.scheduler.limits.decoder_start_id)
            answer = self.scheduler.add(request)
        except (OverflowError, TypeError):
            answer = end_without_token(submit, "error", "token ids must be integers of 32 bits")
        if answer is not None:
            self._answers.append(answer)

    def _schedule(self) -> Launch | None:
        if not self.scheduler.has_requests or self._uncommitted.is_full:
            return None
        budget = self.pacer.budget(self.scheduler.num_decoding, has_seniors=self.scheduler.has_seniors)
        launch = self.scheduler.schedule(budget)
        if launch is None and not budget:
            # nobody decodes after all, so nobody waits for prompts
            launch = self.scheduler.schedule(self.pacer.max_tokens)
        if launch is None and not self._pending and self.scheduler.has_requests:
            raise EngineStalled("requests wait and no step can be launched")
        return launch

    def _apply_oldest(self) -> None:
        pending = self._pending.popleft()
        result = self.device.collect(pending.handle)
        runs = self.scheduler.apply(pending.launch, result)
        now = self.clock()
        seconds = now - max(pending.launched_at, self._last_applied_at)
        self._last_applied_at = now
        self.pacer.note(pending.launch.num_prompt_tokens, pending.launch.num_decodes, seconds)
        self.scheduler.note_time(pending.launch, seconds)
        self._send(runs, seconds)

    def _send_answers(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._send(answers, 0.0)

    def _send(self, runs: list[TokenRun], seconds: float) -> None:
        """Also without tokens: the agent sees from it that the step is over."""
        self._num_sent += 1
        if runs:
            self._uncommitted.sent(self._num_sent)
        self.send(Step(step=self._num_sent, runs=runs, stats=self._stats(seconds)))

    def _stats(self, seconds: float) -> dict[str, float]:
        """Those of now if they are due, which they are too before a silence."""
        now = self.clock()
        if now < self._stats_due_at and self.scheduler.has_requests:
            return {}
        self._stats_due_at = now + STATS_EVERY_S
        return self.scheduler.snapshot() | {"step_ms": seconds * 1e3}
