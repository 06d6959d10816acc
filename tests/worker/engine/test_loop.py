"""The whole engine core against the fake device: exact outputs whatever the traffic, and mistakes that must show."""

from __future__ import annotations

from array import array
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InferfleetError
from tests.worker.engine.fake_device import DeviceMisuse, FakeDevice, Staged
from tests.worker.engine.harness import Harness, encoder_limits, limits, random_traffic, submit
from worker.engine.device import StepPlan, StepResult
from worker.engine.loop import MAX_UNCOMMITTED_S, MAX_UNCOMMITTED_STEPS, EngineStalled
from worker.engine.pacing import PrefillPacer
from worker.engine.plan import Entry, PlanBuilder
from worker.engine.request import Request, Residency
from worker.engine.scheduler import EngineLimits, Picks, Scheduler
from worker.pipe import Commit, Failed, Message, Stop, TokenRun

DEPTHS = [0, 1, 2]
NUM_REQUESTS = 500
STATS = [
    *("steps", "batch_max", "preemptions", "prefix_hits", "prefix_hit_tokens", "chunked_prompts", "prefill_tokens"),
    *("decode_tokens", "encoder_passes", "encoder_tokens", "draft_tokens", "accepted_tokens", "steps_too_large"),
    *("running", "waiting", "waiting_for_slot", "blocks_free", "blocks_total", "step_ms"),
]


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


@pytest.mark.parametrize("depth", DEPTHS)
def test_random_traffic_through_an_encoder_gets_what_each_request_gets_alone(depth: int) -> None:
    harness = Harness(encoder_limits(), depth=depth)
    harness.expect_no_output()
    random_traffic(harness, seed=depth, num_requests=NUM_REQUESTS)
    stats = harness.steps[-1].stats
    assert stats["preemptions"] >= 10
    assert stats["chunked_prompts"] >= 5, "outputs of migrated and preempted jobs go through the decoder in chunks"
    assert stats["batch_max"] >= 3
    assert stats["encoder_passes"] >= NUM_REQUESTS * 0.8
    assert stats["prefill_tokens"] > stats["encoder_tokens"] > stats["encoder_passes"]
    assert stats["prefix_hits"] == 0
    assert harness.device.num_passes_beside_others >= 100
    assert sum(outcome.is_aborted and not outcome.finish for outcome in harness.outcomes.values()) >= 3
    assert {outcome.finish for outcome in harness.outcomes.values()} >= {"length", "eos_token", "stop_sequence"}
    harness.check_outcomes()


@settings(max_examples=150, deadline=None)
@given(
    depth=st.sampled_from(DEPTHS),
    has_encoder=st.booleans(),
    is_hopeful=st.booleans(),
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(16, 40),
    max_num_seqs=st.integers(1, 8),
    prefill=st.integers(1, 40),
    prefix_caching=st.booleans(),
)
def test_any_engine_size_serves_any_traffic(
    depth: int,
    has_encoder: bool,
    is_hopeful: bool,
    seed: int,
    num_blocks: int,
    max_num_seqs: int,
    prefill: int,
    prefix_caching: bool,
) -> None:
    make = encoder_limits if has_encoder else limits
    sizes = make(
        num_blocks=num_blocks + has_encoder,
        max_num_seqs=max_num_seqs,
        max_batch_prefill_tokens=prefill,
        prefix_caching=prefix_caching and not has_encoder,
    )
    harness = Harness(sizes, depth)
    if is_hopeful:
        harness.expect_no_output()
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

    def _apply_sample(self, entry: Entry, picks: Picks) -> list[TokenRun]:
        runs = super()._apply_sample(entry, picks)
        if runs:
            return runs
        request = entry.request
        return [TokenRun(request_id=request.request_id, epoch=request.epoch, ids=picks.ids, logprobs=picks.logprobs)]


MISTAKES = [
    (RegistersWhenScheduled, DeviceMisuse, "pages hold (other|another)"),
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


class SharesPrefixes(Scheduler):
    """Equal outputs pass for equal keys and values, whatever the encoder read."""

    def __init__(self, sizes: EngineLimits) -> None:
        super().__init__(sizes)
        object.__setattr__(sizes, "prefix_caching", True)


class ForgetsInput(Scheduler):
    """Who was preempted comes back as if the encoder need not run again."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        request.encoder_ids = array("i")


class LosesCrossBlocks(Scheduler):
    """Who was preempted keeps what the encoder wrote, and nobody remembers it."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        residency.cross_blocks = []


class FreesCrossBlocksAtOnce(Scheduler):
    """What the encoder wrote is given away while launched steps read it."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        self.pool.release(residency.cross_blocks)
        residency.cross_blocks = []


class EncodesTwo(Scheduler):
    """Two newcomers in one step."""

    def _admit_waiting(self, builder: PlanBuilder) -> None:
        super()._admit_waiting(builder)
        super()._admit_waiting(builder)


class EncodesBeyondBudget(Scheduler):
    """An encoder pass joins whatever prompts there are."""

    def _admit_waiting(self, builder: PlanBuilder) -> None:
        budget, builder.prompt_budget = builder.prompt_budget, self.limits.max_batch_prefill_tokens
        super()._admit_waiting(builder)
        builder.prompt_budget = budget


ENCODER_MISTAKES = [
    (SharesPrefixes, DeviceMisuse, "a prefix hit behind an encoder"),
    (ForgetsInput, DeviceMisuse, "encoder ids are missing"),
    (LosesCrossBlocks, ValueError, "holders are"),
    (FreesCrossBlocksAtOnce, DeviceMisuse, "while in flight|are others' already|holds what an encoder read"),
    (EncodesTwo, DeviceMisuse, "two encoder passes"),
    (EncodesBeyondBudget, DeviceMisuse, "tokens of prompts in one step"),
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("wrong", "error", "message"), ENCODER_MISTAKES)
def test_a_scheduler_that_mistreats_an_encoder_is_caught(
    wrong: type[Scheduler], error: type[Exception], message: str, depth: int
) -> None:
    harness = Harness(encoder_limits(), depth=depth, scheduler_class=wrong)
    harness.expect_no_output()
    with pytest.raises(error, match=message):
        random_traffic(harness, seed=depth, num_requests=NUM_REQUESTS)
        harness.check_outcomes()


def test_a_lost_input_changes_the_output() -> None:
    """What the comparisons above rest on."""
    harness = Harness(encoder_limits())
    for name, prompt in (("a", [10, 11]), ("b", [10, 12])):
        harness.submit(submit(name, prompt, ignore_eos=True))
    harness.run_until_idle()
    harness.check_outcomes()
    assert harness.outcomes["a"].ids != harness.outcomes["b"].ids
    harness.submits["b"] = submit("b", [10, 11], ignore_eos=True)
    with pytest.raises(AssertionError):
        harness.check_outcomes()


class RecordingDevice(FakeDevice):
    """Writes down who is called when; the sends of the loop go to the same list."""

    def __init__(self, harness: Harness) -> None:
        super().__init__(harness.limits, harness.loop.device.depth)
        self.calls: list[str] = []
        receive = harness.loop.send
        harness.loop.device = self
        harness.loop.send = lambda step: (self.calls.append(f"send {step.step}"), receive(step))

    def forward(self, plan: StepPlan) -> None:
        self.calls.append(f"forward {plan.step}")
        super().forward(plan)

    def sample(self, plan: StepPlan) -> Staged:
        self.calls.append(f"sample {plan.step}")
        return super().sample(plan)

    def collect(self, handle: Staged) -> StepResult:
        self.calls.append(f"collect {handle.plan.step}")
        return super().collect(handle)


@pytest.mark.parametrize(
    ("depth", "calls"),
    [
        (0, "forward 1, sample 1, collect 1, send 1, forward 2, sample 2, collect 2, send 2"),
        (
            1,
            "forward 1, sample 1, forward 2, collect 1, send 1, sample 2, forward 3, collect 2, send 2, sample 3, "
            "collect 3, send 3",
        ),
        (
            2,
            "forward 1, sample 1, forward 2, sample 2, forward 3, collect 1, send 1, sample 3, collect 2, send 2, "
            "collect 3, send 3",
        ),
    ],
)
def test_the_order_of_calls_is_that_of_the_chart(depth: int, calls: str) -> None:
    harness = Harness(depth=depth)
    device = RecordingDevice(harness)
    harness.submit(submit("a", [10, 11], max_new_tokens=2 if depth == 0 else 3, ignore_eos=True))
    harness.run_until_idle()
    assert ", ".join(device.calls) == calls
    harness.check_outcomes()


def uncommitted(depth: int) -> Harness:
    """A long request whose steps nobody commits, after the loop has come to rest."""
    sizes = limits(max_total_tokens=120, num_blocks=40)
    harness = Harness(sizes, depth, commits=False)
    harness.submit(submit("a", [10, 11], max_new_tokens=100, ignore_eos=True))
    harness.run_until_idle()
    return harness


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_loop_rests_at_64_uncommitted_steps_and_goes_on_after_a_commit(depth: int) -> None:
    harness = uncommitted(depth)
    assert harness.scheduler.has_requests
    num_steps = len(harness.steps)
    assert MAX_UNCOMMITTED_STEPS <= num_steps <= MAX_UNCOMMITTED_STEPS + depth
    harness.inbox.put(Commit(num_steps - 60))
    harness.run_until_idle()
    assert 1 <= len(harness.steps) - num_steps <= 4 + depth
    harness.commits = True
    harness.inbox.put(Commit(len(harness.steps)))
    harness.run_until_idle()
    harness.check_outcomes()


def test_the_loop_rests_when_a_step_is_uncommitted_for_two_seconds() -> None:
    harness = Harness(commits=False)
    harness.submit(submit("a", [10, 11], max_new_tokens=20, ignore_eos=True))
    for _ in range(3):
        harness.run_pass()
    harness.clock.now += MAX_UNCOMMITTED_S
    harness.run_pass()
    assert len(harness.steps) == 4, "two seconds are allowed"
    harness.clock.now += 0.1
    harness.run_until_idle()
    assert len(harness.steps) == 4
    harness.commits = True
    harness.inbox.put(Commit(4))
    harness.run_until_idle()
    harness.check_outcomes()


def test_steps_without_tokens_need_no_commit() -> None:
    sizes = limits(max_total_tokens=300, num_blocks=80, max_batch_prefill_tokens=2)
    harness = Harness(sizes, commits=False)
    harness.submit(submit("a", [10] * 200, max_new_tokens=1))
    harness.run_until_idle()
    assert len(harness.steps) == 100
    assert sum(bool(step.runs) for step in harness.steps) == 1
    harness.check_outcomes()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("last", [Stop(), None])
def test_leaving_applies_and_sends_what_is_under_way(depth: int, last: Stop | None) -> None:
    harness = Harness(depth=depth)
    harness.submit(submit("a", [10, 11], max_new_tokens=20, ignore_eos=True))
    for _ in range(5):
        harness.run_pass()
    num_launched = harness.scheduler.stats.steps
    assert len(harness.steps) == num_launched - depth
    harness.inbox.put(last)
    harness.loop.run()
    assert harness.scheduler.stats.steps == num_launched
    assert len(harness.steps) == num_launched
    assert len(harness.outcomes["a"].ids) == num_launched


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_of_one_row_ends_one_request(depth: int) -> None:
    harness = Harness(depth=depth, broken={"bad": "the logits are not finite"})
    for name in ("good", "bad", "fine"):
        harness.submit(submit(name, [10, 11, 12]))
    harness.run_until_idle()
    bad = harness.outcomes.pop("bad")
    assert (bad.ids, bad.finish, bad.error) == ([], "error", "the logits are not finite")
    harness.check_outcomes()


def test_what_cannot_run_is_answered_without_a_step() -> None:
    harness = Harness()
    harness.submit(submit("long", [10] * 70))
    harness.submit(submit("wild", [2**40]))
    harness.run_until_idle()
    assert harness.scheduler.stats.steps == 0
    assert {name: outcome.error for name, outcome in harness.outcomes.items()} == {
        "long": "78 tokens are more than the 60 this worker can hold",
        "wild": "token ids must be integers of 32 bits",
    }


def test_a_scheduler_that_never_launches_is_an_error_not_a_wait() -> None:
    harness = Harness()
    harness.scheduler._free_rows.clear()
    harness.submit(submit("a", [10]))
    assert harness.loop.take_messages()
    with pytest.raises(EngineStalled, match="no step can be launched"):
        harness.loop.run_pass()


def test_a_message_of_the_engine_from_the_agent_is_an_error() -> None:
    harness = Harness()
    harness.inbox.put(Failed("nonsense"))
    with pytest.raises(InferfleetError, match="Failed"):
        harness.loop.take_messages()


def test_an_idle_loop_waits_for_its_inbox_and_a_busy_one_does_not() -> None:
    harness = Harness()
    waits: list[bool] = []

    class WatchedInbox(SimpleQueue):
        def get(self, block: bool = True, timeout: float | None = None) -> Message | None:
            waits.append(block)
            return super().get(block, timeout)

    harness.inbox = harness.loop.inbox = WatchedInbox()
    harness.submit(submit("a", [10, 11], max_new_tokens=3, ignore_eos=True))
    harness.run_until_idle()
    assert len(harness.steps) == 3
    harness.inbox.put(Stop())
    waits_while_busy, waits[:] = list(waits), []
    harness.loop.run()
    assert waits_while_busy[0] is True, "the first message is waited for"
    assert sum(waits_while_busy) <= 2, "and the commit after the last step"
    assert waits == [True]


def slow_harness(sizes: EngineLimits, seconds: float = 1.0) -> Harness:
    """Every step takes so long, and mixed ones should take 0.2 seconds."""
    harness = Harness(sizes)
    device = RecordingDevice(harness)
    collect = device.collect

    def slow_collect(handle: Staged) -> StepResult:
        harness.clock.now += seconds
        return collect(handle)

    device.collect = slow_collect
    harness.loop.pacer = PrefillPacer(512, 0.2)
    return harness


def test_the_time_of_prompts_reaches_the_pacer() -> None:
    harness = slow_harness(limits(max_batch_prefill_tokens=512, max_total_tokens=600, num_blocks=400))
    harness.submit(submit("a", [10] * 500, ignore_eos=True, max_new_tokens=40))
    harness.run_pass()
    assert [step.stats["step_ms"] for step in harness.steps] == [1000.0]
    harness.submit(submit("b", [11] * 500))
    harness.run_pass()
    assert harness.scheduler.stats.prefill_tokens == 500 + 96
    harness.run_until_idle()
    harness.check_outcomes()


def test_streams_are_senior_to_prompts_that_came_after_their_first_token_alone() -> None:
    harness = Harness(limits(max_batch_prefill_tokens=64, max_total_tokens=600, num_blocks=400))
    for name in "ab":
        harness.submit(submit(name, [10] * 60, ignore_eos=True, max_new_tokens=40))
    harness.run_pass()
    scheduler = harness.scheduler
    assert scheduler.num_decoding == 1 and not scheduler.has_seniors, "b came before a had begun"
    while scheduler.num_decoding < 2:
        harness.run_pass()
    assert not scheduler.has_seniors, "nobody waits"
    harness.submit(submit("c", [11] * 500))
    harness.loop.take_messages()
    assert scheduler.waiting and scheduler.has_seniors
    harness.run_until_idle()
    harness.check_outcomes()


def test_an_encoder_pass_longer_than_the_paced_budget_runs_whole_beside_those_who_decode() -> None:
    harness = slow_harness(encoder_limits(max_batch_prefill_tokens=512, max_total_tokens=600, num_blocks=400))
    harness.submit(submit("a", [10] * 500, ignore_eos=True, max_new_tokens=40))
    harness.run_pass()
    assert harness.loop.pacer.budget(1, has_seniors=False) == 96
    for name in "bc":
        harness.submit(submit(name, [11] * 500))
    harness.run_pass()
    assert [run.request_id for run in harness.steps[-1].runs] == ["a", "b"]
    harness.run_pass()
    assert [run.request_id for run in harness.steps[-1].runs] == ["a", "b", "c"]
    assert harness.scheduler.stats.encoder_tokens == harness.scheduler.stats.prefill_tokens == 1500
    harness.run_until_idle()
    harness.check_outcomes()


def test_a_step_without_prompts_gives_way_to_them_where_there_would_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(limits(max_batch_prefill_tokens=64, max_total_tokens=600, num_blocks=400))
    budgets: list[int] = []
    monkeypatch.setattr(harness.loop.pacer, "budget", lambda *_, **__: budgets.append(0) or 0)
    for name in "ab":
        harness.submit(submit(name, [10] * 100, ignore_eos=True, max_new_tokens=4))
    harness.run_until_idle()
    assert len(budgets) > 5
    harness.check_outcomes()


def test_counters_of_the_pipe_are_told_when_due_and_before_a_silence() -> None:
    harness = slow_harness(limits(), 0.02)
    harness.submit(submit("a", [10, 11, 12]))
    harness.run_until_idle()
    told = [step for step in harness.steps if step.stats]
    assert [step.step for step in told] == [1, 4, 7, 8]
    assert all(set(step.stats) == set(STATS) for step in told)
    last = told[-1].stats
    assert (last["steps"], last["prefill_tokens"], last["decode_tokens"]) == (8, 3, 7)
    assert (last["running"], last["waiting"], last["blocks_free"], last["blocks_total"]) == (0, 0, 20, 20)
    assert last["step_ms"] == pytest.approx(20)
