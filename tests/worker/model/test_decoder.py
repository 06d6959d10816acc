from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.worker.model import neutral_gpt, neutral_llama
from worker.attention.reference import ReferenceAttention
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.spec import Spec

TOLERANCE = 1e-4


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


@pytest.mark.parametrize("name", ["llama_biases_llama3", "mistral_window_head_dim", "qwen2_late_window", "qwen3"])
def test_reference_attention_agrees_with_transformers(tiny, name):
    assert error_of(tiny(name), attention=ReferenceAttention()) <= TOLERANCE


NEUTRALISED = neutral_llama.NEUTRALISED + neutral_gpt.NEUTRALISED


@pytest.mark.parametrize(("field", "name", "change"), NEUTRALISED)
def test_every_field_of_the_spec_matters(tiny, field, name, change):
    model = tiny(name)
    assert error_of(model) <= TOLERANCE
    changed = change(spec_of(model))
    assert getattr(changed, field) != getattr(spec_of(model), field)
    assert error_of(model, changed) > 10 * TOLERANCE


def test_the_table_of_fields_is_complete():
    # a label, a limit for the device, and what a dummy model ties: none of them is part of the forward pass
    exempt = {"model_type", "max_positions", "is_tied"}
    assert {field for field, _, _ in NEUTRALISED} == {field.name for field in fields(Spec)} - exempt


@pytest.mark.parametrize("name", ["llama_biases_llama3", "qwen2_late_window"])
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
