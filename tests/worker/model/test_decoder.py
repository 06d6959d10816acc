from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.worker.model import neutral_gpt, neutral_llama
from worker.attention.reference import ReferenceAttention
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.spec import Moe, Rope, Spec

TOLERANCE = 2e-5


def spec_of(model) -> Spec:
    return read_spec(read_config(model.folder))[0]


def error_of(model, spec: Spec | None = None, **options) -> float:
    """Relative error against transformers; infinite where the weights refuse to load with this spec."""
    try:
        decoder = load_decoder(model.folder, spec=spec, **options)
    except ConfigurationError:
        return float("inf")
    return relative_error(paged_logits(decoder, model.sequences)[0], model.logits)


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_chunks_and_decodes_of_a_mixed_batch_agree_with_transformers(tiny, name):
    model = tiny(name)
    logits, steps = paged_logits(load_decoder(model.folder), model.sequences)
    assert any(1 in sizes and max(sizes) > 1 for sizes in steps), "no step mixed a decode with a chunk"
    assert any(len(sizes) == len(model.sequences) for sizes in steps)
    assert relative_error(logits, model.logits) <= TOLERANCE


REFERENCE_CASES = [
    "llama_biases_llama3",
    "mistral_window_head_dim",
    "qwen2_late_window",
    "qwen3",
    "bloom_12_heads",
    "falcon_rw",
    "gpt_neo",
    "mpt_12_heads_clip",
]


@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_reference_attention_agrees_with_transformers(tiny, name):
    assert error_of(tiny(name), attention=ReferenceAttention()) <= TOLERANCE


NEUTRALISED = neutral_llama.NEUTRALISED + neutral_gpt.NEUTRALISED
SHAPES = {"hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "embedding_size"}
"""Fields without which the weights have another shape, so that they refuse to load."""
EXPERT_SHAPES = {"num_experts", "ffn_size", "sparse_layers"}


@pytest.mark.parametrize(("field", "name", "change"), NEUTRALISED)
def test_every_field_of_the_spec_matters(tiny, monkeypatch, field, name, change):
    model = tiny(name)
    assert error_of(model) <= TOLERANCE
    changed = change(spec_of(model))
    assert getattr(changed, field) != getattr(spec_of(model), field)
    # what the changed spec has no place for is to be missed in the result, not only to be left over
    monkeypatch.setattr(Checkpoint, "finish", lambda *_: None)
    error = error_of(model, changed)
    assert error > 10 * TOLERANCE
    has_shape = field in SHAPES or (
        field == "moe" and changed_parts(field, Moe, spec_of(model), changed) & EXPERT_SHAPES
    )
    assert math.isfinite(error) != bool(has_shape)


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def changed_parts(field: str, kind: type, spec: Spec, changed: Spec) -> set[str]:
    """The fields in which the ropes, or the mixture of experts, of two specs differ."""
    one, other = (
        value if isinstance(value, tuple) else (value,) for value in (getattr(spec, field), getattr(changed, field))
    )
    pairs = [pair for pair in zip(one, other, strict=True) if None not in pair]
    return {name for name in names_of(kind) for a, b in pairs if getattr(a, name) != getattr(b, name)}


def test_the_table_of_fields_is_complete():
    # a label, a limit for the device, what a dummy model ties: none of them is part of the forward pass; and how
    # narrow types round, which float32 cannot show
    exempt = {"model_type", "max_positions", "is_tied", "wide_norm"}
    assert {field for field, _, _ in NEUTRALISED} == names_of(Spec) - exempt


@pytest.mark.parametrize(("field", "kind"), [("ropes", Rope), ("moe", Moe)])
def test_the_table_changes_every_field_of_a_part_alone(field, kind):
    found = set()
    for _, name, change in [row for row in NEUTRALISED if row[0] == field]:
        spec = read_spec(tiny_models.config_of(name).to_dict())[0]
        changed = changed_parts(field, kind, spec, change(spec))
        found |= changed if len(changed) == 1 else set()
    assert found == names_of(kind)


@pytest.mark.parametrize("name", ["llama_biases_llama3", "qwen2_late_window", "bloom_12_heads", "opt_350m"])
def test_float64_differs_from_the_reference_by_float32_rounding_only(tiny, name):
    model = tiny(name)
    reference = tiny_models.build(name).double()
    with torch.no_grad():
        expected = [reference(torch.tensor([sequence])).logits[0] for sequence in model.sequences]
    assert expected[0].dtype is torch.float64
    got, _ = paged_logits(load_decoder(model.folder, torch.float64), model.sequences)
    assert got[0].dtype is torch.float64
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_stay_within_their_error_bar(tiny, dtype):
    model = tiny("qwen3")
    got, _ = paged_logits(load_decoder(model.folder, dtype), model.sequences)
    assert got[0].dtype is dtype
    bar = 20 * torch.finfo(dtype).eps
    assert relative_error(got, model.logits) <= bar
    without_norm = load_decoder(model.folder, dtype)
    without_norm.spec = replace(without_norm.spec, norm_eps=1.0)
    assert relative_error(paged_logits(without_norm, model.sequences)[0], model.logits) > bar
