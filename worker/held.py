"""The jobs a worker holds, from taken to answered: engine tokens through the text stage into the outbox. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from common.job import FinishReason, Job, JobState, TokenColumns
from common.store.replies import Control, StepReply, Taken
from common.text.detokenize import Decoder
from worker.outbox import JobEnd, Outbox, Outgoing
from worker.pipe import Abort, Message, Step, Submit, TokenRun
from worker.text import TextStage, TopTexts

KEEP_CLOSED_S = 10.0
MAX_CLOSED = 4096
CANCELLED = {"cancel": JobState.CANCELLED, "expire": JobState.EXPIRED}
CANCEL_REASONS = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}

Given = TypeVar("Given")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Held:
    """A job of ours. `stage` is None when it ended before the engine saw it."""

    job: Job
    epoch: int
    is_suspect: bool
    stage: TextStage | None = None
    end: JobEnd | None = None
    unfollowed_since: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.end is not None

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(prompt, output so far, most output), in tokens."""
        num_output = self.stage.num_released if self.stage else 0
        return len(self.job.prompt_ids), num_output, self.job.params.max_new_tokens


@dataclass(slots=True)
class Closed:
    """A job that ended lately, kept in case Redis loses its newest writes."""

    held: Held
    outgoing: Outgoing
    at: float


class HeldJobs:
    """All jobs of one incarnation. A (job, epoch) begins at most once, however often Redis or a lost reply names it.

    `send` goes to the engine. `on_end` hears of every job that ends here, and of how many tokens it has. The answers of
    an encoder-decoder model do not continue their prompts.
    """

    def __init__(
        self,
        decoder: Decoder,
        eos_token_ids: tuple[int, ...],
        send: Callable[[Message], None],
        clock: Callable[[], float],
        on_end: Callable[[Held, int], None] = lambda *_: None,
        *,
        is_encoder_decoder: bool = False,
    ) -> None:
        self._decoder, self._eos_token_ids, self._send, self._clock = decoder, list(eos_token_ids), send, clock
        self._on_end, self._is_encoder_decoder = on_end, is_encoder_decoder
        self._top_texts = TopTexts(decoder)
        self._held: dict[str, Held] = {}
        self._closed: dict[tuple[str, int], Closed] = {}
        self._early: dict[str, JobState] = {}
        self.started: set[tuple[str, int]] = set()
        self.outbox = Outbox()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, job_id: str) -> Held | None:
        return self._held.get(job_id)

    @property
    def running(self) -> list[Held]:
        return [held for held in self._held.values() if not held.is_ended]

    @property
    def is_empty(self) -> bool:
        """Nothing held and nothing waiting for an answer."""
        return not self._held

    def begin(self, taken: Taken, logged: TokenColumns) -> None:
        """Start a job that is ours now, or end it at once if that is what its record says."""
        job = taken.job
        held = Held(job, taken.epoch, taken.is_suspect)
        self._held[job.job_id] = held
        self.started.add((job.job_id, taken.epoch))
        self.outbox.add(job.job_id, taken.epoch, logged, taken.gateways)
        ordered = CANCEL_REASONS.get(taken.cancel_reason) or self._early.pop(job.job_id, None)
        if ordered is not None:
            self._end(held, JobEnd(state=ordered))
        else:
            self._guarded(held, self._submit, logged)

    def _submit(self, held: Held, logged: TokenColumns) -> None:
        job = held.job
        context_ids = [] if self._is_encoder_decoder else job.prompt_ids
        held.stage = TextStage(self._decoder, self._top_texts, context_ids, job.params, logged)
        if held.stage.log_ends_with_stop:
            self._end(held, JobEnd(state=JobState.COMPLETED, finish_reason=FinishReason.STOP_SEQUENCE))
            return
        self._send(
            Submit(
                request_id=job.job_id,
                epoch=held.epoch,
                prompt_ids=job.prompt_ids,
                output_ids=logged.ids,
                params=job.params,
                eos_token_ids=self._eos_token_ids,
                cache_salt=job.cache_salt,
                is_suspect=held.is_suspect,
                adapter=job.adapter,
            )
        )

    def on_step(self, step: Step) -> None:
        """Bring the tokens of one engine step into the outbox."""
        for run in step.runs:
            held = self._held.get(run.request_id)
            if held is not None and held.epoch == run.epoch and held.end is None:
                self._guarded(held, self._on_run, run)
        if step.runs:
            self.outbox.engine_step = step.step

    def _on_run(self, held: Held, run: TokenRun) -> None:
        assert held.stage is not None
        released = held.stage.push(run)
        self.outbox.push(held.job.job_id, released.columns)
        if run.finish == "error":
            self._end(held, JobEnd(state=JobState.FAILED, error_code="engine_error", error_message=run.error))
        elif released.finish_reason is not None:
            if not run.finish:
                self._send(Abort([held.job.job_id]))
            self._end(held, JobEnd(state=JobState.COMPLETED, finish_reason=released.finish_reason))

    def _guarded(self, held: Held, action: Callable[[Held, Given], None], given: Given) -> None:
        try:
            action(held, given)
        except Exception as error:
            # The one place where a failure becomes a failed job: whatever is wrong with it must not end the others.
            logger.exception("job %s failed in the text stage", held.job.job_id)
            self._send(Abort([held.job.job_id]))
            message = f"{type(error).__name__}: {error}"
            self._end(held, JobEnd(state=JobState.FAILED, error_code="internal_error", error_message=message))

    def fail(self, job_id: str, epoch: int, code: str, message: str) -> None:
        """End a job that cannot run here, if it is still ours."""
        held = self._held.get(job_id)
        if held is not None and held.epoch == epoch and not held.is_ended:
            self._end(held, JobEnd(state=JobState.FAILED, error_code=code, error_message=message))

    def _end(self, held: Held, end: JobEnd) -> None:
        held.end = end
        self.outbox.end(held.job.job_id, end)
        self._on_end(held, held.lengths[1])

    def cancel(self, job_id: str, state: JobState) -> None:
        """End a job early; for one that is not known yet the order is kept until the next look at what is ours."""
        held = self._held.get(job_id)
        if held is None:
            self._early[job_id] = state
        elif not held.is_ended:
            self._send(Abort([job_id]))
            self._end(held, JobEnd(state=state))

    def control(self, control: Control) -> None:
        """Follow one order of Redis about a job."""
        if control.verb in CANCELLED:
            self.cancel(control.job_id, CANCELLED[control.verb])
        elif control.verb == "attach":
            self.outbox.attach(control.job_id, control.gateway)
        elif control.verb == "detach":
            self.outbox.detach(control.job_id, control.gateway)

    def answered(self, reply: StepReply) -> None:
        """Take in the reply to a step call: what is settled, what is lost, what is ordered."""
        outgoing = {job.job_id: job for job in self.outbox.jobs}
        for job_id in self.outbox.answered(reply):
            self._close(job_id, outgoing.get(job_id))
        for control in reply.controls:
            self.control(control)

    def _close(self, job_id: str, outgoing: Outgoing | None) -> None:
        held = self._held.pop(job_id, None)
        if held is None:
            return
        if not held.is_ended:
            logger.warning("job %s is no longer ours", job_id)
            self._send(Abort([job_id]))
        elif outgoing is not None:
            self._closed[(job_id, held.epoch)] = Closed(held, outgoing, self._clock())

    def drop(self, job_id: str) -> None:
        """Another worker has the job."""
        self.outbox.drop(job_id)
        if self._held.pop(job_id, None) is not None:
            self._send(Abort([job_id]))

    def forget_old(self, owned: set[tuple[str, int]]) -> None:
        """Drop what was kept until now; `owned` are the (job, epoch) that Redis says are ours."""
        limit = self._clock() - KEEP_CLOSED_S
        recent = [(key, closed) for key, closed in self._closed.items() if closed.at > limit]
        self._closed = dict(recent[-MAX_CLOSED:])
        held = {(held.job.job_id, held.epoch) for held in self._held.values()}
        self.started &= owned | held | self._closed.keys()
        self._early.clear()

    def is_recently_closed(self, job_id: str, epoch: int) -> bool:
        return (job_id, epoch) in self._closed

    def reopen_closed(self) -> None:
        """Redis may have lost the ends of these jobs: treat them as not answered yet."""
        for (job_id, _), closed in self._closed.items():
            if job_id not in self._held:
                self._held[job_id] = closed.held
                self.outbox.restore(closed.outgoing)
        self._closed.clear()

    def unended(self) -> list[tuple[str, int]]:
        """The jobs that have not ended, with their epochs."""
        return [(held.job.job_id, held.epoch) for held in self.running]

    def unfollowed(self) -> list[str]:
        """Jobs whose door gives up on them because nobody has followed them for their grace."""
        now, over = self._clock(), []
        for held in self.running:
            grace = held.job.orphan_grace_s
            if grace is None or self.outbox.has_followers(held.job.job_id):
                held.unfollowed_since = None
            elif held.unfollowed_since is None:
                held.unfollowed_since = now
            elif now - held.unfollowed_since >= grace:
                over.append(held.job.job_id)
        return over
