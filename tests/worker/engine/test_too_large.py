"""Steps for which the device has no memory: they cost themselves, and no request, token, row or block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.engine.fake_device import DeviceMisuse, FakeDevice, Staged
from tests.worker.engine.harness import Harness, encoder_limits, limits, random_traffic, submit
from worker.engine import scheduler as scheduler_module
from worker.engine.device import StepPlan, StepTooLarge
from worker.engine.plan import Entry, Launch
from worker.engine.scheduler import FEWEST_PROMPT_TOKENS, MAX_STUCK, EngineLimits, Scheduler

DEPTHS = [0, 1, 2]


class NarrowDevice(FakeDevice):
    """Has no memory for some steps, and learns so before or after it has touched its rows and pages."""

    seed = 0
    share = 0.1
    most_tokens = 1 << 30
    most_rows = 1 << 30

    def __init__(self, sizes: EngineLimits, depth: int, broken: dict[str, str] | None = None) -> None:
        super().__init__(sizes, depth, broken)
        self._rng = random.Random(self.seed)
        self._spoilt: list[StepPlan] = []
        self._is_lost = False
        self.num_lost = {"forward": 0, "sample": 0}

    def forward(self, plan: StepPlan) -> None:
        for spoilt in self._spoilt:
            self._spoil(spoilt)
        self._spoilt = []
        is_large = len(plan.tokens) > self.most_tokens or len(plan.rows) > self.most_rows
        self._is_lost = is_large or (len(plan.rows) > 1 and self._rng.random() < self.share)
        if self._is_lost and self._rng.random() < 0.3:
            self._lose("forward")
        super().forward(plan)
        if self._is_lost and self._rng.random() < 0.5:
            self._unstage(plan)
            self._lose("forward")

    def sample(self, plan: StepPlan) -> Staged:
        if self._is_lost:
            self._unstage(plan)
            self._lose("sample")
        return super().sample(plan)

    def _unstage(self, plan: StepPlan) -> None:
        self.staged.pop()
        self.last_step -= 1
        self._spoilt.append(plan)

    def _spoil(self, plan: StepPlan) -> None:
        """Rows hold nothing that is right, and of their pages only what was there before the step."""
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.num_tokens.tolist()):
            for position in range(start, start + count):
                index, slot = divmod(position, self.limits.block_size)
                self.digests[self.tables[row, index], slot] = -1
            self.rows[row].tokens = self.rows[row].digests = []

    def _lose(self, where: str) -> None:
        self.num_lost[where] += 1
        self.num_steps_lost += 1
        raise StepTooLarge("there was no memory")


def make(
    depth: int, sizes: EngineLimits | None = None, scheduler_class: type[Scheduler] = Scheduler, **fields
) -> Harness:
    return Harness(sizes, depth, scheduler_class=scheduler_class, device_class=type("Narrow", (NarrowDevice,), fields))


@pytest.mark.parametrize("sizes", [limits(), encoder_limits()])
@pytest.mark.parametrize("depth", DEPTHS)
def test_random_traffic_with_lost_steps_gets_what_each_request_gets_alone(
    depth: int, sizes: EngineLimits, monkeypatch
) -> None:
    monkeypatch.setattr(scheduler_module, "STEPS_UNTIL_REGROWTH", 3)
    harness = make(depth, sizes, seed=depth)
    harness.expect_no_output()
    random_traffic(harness, seed=depth, num_requests=300)
    assert min(harness.device.num_lost.values()) >= 10
    assert harness.stats["steps_too_large"] == sum(harness.device.num_lost.values())
    assert sum(outcome.is_aborted and not outcome.finish for outcome in harness.outcomes.values()) >= 3
    harness.check_outcomes()


@settings(max_examples=60, deadline=None)
@given(
    depth=st.sampled_from(DEPTHS), seed=st.integers(0, 10**6), share=st.floats(0, 0.6), has_encoder=st.booleans(),
    prefix_caching=st.booleans(), num_blocks=st.integers(17, 40),
)  # fmt: skip
def test_any_lost_steps_cost_no_answer(
    depth: int, seed: int, share: float, has_encoder: bool, prefix_caching: bool, num_blocks: int
) -> None:
    sizes = (encoder_limits if has_encoder else limits)(
        num_blocks=num_blocks, prefix_caching=prefix_caching and not has_encoder
    )
    harness = make(depth, sizes, seed=seed, share=share)
    random_traffic(harness, seed, num_requests=20)
    harness.check_outcomes()


def in_narrow_memory(depth: int) -> Harness:
    """Two long prompts, then many rows, on a device for 100 tokens or five rows in a step."""
    sizes = limits(num_blocks=400, max_num_seqs=16, max_total_tokens=600, max_batch_prefill_tokens=512)
    harness = make(depth, sizes, share=0.0, most_tokens=100, most_rows=5)
    for number in range(2):
        harness.submit(submit(str(number), [10 + number] * 300, ignore_eos=True))
    harness.run_until_idle()
    assert (harness.scheduler._most_prompt_tokens, harness.scheduler._most_rows) == (64, 16)
    for number in range(2, 14):
        harness.submit(submit(str(number), [10 + number] * 5, ignore_eos=True, max_new_tokens=40))
    harness.run_until_idle()
    return harness


@pytest.mark.parametrize("depth", DEPTHS)
def test_steps_become_as_small_as_the_memory_is(depth: int) -> None:
    harness = in_narrow_memory(depth)
    assert 2 <= harness.stats["steps_too_large"] <= 6
    assert harness.stats["batch_max"] > 5 >= harness.scheduler._most_rows >= 2
    harness.check_outcomes()


def test_steps_become_larger_again_and_shrink_only_if_that_is_too_much(monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "STEPS_UNTIL_REGROWTH", 20)
    harness = in_narrow_memory(1)
    num_lost = harness.stats["steps_too_large"]
    harness.device.most_tokens = harness.device.most_rows = 1 << 30
    harness.submit(submit("long", [10] * 30, ignore_eos=True, max_new_tokens=200))
    harness.run_until_idle()
    assert (harness.scheduler._most_prompt_tokens, harness.scheduler._most_rows) == (512, 16)
    assert harness.stats["steps_too_large"] == num_lost
    harness.check_outcomes()


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_step_that_cannot_be_smaller_ends_the_engine(depth: int) -> None:
    harness = make(depth, share=0.0, most_tokens=0)
    harness.submit(submit("a", [10] * 9))
    with pytest.raises(StepTooLarge, match="no memory"):
        harness.run_until_idle()
    assert len([10] * 9) <= FEWEST_PROMPT_TOKENS
    assert harness.stats["steps_too_large"] == MAX_STUCK > 1


class KeepsRows(Scheduler):
    """Who took part stays in its row, as if the device still knew it."""

    def _leave(self, request, residency) -> None:
        if residency.last_step == self._last_applied == self._last_launched and self.stats.steps_too_large:
            residency.num_computed = residency.num_written
            return
        super()._leave(request, residency)


class KeepsFlights(Scheduler):
    """Tokens of the lost step are still waited for."""

    def take_back(self, launch: Launch) -> bool:
        self._is_taking_back = True
        is_smaller = super().take_back(launch)
        self._is_taking_back = False
        return is_smaller

    def _land(self, entry: Entry) -> None:
        if not getattr(self, "_is_taking_back", False):
            super()._land(entry)


class ForgetsTheLost(Scheduler):
    """The next step is numbered as if the lost one had been."""

    def take_back(self, launch: Launch) -> bool:
        is_smaller = super().take_back(launch)
        self._last_launched += 1
        return is_smaller


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("wrong", [KeepsRows, KeepsFlights, ForgetsTheLost])
def test_a_scheduler_that_takes_a_step_back_wrongly_is_caught(wrong: type[Scheduler], depth: int, monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "STEPS_UNTIL_REGROWTH", 3)
    harness = make(depth, scheduler_class=wrong, seed=3)
    with pytest.raises((DeviceMisuse, AssertionError, KeyError, ValueError)):
        random_traffic(harness, seed=depth, num_requests=300)
        harness.check_outcomes()
