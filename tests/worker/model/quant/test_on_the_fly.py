"""What `--quantize` makes of whole weights: the numbers of each scheme's definition, on one rank and on two."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import quantised, tiny_models
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.support.ranks import ranks
from worker.model import loading
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import load_weights, weight_bytes
from worker.model.quant import choice
from worker.model.quant.choice import MADE
from worker.model.quant.linear import CodedLinear, Int4Linear, Int8Embedding, Int8Linear
from worker.model.quant.matrix import stacked
from worker.model.weights import DummySource

# groups of 64 columns, of which two ranks do not get whole ones of the heads
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=24, num_hidden_layers=2)
SEQUENCES = [list(range(5, 60)), [3, 250, 17, 17], [200]]
FARTHEST = 0.9677083
"""The quantile at which QLoRA's appendix begins."""
POSITIVE, NEGATIVE = (
    torch.special.ndtri(torch.linspace(FARTHEST, 0.5, count, dtype=torch.float64))[:-1] for count in (9, 8)
)
NF4 = [0.0, *(POSITIVE / POSITIVE.max()).tolist(), *(-NEGATIVE / POSITIVE.max()).tolist()]
FP4 = [sign * number for sign in (1, -1) for number in (0, 0.0052083333, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)]


def int8(weight, largest=127, kind=np.rint):
    scale = np.abs(weight).max(1, keepdims=True) / largest
    return kind(weight / scale) * scale


def by_group(weight, number_of, size=64):
    """`number_of` a group, for each group of a row; the last one may be shorter."""
    places = range(size, weight.shape[1], size)
    return np.stack([np.concatenate([number_of(part) for part in np.split(row, places)]) for row in weight])


def int4(weight, largest=15):
    size = 64 if weight.shape[1] % 64 == 0 else 32
    return by_group(weight, lambda part: int4_group(part, largest), size)


def int4_group(part, largest):
    low, high = min(part.min(), 0.0), max(part.max(), 0.0)
    scale = (high - low) / largest
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(part / scale + zero), 0, 15) - zero) * scale


def nearest(table):
    def number_of(part):
        largest = np.abs(part).max()
        return np.array([min(table, key=lambda number: abs(number - value / largest)) for value in part]) * largest

    return number_of


def fp8(weight, mantissa=3):
    scale = np.abs(weight).max(1, keepdims=True) / 448.0
    scaled = weight / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
    return np.rint(scaled / 2.0 ** (exponent - mantissa)) * 2.0 ** (exponent - mantissa) * scale


DEFINITIONS = {
    "int8": (int8, lambda weight: int8(weight, largest=128)),
    "int4": (int4, lambda weight: int4(weight, largest=16)),
    "fp8": (fp8, lambda weight: fp8(weight, mantissa=2)),
    "bitsandbytes": (int8, lambda weight: int8(weight, kind=np.floor)),
    "bitsandbytes-nf4": (lambda w: by_group(w, nearest(NF4)), lambda w: by_group(w, nearest(FP4))),
    "bitsandbytes-fp4": (lambda w: by_group(w, nearest(FP4)), lambda w: by_group(w, nearest(FP4), 32)),
}
"""The numbers that a matrix becomes, and those of a wrong reading of the scheme."""
BAR = 1e-5
"""Relative error of logits in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    tiny_models.build_from("Llama", **SIZES).save_pretrained(out)
    return out


def dense_logits(folder, out, scheme, definition):
    """Of a checkpoint that has the numbers of the definition."""
    _, dense = quantised.save(folder, out, quantised.Format({}, lambda weight: ({}, definition(weight))))
    if MADE[scheme].has_int8_embeddings:
        rows = quantised.Format({}, lambda weight: ({}, int8(weight)))
        _, dense = quantised.save(dense, out / "too", rows, lambda module: "embed" in module or module == "lm_head")
    return paged_logits(load_decoder(dense), SEQUENCES)[0]


@pytest.mark.parametrize("scheme", MADE)
def test_logits_are_those_of_the_numbers_that_the_definition_gives(folder, tmp_path, scheme):
    right, wrong = (
        dense_logits(folder, tmp_path / name, scheme, definition)
        for name, definition in zip(("right", "wrong"), DEFINITIONS[scheme])
    )
    got = paged_logits(load_decoder(folder, quantize=scheme), SEQUENCES)[0]
    assert relative_error(got, right) <= BAR
    assert relative_error(wrong, right) > 100 * BAR
    assert relative_error(paged_logits(load_decoder(folder), SEQUENCES)[0], right) > 100 * BAR


@pytest.mark.parametrize("scheme", MADE)
def test_bfloat16_adds_its_own_rounding_only(folder, scheme):
    exact = paged_logits(load_decoder(folder, quantize=scheme), SEQUENCES)[0]
    got = paged_logits(load_decoder(folder, torch.bfloat16, quantize=scheme), SEQUENCES)[0]
    whole = paged_logits(load_decoder(folder, torch.bfloat16), SEQUENCES)[0]
    # as far as rounding takes the whole model from itself, or twice
    rounding = relative_error(whole, paged_logits(load_decoder(folder), SEQUENCES)[0])
    assert relative_error(got, exact) <= 2 * rounding


@pytest.fixture(scope="module")
def pair():
    with ranks(2) as started:
        yield started


@pytest.mark.parametrize("scheme", MADE)
def test_two_ranks_have_the_same_model(folder, tmp_path, pair, scheme):
    expected = paged_logits(load_decoder(folder, quantize=scheme), SEQUENCES)[0]
    got = pair.logits(folder, SEQUENCES, tmp_path / "logits", quantize=scheme)
    assert relative_error(got, expected) <= BAR
    others = pair.logits(folder, SEQUENCES, tmp_path / "logits", quantize="fp8" if scheme == "int8" else "int8")
    assert relative_error(others, expected) > 100 * BAR


def kinds_of(weights):
    layer = weights.layers[0]
    return {type(each) for each in (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down)}


def test_each_scheme_gets_its_product(folder):
    kinds = {scheme: kinds_of(load_decoder(folder, quantize=scheme).weights) for scheme in MADE}
    assert kinds["int8"] == kinds["bitsandbytes"] == {Int8Linear}
    assert kinds["int4"] == {Int4Linear}
    assert all(kinds[scheme] == {CodedLinear} for scheme in ("fp8", "bitsandbytes-nf4", "bitsandbytes-fp4"))
    weights = load_decoder(folder, quantize="int4").weights
    assert isinstance(weights.embed, Int8Embedding) and isinstance(weights.head, Int8Linear)


def test_tied_heads_share_their_codes(tmp_path):
    tiny_models.build_from("Llama", **SIZES, tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_decoder(tmp_path, quantize="int8").weights
    assert weights.head.codes is weights.embed.codes


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "glm", "phi3", "opt_350m"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "bitsandbytes-nf4"])
def test_what_will_be_taken_is_known_before(tmp_path, monkeypatch, name, scheme):
    folder = tiny_models.save(name, tmp_path)
    monkeypatch.setattr(loading, "MADE_ELEMENTS", 1000)
    spec, family = read_spec(read_config(folder))
    seen = []
    arguments = (spec, family, Checkpoint(folder), torch.float32)
    load_weights(*arguments, on_progress=lambda *done: seen.append(done), quantisation=MADE[scheme])
    said = weight_bytes(*arguments, quantisation=MADE[scheme])
    assert seen[-1] == (said, said)
    assert said < 0.8 * weight_bytes(*arguments)


def test_a_piece_at_a_time_gives_what_the_whole_does(folder, monkeypatch):
    whole = load_decoder(folder, quantize="int4").weights
    monkeypatch.setattr(loading, "MADE_ELEMENTS", 1000)
    calls = []
    make = choice.MADE["int4"].make
    counted = replace(choice.MADE["int4"], make=lambda weight: calls.append(len(weight)) or make(weight))
    monkeypatch.setitem(choice.MADE, "int4", counted)
    parts = load_decoder(folder, quantize="int4").weights
    assert len(calls) > 100 and max(calls) <= 1000 // 96
    for one, other in zip(whole.layers, parts.layers):
        assert torch.equal(one.mlp.down.packed, other.mlp.down.packed)
        assert torch.equal(one.qkv.scales, other.qkv.scales)


NUM_ROWS, NUM_COLUMNS = 12288, 4096


def make_large_matrix(way: str) -> None:
    """Says by how many bytes this process grew at most, and how many the matrix takes."""
    torch.set_num_threads(1)
    if way == "list":
        loading.filled = lambda parts, num_rows: stacked(list(parts))[0]  # type: ignore[assignment]
    _, family = read_spec(tiny_models.config_of("llama").to_dict())
    source = loading._Zeros(DummySource(is_tied=True, head_name="lm_head"))
    builder = loading.Builder(family, source, torch.bfloat16, quantisation=MADE["int8"])
    loading.MADE_ELEMENTS = 1 << 20
    builder.embedding(NUM_ROWS // 16, NUM_COLUMNS)  # what is loaded and set apart once, which differs between machines
    before = most_memory()
    matrix = builder.embedding(NUM_ROWS, NUM_COLUMNS)
    sys.stdout.write(f"{most_memory() - before} {matrix.num_bytes}")


def most_memory() -> int:
    """Bytes that this process had at most."""
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(size)


@pytest.mark.parametrize(("way", "is_bounded"), [("filled", True), ("list", False)])
def test_a_large_matrix_is_made_in_little_more_memory_than_its_own(way, is_bounded):
    code = f"from {__name__} import make_large_matrix; make_large_matrix({way!r})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    growth, num_bytes = map(int, told.stdout.split())
    assert num_bytes > NUM_ROWS * NUM_COLUMNS
    assert (growth < 1.8 * num_bytes) == is_bounded, growth
