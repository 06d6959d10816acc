"""Models over pages of 8 bits: exactly what they are with keys and values rounded to the format, and near what they are
without."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.support import paged_t5, tiny_t5
from tests.support.kv_types import (
    KV_TYPES,
    nearest,
    share_scales,
    spoil_what_is_written,
    with_scales_of_other_heads,
    write_instead,
)
from tests.support.lockstep import run_ranks
from tests.support.paged import BLOCK_SIZE, load_decoder, paged_logits, relative_error
from worker.attention.pages import write_pages

EXACT = 1e-12
"""What float64 rounds, with all of these models' sums."""
BARS = {torch.int8: 2.0**-5, torch.float8_e4m3fn: 2.0**-3, torch.float8_e5m2: 2.0**-2}
"""Root mean square of the errors of logits, as a share of that of logits: twice what a single number of a float8 may be
off by. These models are drawn so that everything matters; on text a trained one is off by a fifth of it."""

NAMES = ["llama", "mistral_window_head_dim", "gemma2", "qwen3", "bloom", "falcon_7b"]
T5_NAMES = ["t5", "mt5"]

each_type = pytest.mark.parametrize("kv_type", KV_TYPES.values(), ids=KV_TYPES)

Logits = list[torch.Tensor]
Run = Callable[..., Logits]
"""All logits of a model, in the type that its pages have."""


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Callable[[str], Run]:
    """Loaded once in float64."""

    @cache
    def get(name: str) -> Run:
        if name in tiny_t5.CASES:
            t5 = paged_t5.load_t5(tiny_t5.save(name, tmp_path_factory.mktemp(name)), torch.float64)
            pairs = [paged_t5.Pair(random_ids(1, 60), random_ids(2, 40)), paged_t5.Pair(random_ids(3, 7), [0, 1, 2])]
            return lambda kv_type, seed=0: paged_t5.paged_logits(t5, pairs, seed, kv_type)[0]
        decoder, sequences = load_decoder(tiny(name).folder, torch.float64), tiny(name).sequences
        return lambda kv_type, seed=0: paged_logits(decoder, sequences, seed, kv_type)[0]

    return get


def random_ids(seed: int, length: int) -> list[int]:
    return torch.randint(tiny_t5.VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rounded_logits(run: Run, kv_type: torch.dtype, monkeypatch) -> Logits:
    """Of pages in float64, where whatever is written is first rounded as the format says."""

    def write(pages: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        # what an encoder reads within a step is one page of another size, and no cache
        is_cache = pages.shape[1] == BLOCK_SIZE
        write_pages(pages, nearest(values, kv_type) if is_cache else values, slots)

    with monkeypatch.context() as patch:
        write_instead(patch, write)
        return run(torch.float64)


def mean_error(got: Logits, expected: Logits) -> float:
    """Root mean square of the differences over that of what is expected."""
    squares = [float((a - b).square().sum()) for a, b in zip(got, expected, strict=True)]
    return math.sqrt(sum(squares) / sum(float(logits.square().sum()) for logits in expected))


@each_type
@pytest.mark.parametrize("name", NAMES + T5_NAMES)
def test_logits_are_those_of_keys_and_values_that_the_format_rounds(model, monkeypatch, name, kv_type):
    run = model(name)
    got = run(kv_type)
    assert relative_error(got, rounded_logits(run, kv_type, monkeypatch)) <= EXACT
    assert 1e-4 < mean_error(got, run(torch.float64)) <= BARS[kv_type]


def swapped(pages: torch.Tensor) -> torch.Tensor:
    return pages.roll(1, -2)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("spoil", [with_scales_of_other_heads, swapped])
def test_wrong_scales_and_heads_are_beyond_the_bar(model, monkeypatch, name, spoil):
    run = model(name)
    expected = run(torch.float64)
    spoil_what_is_written(monkeypatch, spoil)
    assert mean_error(run(torch.int8), expected) > BARS[torch.int8]


# Chunks.


@each_type
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(model, name, kv_type):
    run = model(name)
    assert relative_error(run(kv_type, seed=1), run(kv_type, seed=2)) <= EXACT


def test_a_scale_that_the_tokens_of_a_step_share_is_told_apart(model, monkeypatch):
    share_scales(monkeypatch)
    run = model("llama")
    assert relative_error(run(torch.int8, seed=1), run(torch.int8, seed=2)) > 1e-4


# Ranks.


@each_type
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_round_as_one_does(tiny, model, kv_type, size):
    llama = tiny("llama")

    def work(group) -> Logits:
        decoder = load_decoder(llama.folder, torch.float64, group=group)
        return paged_logits(decoder, llama.sequences, kv_type=kv_type)[0]

    logits = [torch.cat(parts, 1) for parts in zip(*run_ranks(size, work), strict=True)]
    assert relative_error(logits, model("llama")(kv_type)) <= EXACT
