"""The scheduler with fabricated results: no device, thousands of scenarios."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.worker.engine.harness import EOS, START, encoder_limits, limits, submit
from worker.engine.device import StepResult
from worker.engine.plan import Launch, PlanBuilder
from worker.engine.request import Request, request_of
from worker.engine.scheduler import EngineLimits, Scheduler, limits_of
from worker.engine.speculation import Speculator
from worker.pipe import Ready, TokenRun

PLENTY = 10_000
SEEN = {"drafts": 0, "retries": 0}


def result_of(launch: Launch, token: int = 9, errors: dict[int, str] | None = None) -> StepResult:
    """Every sampling row picks `token`."""
    count = int(launch.plan.samples.sum())
    return StepResult(ids=np.full(count, token, np.int32), logprobs=np.zeros(count, np.float32), errors=errors or {})


class Bench:
    """A scheduler by hand: requests in, steps launched and applied one at a time."""

    def __init__(
        self, scheduler_class: type[Scheduler] = Scheduler, *, has_encoder: bool = False, **sizes: object
    ) -> None:
        self.scheduler = scheduler_class(encoder_limits(**sizes) if has_encoder else limits(**sizes))
        self.num_arrivals = 0

    def add(self, request_id: str, prompt: list[int], **fields: object) -> TokenRun | None:
        self.num_arrivals += 1
        message, start_id = submit(request_id, prompt, **fields), self.scheduler.limits.decoder_start_id
        return self.scheduler.add(request_of(message, self.num_arrivals, start_id))

    def launch(self, budget: int = PLENTY) -> Launch:
        launch = self.scheduler.schedule(budget)
        self.scheduler.check()
        assert launch is not None
        return launch

    def apply(self, launch: Launch, token: int = 9, errors: dict[int, str] | None = None) -> list[TokenRun]:
        runs = self.scheduler.apply(launch, result_of(launch, token, errors))
        self.scheduler.check()
        return runs

    def step(self, budget: int = PLENTY) -> Launch:
        launch = self.launch(budget)
        self.apply(launch)
        return launch

    def known_blocks(self, request: Request) -> int:
        self.scheduler._extend_digests(request)
        return len(self.scheduler.pool.lookup(request.digests))


def ids_of(launch: Launch) -> list[str]:
    return [entry.request.request_id for entry in launch.entries]


class SameForAll(Speculator):
    """The same number of drafts for everybody, as far as they may have some."""

    count = 0

    def drafts(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        return {request.request_id: [9] * min(self.count, most) for request, most in self._guessable(requests)}


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts, launches up to a depth and results in any order that a device allows."""

    @initialize(
        depth=st.integers(0, 2),
        num_blocks=st.integers(16, 30),
        max_num_seqs=st.integers(1, 6),
        prefill=st.integers(1, 40),
        has_encoder=st.booleans(),
        max_drafts=st.integers(2, 9),
    )
    def start(
        self, depth: int, num_blocks: int, max_num_seqs: int, prefill: int, has_encoder: bool, max_drafts: int
    ) -> None:
        make = encoder_limits if has_encoder else limits
        sizes = make(
            num_blocks=num_blocks + has_encoder,
            max_num_seqs=max_num_seqs,
            max_batch_prefill_tokens=prefill,
            max_drafts=max_drafts,
        )
        self.depth, self.scheduler = depth, Scheduler(sizes)
        self.guesser = self.scheduler.speculator = SameForAll(max_drafts)
        self.launched: deque[Launch] = deque()
        self.ended: set[str] = set()
        self.num_arrivals = 0
        for seed in range(3):
            self.arrive(length=min(prefill, 5), seed=seed, max_new=24, is_suspect=False)

    @rule(length=st.integers(1, 36), seed=st.integers(0, 2), max_new=st.integers(1, 24), is_suspect=st.booleans())
    def arrive(self, length: int, seed: int, max_new: int, is_suspect: bool) -> None:
        self.num_arrivals += 1
        prompt = [8 + (seed * 7 + index) % 30 for index in range(length)]
        message = submit(f"r{self.num_arrivals}", prompt, max_new_tokens=max_new, is_suspect=is_suspect)
        sizes = self.scheduler.limits
        answer = self.scheduler.add(request_of(message, self.num_arrivals, sizes.decoder_start_id))
        is_too_long = sizes.has_encoder and length > sizes.max_batch_prefill_tokens
        assert bool(answer and answer.error) == is_too_long

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.abort(request_id)
        self.ended.add(request_id)

    @precondition(lambda self: self.scheduler.requests and len(self.launched) <= self.depth)
    @rule(budget=st.integers(1, 40), num_drafts=st.integers(0, 9))
    def launch(self, budget: int, num_drafts: int) -> None:
        self.guesser.count = num_drafts
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        before, waiting = self.scheduler.stats.preemptions, list(self.scheduler.waiting)
        launch = self.scheduler.schedule(budget)
        if oldest is not None:
            assert oldest in self.scheduler.running, "the oldest was preempted"
        if self.scheduler.stats.preemptions > before and launch is not None:
            assert not launch.plan.new_rows, "admission in a step that preempted"
        if launch is None:
            assert self.launched or not self.scheduler.requests, "nothing can go on"
            return
        budget = min(budget, self.scheduler.limits.max_batch_prefill_tokens)
        assert launch.num_prompt_tokens <= max(budget, launch.num_encoder_tokens)
        if self.scheduler.limits.has_encoder:
            admitted = [request for request in waiting if request.residency is not None]
            assert admitted == waiting[: len(launch.plan.new_rows)], "overtaken"
            assert len(admitted) <= 1
        assert len(launch.entries) <= self.scheduler.limits.max_num_seqs
        self.launched.append(launch)

    @precondition(lambda self: self.launched)
    @rule(
        tokens=st.lists(st.sampled_from([9, 9, 10, EOS]), min_size=6, max_size=6),
        shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    )
    def apply(self, tokens: list[int], shares: list[float]) -> None:
        """A row with drafts keeps a share of what it may keep, none of it if that is below 0.2."""
        launch = self.launched.popleft()
        num_drafts = launch.plan.num_drafts[launch.plan.samples]
        SEEN["drafts"] += int(num_drafts.sum())
        num_ids = np.where(num_drafts, np.ceil((num_drafts + 1) * (np.array(shares)[: len(num_drafts)] - 0.2) / 0.8), 1)
        num_ids = np.clip(num_ids, 0, num_drafts + 1).astype(np.int32)
        SEEN["retries"] += int((num_ids == 0).sum())
        ids, count = np.resize(tokens, num_ids.sum()).astype(np.int32), num_ids.sum()
        result = StepResult(ids=ids, logprobs=np.zeros(count, np.float32), num_ids=num_ids)
        for run in self.scheduler.apply(launch, result):
            assert run.request_id not in self.ended, "a token after the end"
            if run.finish:
                self.ended.add(run.request_id)

    @invariant()
    def books_agree(self) -> None:
        scheduler = self.scheduler
        scheduler.check()
        for request in scheduler.running:
            stay = request.residency
            assert stay is not None
            assert stay.num_registered * 4 <= stay.num_written <= stay.num_computed <= request.num_total
            assert stay.num_computed <= len(stay.blocks) * 4
            assert len(stay.cross_blocks) == -(-len(request.encoder_ids) // 4)
            assert not stay.num_registered or not request.encoder_ids
            assert len(request.tokens) - request.num_prompt + request.num_in_flight <= request.params.max_new_tokens

    def teardown(self) -> None:
        while self.launched:
            self.apply([9] * 6, [1.0] * 6)
        for request_id in list(self.scheduler.requests):
            self.scheduler.abort(request_id)
        self.scheduler.check()
        assert self.scheduler.pool.num_free == self.scheduler.limits.num_blocks
        assert not self.scheduler._computing


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_drafts_were_among_what_the_machine_did() -> None:
    assert SEEN["drafts"] >= 50
    assert SEEN["retries"] >= 1


# The prefix cache.


def test_blocks_are_known_only_when_the_step_that_wrote_them_is_applied() -> None:
    bench = Bench()
    bench.add("a", list(range(10, 18)))
    request = bench.scheduler.requests["a"]
    launch = bench.launch()
    assert launch.plan.num_tokens.tolist() == [8]
    assert bench.known_blocks(request) == 0
    bench.apply(launch)
    assert bench.known_blocks(request) == 2


def test_a_sampled_token_has_no_keys_and_values_yet() -> None:
    bench = Bench()
    bench.add("a", list(range(10, 17)))
    request = bench.scheduler.requests["a"]
    bench.step()
    assert len(request.tokens) == 8
    assert bench.known_blocks(request) == 1
    bench.step()
    assert bench.known_blocks(request) == 2


def test_aborted_steps_register_nothing() -> None:
    bench = Bench()
    bench.add("a", list(range(10, 18)))
    request = bench.scheduler.requests["a"]
    launch = bench.launch()
    bench.scheduler.abort("a")
    assert bench.apply(launch) == []
    assert bench.known_blocks(request) == 0


def test_a_failed_row_ends_its_request_alone_and_registers_nothing() -> None:
    bench = Bench()
    bench.add("a", list(range(10, 18)))
    bench.add("b", list(range(20, 28)))
    requests = dict(bench.scheduler.requests)
    launch = bench.launch()
    assert ids_of(launch) == ["a", "b"]
    runs = bench.apply(launch, errors={0: "the logits are not finite"})
    assert [(run.request_id, run.ids, run.finish, run.error) for run in runs] == [
        ("a", [], "error", "the logits are not finite"),
        ("b", [9], "", ""),
    ]
    assert bench.known_blocks(requests["a"]) == 0
    assert bench.known_blocks(requests["b"]) == 2


def test_a_prompt_that_fails_late_is_forgotten_from_its_beginning() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    bench.add("a", list(range(10, 22)))
    request = bench.scheduler.requests["a"]
    bench.step()
    assert bench.known_blocks(request) == 2
    bench.apply(bench.launch(), errors={0: "the logits are not finite"})
    assert bench.known_blocks(request) == 0


@pytest.mark.parametrize(("length", "hit"), [(7, 4), (8, 4), (9, 8)])
def test_the_last_token_is_never_a_hit(length: int, hit: int) -> None:
    bench = Bench()
    prompt = list(range(10, 10 + length))
    bench.add("a", [*prompt, 30, 31, 32])
    bench.step()
    bench.add("b", prompt)
    launch = bench.launch()
    assert ids_of(launch) == ["a", "b"]
    assert launch.plan.starts[1] == hit
    assert bench.scheduler.stats.prefix_hit_tokens == hit


def test_equal_prompts_wait_for_the_one_that_computes() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    prompt = list(range(10, 26))
    for name in "ab":
        bench.add(name, prompt)
    bench.add("c", [40, 41])
    first = bench.launch()
    assert ids_of(first) == ["a"]
    bench.apply(first)
    assert bench.scheduler.pool.num_in_use([1, 2]) == 2
    second = bench.step()
    assert ids_of(second) == ["a"], "b waits although two of its blocks are known, c for its budget"
    third = bench.launch()
    assert ids_of(third) == ["a", "b", "c"]
    assert third.plan.starts.tolist() == [16, 12, 0]
    assert bench.scheduler.stats.prefix_hits == 1


def test_one_that_waits_for_a_prefix_does_not_hold_up_others() -> None:
    bench = Bench()
    for name in "ab":
        bench.add(name, list(range(10, 20)))
    bench.add("c", [40, 41])
    assert ids_of(bench.launch()) == ["a", "c"]


def test_nobody_waits_for_a_request_that_is_gone() -> None:
    bench = Bench(max_batch_prefill_tokens=4)
    for name in "ab":
        bench.add(name, list(range(10, 22)))
    bench.step()
    assert ids_of(bench.step()) == ["a"]
    bench.scheduler.abort("a")
    launch = bench.launch()
    assert ids_of(launch) == ["b"]
    assert launch.plan.starts.tolist() == [8]


@pytest.mark.parametrize(("salts", "hits"), [(("x", "y"), 0), (("x", "x"), 1), (("", "x"), 0)])
def test_tenants_do_not_share(salts: tuple[str, str], hits: int) -> None:
    bench = Bench()
    for name, salt in zip("ab", salts):
        bench.add(name, list(range(10, 20)), cache_salt=salt)
        bench.step()
    assert bench.scheduler.stats.prefix_hits == hits


def test_without_prefix_caching_nothing_is_shared() -> None:
    bench = Bench(prefix_caching=False)
    for name in "ab":
        bench.add(name, list(range(10, 20)))
    launch = bench.launch()
    assert launch.plan.starts.tolist() == [0, 0]
    bench.apply(launch)
    assert bench.scheduler.pool.num_cached == 0


# Budget and order.


def test_running_requests_come_first_and_decodes_are_outside_the_prompt_budget() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    bench.add("a", [10, 11])
    bench.step()
    bench.add("b", list(range(20, 40)))
    launch = bench.launch()
    assert ids_of(launch) == ["a", "b"]
    assert launch.plan.num_tokens.tolist() == [1, 8]
    assert launch.plan.samples.tolist() == [True, False]
    assert (launch.num_prompt_tokens, launch.num_decodes) == (8, 1)


def test_a_long_prompt_goes_in_chunks_and_is_counted_once() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    bench.add("a", list(range(10, 30)))
    starts = [bench.step().plan.starts.tolist() for _ in range(4)]
    assert starts == [[0], [8], [16], [20]]
    assert bench.scheduler.stats.chunked_prompts == 1


def test_the_smaller_of_budget_and_limit_counts() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    bench.add("a", list(range(10, 30)))
    assert bench.launch(budget=3).plan.num_tokens.tolist() == [3]


def test_tokens_in_flight_are_named_by_a_placeholder() -> None:
    bench = Bench()
    bench.add("a", [10, 11, 12], max_new_tokens=3)
    launches = [bench.launch() for _ in range(3)]
    assert [launch.plan.tokens.tolist() for launch in launches] == [[10, 11, 12], [-1], [-1]]
    assert bench.scheduler.schedule(PLENTY) is None, "the last token allowed is in flight"
    assert [run.finish for launch in launches for run in bench.apply(launch)] == ["", "", "length"]


def test_a_row_gets_everything_with_its_request() -> None:
    bench = Bench()
    bench.add("a", [10, 11], output=[12, 13], stop_token_ids=(3,), min_tokens=4)
    launch = bench.launch()
    (init,) = launch.plan.new_rows
    assert init.prompt_ids.tolist() == [10, 11]
    assert init.output_ids.tolist() == [12, 13]
    assert init.stop_ids.tolist() == [3, EOS]
    assert (init.request_id, init.params.min_tokens) == ("a", 4)
    assert launch.plan.tokens.tolist() == [10, 11, 12, 13]


# Ends, aborts and what goes back when.


def test_row_and_blocks_go_back_when_the_last_step_that_names_them_is_applied() -> None:
    bench = Bench()
    bench.add("a", [10, 11, 12])
    first, second = bench.launch(), bench.launch()
    assert bench.apply(first, token=EOS)[0].finish == "eos_token"
    assert bench.scheduler.pool.num_free == bench.scheduler.limits.num_blocks - 1
    bench.add("b", [20])
    third = bench.launch()
    assert third.plan.rows.tolist() == [1]
    assert bench.apply(second) == [], "the late token is dropped"
    assert bench.scheduler.pool.num_free == bench.scheduler.limits.num_blocks - 1
    bench.add("c", [30])
    fourth = bench.launch()
    assert fourth.plan.freed_rows.tolist() == [0]
    assert [init.row for init in fourth.plan.new_rows] == [0]


@pytest.mark.parametrize(
    ("prompt", "fields", "error"),
    [
        ([], {}, "the prompt is empty"),
        ([50], {}, "token ids must be below 50"),
        ([-1], {}, "token ids must be below 50"),
        ([1], {"output": [50]}, "token ids must be below 50"),
        ([1] * 20, {"max_new_tokens": 41}, "61 tokens are more than the 60 this worker can hold"),
    ],
)
def test_what_cannot_run_here_ends_at_once(prompt: list[int], fields: dict, error: str) -> None:
    bench = Bench()
    answer = bench.add("a", prompt, **fields)
    assert answer is not None
    assert (answer.ids, answer.finish, answer.error) == ([], "error", error)
    assert not bench.scheduler.has_requests


@pytest.mark.parametrize(
    ("output", "fields", "finish"),
    [
        ([4, 5], {"max_new_tokens": 2}, "length"),
        ([4, EOS], {}, "eos_token"),
        ([4, 9], {"stop_token_ids": (9,)}, "stop_sequence"),
        ([], {"max_new_tokens": 0}, "length"),
    ],
)
def test_a_job_that_comes_with_complete_output_ends_at_once(output: list[int], fields: dict, finish: str) -> None:
    bench = Bench()
    answer = bench.add("a", [1, 2], output=output, **fields)
    assert answer is not None
    assert (answer.ids, answer.finish, answer.error) == ([], finish, "")
    assert not bench.scheduler.has_requests


def test_of_two_runs_of_a_job_the_later_epoch_wins() -> None:
    bench = Bench()
    bench.add("a", [10, 11], epoch=2)
    launch = bench.launch()
    bench.add("a", [10, 11], epoch=1)
    assert bench.scheduler.requests["a"].epoch == 2
    bench.add("a", [10, 11], output=[30], epoch=3)
    assert bench.scheduler.requests["a"].epoch == 3
    assert bench.apply(launch) == []
    assert [run.epoch for run in bench.apply(bench.launch())] == [3]


def test_aborting_the_unknown_and_the_waiting_is_harmless() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", [10])
    bench.add("b", [20])
    bench.step()
    assert [request.request_id for request in bench.scheduler.waiting] == ["b"]
    bench.scheduler.abort("b")
    bench.scheduler.abort("b")
    bench.scheduler.abort("nobody")
    bench.scheduler.check()
    assert list(bench.scheduler.requests) == ["a"]


# Suspects.


def test_a_suspect_gets_its_first_token_without_other_newcomers() -> None:
    bench = Bench(max_batch_prefill_tokens=8)
    bench.add("old", [10])
    bench.step()
    bench.add("s1", list(range(20, 32)), is_suspect=True)
    bench.add("s2", [40], is_suspect=True)
    bench.add("new", [41])
    assert [ids_of(bench.step()) for _ in range(4)] == [
        ["old", "s1"],
        ["old", "s1"],
        ["old", "s1", "s2"],
        ["old", "s1", "s2", "new"],
    ]


def test_a_suspect_does_not_join_a_step_with_other_newcomers() -> None:
    bench = Bench()
    bench.add("a", [10])
    bench.add("s", [40], is_suspect=True)
    assert [ids_of(bench.step()) for _ in range(2)] == [["a"], ["a", "s"]]


# Memory.


def crowded(scheduler_class: type[Scheduler] = Scheduler) -> Bench:
    """Three requests that together outgrow 16 blocks of 4; admitted because outputs used to be short."""
    bench = Bench(scheduler_class, num_blocks=16, max_num_seqs=3, max_batch_prefill_tokens=60)
    for _ in range(300):
        bench.scheduler._forecast.note(1)
    for index in range(3):
        bench.add(f"r{index}", [10 + 10 * index + offset for offset in range(10)], max_new_tokens=40, ignore_eos=True)
    bench.step()
    assert len(bench.scheduler.running) == 3
    return bench


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    bench = crowded()
    bench.add("later", [45])
    while not bench.scheduler.stats.preemptions:
        launch = bench.step()
    assert ids_of(launch) == ["r0", "r1"], "the step that preempts admits nobody"
    assert [request.request_id for request in bench.scheduler.waiting] == ["r2", "later"]
    victim = bench.scheduler.requests["r2"]
    num_tokens = len(victim.tokens)
    while victim.residency is None:
        launch = bench.step()
    (init,) = [init for init in launch.plan.new_rows if init.request_id == "r2"]
    assert len(init.prompt_ids) == 10
    assert len(init.output_ids) == num_tokens - 10


def test_a_step_in_flight_is_applied_before_the_preempted_goes_back() -> None:
    bench = crowded()
    in_flight, launch = bench.launch(), bench.launch()
    while not bench.scheduler.stats.preemptions:
        bench.apply(in_flight)
        in_flight, launch = launch, bench.launch()
    victim = bench.scheduler.requests["r2"]
    assert ids_of(in_flight) == ["r0", "r1", "r2"]
    assert victim.num_in_flight == 1
    assert victim not in bench.scheduler.waiting
    num_tokens = len(victim.tokens)
    assert "r2" in [run.request_id for run in bench.apply(in_flight)]
    assert (len(victim.tokens), victim.num_in_flight) == (num_tokens + 1, 0)
    assert bench.scheduler.waiting == [victim]
    assert "r2" not in ids_of(launch)


class PreemptsOldest(Scheduler):
    def _preempt_youngest(self, needy: Request, builder: PlanBuilder) -> bool:
        self.running.reverse()
        again = super()._preempt_youngest(needy, builder)
        self.running.reverse()
        return again


def first_to_end(bench: Bench) -> str:
    for _ in range(200):
        for run in bench.apply(bench.launch()):
            if run.finish:
                return run.request_id
    raise AssertionError("nobody ends")


def test_the_oldest_runs_to_its_end_whatever_happens() -> None:
    bench = crowded()
    assert first_to_end(bench) == "r0"
    assert bench.scheduler.stats.preemptions > 0
    wrong = crowded(PreemptsOldest)
    assert first_to_end(wrong) != "r0"


def test_admission_follows_the_predicted_peak() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", [10] * 10, max_new_tokens=30)
    bench.add("b", [20] * 10, max_new_tokens=30)
    assert ids_of(bench.step()) == ["a"], "both would grow to 80 of 64 tokens"
    bench.scheduler.requests["b"].params = submit("b", [1], max_new_tokens=4).params
    assert ids_of(bench.step()) == ["a", "b"]


def test_what_does_not_fit_is_not_overtaken() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", [10] * 10, max_new_tokens=30)
    bench.add("b", [20] * 10, max_new_tokens=30)
    bench.add("c", [30], max_new_tokens=1)
    assert ids_of(bench.step()) == ["a"]


@pytest.mark.parametrize(("has_encoder", "is_caching"), [(False, True), (False, False), (True, True)])
def test_limits_come_from_the_loaded_device(has_encoder: bool, is_caching: bool) -> None:
    ready = Ready(
        vocab_size=50,
        dtype="float32",
        quantize="",
        weights_digest="d",
        kv_tokens=87,
        block_size=4,
        max_num_seqs=6,
        max_input_tokens=50,
        max_total_tokens=60,
        max_batch_prefill_tokens=16,
        step_limit_s=60.0,
        reasons=[],
        decoder_start_id=START if has_encoder else None,
    )
    assert limits_of(ready, prefix_caching=is_caching, max_drafts=5) == EngineLimits(
        vocab_size=50,
        block_size=4,
        num_blocks=21,
        max_num_seqs=6,
        max_total_tokens=60,
        max_batch_prefill_tokens=16,
        prefix_caching=is_caching and not has_encoder,
        decoder_start_id=START if has_encoder else None,
        max_drafts=5,
    )


# Encoder and decoder.


def test_the_encoder_reads_the_prompt_and_the_decoder_begins_with_its_start_token() -> None:
    bench = Bench(has_encoder=True)
    bench.add("a", list(range(10, 19)), stop_token_ids=(9,), min_tokens=4)
    launch = bench.launch()
    (init,) = launch.plan.new_rows
    assert init.encoder_ids.tolist() == list(range(10, 19))
    assert (init.prompt_ids.tolist(), init.output_ids.tolist()) == ([START], [])
    assert len(init.cross_blocks) == 3
    assert not set(init.cross_blocks) & set(launch.plan.block_ids)
    assert launch.plan.tokens.tolist() == [START]
    assert (launch.num_prompt_tokens, launch.num_encoder_tokens, launch.num_decodes) == (9, 9, 1)
    (request,) = bench.scheduler.running
    assert (request.num_output, request.num_in_flight) == (0, 1)
    assert [run.finish for run in bench.apply(launch)] == [""], "one token is below min_tokens"
    assert request.num_output == 1
    following = bench.step()
    assert not following.plan.new_rows, "the input goes through the encoder once"
    assert (following.plan.starts.tolist(), following.plan.tokens.tolist()) == ([1], [9])


def test_one_encoder_pass_a_step_in_the_order_of_arrival_beside_those_who_decode() -> None:
    bench = Bench(has_encoder=True)
    for name, length in (("a", 12), ("b", 16), ("c", 1)):
        bench.add(name, [10] * length, max_new_tokens=4)
    steps = [bench.step() for _ in range(3)]
    assert [ids_of(step) for step in steps] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert [step.num_encoder_tokens for step in steps] == [12, 16, 1]
    assert bench.scheduler.stats.encoder_passes == 3


def test_an_encoder_pass_is_not_cut_to_a_smaller_budget() -> None:
    bench = Bench(has_encoder=True)
    bench.add("a", [10] * 12, max_new_tokens=20)
    bench.add("b", [11] * 16, max_new_tokens=4)
    assert ids_of(bench.step(budget=3)) == ["a"]
    assert ids_of(bench.step(budget=3)) == ["a", "b"]
    assert bench.scheduler.stats.chunked_prompts == 0


def test_an_encoder_pass_waits_for_prompts_that_it_would_lengthen_the_step_of() -> None:
    bench = Bench(has_encoder=True, num_blocks=30)
    bench.add("a", [10] * 12, output=[20] * 24, max_new_tokens=30)
    bench.add("b", [11] * 8, max_new_tokens=4)
    bench.add("c", [12], max_new_tokens=4)
    steps = [bench.step() for _ in range(4)]
    assert [step.plan.num_tokens.tolist() for step in steps] == [[1 + 4], [16], [4, 1], [1, 1, 1]]
    assert [step.num_prompt_tokens for step in steps] == [16, 16, 12, 1]
    assert ids_of(steps[2]) == ["a", "b"], "what is left of the budget is enough for b"


def test_an_input_as_long_as_the_budget_leaves_room_for_the_start_token_alone() -> None:
    bench = Bench(has_encoder=True)
    bench.add("a", [10] * 16, output=[20, 21], max_new_tokens=4)
    first, second = bench.step(), bench.step()
    (init,) = first.plan.new_rows
    assert (init.prompt_ids.tolist(), init.output_ids.tolist()) == ([START], [20, 21])
    assert (first.plan.tokens.tolist(), first.plan.samples.tolist()) == ([START], [False])
    assert (second.plan.tokens.tolist(), second.plan.samples.tolist()) == ([20, 21], [True])
    assert (first.num_prompt_tokens, first.num_decodes) == (16, 0)
    assert (second.num_prompt_tokens, second.num_decodes) == (2, 0)


@pytest.mark.parametrize(
    ("prompt", "fields", "error"),
    [
        ([], {}, "the prompt is empty"),
        ([50], {}, "token ids must be below 50"),
        ([-1], {"output": [4]}, "token ids must be below 50"),
        ([1] * 16, {"max_new_tokens": 45}, "61 tokens are more than the 60 this worker can hold"),
        ([1] * 17, {}, "17 tokens are more than the 16 that the encoder reads at once"),
    ],
)
def test_an_input_that_cannot_run_here_ends_at_once(prompt: list[int], fields: dict, error: str) -> None:
    bench = Bench(has_encoder=True)
    answer = bench.add("a", prompt, **fields)
    assert answer is not None
    assert (answer.ids, answer.finish, answer.error) == ([], "error", error)
    assert not bench.scheduler.has_requests


@pytest.mark.parametrize(("token", "finish"), [(START, ""), (EOS, "eos_token")])
def test_the_start_token_is_no_output(token: int, finish: str) -> None:
    """Also where it is an end-of-sequence id at the same time."""
    bench = Bench(has_encoder=True, decoder_start_id=EOS)
    assert bench.add("a", [10]) is None
    assert [run.finish for run in bench.apply(bench.launch(), token=token)] == [finish]


def test_cross_blocks_go_back_with_the_last_step_that_names_their_row() -> None:
    bench = Bench(has_encoder=True)
    num_blocks = bench.scheduler.limits.num_blocks
    bench.add("a", [10] * 12)
    first, second = bench.launch(), bench.launch()
    bench.apply(first, token=EOS)
    assert bench.scheduler.pool.num_free == num_blocks - 4
    bench.apply(second)
    assert bench.scheduler.pool.num_free == num_blocks
    assert bench.scheduler.pool.num_cached == 0


def test_a_preempted_request_gives_both_tables_back_and_comes_with_its_input_again() -> None:
    bench = Bench(has_encoder=True, num_blocks=17)
    bench.scheduler._forecast.remaining = lambda num_output, max_new_tokens: 0
    for name in "ab":
        bench.add(name, [10] * 15, max_new_tokens=40, ignore_eos=True)
    for _ in range(2):
        bench.step()
    victim = bench.scheduler.requests["b"]
    assert victim.residency is not None
    while not bench.scheduler.stats.preemptions:
        bench.step()
    (other,) = bench.scheduler.running
    assert other.residency is not None
    assert bench.scheduler.pool.num_free == 17 - len(other.residency.all_blocks)
    num_output = victim.num_output
    while victim.residency is None:
        launch = bench.step()
    (init,) = launch.plan.new_rows
    assert init.encoder_ids.tolist() == [10] * 15
    assert len(init.output_ids) == num_output > 0
    assert len(init.cross_blocks) == 4
    assert bench.scheduler.stats.encoder_passes == 3


def test_the_oldest_runs_to_its_end_in_the_smallest_pool_however_its_tokens_are_divided() -> None:
    num_preemptions = 0
    for num_input in range(1, 60):
        bench = Bench(has_encoder=True, num_blocks=17, max_batch_prefill_tokens=60)
        bench.scheduler._forecast.remaining = lambda num_output, max_new_tokens: 0
        bench.add("a", [10] * num_input, max_new_tokens=60 - num_input, ignore_eos=True)
        bench.add("b", [11] * 9, max_new_tokens=51, ignore_eos=True)
        assert first_to_end(bench) == "a"
        num_preemptions += bench.scheduler.stats.preemptions
    assert num_preemptions >= 10


def test_the_predicted_peak_counts_what_the_encoder_leaves() -> None:
    steps = []
    for num_blocks in (18, 19):
        bench = Bench(has_encoder=True, num_blocks=num_blocks, max_batch_prefill_tokens=40)
        bench.add("a", [10] * 20, max_new_tokens=24)
        bench.add("b", [11] * 36, max_new_tokens=4)
        bench.step()
        steps.append(ids_of(bench.step()))
    assert steps == [["a"], ["a", "b"]], "5 and 9 blocks for what they read, 4 for the answers, one more for each"
