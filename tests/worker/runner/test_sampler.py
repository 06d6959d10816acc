"""The sampler against an oracle that does one row at a time with transformers' processors and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import generation

from common.job import LogprobKind, PenaltyKind, SamplingParams
from tests.worker.runner.sampling import Row, output_indices, random_batch, state_of
from worker.runner import sampler
from worker.runner.vocabulary import Vocabulary


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(logits: torch.Tensor, rows: list[Row]) -> sampler.Sampled:
    vocabulary = Vocabulary(logits.shape[1])
    state, places = state_of(rows, vocabulary.mine)
    return sampler.sample(logits, places, output_indices(rows), state, vocabulary)


# ------------------------------------------------------------------ the oracle


def philox_word(seed: int, output_index: int, token: int) -> int:
    """Philox4x32-10 in Python integers."""
    counter, key = [token // 4, output_index, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter[token % 4]


def noise_of(seed: int, output_index: int, token: int) -> float:
    uniform = ((philox_word(seed, output_index, token) >> 9) + 0.5) * 2.0**-23
    return -math.log(-math.log(uniform))


ORDER = ("min_tokens", "repetition", "frequency", "temperature", "top_k", "top_p", "typical", "min_p")


def process(scores: torch.Tensor, row: Row, order=ORDER) -> torch.Tensor:
    """`scores` float64 [vocab]."""
    steps = {
        "min_tokens": _min_tokens,
        "repetition": _repetition,
        "frequency": _frequency_and_presence,
        "temperature": lambda scores, row: scores / row.params.temperature,
        "top_k": lambda scores, row: (
            _hf(scores, generation.TopKLogitsWarper(row.params.top_k)) if row.params.top_k else scores
        ),
        "top_p": lambda scores, row: _hf(scores, generation.TopPLogitsWarper(row.params.top_p)),
        "typical": lambda scores, row: (
            _hf(scores, generation.TypicalLogitsWarper(row.params.typical_p)) if row.params.typical_p < 1 else scores
        ),
        "min_p": lambda scores, row: _hf(scores, generation.MinPLogitsWarper(row.params.min_p)),
    }
    names = order if row.params.do_sample else [name for name in order if name in ORDER[:3]]
    for name in names:
        scores = steps[name](scores, row)
    return scores


def _hf(scores: torch.Tensor, processor, ids=(0,)) -> torch.Tensor:
    return processor(torch.tensor([list(ids)]), scores[None].clone())[0]


def _min_tokens(scores: torch.Tensor, row: Row) -> torch.Tensor:
    scores = scores.clone()
    if len(row.output_ids) < row.params.min_tokens:
        scores[list(row.stop_ids)] = -math.inf
    return scores


def _repetition(scores: torch.Tensor, row: Row) -> torch.Tensor:
    processor = generation.RepetitionPenaltyLogitsProcessor(row.params.repetition_penalty)
    return _hf(scores, processor, row.prompt_ids + row.output_ids)


def _frequency_and_presence(scores: torch.Tensor, row: Row) -> torch.Tensor:
    scores, everything = scores.clone(), row.prompt_ids + row.output_ids
    is_openai = row.params.penalty_kind is PenaltyKind.OPENAI
    counted = row.output_ids if is_openai else everything
    for token in set(counted):
        share = counted.count(token) / (1 if is_openai else len(everything))
        scores[token] -= row.params.frequency_penalty * share + row.params.presence_penalty
    return scores


def expected(logits: torch.Tensor, row: Row, order=ORDER, shift: int = 0) -> tuple[int, float]:
    """Token and its log-probability."""
    scores = process(logits.double(), row, order)
    keyed = scores.clone()
    if row.params.do_sample:
        for token in torch.nonzero(torch.isfinite(scores))[:, 0].tolist():
            keyed[token] += noise_of(row.params.seed, len(row.output_ids) + shift, token)
    token = int(keyed.argmax())
    kind = logits.double() if row.params.logprob_kind is LogprobKind.RAW else scores
    return token, float(kind.log_softmax(-1)[token])


# ------------------------------------------------------------------ random rows against it


@pytest.mark.parametrize(("seed", "num_rows", "vocab_size"), [(0, 60, 50), (1, 60, 50), (2, 40, 300), (3, 12, 3000)])
def test_random_rows_equal_the_oracle(seed, num_rows, vocab_size):
    logits, rows = random_batch(seed, num_rows, vocab_size)
    assert any(row.params.do_sample for row in rows)
    assert not all(row.params.do_sample for row in rows)
    got = run(logits, rows)
    wanted = [expected(logits[index], row) for index, row in enumerate(rows)]
    assert got.ids.tolist() == [token for token, _ in wanted]
    assert got.logprobs.tolist() == pytest.approx([logprob for _, logprob in wanted], rel=1e-5, abs=1e-5)
    assert got.errors == {}


WRONG_ORDERS = [
    ("temperature", "min_tokens", "repetition", "frequency", "top_k", "top_p", "typical", "min_p"),
    ("min_tokens", "frequency", "repetition", "temperature", "top_k", "top_p", "typical", "min_p"),
    ("min_tokens", "repetition", "frequency", "top_k", "top_p", "temperature", "typical", "min_p"),
    ("min_tokens", "repetition", "frequency", "temperature", "top_p", "top_k", "typical", "min_p"),
    ("min_tokens", "repetition", "frequency", "temperature", "top_k", "typical", "top_p", "min_p"),
    ("repetition", "frequency", "temperature", "top_k", "top_p", "typical", "min_p"),
    *(tuple(name for name in ORDER if name != left_out) for left_out in ORDER),
]


@pytest.mark.parametrize("order", WRONG_ORDERS)
def test_another_order_or_a_processor_left_out_is_told_apart(order):
    logits, rows = random_batch(4, 150, 40)
    rows = [replace_kind(row) for row in rows]
    got = run(logits, rows)
    assert got.ids.tolist() == [expected(logits[index], row)[0] for index, row in enumerate(rows)]
    wrong = [expected(logits[index], row, order) for index, row in enumerate(rows)]
    assert not np.allclose(got.logprobs, [logprob for _, logprob in wrong], atol=1e-4)


def replace_kind(row: Row) -> Row:
    return Row(replace(row.params, logprob_kind=LogprobKind.PROCESSED), row.prompt_ids, row.output_ids, row.stop_ids)


def test_another_output_index_or_penalty_kind_is_told_apart():
    logits, rows = random_batch(5, 80, 40)
    got = run(logits, rows).ids.tolist()
    assert got == [expected(logits[index], row)[0] for index, row in enumerate(rows)]
    assert got != [expected(logits[index], row, shift=1)[0] for index, row in enumerate(rows)]
    for one, other in ((PenaltyKind.TGI, PenaltyKind.OPENAI), (PenaltyKind.OPENAI, PenaltyKind.TGI)):
        params = dict(max_new_tokens=9, frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=one)
        row = Row(SamplingParams(**params), [1, 2, 2], [3, 3, 4])
        wrong = Row(SamplingParams(**params | dict(penalty_kind=other)), [1, 2, 2], [3, 3, 4])
        probs, wrong_probs = (expected(torch.zeros(6), either)[1] for either in (row, wrong))
        assert run(torch.zeros(1, 6), [row]).logprobs[0] == pytest.approx(probs, rel=1e-5)
        assert abs(probs - wrong_probs) > 1e-3


# ------------------------------------------------------------------ company, ties, edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_company_does_not_change_a_row(dtype):
    logits, rows = random_batch(6, 50, 700)
    logits = logits.to(dtype)
    together = run(logits, rows)
    order = np.random.default_rng(0).permutation(50)
    shuffled = run(logits[order], [rows[index] for index in order])
    assert shuffled.ids.tolist() == together.ids[order].tolist()
    for index, row in enumerate(rows):
        alone = run(logits[index : index + 1], [row])
        assert alone.ids[0] == together.ids[index]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[index], rel=1e-6, abs=1e-6)


def test_greedy_takes_the_lowest_id_on_ties():
    logits = torch.zeros(2, 20)
    logits[:, [7, 3, 11]] = 2.0
    penalised = SamplingParams(max_new_tokens=1, repetition_penalty=2.0)
    got = run(logits, [Row(SamplingParams(max_new_tokens=1), [1], []), Row(penalised, [3], [])])
    assert got.ids.tolist() == [3, 7]


def test_top_k_keeps_ties_and_top_p_cuts_them_by_id():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    assert sampler.keep_top_k(scores, torch.tensor([[2]])).tolist() == [[True, False, True, True, True, False]]
    mass = scores.softmax(-1)[0]
    reach = torch.tensor([[float(mass[0] + 1.5 * mass[2])]])
    assert sampler.keep_top_p(scores, reach).tolist() == [[True, False, True, True, False, False]]
    assert sampler.keep_top_p(scores, torch.tensor([[1e-9]])).sum() == 1


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("ties", [False, True])
def test_the_head_of_the_vocabulary_decides_like_the_whole(monkeypatch, p, ties):
    draw = np.random.default_rng(1)
    scores = torch.from_numpy(draw.normal(0, 2, (6, 4000)))
    if ties:
        scores = scores.round()
    mass = torch.full((6, 1), p, dtype=torch.float64)
    with_head = sampler.keep_top_p(scores, mass)
    monkeypatch.setattr(sampler, "NUCLEUS_HEAD", 10_000)
    whole = sampler.keep_top_p(scores, mass)
    assert torch.equal(with_head, whole)
    assert float((scores.softmax(-1) * whole).sum(-1).min()) >= p - 1e-12


def test_stops_are_held_back_until_the_minimum_is_reached():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    params = SamplingParams(max_new_tokens=9, min_tokens=2)
    assert run(logits, [Row(params, [0], [0], stop_ids=(1,))]).ids.tolist() == [2]
    assert run(logits, [Row(params, [0], [0, 0], stop_ids=(1,))]).ids.tolist() == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_unusable_logits_are_an_error_of_their_row_only(value, do_sample):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    logits[1] = value
    rows = [Row(SamplingParams(max_new_tokens=1, do_sample=do_sample, top_p=0.9, num_top_logprobs=2), [1], [])] * 3
    got = run(logits, rows)
    assert list(got.errors) == [1]
    assert got.ids[[0, 2]].tolist() == [expected(logits[index], rows[index])[0] for index in (0, 2)]
    assert [len(tops) for tops in got.top_tokens] == [2, 0, 2]


def test_excluding_every_token_is_an_error():
    params = SamplingParams(max_new_tokens=9, min_tokens=2)
    assert list(run(torch.zeros(1, 2), [Row(params, [0], [], stop_ids=(0, 1))]).errors) == [0]


def test_top_tokens_by_kind():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    processed = SamplingParams(max_new_tokens=1, num_top_logprobs=2, repetition_penalty=1.5)
    raw = replace(processed, logprob_kind=LogprobKind.RAW)
    got = run(logits.repeat(2, 1), [Row(processed, [1], []), Row(raw, [1], [])])
    # 3.0 is divided by 1.5, so that three tokens tie, and TGI's rule reports all of them
    assert [token for token, _ in got.top_tokens[0]] == [1, 2, 3]
    assert got.top_tokens[0][0][1] == pytest.approx(float(torch.tensor([1.0, 2, 2, 2, 0]).log_softmax(-1)[1]))
    assert [token for token, _ in got.top_tokens[1]] == [1, 2]
    assert got.top_tokens[1][0][1] == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    assert got.ids.tolist() == [1, 1]


def test_top_tokens_leave_out_the_impossible_and_have_a_bound():
    params = SamplingParams(max_new_tokens=1, do_sample=True, top_k=2, num_top_logprobs=4)
    assert len(run(torch.arange(6.0)[None], [Row(params, [0], [])]).top_tokens[0]) == 2
    assert len(sampler.top_tokens(torch.zeros(5000), 3, with_ties=True)) == sampler.MAX_TIES


def test_nobody_asking_for_alternatives_costs_nothing():
    assert run(torch.zeros(1, 5), [Row(SamplingParams(max_new_tokens=1), [0], [])]).top_tokens == []


def test_noise_is_computed_for_candidates_that_can_win_only(monkeypatch):
    asked = []
    original = sampler.noise.gumbel
    monkeypatch.setattr(sampler.noise, "gumbel", lambda *columns: asked.append(len(columns[0])) or original(*columns))
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[0, :5] += 25.0
    row = Row(SamplingParams(max_new_tokens=1, do_sample=True, seed=9), [0], [])
    token = int(run(logits, [row]).ids[0])
    assert 5 <= sum(asked) < 1000
    assert token == expected(logits[0], row)[0]


def test_all_greedy_batches_touch_no_processor(monkeypatch):
    monkeypatch.setattr(sampler, "_process_and_pick", None)
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    got = run(logits, [Row(SamplingParams(max_new_tokens=1, temperature=0.5, top_p=0.1), [0], [])] * 4)
    assert got.ids.tolist() == logits.argmax(-1).tolist()


def test_bfloat16_logits_are_processed_in_float32():
    logits, rows = random_batch(8, 40, 200)
    narrow = logits.to(torch.bfloat16)
    assert run(narrow, rows).ids.tolist() == run(narrow.float(), rows).ids.tolist()


def test_where_nobody_asks_for_more_the_likeliest_is_found_without_looking_at_rows():
    rows = [Row(SamplingParams(max_new_tokens=5), [1, 2], []) for _ in range(3)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    found, by_rows = sampler.most_likely(logits, sampler.IN_TORCH.summarise), run(logits, rows)
    assert found is not None and found.ids.tolist() == by_rows.ids.tolist()
    assert np.array_equal(found.logprobs, by_rows.logprobs) and not found.errors
    logits[1, 4] = torch.nan
    assert sampler.most_likely(logits, sampler.IN_TORCH.summarise) is None and 1 in run(logits, rows).errors
