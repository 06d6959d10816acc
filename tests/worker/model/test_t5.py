"""Encoder and decoder over pages against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from common.errors import ConfigurationError
from tests.support import tiny_t5
from tests.support.lockstep import LockstepGroup, run_ranks
from tests.support.paged import relative_error
from tests.support.paged_t5 import Pair, load_t5, paged_logits
from worker.attention import LayerShape
from worker.attention.reference import ReferenceAttention
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.spec import Activation, T5Spec
from worker.model.t5 import bias_by_distance

TOLERANCE = 1e-4
LENGTHS = ((300, 180), (7, 40), (1, 3), (130, 75))
"""Of source and target; the longest are beyond every bucket's edge."""


@dataclass
class TinyT5:
    name: str
    folder: Path
    pairs: list[Pair]
    logits: list[torch.Tensor]

    @property
    def spec(self) -> T5Spec:
        return read_spec(read_config(self.folder))[0]

    def error(self, **options: Any) -> float:
        """Relative error against transformers; infinite where the weights refuse to load."""
        try:
            model = load_t5(self.folder, **options)
        except ConfigurationError:
            return float("inf")
        return relative_error(paged_logits(model, self.pairs)[0], self.logits)


def reference_logits(name: str, pairs: list[Pair], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = tiny_t5.build(name, dtype)
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([pair.source]), decoder_input_ids=torch.tensor([pair.target])).logits[0]
            for pair in pairs
        ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyT5]:
    torch.set_num_threads(1)

    @cache
    def get(name: str) -> TinyT5:
        randomness = torch.Generator().manual_seed(5)
        pairs = [
            Pair(*(torch.randint(tiny_t5.VOCAB_SIZE, (length,), generator=randomness).tolist() for length in lengths))
            for lengths in LENGTHS
        ]
        folder = tiny_t5.save(name, tmp_path_factory.mktemp(name))
        return TinyT5(name, folder, pairs, reference_logits(name, pairs))

    return get


@pytest.mark.parametrize("name", tiny_t5.CASES)
def test_chunks_and_decodes_of_a_mixed_batch_agree_with_transformers(tiny, name):
    model = tiny(name)
    logits, steps = paged_logits(load_t5(model.folder), model.pairs)
    assert any(1 in sizes and max(sizes) > 1 for sizes in steps), "no step mixed a decode with a chunk"
    assert any(len(sizes) > 2 for sizes in steps)
    assert relative_error(logits, model.logits) <= TOLERANCE


def test_reference_attention_agrees_with_transformers(tiny):
    assert tiny("flan").error(attention=ReferenceAttention()) <= TOLERANCE


def without_bias(model, side: str) -> None:
    setattr(model, f"_{side}_shape", LayerShape(scale=1.0))


def with_the_other_bias(model, side: str) -> None:
    setattr(model, f"_{side}_shape", model._decoder_shape if side == "encoder" else model._encoder_shape)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("spoil", [without_bias, with_the_other_bias])
def test_a_wrong_bias_shows(tiny, spoil, side):
    model = tiny("t5")
    wrong = load_t5(model.folder)
    spoil(wrong, side)
    assert relative_error(paged_logits(wrong, model.pairs)[0], model.logits) > 10 * TOLERANCE


def test_what_another_request_left_shows(tiny):
    model = tiny("t5")
    swapped = [replace(pair, source=list(reversed(pair.source))) for pair in model.pairs]
    got, _ = paged_logits(load_t5(model.folder), swapped)
    assert relative_error(got, model.logits) > 10 * TOLERANCE


NEUTRALISED = [
    ("num_encoder_layers", "mt5", dict(num_encoder_layers=1)),
    ("num_layers", "flan", dict(num_layers=2)),
    ("hidden_size", "t5", dict(hidden_size=32)),
    ("num_heads", "mt5", dict(num_heads=2)),
    ("head_dim", "mt5", dict(head_dim=16)),
    ("ffn_size", "t5", dict(ffn_size=64)),
    ("vocab_size", "t5", dict(vocab_size=256)),
    ("activation", "t5", dict(activation=Activation.SILU)),
    ("activation", "flan", dict(activation=Activation.SILU)),
    ("is_gated", "flan", dict(is_gated=False)),
    ("is_gated", "t5", dict(is_gated=True)),
    ("norm_eps", "mt5", dict(norm_eps=1e-6)),
    ("num_buckets", "mt5", dict(num_buckets=32)),
    ("max_distance", "mt5", dict(max_distance=128)),
    ("max_distance", "t5", dict(max_distance=100)),
    ("output_scale", "t5", dict(output_scale=1.0)),
    ("output_scale", "flan", dict(output_scale=64**-0.5)),
]


@pytest.mark.parametrize(("field", "name", "change"), NEUTRALISED)
def test_every_field_of_the_spec_matters(tiny, field, name, change):
    model = tiny(name)
    assert model.error() <= TOLERANCE
    assert list(change) == [field] and change[field] != getattr(model.spec, field)
    assert model.error(spec=replace(model.spec, **change)) > 10 * TOLERANCE


def test_the_table_of_fields_is_complete():
    # a label, a limit for the device, what a dummy model ties, and what the engine begins with
    exempt = {"model_type", "max_positions", "is_tied", "decoder_start_id"}
    assert {field for field, _, _ in NEUTRALISED} == {field.name for field in fields(T5Spec)} - exempt


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_float64_differs_from_the_reference_by_float32_rounding_only(tiny, name):
    model = tiny(name)
    expected = reference_logits(name, model.pairs, torch.float64)
    got, _ = paged_logits(load_t5(model.folder, torch.float64), model.pairs)
    assert got[0].dtype is expected[0].dtype is torch.float64
    assert relative_error(got, expected) <= 1e-6


def test_bfloat16_stays_within_its_error_bar(tiny):
    model = tiny("mt5")
    bar = 20 * torch.finfo(torch.bfloat16).eps
    assert model.error(dtype=torch.bfloat16) <= bar
    assert model.error(dtype=torch.bfloat16, spec=replace(model.spec, norm_eps=1.0)) > bar


# Ranks.


def rank_logits(model: TinyT5, size: int) -> list[torch.Tensor]:
    def work(group: LockstepGroup) -> list[torch.Tensor]:
        logits, _ = paged_logits(load_t5(model.folder, group=group), model.pairs)
        assert group.num_calls > 0
        assert all(part.shape[1] == len(group.shard.bounds(tiny_t5.VOCAB_SIZE)) for part in logits)
        return logits

    return [torch.cat(parts, 1) for parts in zip(*run_ranks(size, work))]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", tiny_t5.CASES)
def test_ranks_agree_with_transformers(tiny, name, size):
    model = tiny(name)
    assert tiny_t5.VOCAB_SIZE % size and model.spec.num_heads % size == 0
    assert relative_error(rank_logits(model, size), model.logits) <= TOLERANCE


def test_ranks_that_keep_their_sums_to_themselves_show(tiny, monkeypatch):
    monkeypatch.setattr(LockstepGroup, "all_reduce", lambda group, x: group.all_gather(x)[group.shard.rank])
    model = tiny("t5")
    assert relative_error(rank_logits(model, 2), model.logits) > 10 * TOLERANCE


# The bias.


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (4, 3), (7, 5), (64, 1000)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_buckets_are_those_of_transformers(num_buckets, max_distance, is_causal):
    by_bucket = torch.arange(float(num_buckets))[:, None]
    table = bias_by_distance(by_bucket, max_distance, is_causal=is_causal)
    # far beyond the table as well, where its ends stand for everything
    distances = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    expected = T5Attention._relative_position_bucket(distances, not is_causal, num_buckets, max_distance)
    got = table[0, distances.clamp(-max_distance, max_distance) + max_distance]
    assert torch.equal(got.long(), expected)
    assert len(expected.unique()) > num_buckets // 4
