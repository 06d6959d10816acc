"""Drafts: looked up well, dealt out where they pay, and never a reason for another token."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.guesser import Guesser
from tests.worker.engine.fake_device import DeviceMisuse, FakeDevice, Oracle, Row
from tests.worker.engine.harness import START, Harness, encoder_limits, limits, random_traffic, submit
from tests.worker.engine.test_scheduler import Bench, result_of
from worker.engine import scheduler as scheduler_module
from worker.engine.device import StepResult
from worker.engine.loop import EngineStalled
from worker.engine.plan import Entry, PlanBuilder
from worker.engine.request import Request, Residency
from worker.engine.scheduler import Scheduler
from worker.engine.speculation import (
    DECAY_OF_ALL,
    MAX_AGE,
    MAX_DRAFTS_PER_STEP,
    MAX_INDEXED_TOKENS,
    NUM_TRIES,
    STEPS_UNTIL_PLAIN,
    Chances,
    Lookup,
    Speculator,
    StepTimes,
    num_kept,
)

DEPTHS = [0, 1, 2]
NUM_REQUESTS = 300


def texts(letters: str) -> array[int]:
    return array("i", map(ord, letters))


def lookup_of(prompt: str, output: str = "") -> Lookup:
    """As if the request had grown token by token."""
    tokens = texts(prompt)
    lookup = Lookup(tokens, Chances(DECAY_OF_ALL))
    for letter in output:
        tokens.append(ord(letter))
        lookup.chances(1)
    return lookup


def guess(lookup: Lookup, count: int) -> str:
    return "".join(map(chr, lookup.drafts(count))) if lookup.chances(1) else ""


# Looking up.


@pytest.mark.parametrize(
    ("prompt", "output", "drafts"),
    [
        ("the cat sat. ", "the cat", " sat. th"),
        ("the cat sat. ", "the c", "at sat. "),
        ("abXY abcdZW ", "abcd", "ZW abcdZ"),
        ("wabcdE vbcdF ", "uabcd", "E vbcdF "),
        ("abcd", "xyz", ""),
        ("", "a", ""),
        ("", "ababab", "abababab"),
        ("", "aaaa", "aaaaaaaa"),
    ],
)
def test_guesses_follow_the_place_where_most_tokens_agree(prompt: str, output: str, drafts: str) -> None:
    assert guess(lookup_of(prompt, output), 8) == drafts


@given(st.text("ab", max_size=60), st.text("abc", max_size=60))
def test_one_token_at_a_time_finds_what_a_search_through_all_of_them_finds(prompt: str, output: str) -> None:
    """A place where four or two agree, if there is one; and that the guess is what followed."""
    lookup, text = lookup_of(prompt, output), prompt + output
    drafts = guess(lookup, 3)
    has_match = len(text) >= 3 and text[-2:] in text[:-1]
    assert bool(drafts) == (has_match and lookup.chances(1) != [])
    if not has_match:
        return
    place = lookup._source
    assert text[place : place + 3].startswith(drafts) or len(text) - place < 3
    num_agreeing = next((n for n in range(8) if n >= place or text[place - 1 - n] != text[-1 - n]), 8)
    assert min(lookup._match, 8) == num_agreeing
    if len(text) > 4 and text[-4:] in text[:-1]:
        assert num_agreeing >= 4, "a longer match was passed over"


def test_a_prompt_read_at_once_is_known_like_one_that_grew() -> None:
    text = "".join(random.Random(1).choices("abcdef", k=400))
    at_once, grown = lookup_of(text), lookup_of("", text)
    assert guess(at_once, 8) == guess(grown, 8) != ""
    assert at_once._ends == grown._ends


def test_what_the_encoder_read_is_looked_through_too() -> None:
    bench = Bench(has_encoder=True, max_drafts=4)
    bench.add("a", [10, 11, 12, 13, 14, 15], output=[11, 12], max_new_tokens=20)
    bench.step()
    request = bench.scheduler.requests["a"]
    request.tokens[-1] = 13
    timed(bench.scheduler.speculator, 1, {0: 1.0, 1: 1.0, 2: 1.0, 4: 1.0})
    assert bench.scheduler.speculator.drafts([request]) == {"a": [14, 15, START, 11]}


def test_of_an_endless_prompt_the_end_is_known() -> None:
    prompt = array("i", range(MAX_INDEXED_TOKENS + 100))
    for first, is_known in ((50, False), (150, True)):
        lookup = Lookup(array("i", [*prompt, first, first + 1]), Chances(DECAY_OF_ALL))
        assert bool(lookup.chances(1)) == is_known
        if is_known:
            assert lookup.drafts(2) == [first + 2, first + 3]
        assert len(lookup._ends) <= 2 * MAX_INDEXED_TOKENS + 4


# How likely and how dear.


def test_chances_are_those_of_tokens_nobody_had_to_try() -> None:
    copying, other = lookup_of("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnop"), lookup_of("ab ab ab ab ", "abXabYabZ")
    assert copying.chances(4)[0] > 0.8
    assert other.chances(4) == [] or other.chances(4)[0] < 0.4
    chances = copying.chances(8)
    assert chances == sorted(chances, reverse=True)


def test_what_others_saw_counts_until_a_request_has_seen_enough() -> None:
    of_all = Chances(1.0)
    for _ in range(100):
        of_all.note(2, False)
    one = Chances(1.0, of_all)
    assert one.of(2) == of_all.of(2) < 0.1
    assert one.of(3) == 0.5
    for _ in range(20):
        one.note(2, True)
    assert one.of(2) > 0.7
    assert of_all.of(2) < 0.3


def timed(speculator: Speculator, num_rows: int, seconds: dict[int, float]) -> None:
    for num_drafts, each in seconds.items():
        for _ in range(NUM_TRIES):
            speculator.times.note(num_rows, num_drafts, each)


@pytest.mark.parametrize(
    ("seconds", "chance", "num_rows", "expected"),
    [
        ({0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04, 8: 1.08}, 0.9, 1, 8),
        ({0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04, 8: 1.08}, 0.005, 1, 0),
        ({0: 1.0, 1: 1.6, 2: 2.2, 4: 3.4, 8: 5.8}, 0.5, 1, 0),
        ({0: 1.0, 1: 1.6, 2: 2.2, 4: 3.4, 8: 5.8}, 0.9, 1, 2),
        ({0: 1.0, 1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0}, 0.9, 1, 8),
        ({0: 32.0, 1: 33.0, 2: 34.0, 4: 36.0, 8: 40.0}, 0.9, 32, 0),
        ({0: 32.0, 1: 32.5, 2: 33.0, 4: 34.0, 8: 36.0}, 0.9, 32, 4),
        ({0: 1.0}, 0.2, 1, 0),
        ({0: 1.0}, 0.9, 1, 4),
        ({}, 0.9, 1, 0),
    ],
)
def test_a_step_tries_as_many_as_bring_the_most_tokens_a_second(
    seconds: dict[int, float], chance: float, num_rows: int, expected: int
) -> None:
    speculator = Speculator(8)
    timed(speculator, num_rows, seconds)
    assert speculator._num_worthwhile(num_rows, [chance**place for place in range(1, 9)]) == expected


def test_recent_times_count_and_old_ones_are_forgotten() -> None:
    times = StepTimes()
    for seconds in (9.0, 1.0):
        times.note(4, 0, seconds)
    assert times.of(4, 0) is None, "two are too few"
    times.note(4, 0, 2.0)
    assert times.of(4, 0) == 2.0
    assert times.of(4, 1) is times.of(40, 0) is None
    for _ in range(8):
        times.note(4, 0, 3.0)
    assert times.of(4, 0) == 3.0
    for _ in range(MAX_AGE):
        times.note(4, 1, 3.0)
    assert times.of(4, 0) is None


def test_drafts_are_not_cheaper_for_having_been_tried_while_the_machine_was_fast() -> None:
    speculator = Speculator(8)
    timed(speculator, 4, {0: 1.0, 1: 1.3, 2: 1.6, 4: 2.2})
    timed(speculator, 4, {0: 2.0})
    timed(speculator, 4, {0: 2.0})
    assert speculator.times.of(4, 2) == 1.6
    assert speculator._num_worthwhile(4, [0.1] * 4) == 0, "2.2 seconds are little more than 2"


def test_among_many_steps_with_drafts_there_is_one_without_to_compare_them_with() -> None:
    speculator, num_plain = Speculator(8), 0
    timed(speculator, 1, {0: 1.0})
    for _ in range(10 * STEPS_UNTIL_PLAIN):
        count = speculator._num_worthwhile(1, [0.9])
        num_plain += not count
        speculator.times.note(1, count, 1.1 if count else 1.0)
    assert 9 <= num_plain <= 10


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.lists(st.integers(0, 2), max_size=8))
def test_what_counts_is_what_single_steps_would_have_sampled(picks: list[int], drafts: list[int]) -> None:
    picks = (picks * 9)[: len(drafts) + 1]
    expected = 1
    while expected <= len(drafts) and picks[expected - 1] == drafts[expected - 1]:
        expected += 1
    assert num_kept(np.array(picks), np.array(drafts, np.int32)) == expected


# Through the whole engine core.


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("has_encoder", [False, True])
def test_requests_get_what_they_get_without_drafts(depth: int, has_encoder: bool) -> None:
    harness = Harness((encoder_limits if has_encoder else limits)(max_drafts=6), depth)
    harness.guess(depth)
    harness.expect_no_output()
    random_traffic(harness, depth, NUM_REQUESTS, pauses=0.5)
    stats = harness.steps[-1].stats
    assert stats["accepted_tokens"] >= 100
    assert stats["draft_tokens"] - stats["accepted_tokens"] >= 50
    assert harness.device.num_rejected_blocks >= 5
    assert stats["preemptions"] >= 5
    assert has_encoder or stats["prefix_hits"] >= 20
    assert sum(outcome.is_aborted and not outcome.finish for outcome in harness.outcomes.values()) >= 3
    assert {outcome.finish for outcome in harness.outcomes.values()} >= {"length", "eos_token", "stop_sequence"}
    harness.check_outcomes()


class AcceptsAll(FakeDevice):
    """Takes every draft for right."""

    def _is_right(self, pick: int, draft: int | None) -> bool:
        return draft is not None


class RejectsLate(FakeDevice):
    """Keeps one token more behind the first draft that is wrong."""

    def _sample_all(self, truth: Row, drafts: list[int], digests: list[int]) -> list[int]:
        picks = super()._sample_all(truth, drafts, digests)
        if len(picks) < len(digests):
            picks.append(self._sample(truth, digests[len(picks)]))
        return picks


@pytest.mark.parametrize("wrong", [AcceptsAll, RejectsLate])
def test_a_device_that_does_not_compare_well_is_caught(wrong: type[FakeDevice]) -> None:
    harness = Harness(limits(max_drafts=6), device_class=wrong)
    harness.guess()
    with pytest.raises((DeviceMisuse, AssertionError)):
        random_traffic(harness, 0, NUM_REQUESTS)
        harness.check_outcomes()


class KeepsRejected(Scheduler):
    """Goes on behind all drafts, as if they had been right."""

    def _note_written(self, entry: Entry, num_tokens: int) -> None:
        super()._note_written(entry, num_tokens)
        entry.residency.num_computed = max(entry.residency.num_computed, entry.start + entry.num_drafts + 1)


class RegistersRejected(Scheduler):
    """Blocks enter the prefix cache although a rejected draft's keys and values lie in them."""

    def _note_written(self, entry: Entry, num_tokens: int) -> None:
        stay, num_known = entry.residency, len(entry.request.tokens) - entry.start
        super()._note_written(entry, min(entry.num_tokens + entry.num_drafts, num_known))
        if entry.num_drafts:
            stay.num_computed = stay.num_written = entry.start + num_tokens


class GoesOnAtOnce(Scheduler):
    """Launches a row while its drafts are not compared."""

    def _add(
        self, request: Request, residency: Residency, num_tokens: int, builder: PlanBuilder, drafts: Sequence[int] = ()
    ) -> None:
        super()._add(request, residency, num_tokens, builder, drafts)
        request.is_guessing = False
        residency.num_computed -= len(drafts)
        request.num_in_flight -= len(drafts)

    def _land(self, entry: Entry) -> None:
        entry.request.num_in_flight += entry.num_drafts
        super()._land(entry)


class OverdrawsBlocks(Scheduler):
    """Takes blocks for drafts at the cost of others."""

    def _num_draft_places(self, residency: Residency) -> int:
        return 99


MISTAKES = [
    (KeepsRejected, 0, (DeviceMisuse, EngineStalled), "a row jumps|no step can be launched"),
    (GoesOnAtOnce, 1, DeviceMisuse, "before its drafts are compared|a row jumps"),
]


@pytest.mark.parametrize(("wrong", "depth", "error", "message"), MISTAKES)
def test_a_scheduler_that_mistreats_drafts_is_caught(
    wrong: type[Scheduler], depth: int, error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    harness = Harness(limits(max_drafts=6), depth, scheduler_class=wrong)
    harness.guess()
    harness.expect_no_output()
    with pytest.raises(error, match=message):
        random_traffic(harness, 0, NUM_REQUESTS, pauses=0.5)
        harness.check_outcomes()


class AlwaysWrong(Guesser):
    def drafts_of(self, request: Request, most: int) -> list[int]:
        expected = self._answer_of(request.request_id)[request.num_output]
        return [(expected + 1) % 50] * most


def continued(scheduler_class: type[Scheduler]) -> Harness:
    """A request ends with a stop token that fills a block, where a rejected draft lay; another one goes on from it."""
    harness = Harness(limits(max_drafts=2), scheduler_class=scheduler_class)
    harness.guess(guesser_class=AlwaysWrong)
    prompt, output = [10, 11, 12, 13], Oracle(50).generate([10, 11, 12, 13], [], submit("", []).params, [])[0][:4]
    assert output[3] not in output[:3]
    harness.submit(submit("a", prompt, max_new_tokens=20, stop_token_ids=(output[3],)))
    harness.run_until_idle()
    assert harness.outcomes["a"].ids == output
    harness.submit(submit("b", [*prompt, *output, 20]))
    harness.run_until_idle()
    return harness


def test_keys_and_values_of_a_rejected_draft_are_found_by_nobody() -> None:
    harness = continued(Scheduler)
    assert harness.stats["draft_tokens"] > harness.stats["accepted_tokens"] == 0
    assert harness.stats["prefix_hit_tokens"] == 4
    harness.check_outcomes()
    with pytest.raises(DeviceMisuse, match="pages hold another history"):
        continued(RegistersRejected)


def test_tokens_behind_the_end_of_a_request_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def append_all(request: Request, ids: Sequence[int]) -> tuple[int, str]:
        request.tokens.extend(ids)
        return len(ids), request.finish()

    monkeypatch.setattr(scheduler_module, "_append", append_all)
    harness = Harness(limits(max_drafts=6))
    harness.guess()
    with pytest.raises((AssertionError, ValueError)):
        random_traffic(harness, 0, NUM_REQUESTS)
        harness.check_outcomes()


class Repeating(FakeDevice):
    """Requests say the same ten tokens again and again, with a change now and then."""

    def _sample(self, truth: Row, digest: int) -> int:
        index = len(truth.tokens) - len(truth.init.prompt_ids)
        token = 10 + index % 10 if index % 37 else 30 + index % 7
        truth.push(token)
        return token


@pytest.mark.parametrize("max_drafts", [1, 4, 16])
def test_who_repeats_takes_fewer_steps_to_the_same_tokens(max_drafts: int) -> None:
    outcomes, steps = [], []
    for most in (0, max_drafts):
        harness = Harness(limits(max_drafts=most, max_total_tokens=400, num_blocks=220), device_class=Repeating)
        for name in "ab":
            harness.submit(submit(name, [40, 41], max_new_tokens=300, ignore_eos=True, num_top_logprobs=2))
        harness.run_until_idle()
        outcomes.append(harness.outcomes)
        steps.append(len(harness.steps))
    assert outcomes[0] == outcomes[1]
    assert harness.stats["accepted_tokens"] > 200
    assert harness.stats["accepted_tokens"] > 0.6 * harness.stats["draft_tokens"]
    assert steps[1] < steps[0] * (0.7 if max_drafts == 1 else 0.5)


def test_who_never_repeats_is_never_guessed_for() -> None:
    harness = Harness(limits(max_drafts=8, vocab_size=1 << 20, max_total_tokens=400, num_blocks=220))
    harness.submit(submit("a", [40, 41], max_new_tokens=300, ignore_eos=True))
    harness.run_until_idle()
    assert harness.stats["draft_tokens"] == 0
    harness.check_outcomes()


# By hand.


def guessing(bench: Bench, drafts: dict[str, list[int]]) -> None:
    """What the next steps try."""
    bench.scheduler.speculator.drafts = lambda requests: drafts


def test_a_run_ends_with_its_request_and_counts_what_was_right() -> None:
    bench = Bench(max_drafts=4)
    bench.add("a", [10, 11], max_new_tokens=4)
    bench.step()
    guessing(bench, {"a": [9, 9]})
    launch = bench.launch()
    assert (launch.plan.num_tokens.tolist(), launch.plan.num_drafts.tolist()) == ([3], [2])
    assert (launch.plan.tokens.tolist(), launch.num_prompt_tokens, launch.num_drafts) == ([9, 9, 9], 0, 2)
    result = StepResult(
        ids=np.array([9, 9, 5], np.int32), logprobs=np.arange(3, dtype=np.float32), num_ids=np.array([3], np.int32)
    )
    (run,) = bench.scheduler.apply(launch, result)
    assert (run.ids, run.logprobs, run.finish) == ([9, 9, 5], [0, 1, 2], "length")
    assert (bench.scheduler.stats.draft_tokens, bench.scheduler.stats.accepted_tokens) == (2, 2)
    bench.scheduler.check()


def test_of_a_run_that_holds_the_end_the_rest_is_dropped() -> None:
    bench = Bench(max_drafts=4)
    bench.add("a", [10, 11], max_new_tokens=20)
    bench.step()
    guessing(bench, {"a": [9, 7, 9]})
    launch = bench.launch()
    ids = np.array([9, 7, 9, 9], np.int32)
    (run,) = bench.scheduler.apply(
        launch, StepResult(ids=ids, logprobs=np.zeros(4, np.float32), num_ids=np.array([4], np.int32))
    )
    assert (run.ids, run.finish) == ([9, 7], "eos_token")
    assert bench.scheduler.stats.accepted_tokens == 2
    bench.scheduler.check()


def test_no_request_gets_more_drafts_than_tokens_it_may_still_have() -> None:
    speculator = Speculator(8)
    bench = Bench(max_drafts=8)
    bench.add("a", [10, 11], max_new_tokens=4)
    bench.step()
    request = bench.scheduler.requests["a"]
    assert list(speculator._guessable([request])) == [(request, 2)]
    bench.launch()
    assert list(speculator._guessable([request])) == []


@pytest.mark.parametrize(("num_kept", "num_known"), [(1, 1), (2, 2), (3, 2), (6, 3)])
def test_only_blocks_without_rejected_tokens_are_remembered(num_kept: int, num_known: int) -> None:
    bench = Bench(max_drafts=6, num_blocks=40)
    bench.add("a", [10, 11, 12, 13, 14, 15], max_new_tokens=20)
    request = bench.scheduler.requests["a"]
    bench.step()
    guessing(bench, {"a": [9] * 5})
    launch = bench.launch()
    count = np.array([num_kept], np.int32)
    bench.scheduler.apply(
        launch, StepResult(ids=np.full(num_kept, 9, np.int32), logprobs=np.zeros(num_kept, np.float32), num_ids=count)
    )
    assert len(request.residency.blocks) == 3, "the block that was taken for drafts stays"
    assert request.residency.num_computed == request.residency.num_written == 6 + num_kept
    assert bench.known_blocks(request) == (6 + num_kept) // 4 <= num_known
    guessing(bench, {})
    assert bench.launch().plan.starts.tolist() == [6 + num_kept]


def test_drafts_leave_the_blocks_that_others_need() -> None:
    for scheduler_class, has_room in ((Scheduler, True), (OverdrawsBlocks, False)):
        bench = Bench(scheduler_class, max_drafts=8, num_blocks=16, max_total_tokens=60)
        bench.scheduler._forecast.remaining = lambda num_output, max_new_tokens: 0
        for name in "abc":
            bench.add(name, [ord(name) % 30] * 3, max_new_tokens=40, ignore_eos=True)
        bench.step()
        held = bench.scheduler.pool.allocate(bench.scheduler.pool.num_free - 3)
        bench.scheduler.check = lambda: None
        guessing(bench, {name: [9] * 8 for name in "abc"})
        for _ in range(2):
            launch = bench.scheduler.schedule(100)
            assert launch is not None
            bench.scheduler.apply(launch, result_of(launch))
        assert (bench.scheduler.stats.preemptions == 0) == has_room
        bench.scheduler.pool.release(held)


def test_a_row_whose_drafts_spoilt_it_goes_on_without() -> None:
    bench = Bench(max_drafts=4)
    bench.add("a", [10, 11], max_new_tokens=20)
    bench.step()
    request = bench.scheduler.requests["a"]
    guessing(bench, {"a": [9, 9]})
    nothing = StepResult(ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), num_ids=np.zeros(1, np.int32))
    assert bench.scheduler.apply(bench.launch(), nothing) == []
    assert list(Speculator(4)._guessable([request])) == []
    guessing(bench, {})
    again = bench.launch()
    assert (again.plan.starts.tolist(), again.plan.num_tokens.tolist()) == ([2], [1])
    assert [run.ids for run in bench.apply(again)] == [[9]]


def test_a_step_never_has_more_drafts_than_its_limit() -> None:
    speculator = Speculator(64)
    timed(speculator, 8, {0: 1.0, **{1 << power: 1.0 for power in range(8)}})
    assert speculator._num_worthwhile(8, [0.9] * 500) == MAX_DRAFTS_PER_STEP
