"""Every tiny model by the kernels of a GPU, one mixed step: decoding, the beginning of a prompt and a later chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import tiny_models, tiny_t5
from worker.attention import Attention, Batch
from worker.attention.reference import ReferenceAttention
from worker.attention.triton import TritonAttention
from worker.kernels.triton.operations import TritonOperations
from worker.model.decoder import Decoder
from worker.model.families import read_spec
from worker.model.families.base import Family
from worker.model.loading import load_weights
from worker.model.operations import Operations
from worker.model.spec import Spec, T5Spec
from worker.model.t5 import T5, load_t5_weights
from worker.model.weights import DummySource, Part
from worker.runner.device_step import whole_input

BAR = 2e-5
"""Relative to the largest logit, in float32."""

PAGE_SIZE = 16
STARTS, COUNTS = np.array([19, 0, 15]), np.array([1, 3, 2])
TABLES = np.array([[3, 1], [2, 0], [5, 4]])
NUM_PAGES = 6


class DrawnSource(DummySource):
    """Weights of which each matters: a forward pass that forgets one is visibly wrong."""

    def copy_into(self, name: str, target: torch.Tensor, part: Part) -> None:
        is_norm = target.dim() == 1 and name.endswith("weight")
        deviation = 0.3 if target.dim() == 1 else 0.5 if "embed" in name or "wte" in name else 0.15
        drawn = torch.empty(target.shape, device="cpu").normal_(0.0, deviation, generator=self._generator)
        target.copy_(drawn + 1.0 if is_norm else drawn)


def source_of(spec: Spec | T5Spec, family: Family, device: torch.device) -> DrawnSource:
    head = family.candidates("head", 0, 0)[0] if isinstance(spec, Spec) else "lm_head"
    source = DrawnSource(is_tied=spec.is_tied, head_name=head)
    source.device = device
    return source


def with_each_layer_once(spec: Spec) -> Spec:
    """Without layers that differ from earlier ones by their weights only."""
    sparse = spec.moe.sparse_layers if spec.moe else (False,) * spec.num_layers
    kinds = list(dict.fromkeys(zip(spec.windows, spec.ropes, sparse, strict=True)))
    windows, ropes, sparse = (tuple(each) for each in zip(*kinds, strict=True))
    moe = spec.moe and replace(spec.moe, sparse_layers=sparse)
    return replace(spec, num_layers=len(kinds), windows=windows, ropes=ropes, moe=moe)


def step() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Tokens, positions, and the row of each."""
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(STARTS, COUNTS, strict=True)])
    tokens = torch.randint(tiny_models.VOCAB_SIZE, (len(positions),), generator=torch.Generator().manual_seed(5))
    return tokens, torch.from_numpy(positions), np.repeat(np.arange(len(STARTS)), COUNTS)


def slots_of(tables: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tables[rows, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE)


def pages_of(model: Decoder | T5, num_pages: int, device: torch.device) -> torch.Tensor:
    """Whatever earlier steps may have left there."""
    num_layers, num_heads, head_dim = model.page_shape
    shape = num_layers, 2, num_pages, PAGE_SIZE, num_heads, head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(device)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


WAYS: dict[str, tuple[Attention, Operations]] = {
    "torch": (ReferenceAttention(), Operations()),
    # whole rows: parts would be put together by as many programs as there are heads of tokens
    "triton": (TritonAttention(num_parts=1), TritonOperations()),
}


@pytest.fixture
def nothing_by_torch(monkeypatch):
    """Called, it makes sure that from then on no kernel leaves its work to torch."""

    def refuse(*_, **__):
        raise AssertionError("left to torch")

    def begin():
        for name in ("normalise", "add_and_normalise", "turn_and_write", "experts"):
            monkeypatch.setattr(Operations, name, refuse)

    return begin


@torch.inference_mode()
def decoded(spec: Spec, family: Family, way: str, device: torch.device, *, has_other_past: bool = False):
    """Logits of every token of the step, and the pages behind it."""
    attention, operations = WAYS[way]
    with device:
        weights = load_weights(spec, family, source_of(spec, family, device), torch.float32)
        decoder = Decoder(spec, weights, attention, operations=operations)
    tokens, positions, rows = step()
    pages = pages_of(decoder, NUM_PAGES, device)
    if has_other_past:
        pages = pages.roll(1, 3)
    batch = Batch(COUNTS, STARTS, TABLES, slots_of(TABLES, rows, positions.numpy()).to(device))
    every = torch.arange(len(tokens), device=device)
    return decoder.forward(tokens.to(device), positions.to(device), batch, pages, every), pages


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_decoders_say_the_same_by_kernels(device, nothing_by_torch, name):
    spec, family = read_spec(tiny_models.config_of(name).to_dict())
    spec = with_each_layer_once(spec)
    expected, expected_pages = decoded(spec, family, "torch", device)
    other, _ = decoded(spec, family, "torch", device, has_other_past=True)
    assert error(other[:1], expected[:1]) > 100 * BAR
    nothing_by_torch()
    found, pages = decoded(spec, family, "triton", device)
    assert error(found, expected) <= BAR and error(pages, expected_pages) <= BAR


@torch.inference_mode()
def answered(name: str, way: str, device: torch.device, *, has_other_source: bool = False):
    """Logits of every token of the step of a T5, whose last row has just been encoded, and the pages behind it."""
    attention, operations = WAYS[way]
    spec, family = read_spec(tiny_t5.build(name).config.to_dict())
    spec = replace(spec, num_layers=1, num_encoder_layers=1)
    with device:
        weights = load_t5_weights(spec, family, source_of(spec, family, device), torch.float32)
        model = T5(spec, weights, attention, operations=operations)
    pages = pages_of(model, 2 * NUM_PAGES, device)
    sources, lengths = TABLES + NUM_PAGES, np.array([5, 18, 7])
    places = np.arange(lengths[2])
    source = torch.from_numpy(places + (1 if has_other_source else 0))
    source = source.to(device)
    whole = whole_input(source.int(), pages.shape[3]) if way == "triton" else None
    model.encode(source, slots_of(sources, np.full(len(places), 2), places).to(device), pages, whole)
    tokens, positions, rows = step()
    slots = slots_of(TABLES, rows, positions.numpy()).to(device)
    batch = Batch(COUNTS, STARTS, TABLES, slots)
    cross = Batch(COUNTS, STARTS, sources, slots, num_keys=lengths)
    every = torch.arange(len(tokens), device=device)
    return model.forward(tokens.to(device), positions.to(device), batch, pages, every, cross), pages


@pytest.mark.parametrize("name", tiny_t5.CASES)
def test_encoders_and_their_decoders_say_the_same_by_kernels(device, nothing_by_torch, name):
    expected, expected_pages = answered(name, "torch", device)
    other, _ = answered(name, "torch", device, has_other_source=True)
    assert error(other[-2:], expected[-2:]) > 100 * BAR and torch.equal(other[:-2], expected[:-2])
    nothing_by_torch()
    found, pages = answered(name, "triton", device)
    assert error(found, expected) <= BAR and error(pages, expected_pages) <= BAR
