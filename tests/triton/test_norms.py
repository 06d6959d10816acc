"""Norms against float64, and bit for bit against torch's roundings."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.triton import norms
from worker.kernels.triton.operations import TritonOperations
from worker.model.operations import Operations
from worker.model.spec import Norm
from worker.model.weights import NormWeights

TORCH, OURS = Operations(), TritonOperations()
EPS = 1e-5
UNITS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the distance of two neighbours, relative to them at most."""

SHAPES = [(1, 2), (3, 5), (7, 100), (2, 768), (5, 3, 24), (2, 9, 80), (0, 16)]

KINDS = [(Norm.RMS, False, False), (Norm.RMS, True, False), (Norm.LAYER, False, False), (Norm.LAYER, False, True)]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def weights_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, is_wide: bool, has_bias: bool
) -> NormWeights:
    weight = random(*shape, dtype=torch.float32 if is_wide else dtype, device=device, seed=1) + 1
    return NormWeights(weight, random(*shape, dtype=dtype, device=device, seed=2) if has_bias else None)


def exact(x: torch.Tensor, weights: NormWeights, kind: Norm) -> torch.Tensor:
    """The definition, in float64."""
    wide = x.double()
    wide = wide - (wide.mean(-1, keepdim=True) if kind is Norm.LAYER else 0.0)
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weights.weight.double()
    return wide if weights.bias is None else wide + weights.bias.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest number, in halves of the distance of two neighbours."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    most = expected.double().abs().max().clamp(min=1e-9)
    return float((found.double() - expected.double()).abs().max() / most) / UNITS[found.dtype]


@pytest.mark.parametrize(("kind", "is_wide", "has_bias"), KINDS)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_norms_are_what_their_definitions_say(device, dtype, kind, is_wide, has_bias):
    for shape in SHAPES:
        weights = weights_of(shape[1:], dtype, device, is_wide=is_wide, has_bias=has_bias)
        x = random(*shape, dtype=dtype, device=device) * 3 + 1
        assert norms.can_normalise(x, weights, kind)
        found, expected = OURS.normalise(x, weights, EPS, kind), exact(x, weights, kind)
        assert found.dtype is dtype and error(found, expected) <= 8, shape
        assert not x.numel() or error(found, exact(x.roll(1, -1), weights, kind)) > 8, shape


@pytest.mark.parametrize(("kind", "is_wide", "has_bias"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_where_torch_rounds_them(device, dtype, kind, is_wide, has_bias):
    for shape in [(40, 256), (20, 6, 64)]:
        weights = weights_of(shape[1:], dtype, device, is_wide=is_wide, has_bias=has_bias)
        x = random(*shape, dtype=dtype, device=device)
        found, expected = (each.normalise(x, weights, EPS, kind) for each in (OURS, TORCH))
        share = float((found == expected).float().mean())
        # a statistic that is another float32 moves a few numbers over the edge
        assert share > 0.995, (shape, share)
        rounded_once = exact(x, weights, kind).to(dtype)
        if not is_wide and (kind is Norm.RMS or len(shape) == 3):
            assert float((rounded_once == expected).float().mean()) < 0.95


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_a_sum_is_rounded_before_it_is_normalised(device, dtype, kind):
    x, part = (random(6, 200, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
    weights = weights_of((200,), dtype, device, is_wide=False, has_bias=kind is Norm.LAYER)
    added, normed = OURS.add_and_normalise(x, part, weights, EPS, kind)
    assert torch.equal(added, x + part)
    assert torch.equal(normed, OURS.normalise(x + part, weights, EPS, kind))
    assert not torch.equal(normed, OURS.normalise(x, weights, EPS, kind))


@pytest.mark.parametrize("kind", Norm)
def test_heads_of_a_product_are_read_where_they_are(device, kind):
    qkv = random(9, 8, 24, dtype=torch.bfloat16, device=device)
    x = qkv[:, 1:7]
    weights = weights_of((6, 24), torch.bfloat16, device, is_wide=False, has_bias=kind is Norm.LAYER)
    assert not x.is_contiguous() and norms.can_normalise(x, weights, kind)
    found = OURS.normalise(x, weights, EPS, kind)
    assert torch.equal(found, OURS.normalise(x.contiguous(), weights, EPS, kind))
    assert error(found, exact(x, weights, kind)) <= 8
    assert error(found, exact(x, NormWeights(weights.weight.roll(1, 0), weights.bias), kind)) > 8
    together, flat = x.flatten(1), NormWeights(weights.weight.flatten(), None)
    assert not together.is_contiguous() and norms.can_normalise(together, flat, Norm.RMS)
    assert error(OURS.normalise(together, flat, EPS, Norm.RMS), exact(together, flat, Norm.RMS)) <= 8


def test_a_row_is_the_same_in_every_company(device):
    x = random(37, 100, dtype=torch.bfloat16, device=device)
    weights = weights_of((100,), torch.bfloat16, device, is_wide=False, has_bias=False)
    everyone = OURS.normalise(x, weights, EPS, Norm.RMS)
    assert torch.equal(OURS.normalise(x[7:9], weights, EPS, Norm.RMS), everyone[7:9])


def test_other_types_and_longer_rows_are_left_to_torch(device):
    for x in (random(3, 8, dtype=torch.float64, device=device), torch.ones(1, norms.MAX_SIZE + 1, device=device)):
        weights = NormWeights(torch.ones_like(x[0]), None)
        assert not norms.can_normalise(x, weights, Norm.RMS)
        assert torch.equal(*(each.normalise(x, weights, EPS, Norm.RMS) for each in (OURS, TORCH)))
        sums = (each.add_and_normalise(x, x, weights, EPS, Norm.RMS) for each in (OURS, TORCH))
        assert all(torch.equal(*each) for each in zip(*sums, strict=True))
