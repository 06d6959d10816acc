"""The sampler of a GPU against that of a CPU, whose own oracle is transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from common.job import LogprobKind, PenaltyKind, SamplingParams
from tests.worker.runner.device_sampling import Sampling, asking, assert_equal, on_cpu
from tests.worker.runner.sampling import Row, random_batch
from worker.kernels.triton import sampling
from worker.kernels.triton.sampling import NOISE_TOLERANCE, TritonSampler
from worker.parallel.shard import Shard
from worker.runner import noise, sampler
from worker.runner.device_rows import Word


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def _small_tiles(monkeypatch):
    """Vocabularies of some hundred tokens have several, and often more candidates than are listed."""
    monkeypatch.setattr(sampling, "SCAN_TILE", 128)
    monkeypatch.setattr(sampling, "SELECT_TILE", 128)
    monkeypatch.setattr(sampling, "LIST_LENGTH", 16)


# ------------------------------------------------------------------ noise


@triton.jit
def noise_of(words, noises, first_id, low, high, index, TILE: tl.constexpr):
    random = sampling.random_words(first_id, low, high, index, TILE)
    lanes = tl.arange(0, TILE)
    tl.store(words + lanes, random.to(tl.int32, bitcast=True))
    tl.store(noises + lanes, -tl.log(sampling.exponentials(random)))


def halves(seed: int) -> list[int]:
    return np.array([seed], np.uint64).view(np.int32).tolist()


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (2**64 - 5, 7), (0x123456789ABCDEF0, 2**31 - 1)])
def test_noise_is_that_of_a_cpu_to_the_bit_before_the_logarithm(device, seed, index):
    size, first_id = 16384, 151_936 - 16384
    words = torch.empty(size, dtype=torch.int32, device=device)
    noises = torch.empty(size, dtype=torch.float32, device=device)
    noise_of[(1,)](words, noises, first_id, *halves(seed), index, TILE=size)
    ids = np.arange(first_id, first_id + size).astype(np.uint64)
    zero = np.zeros_like(ids)
    keys = tuple(np.full_like(ids, half) for half in np.array(halves(seed), np.int32).view(np.uint32))
    expected = np.stack(noise.philox((ids // 4, np.full_like(ids, index), zero, zero), keys))[ids % 4, np.arange(size)]
    assert np.array_equal(words.cpu().numpy().view(np.uint32), expected)
    gumbel = noise.gumbel(np.full_like(ids, seed), np.full_like(ids, index), ids)
    assert np.abs(noises.cpu().numpy() - gumbel).max() < NOISE_TOLERANCE / 4
    other = noise.gumbel(np.full_like(ids, seed), np.full_like(ids, index + 1), ids)
    assert np.abs(noises.cpu().numpy() - other).max() > 1


@triton.jit
def race(logits, winners, low, high, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    lanes = tl.arange(0, ROWS * COLUMNS)
    scores = tl.load(logits + lanes)
    random = sampling.random_words(tl.program_id(0), low, high, index, ROWS * COLUMNS)
    keyed = tl.exp(scores) / sampling.exponentials(random)
    _, winner = tl.max(tl.reshape(keyed, (ROWS, COLUMNS)), 1, return_indices=True)
    tl.store(winners + tl.arange(0, ROWS), winner)


def test_of_thousands_of_races_all_have_the_same_winner(device):
    num_rows, num_columns = 4096, 16
    logits = torch.randn(num_rows * num_columns, generator=torch.Generator().manual_seed(0)) * 3
    winners = torch.empty(num_rows, dtype=torch.int32, device=device)
    race[(1,)](logits.to(device), winners, *halves(11), 3, ROWS=num_rows, COLUMNS=num_columns, num_warps=16)
    ids = np.arange(num_rows * num_columns).astype(np.uint64)
    keyed = logits.double().numpy() + noise.gumbel(np.full_like(ids, 11), np.full_like(ids, 3), ids)
    keyed = keyed.reshape(num_rows, num_columns)
    margins = np.sort(keyed, 1)[:, -1] - np.sort(keyed, 1)[:, -2]
    assert margins.min() > NOISE_TOLERANCE
    assert winners.cpu().numpy().tolist() == keyed.argmax(1).tolist()


# ------------------------------------------------------------------ everything against a CPU


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 12), (torch.bfloat16, 6)])
def test_random_rows_get_what_a_cpu_gives_them(device, dtype, num_rows):
    logits, rows = random_batch(0, num_rows, 200)
    logits, rows = logits.to(dtype), asking(rows)
    run = Sampling(TritonSampler, rows, 200, device)
    processors = run.ask().processors
    assert processors.cuts
    assert processors.num_slots
    (wanted,) = on_cpu(logits, rows)
    assert_equal(run.step(logits), wanted)
    assert run.state.last_ids[run.places].tolist() == wanted.ids.tolist()


ALONE = [
    dict(repetition_penalty=1.7),
    dict(frequency_penalty=1.5, presence_penalty=-0.5),
    dict(frequency_penalty=1.5, presence_penalty=-0.5, penalty_kind=PenaltyKind.OPENAI),
    dict(min_tokens=5),
    dict(do_sample=True, temperature=0.7),
    dict(do_sample=True, top_k=3),
    dict(do_sample=True, top_p=0.6),
    dict(do_sample=True, typical_p=0.6),
    dict(do_sample=True, min_p=0.2),
    dict(do_sample=True, top_k=1),
    dict(do_sample=True, top_p=1e-6),
    dict(do_sample=True, top_k=30, top_p=0.8, typical_p=0.9, min_p=0.05, temperature=1.4, repetition_penalty=0.8),
]


def alone(kind: LogprobKind) -> list[Row]:
    params = [
        SamplingParams(max_new_tokens=9, seed=seed, num_top_logprobs=seed % 3, logprob_kind=kind, **options)
        for seed, options in enumerate(ALONE)
    ]
    return [Row(each, [1, 2, 2], [3, 3], stop_ids=(4, 99)) for each in params]


@pytest.mark.parametrize(("kind", "num_steps"), [(LogprobKind.PROCESSED, 2), (LogprobKind.RAW, 1)])
def test_each_processor_alone_step_after_step(device, kind, num_steps):
    rows = alone(kind)
    logits = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(1))
    logits[:, [1, 2, 3, 4]] += 3
    run = Sampling(TritonSampler, rows, 40, device)
    for wanted in on_cpu(logits, rows, num_steps):
        assert_equal(run.step(logits), wanted)


@pytest.mark.usefixtures("_small_tiles")
def test_ties_are_kept_and_cut_alike(device):
    options = [dict(top_k=20), dict(top_p=0.61), dict(top_k=40, top_p=0.4), dict(typical_p=0.5), dict(min_p=0.1), {}]
    params = [SamplingParams(max_new_tokens=9, do_sample=True, seed=3, num_top_logprobs=3, **each) for each in options]
    rows = [Row(each, [1], []) for each in [*params, SamplingParams(max_new_tokens=1, num_top_logprobs=2)]]
    logits = torch.randn(len(rows), 290, generator=torch.Generator().manual_seed(2)).mul(2).round()
    (wanted,) = on_cpu(logits, rows)
    assert any(len(tops) > row.params.num_top_logprobs for row, tops in zip(rows, wanted.top_tokens))
    assert_equal(Sampling(TritonSampler, rows, 290, device).step(logits), wanted)


@pytest.mark.parametrize("options", [{}, dict(do_sample=True), dict(do_sample=True, top_k=4, top_p=0.9, min_p=0.1)])
def test_unusable_logits_are_an_error_of_their_row_only(device, options):
    params = SamplingParams(max_new_tokens=9, num_top_logprobs=2, **options)
    rows = [Row(replace(params, seed=seed), [1], []) for seed in range(8)]
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    logits[1], logits[3], logits[5, 7], logits[6, 9] = -torch.inf, torch.nan, torch.nan, torch.inf
    logits[7, 5:] = -torch.inf
    (wanted,) = on_cpu(logits, rows)
    assert list(wanted.errors) == [1, 3, 5, 6]
    run = Sampling(TritonSampler, rows, 50, device)
    assert_equal(run.step(logits), wanted)
    assert 0 <= run.state.last_ids.min() <= run.state.last_ids.max() < 50


def test_excluding_every_token_is_an_error(device):
    params = SamplingParams(max_new_tokens=9, min_tokens=2)
    rows = [Row(params, [0], [], stop_ids=(0, 1, 2)), Row(params, [0], [], stop_ids=(0, 2))]
    got = Sampling(TritonSampler, rows, 3, device).step(torch.zeros(2, 3))
    assert list(got.errors) == [0]
    assert got.ids[1] == 1


class Said(Exception):
    """What a rank says in its first collective."""


@dataclass
class Rank:
    """One of several, each of which runs by itself: until it says something, then with what all have said."""

    shard: Shard
    everyone: list[torch.Tensor]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if not self.everyone:
            raise Said(x)
        return torch.stack(self.everyone)


def run_ranks(rows: list[Row], logits: torch.Tensor, device, size: int) -> tuple[list[sampler.Sampled], list]:
    """What each gets, and what each said."""
    everyone: list[torch.Tensor] = []
    for rank in range(size):
        with pytest.raises(Said) as said:
            Sampling(TritonSampler, rows, logits.shape[1], device, Rank(Shard(rank, size), [])).step(logits)
        everyone.append(said.value.args[0].clone())
    groups = [Rank(Shard(rank, size), everyone) for rank in range(size)]
    return [Sampling(TritonSampler, rows, logits.shape[1], device, group).step(logits) for group in groups], everyone


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("cuts", [False, True])
def test_ranks_pick_what_one_picks(device, cuts):
    logits, rows = random_batch(8, 5, 201)
    logits = logits.float()
    if not cuts:
        neutral = dict(top_k=0, top_p=1.0, typical_p=1.0, min_p=0.0)
        rows = [replace(row, params=replace(row.params, **neutral)) for row in rows]
    (wanted,) = on_cpu(logits, rows)
    results, everyone = run_ranks(rows, logits, device, 2)
    assert [each.dtype for each in everyone] == [torch.float32 if cuts else torch.int32] * 2
    for got in results:
        assert_equal(got, wanted)


def test_company_and_padding_change_nothing(device):
    rows = alone(LogprobKind.PROCESSED)[4:8]
    logits = torch.randn(len(rows), 60, generator=torch.Generator().manual_seed(4))
    together = Sampling(TritonSampler, rows, 60, device).step(torch.cat((logits, torch.zeros(2, 60))), size=6)
    for index, row in enumerate(rows):
        single = Sampling(TritonSampler, [row], 60, device).step(logits[index : index + 1])
        assert single.ids[0] == together.ids[index]
        assert single.logprobs[0] == together.logprobs[index]


# ------------------------------------------------------------------ what would be wrong


def another_index(run: Sampling) -> None:
    run.indices = run.indices + 1


def other_sign(run: Sampling) -> None:
    run.state.parameters.view(torch.float32)[:, Word.FREQUENCY].neg_()


def one_more(run: Sampling) -> None:
    run.state.parameters[:, Word.TOP_K] += 1


WRONG = [
    (another_index, dict(do_sample=True)),
    (other_sign, dict(frequency_penalty=1.0)),
    (one_more, dict(do_sample=True, top_k=5)),
]


@pytest.mark.parametrize(("spoil", "options"), WRONG)
def test_a_wrong_step_is_told_apart(device, spoil, options):
    rows = [Row(SamplingParams(max_new_tokens=9, seed=seed, **options), [1, 2], [3]) for seed in range(6)]
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(5))
    (wanted,) = on_cpu(logits, rows)
    assert_equal(Sampling(TritonSampler, rows, 40, device).step(logits), wanted)
    run = Sampling(TritonSampler, rows, 40, device)
    spoil(run)
    with pytest.raises(AssertionError):
        assert_equal(run.step(logits), wanted)


def test_alternatives_have_a_bound(device):
    rows = [Row(SamplingParams(max_new_tokens=1, num_top_logprobs=3), [0], [])]
    (tops,) = Sampling(TritonSampler, rows, 700, device).step(torch.zeros(1, 700)).top_tokens
    assert len(tops) == sampler.MAX_TIES
