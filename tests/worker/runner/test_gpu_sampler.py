"""What a device is asked to sample, in torch, against the sampler of a CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.job import LogprobKind, SamplingParams
from tests.support.lockstep import run_ranks
from tests.worker.runner.device_sampling import (
    Sampling,
    apply,
    asking,
    assert_equal,
    device_rows,
    init_of,
    on_cpu,
    plan_of,
)
from tests.worker.runner.sampling import Row, random_batch
from worker.runner import gpu_sampler, sampler
from worker.runner.device_rows import MAX_STOPS, NO_SLOT, DeviceRows, Word
from worker.runner.gpu_sampler import Processors, TorchSampler


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(4))
def test_a_device_picks_what_a_cpu_picks_step_after_step(seed):
    logits, rows = random_batch(seed, 200, 60)
    logits, rows = logits.float(), asking(rows)
    sampling = Sampling(TorchSampler, rows, 60)
    processors = sampling.ask().processors
    assert processors.cuts and processors.num_slots >= 8
    for wanted in on_cpu(logits, rows, num_steps=3):
        got = sampling.step(logits)
        assert_equal(got, wanted)
        assert sampling.state.last_ids[sampling.places].tolist() == wanted.ids.tolist()


def test_ties_are_broken_alike():
    logits, rows = random_batch(7, 150, 40)
    logits, rows = logits.float().round(), asking(rows)
    (wanted,) = on_cpu(logits, rows)
    assert any(len(tops) > row.params.num_top_logprobs for row, tops in zip(rows, wanted.top_tokens))
    assert_equal(Sampling(TorchSampler, rows, 40).step(logits), wanted)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_pick_what_one_picks(size):
    logits, rows = random_batch(8, 60, 41)
    logits, rows = logits.float(), asking(rows)

    def work(group):
        sampling = Sampling(TorchSampler, rows, 41, group=group)
        return [sampling.step(logits) for _ in range(2)]

    for steps in run_ranks(size, work):
        for got, wanted in zip(steps, on_cpu(logits, rows, num_steps=2), strict=True):
            assert_equal(got, wanted)


def test_padding_changes_nothing_and_is_not_read():
    logits, rows = random_batch(9, 5, 40)
    logits, rows = logits.float(), asking(rows)
    sampling = Sampling(TorchSampler, rows, 40)
    got = sampling.step(torch.cat((logits, torch.zeros(3, 40))), size=8)
    assert_equal(got, on_cpu(logits, rows)[0])
    assert sampling.state.last_ids[sampling.state.spare_row] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_unusable_logits_are_an_error_of_their_row_only(value):
    logits, rows = random_batch(10, 40, 50)
    logits, rows = logits.float(), asking(rows)
    logits[3:20:2] = value
    (wanted,) = on_cpu(logits, rows)
    assert list(wanted.errors) == list(range(3, 20, 2))
    sampling = Sampling(TorchSampler, rows, 50)
    assert_equal(sampling.step(logits), wanted)
    assert 0 <= sampling.state.last_ids.min() <= sampling.state.last_ids.max() < 50


# ------------------------------------------------------------------ what would be wrong


def test_noise_of_another_index_and_a_penalty_of_the_other_sign_are_told_apart(monkeypatch):
    logits, rows = random_batch(11, 60, 50)
    logits = logits.float()
    wanted = on_cpu(logits, rows)[0].ids.tolist()
    sampling = Sampling(TorchSampler, rows, 50)
    sampling.indices = sampling.indices + 1
    assert sampling.step(logits).ids.tolist() != wanted
    sampling = Sampling(TorchSampler, rows, 50)
    for word in (Word.FREQUENCY, Word.PRESENCE):
        sampling.state.parameters.view(torch.float32)[:, word].neg_()
    assert sampling.step(logits).ids.tolist() != wanted
    monkeypatch.setattr(gpu_sampler, "keep_nucleus", lambda scores, p: scores > scores.amax(-1, keepdim=True) - 1)
    assert Sampling(TorchSampler, rows, 50).step(logits).ids.tolist() != wanted


# ------------------------------------------------------------------ what the host decides


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({}, Processors()),
        (dict(temperature=0.5, top_p=0.1), Processors()),
        (dict(do_sample=True, top_k=50), Processors()),
        (dict(do_sample=True, top_k=49), Processors(cuts=True)),
        (dict(do_sample=True, top_p=0.9), Processors(cuts=True)),
        (dict(do_sample=True, typical_p=0.9), Processors(cuts=True)),
        (dict(do_sample=True, min_p=0.1), Processors(cuts=True)),
        (dict(presence_penalty=-1.0), Processors(num_slots=4)),
    ],
)
def test_processors_run_where_a_row_asks_for_them(options, processors):
    rows = [Row(SamplingParams(max_new_tokens=9, **each), [1], [1, 2]) for each in ({}, options)]
    assert Sampling(TorchSampler, rows, 50).ask().processors == processors


# ------------------------------------------------------------------ rows


PENALISED = SamplingParams(max_new_tokens=9, repetition_penalty=1.5, seed=2**64 - 5, min_tokens=4)


def test_what_travels_arrives_at_its_place():
    state = DeviceRows(4, 3, 10, torch.device("cpu"), has_encoder=True)
    row = Row(PENALISED, [1, 1, 99], [3], stop_ids=(7, 99, 8))
    init = replace(init_of(2, row), encoder_ids=np.arange(5, dtype=np.int32), cross_blocks=np.array([9, 4], np.int32))
    apply(state, plan_of([init], blocks=[(2, 0, 5), (2, 1, 6), (0, 2, 7)]))
    assert state.tables.tolist() == [[0, 0, 7], [0, 0, 0], [5, 6, 0], [0, 0, 0], [0, 0, 0]]
    assert state.cross_tables[2].tolist() == [9, 4, 0]
    assert state.cross_lengths.tolist() == [0, 0, 5, 0, 0]
    words = state.parameters[2]
    assert (words[Word.NUM_PROMPT], words[Word.MIN_TOKENS], words[Word.NUM_STOPS]) == (3, 4, 2)
    assert state.stops[2, :2].tolist() == [7, 8]
    assert words[Word.SEED_LOW : Word.SEED_HIGH + 1].tolist() == [-5, -1]
    assert words.view(torch.float32)[Word.REPETITION] == 1.5
    slot = state.counts[words[Word.SLOT]]
    assert slot.tolist() == [[0, 2, 0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    assert state.parameters[[0, 1, 3, 4], Word.SLOT].tolist() == [NO_SLOT] * 4


def test_slots_are_begun_anew_and_grow_without_losing_any():
    state = DeviceRows(12, 3, 10, torch.device("cpu"))
    apply(state, plan_of([init_of(0, Row(PENALISED, [1], [])), init_of(1, Row(PENALISED, [2], []))]))
    first = int(state.parameters[0, Word.SLOT])
    apply(state, plan_of([init_of(5, Row(PENALISED, [3, 3], []))], freed=[0]))
    assert (int(state.parameters[5, Word.SLOT]), len(state.counts)) == (first, 4)
    assert state.counts[first, 0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    apply(state, plan_of([init_of(row, Row(PENALISED, [row], [])) for row in (2, 3, 6, 7)]))
    assert len(state.counts) == state.num_slots == 8
    slots = state.parameters[[1, 2, 3, 5, 6, 7], Word.SLOT].tolist()
    assert len(set(slots)) == 6
    assert state.counts[slots, 0].argmax(-1).tolist() == [2, 2, 3, 3, 6, 7]


def test_growth_that_a_lost_step_failed_to_get_is_not_asked_for_again():
    state = DeviceRows(12, 3, 10, torch.device("cpu"))
    lost = plan_of([init_of(row, Row(PENALISED, [row], [])) for row in range(9)])
    assert state.changes(lost).num_slots == 16
    apply(state, plan_of([init_of(9, Row(PENALISED, [9], []))], freed=range(9)))
    assert len(state.counts) == state.num_slots == 4
    apply(state, plan_of([init_of(row, Row(PENALISED, [row], [])) for row in range(4)]))
    slots = state.parameters[[0, 1, 2, 3, 9], Word.SLOT].tolist()
    assert len(state.counts) == 8 and state.counts[slots, 0].argmax(-1).tolist() == [0, 1, 2, 3, 9]


def test_a_plan_without_changes_sends_nothing():
    state, _ = device_rows([Row(PENALISED, [1], [])], 10)
    assert state.changes(plan_of([])).words.size == 0


def test_more_stops_than_there_is_room_for_are_an_error_of_their_row():
    state = DeviceRows(3, 3, 400, torch.device("cpu"))
    many, few = tuple(range(MAX_STOPS + 1)), tuple(range(MAX_STOPS))
    rows = [
        Row(PENALISED, [1], [], many),
        Row(PENALISED, [1], [], few),
        Row(SamplingParams(max_new_tokens=1), [1], [], many),
    ]
    errors = apply(state, plan_of([init_of(place, row) for place, row in enumerate(rows)]))
    assert list(errors) == [0]
    assert f"at most {MAX_STOPS} stop tokens" in errors[0]


def test_alternatives_have_a_bound():
    row = Row(SamplingParams(max_new_tokens=1, num_top_logprobs=3), [0], [])
    raw = Row(replace(row.params, logprob_kind=LogprobKind.RAW), [0], [])
    tops = Sampling(TorchSampler, [row, raw], 2000).step(torch.zeros(2, 2000)).top_tokens
    assert [len(each) for each in tops] == [sampler.MAX_TIES, 3]
