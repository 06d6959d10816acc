"""Drives scheduler, loop and fake device pass by pass in one thread, checks the books after each pass, collects
outputs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import numpy as np

from common.job import Adapter, SamplingParams
from tests.support.guesser import Guesser
from tests.worker.engine.fake_device import FakeDevice, Oracle, logprob_of
from worker.engine.loop import EngineLoop
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import EngineLimits, Scheduler
from worker.pipe import Abort, AdapterChecked, Commit, Message, Step, Submit

EOS = 7
START = 3
MAX_PASSES = 5000


def limits(**changes: object) -> EngineLimits:
    """A tiny engine in which everything runs short soon."""
    fields = {
        "vocab_size": 50,
        "block_size": 4,
        "num_blocks": 20,
        "max_num_seqs": 6,
        "max_total_tokens": 60,
        "max_batch_prefill_tokens": 16,
        "prefix_caching": True,
    }
    return EngineLimits(**(fields | changes))


def encoder_limits(**changes: object) -> EngineLimits:
    """The same for an encoder-decoder model, with the smallest pool that these requests allow."""
    fields = {"decoder_start_id": START, "prefix_caching": False, "num_blocks": 17}
    return limits(**(fields | changes))


def submit(request_id: str, prompt: list[int], *, output: list[int] | None = None, **fields: object) -> Submit:
    names = {"epoch", "cache_salt", "is_suspect", "eos_token_ids", "adapter"}
    params = {"max_new_tokens": 8, "seed": 1} | {name: value for name, value in fields.items() if name not in names}
    rest = {"epoch": 1, "eos_token_ids": [EOS]} | {name: value for name, value in fields.items() if name in names}
    return Submit(
        request_id=request_id,
        prompt_ids=prompt,
        output_ids=output or [],
        params=SamplingParams(**params),
        **rest,
    )


def adapter(number: int) -> Adapter:
    return Adapter(f"a{number}", f"/adapters/{number}", f"{number:032x}")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Outcome:
    """What the agent would have seen of one request."""

    ids: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    is_aborted: bool = False


class Harness:
    def __init__(
        self,
        engine_limits: EngineLimits | None = None,
        depth: int = 0,
        *,
        scheduler_class: type[Scheduler] = Scheduler,
        broken: dict[str, str] | None = None,
        commits: bool = True,
        device_class: type[FakeDevice] = FakeDevice,
    ) -> None:
        self.limits = engine_limits or limits()
        self.device = device_class(self.limits, depth, broken)
        self.scheduler = scheduler_class(self.limits)
        self.clock = Clock()
        self.inbox: SimpleQueue[Message | None] = SimpleQueue()
        self.steps: list[Step] = []
        self.checked: list[AdapterChecked] = []
        self.outcomes: dict[str, Outcome] = {}
        self.submits: dict[str, Submit] = {}
        self.commits = commits
        pacer = PrefillPacer(self.limits.max_batch_prefill_tokens, 0.0)
        self.loop = EngineLoop(self.device, self.scheduler, pacer, self.inbox, self._receive, self.clock)

    @property
    def stats(self) -> dict[str, float]:
        return self.scheduler.snapshot()

    def guess(self, seed: int = 0, guesser_class: type[Guesser] = Guesser) -> None:
        """Drafts as if half of them were looked up well, instead of those that the requests' own tokens suggest."""
        most = self.limits.max_drafts
        self.scheduler.speculator = guesser_class(most, lambda request_id: self.expected(request_id)[0], seed)

    def settle(self) -> None:
        """Apply all that is launched, as when the loop pauses: only then may rows of deep devices have drafts."""
        while self.loop._pending:
            self.loop._apply_oldest()
            self.scheduler.check()

    def expect_no_output(self) -> None:
        """Let everyone in whose prompt fits, so that the pool runs out again and again."""
        self.scheduler._forecast.remaining = lambda num_output, max_new_tokens: 0

    def submit(self, message: Submit) -> None:
        self.submits[message.request_id] = message
        self.outcomes[message.request_id] = Outcome(ids=list(message.output_ids))
        self.inbox.put(message)

    def abort(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.outcomes[request_id].is_aborted = True
        self.inbox.put(Abort(list(request_ids)))

    def run_pass(self) -> None:
        """One pass of the loop, if it has anything to do, and a look into the books."""
        if self.inbox.empty() and not self.loop._has_work():
            return
        assert self.loop.take_messages()
        self.loop.run_pass()
        self.scheduler.check()

    def run_until_idle(self) -> None:
        for _ in range(MAX_PASSES):
            if self.inbox.empty() and not self.loop._has_work():
                return
            self.run_pass()
        raise AssertionError("the engine does not come to rest")

    def check_outcomes(self) -> None:
        """Every request got exactly what it gets alone, an aborted one a prefix of it; nothing is left behind."""
        for request_id, outcome in self.outcomes.items():
            expected, finish = self.expected(request_id)
            if outcome.is_aborted and not outcome.finish:
                assert outcome.ids == expected[: len(outcome.ids)], request_id
            else:
                assert (outcome.ids, outcome.finish) == (expected, finish), request_id
        assert not self.scheduler.requests
        assert self.scheduler.pool.num_free == self.limits.num_blocks
        assert not self.scheduler._computing

    def expected(self, request_id: str) -> tuple[list[int], str]:
        """Output and end of a request that runs alone."""
        oracle, message = Oracle(self.limits.vocab_size, self.limits.decoder_start_id), self.submits[request_id]
        return oracle.generate(
            message.prompt_ids, message.output_ids, message.params, message.eos_token_ids, digest_of(message)
        )

    def _receive(self, step: Step | AdapterChecked) -> None:
        if isinstance(step, AdapterChecked):
            self.checked.append(step)
            return
        assert step.step == len(self.steps) + 1
        self.steps.append(step)
        for run in step.runs:
            outcome = self.outcomes[run.request_id]
            assert not outcome.finish, f"{run.request_id} goes on after its end"
            assert run.epoch == self.submits[run.request_id].epoch
            assert run.logprobs == [float(np.float32(logprob_of(token))) for token in run.ids]
            num_tops = self.submits[run.request_id].params.num_top_logprobs
            assert [len(tops) for tops in run.top_tokens] == [num_tops] * len(run.ids) * bool(num_tops)
            outcome.ids += run.ids
            outcome.finish, outcome.error = run.finish, run.error
        if self.commits:
            self.inbox.put(Commit(step.step))


def digest_of(message: Submit) -> str:
    return message.adapter.digest if message.adapter else ""


def random_traffic(harness: Harness, seed: int, num_requests: int, num_adapters: int = 0, pauses: float = 0.0) -> None:
    """Random arrivals with shared beginnings, equal prompts, stops, migrated jobs, suspects and aborts at any time.

    With `num_adapters` three of four requests have one of so many. `pauses` is how often the loop comes to rest.
    """
    rng = random.Random(seed)
    stems = [[rng.randrange(8, 50) for _ in range(24)] for _ in range(3)]
    oracle = Oracle(harness.limits.vocab_size, harness.limits.decoder_start_id)
    for index in range(num_requests):
        message = random_submit(rng, f"r{index}", rng.choice(stems))
        if harness.limits.has_encoder:
            message = replace(message, prompt_ids=message.prompt_ids[-harness.limits.max_batch_prefill_tokens :])
        if num_adapters and rng.random() < 0.75:
            message = replace(message, adapter=adapter(rng.randrange(num_adapters)))
        if rng.random() < 0.2:
            whole, _ = oracle.generate(
                message.prompt_ids, [], message.params, message.eos_token_ids, digest_of(message)
            )
            logged = whole[: rng.randrange(len(whole) + 1)]
            message = replace(message, output_ids=logged, epoch=2, is_suspect=rng.random() < 0.5)
        harness.submit(message)
        for _ in range(rng.choice([0, 0, 1, 2])):
            harness.run_pass()
            if pauses and rng.random() < pauses:
                harness.settle()
        if rng.random() < 0.15:
            harness.abort(f"r{rng.randrange(index + 1)}")
    harness.run_until_idle()


def random_submit(rng: random.Random, request_id: str, stem: list[int]) -> Submit:
    prompt = stem[: rng.randrange(1, 25)] + [rng.randrange(50) for _ in range(rng.choice([0, 0, 1, 5, 12]))]
    return submit(
        request_id,
        prompt,
        max_new_tokens=rng.randrange(1, 12) if rng.random() < 0.9 else 24,
        seed=rng.randrange(4),
        ignore_eos=rng.random() < 0.3,
        min_tokens=rng.choice([0, 0, 4]),
        stop_token_ids=(rng.randrange(50),) if rng.random() < 0.3 else (),
        num_top_logprobs=rng.choice([0, 0, 2]),
    )
