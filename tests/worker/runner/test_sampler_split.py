"""Sampling by ranks that hold parts of the vocabulary, against one rank that holds all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from common.errors import ConfigurationError
from common.job import LogprobKind, SamplingParams
from tests.support.lockstep import LockstepGroup, run_ranks
from tests.worker.runner.sampling import Row, output_indices, random_batch, state_of
from worker.parallel.group import Group
from worker.parallel.shard import Shard
from worker.runner import rows as rows_module
from worker.runner import sampler
from worker.runner.rows import TokenCounts
from worker.runner.sampler import Sampled
from worker.runner.vocabulary import Vocabulary

SIZES = [2, 3, 4]
FEW = 30
"""Random rows draw their tokens from so many ids."""
FLOAT32_TOLERANCE = 5e-6
"""One rank rounds the sum over the vocabulary once, to float32, whose steps are as large as 2e-6 here."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@dataclass
class Wrong:
    """A group that spoils what ranks say."""

    group: LockstepGroup
    spoil: Callable[[torch.Tensor], torch.Tensor]

    @property
    def shard(self) -> Shard:
        return self.group.shard

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.group.all_gather(x))


def backwards(group: LockstepGroup) -> Wrong:
    return Wrong(group, lambda everyone: everyone.flip(0))


def first_sum_only(group: LockstepGroup) -> Wrong:
    def spoil(everyone: torch.Tensor) -> torch.Tensor:
        everyone[1:, 3:] = -math.inf
        return everyone

    return Wrong(group, spoil)


def sample(logits: torch.Tensor, rows: list[Row], vocabulary: Vocabulary, num_steps: int = 1) -> list[Sampled]:
    """What one rank gets in each of some steps with the same logits."""
    mine = logits[:, vocabulary.mine.start : vocabulary.mine.stop].contiguous()
    state, places = state_of(rows, vocabulary.mine)
    results = []
    for step in range(num_steps):
        results.append(sampler.sample(mine, places, output_indices(rows) + step, state, vocabulary))
        state.remember(places, results[-1].ids)
    assert state.counts.table.shape[2] == len(vocabulary.mine)
    return results


def on_one_rank(logits: torch.Tensor, rows: list[Row], num_steps: int = 1) -> list[Sampled]:
    return sample(logits, rows, Vocabulary(logits.shape[1]), num_steps)


def on_ranks(
    logits: torch.Tensor,
    rows: list[Row],
    size: int,
    num_steps: int = 1,
    wrap: Callable[[LockstepGroup], Group] = lambda group: group,
) -> tuple[list[Sampled], int]:
    """What each rank gets, and the number of collectives it took."""

    def work(group: LockstepGroup) -> tuple[list[Sampled], int]:
        vocabulary = Vocabulary(logits.shape[1], wrap(group))
        return sample(logits, rows, vocabulary, num_steps), group.num_calls

    results = run_ranks(size, work)
    said = [([exactly(step) for step in steps], num_calls) for steps, num_calls in results]
    assert said == said[:1] * size, "ranks disagree"
    return results[0]


def exactly(result: Sampled) -> tuple:
    """To the bit, also where it is not a number."""
    return result.ids.tobytes(), result.logprobs.tobytes(), result.top_tokens, result.errors


def assert_equal(got: Sampled, wanted: Sampled, tolerance: float = 1e-6) -> None:
    usable = [index for index in range(len(wanted.ids)) if index not in wanted.errors]
    assert got.errors == wanted.errors
    assert got.ids[usable].tolist() == wanted.ids[usable].tolist()
    assert got.logprobs[usable] == pytest.approx(wanted.logprobs[usable], rel=tolerance, abs=tolerance)
    assert [tokens_of(tops) for tops in got.top_tokens] == [tokens_of(tops) for tops in wanted.top_tokens]
    logprobs, wanted_logprobs = ([value for tops in each.top_tokens for _, value in tops] for each in (got, wanted))
    assert logprobs == pytest.approx(wanted_logprobs, rel=tolerance, abs=tolerance)


def tokens_of(tops: list[tuple[int, float]]) -> list[int]:
    return [token for token, _ in tops]


def spread(row: Row, vocab_size: int, num_top: int) -> Row:
    """The same with tokens from all of the vocabulary, and alternatives."""

    def scale(ids):
        return [token * ((vocab_size - 1) // (min(FEW, vocab_size) - 1)) for token in ids]

    params = replace(row.params, num_top_logprobs=num_top)
    return Row(params, scale(row.prompt_ids), scale(row.output_ids), tuple(scale(row.stop_ids)))


def mixed_batch(seed: int, vocab_size: int) -> tuple[torch.Tensor, list[Row]]:
    logits, rows = random_batch(seed, 90, vocab_size)
    draw = np.random.default_rng(seed)
    rows = [spread(row, vocab_size, int(draw.integers(1, 6)) if draw.random() < 0.2 else 0) for row in rows]
    # rows without truncation are few among random ones
    plain = dict(top_k=0, top_p=1.0, typical_p=1.0, min_p=0.0, num_top_logprobs=0)
    rows[:30] = [replace(row, params=replace(row.params, **plain)) for row in rows[:30]]
    return logits, rows


def holder(token: int, vocab_size: int, size: int) -> int:
    return next(rank for rank in range(size) if token in Shard(rank, size).bounds(vocab_size))


def assert_mixed(rows: list[Row], vocab_size: int, size: int) -> None:
    parameters = state_of(rows, range(vocab_size))[0].parameters[::2]
    for name in ("is_plain", "needs_whole", "samples", "needs_counts", "is_raw"):
        assert 0 < parameters[name].sum() < len(rows)
    assert ((parameters["samples"]) & ~parameters["needs_whole"]).any()
    assert (parameters["needs_counts"] & parameters["needs_whole"]).any()
    held_back = [row for row in rows if row.params.min_tokens > len(row.output_ids)]
    stops = {tuple(holder(token, vocab_size, size) for token in row.stop_ids) for row in held_back}
    assert any(one != other for one, other in stops)
    counted = [row for row in rows if row.params.frequency_penalty]
    assert len({holder(token, vocab_size, size) for row in counted for token in row.output_ids}) == size


# ------------------------------------------------------------------ everything against one rank


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(31, torch.float64), (301, torch.float64), (1001, torch.float32)])
def test_any_number_of_ranks_picks_what_one_picks(size, vocab_size, dtype):
    logits, rows = mixed_batch(size, vocab_size)
    assert_mixed(rows, vocab_size, size)
    (got,), num_calls = on_ranks(logits.to(dtype), rows, size)
    (wanted,) = on_one_rank(logits.to(dtype), rows)
    assert len({holder(token, vocab_size, size) for token in wanted.ids}) == size
    assert num_calls == 3
    assert_equal(got, wanted, 1e-6 if dtype is torch.float64 else FLOAT32_TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_ties_anywhere_are_broken_as_on_one_rank(size):
    logits, rows = mixed_batch(10 + size, 101)
    logits = logits.round()
    (got,), _ = on_ranks(logits, rows, size)
    (wanted,) = on_one_rank(logits, rows)
    assert any(len(tops) > row.params.num_top_logprobs for row, tops in zip(rows, wanted.top_tokens))
    assert_equal(got, wanted)


def test_bfloat16_logits_are_gathered_as_they_are():
    logits, rows = mixed_batch(3, 77)
    (got,), _ = on_ranks(logits.to(torch.bfloat16), rows, 3)
    assert_equal(got, on_one_rank(logits.to(torch.bfloat16), rows)[0], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_a_vocabulary_of_one_token_for_each_rank(size):
    logits, rows = torch.zeros(3, size), [Row(SamplingParams(max_new_tokens=1, **options), [0], []) for options in (
        {}, dict(do_sample=True, seed=5), dict(do_sample=True, top_p=0.5, num_top_logprobs=2)
    )]  # fmt: skip
    (got,), _ = on_ranks(logits, rows, size)
    assert_equal(got, on_one_rank(logits, rows)[0])


def test_more_ranks_than_tokens_are_refused():
    with pytest.raises(ConfigurationError, match="--num-shard 3 is more than the 2 tokens.*at most 2"):
        run_ranks(3, lambda group: Vocabulary(2, group))


@pytest.mark.parametrize("vocab_size", [4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_parts_of_any_width_are_put_side_by_side(vocab_size, dtype):
    whole = torch.arange(6 * vocab_size).view(3, 2, vocab_size).to(dtype)

    def work(group):
        vocabulary = Vocabulary(vocab_size, group)
        return vocabulary.gather(whole[..., vocabulary.mine.start : vocabulary.mine.stop])

    assert all(torch.equal(gathered, whole) and gathered.dtype is dtype for gathered in run_ranks(4, work))


# ------------------------------------------------------------------ what would be wrong


def sampled_rows(num_rows: int, **options) -> list[Row]:
    params = [SamplingParams(max_new_tokens=9, do_sample=True, seed=seed, **options) for seed in range(num_rows)]
    return [Row(each, [1], []) for each in params]


def test_noise_belongs_to_the_token_and_not_to_its_place_on_a_rank(monkeypatch):
    logits, rows = torch.zeros(20, 40), sampled_rows(20, temperature=0.7)
    (wanted,) = on_one_rank(logits, rows)
    assert_equal(on_ranks(logits, rows, 2)[0][0], wanted)
    original = sampler.pick
    monkeypatch.setattr(sampler, "pick", lambda scores, seeds, indices, first_id: original(scores, seeds, indices))
    assert on_ranks(logits, rows, 2)[0][0].ids.tolist() != wanted.ids.tolist()


def test_of_equals_on_two_ranks_the_lower_id_wins():
    logits = torch.zeros(3, 21)
    logits[0, [9, 10, 20]] = logits[1, [10, 11]] = logits[2, [0, 20]] = 4.0
    rows = [Row(SamplingParams(max_new_tokens=1), [1], [])] * 3
    assert on_ranks(logits, rows, 2)[0][0].ids.tolist() == on_one_rank(logits, rows)[0].ids.tolist() == [9, 10, 0]
    assert on_ranks(logits, rows, 2, wrap=backwards)[0][0].ids.tolist() == [10, 10, 20]


@pytest.mark.parametrize("kind", LogprobKind)
def test_logprobs_are_relative_to_all_tokens(kind):
    logits, rows = random_batch(0, 9, 40)[0] / 3, sampled_rows(9, temperature=0.7, logprob_kind=kind)
    (wanted,) = on_one_rank(logits, rows)
    assert_equal(on_ranks(logits, rows, 2)[0][0], wanted)
    wrong = on_ranks(logits, rows, 2, wrap=first_sum_only)[0][0]
    assert wrong.ids.tolist() == wanted.ids.tolist()
    assert (wrong.logprobs > wanted.logprobs + 0.01).all()


@pytest.mark.parametrize("options", [{}, dict(top_p=0.9)])
@pytest.mark.parametrize("size", SIZES)
def test_penalties_follow_what_all_ranks_picked(monkeypatch, size, options):
    logits, rows = torch.zeros(12, 13), sampled_rows(12, frequency_penalty=2.0, repetition_penalty=1.3, **options)
    logits += torch.arange(13) / 10
    wanted = on_one_rank(logits, rows, num_steps=9)
    got, num_calls = on_ranks(logits, rows, size, num_steps=9)
    assert num_calls == (18 if options else 9)
    assert len({holder(token, 13, size) for step in wanted for token in step.ids}) == size
    for mine, other in zip(got, wanted):
        assert_equal(mine, other)
    monkeypatch.setattr(rows_module, "columns_of", lambda ids, mine: ids[rows_module.is_among(ids, mine)] % len(mine))
    misplaced, _ = on_ranks(logits, rows, size, num_steps=9)
    monkeypatch.setattr(TokenCounts, "add", lambda self, rows, ids: None)
    forgotten, _ = on_ranks(logits, rows, size, num_steps=9)
    for wrong in (misplaced, forgotten):
        assert [step.ids.tolist() for step in wrong] != [step.ids.tolist() for step in wanted]


@pytest.mark.parametrize("do_sample", [False, True])
def test_stops_are_held_back_wherever_they_are(do_sample):
    logits = torch.zeros(2, 21)
    logits[:, [3, 20]], logits[:, 12] = 30.0, 20.0
    params = SamplingParams(max_new_tokens=9, min_tokens=2, do_sample=do_sample)
    # the tokenizer has a stop and a prompt that the model does not know
    rows = [Row(params, [1, 99], [], stop_ids=(20, 3, 99)), Row(params, [1, 99], [5, 5], stop_ids=(20, 3, 99))]
    (wanted,) = on_one_rank(logits, rows)
    assert wanted.ids[0] == 12
    assert wanted.ids[1] in (3, 20)
    for size in SIZES:
        assert_equal(on_ranks(logits, rows, size)[0][0], wanted)


# ------------------------------------------------------------------ errors


KINDS = [
    {},
    dict(do_sample=True),
    dict(do_sample=True, top_p=0.9),
    dict(repetition_penalty=1.5),
    dict(num_top_logprobs=2, logprob_kind=LogprobKind.RAW),
    dict(min_tokens=3, do_sample=True, top_k=2),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [[0], [20], list(range(11, 21)), list(range(21))])
def test_unusable_logits_are_found_by_all_ranks(value, tokens):
    logits = torch.randn(2 * len(KINDS), 21, generator=torch.Generator().manual_seed(0))
    rows = [Row(SamplingParams(max_new_tokens=9, **options), [1], [], stop_ids=(20,)) for options in KINDS * 2]
    logits[: len(KINDS), tokens] = value
    (wanted,) = on_one_rank(logits, rows)
    is_harmless = value == -math.inf and len(tokens) < 21
    assert list(wanted.errors) == ([] if is_harmless else list(range(len(KINDS))))
    for size in SIZES:
        (got,), _ = on_ranks(logits, rows, size)
        assert_equal(got, wanted)
        assert all(0 <= token < 21 for token in got.ids)


@pytest.mark.parametrize("options", [{}, dict(do_sample=True), dict(do_sample=True, top_p=0.9)])
def test_excluding_every_token_is_an_error_on_all_ranks(options):
    params = SamplingParams(max_new_tokens=9, min_tokens=2, **options)
    rows = [Row(params, [0], [], stop_ids=stops) for stops in ((0, 1, 2, 3, 4), (0, 1, 2, 4), (2, 3, 4))]
    for size in SIZES:
        (got,), _ = on_ranks(torch.zeros(3, 5), rows, size)
        assert list(got.errors) == [0]
        assert_equal(got, on_one_rank(torch.zeros(3, 5), rows)[0])


# ------------------------------------------------------------------ what it costs


PENALTY = dict(presence_penalty=1.0)
CUT = dict(do_sample=True, top_p=0.8)


@pytest.mark.parametrize(
    ("num_calls", "options"),
    [
        (0, []),
        (1, [{}, {}]),
        (1, [{}, dict(do_sample=True, temperature=0.5), PENALTY, dict(min_tokens=3), dict(top_p=0.8)]),
        (1, [CUT, dict(num_top_logprobs=1)]),
        (2, [CUT, {}, PENALTY]),
        (2, [CUT | PENALTY, CUT]),
        (3, [CUT | PENALTY, {}]),
    ],
)
def test_number_of_collectives(num_calls, options):
    rows = [Row(SamplingParams(max_new_tokens=9, **each), [1], []) for each in options]
    (got,), counted = on_ranks(torch.zeros(len(rows), 11), rows, 2)
    assert counted == num_calls
    assert len(got.ids) == len(got.logprobs) == len(rows)
