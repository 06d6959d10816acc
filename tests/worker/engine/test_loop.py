"""The whole engine core against the fake device: exact outputs whatever the traffic, and mistakes that must show."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.engine.fake_device import DeviceMisuse
from tests.worker.engine.harness import Harness, limits, random_traffic
from worker.engine.device import StepResult
from worker.engine.plan import Entry, PlanBuilder
from worker.engine.request import Request, Residency
from worker.engine.scheduler import Scheduler
from worker.pipe import TokenRun

DEPTHS = [0, 1, 2]
NUM_REQUESTS = 500


@pytest.mark.parametrize("depth", DEPTHS)
def test_random_traffic_gets_what_each_request_gets_alone(depth: int) -> None:
    harness = Harness(depth=depth)
    random_traffic(harness, seed=depth, num_requests=NUM_REQUESTS)
    stats = harness.steps[-1].stats
    assert stats["preemptions"] >= 5
    assert stats["prefix_hits"] >= 20
    assert stats["chunked_prompts"] >= 5
    assert stats["batch_max"] >= 5
    assert sum(outcome.is_aborted and not outcome.finish for outcome in harness.outcomes.values()) >= 3
    assert {outcome.finish for outcome in harness.outcomes.values()} >= {"length", "eos_token", "stop_sequence"}
    harness.check_outcomes()


@settings(max_examples=100, deadline=None)
@given(
    depth=st.sampled_from(DEPTHS),
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(16, 40),
    max_num_seqs=st.integers(1, 8),
    prefill=st.integers(1, 40),
    prefix_caching=st.booleans(),
)
def test_any_engine_size_serves_any_traffic(
    depth: int, seed: int, num_blocks: int, max_num_seqs: int, prefill: int, prefix_caching: bool
) -> None:
    sizes = limits(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_prefill_tokens=prefill,
        prefix_caching=prefix_caching,
    )
    harness = Harness(sizes, depth)
    random_traffic(harness, seed, num_requests=25)
    harness.check_outcomes()


class RegistersWhenScheduled(Scheduler):
    """Blocks enter the cache before their keys and values are written."""

    def _admit(self, request: Request, hits: list[int], builder: PlanBuilder) -> bool:
        if not super()._admit(request, hits, builder):
            return False
        for block, digest in zip(request.residency.blocks, request.digests):
            self.pool.register(block, digest)
        return True


class FreesAtOnce(Scheduler):
    """Row and blocks go back although launched steps name them."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        residency.last_step = 0


class HitsWholePrompt(Scheduler):
    """A prompt that is cached to its last token leaves nothing to compute."""

    def _find_prefix(self, request: Request) -> list[int] | None:
        self._extend_digests(request)
        return self.pool.lookup(request.digests)


class ReusesRows(Scheduler):
    """The row goes back while launched steps name it; blocks stay until they are applied."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        self._free_rows.insert(0, residency.row)

    def _release_drained(self) -> None:
        early = [stay.row for _, stay in self._releasing if stay.last_step <= self._last_applied]
        super()._release_drained()
        for row in early:
            self._free_rows.remove(row)

    def check(self) -> None:
        """The books are blind for it here: the device must notice."""


class KeepsLateTokens(Scheduler):
    """A token that was sampled after the end still goes out."""

    def _apply_sample(
        self, entry: Entry, result: StepResult, index: int, token_id: int, logprob: float
    ) -> list[TokenRun]:
        runs = super()._apply_sample(entry, result, index, token_id, logprob)
        if runs:
            return runs
        request = entry.request
        return [TokenRun(request_id=request.request_id, epoch=request.epoch, ids=[token_id], logprobs=[logprob])]


MISTAKES = [
    (RegistersWhenScheduled, DeviceMisuse, "pages hold other"),
    (FreesAtOnce, DeviceMisuse, "while in flight"),
    (HitsWholePrompt, DeviceMisuse, "no rows|token counts|middle of a prompt"),
    (ReusesRows, DeviceMisuse, "is occupied|while in flight"),
    (KeepsLateTokens, AssertionError, "goes on after its end"),
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES)
def test_a_scheduler_with_a_known_mistake_is_caught(
    wrong: type[Scheduler], error: type[Exception], message: str, depth: int
) -> None:
    harness = Harness(depth=depth, scheduler_class=wrong)
    with pytest.raises(error, match=message):
        random_traffic(harness, seed=depth, num_requests=NUM_REQUESTS)
        harness.check_outcomes()
