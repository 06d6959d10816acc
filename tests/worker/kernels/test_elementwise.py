from __future__ import annotations

import numpy as np
import pytest
import torch

from worker.kernels.elementwise import ACTIVATIONS, CpuOperations
from worker.model.operations import Operations
from worker.model.rope import angles, both_ways
from worker.model.spec import Activation, Norm
from worker.model.weights import NormWeights

TORCH = Operations()
EPS = 1e-5
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Relative to the largest number; in bfloat16 a number may be rounded to the neighbour."""

SHAPES = [(1, 2), (3, 5), (2, 16), (7, 100), (40, 768)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)).item()


@pytest.fixture
def operations(library):
    return CpuOperations(library)


def norm_weights(shape: tuple[int, ...], dtype: torch.dtype, *, has_bias: bool, is_wide: bool) -> NormWeights:
    weight = random(*shape, dtype=torch.float32 if is_wide else dtype, seed=1)
    return NormWeights(weight, random(*shape, dtype=dtype, seed=2) if has_bias else None)


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("is_wide", [False, True], ids=["same_type", "wide"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_norms_are_those_of_torch(operations, dtype, has_bias, is_wide, kind):
    if kind is Norm.LAYER and is_wide:
        dtype = torch.float32
    for shape in SHAPES:
        weights = norm_weights(shape[1:], dtype, has_bias=has_bias and kind is Norm.LAYER, is_wide=is_wide)
        x = random(*shape, dtype=dtype) * 3 + 1
        expected = TORCH.normalise(x, weights, EPS, kind)
        assert error(operations.normalise(x, weights, EPS, kind), expected) <= TOLERANCES[dtype], shape
        part = random(*shape, dtype=dtype, seed=9)
        added, normed = operations.add_and_normalise(x, part, weights, EPS, kind)
        assert torch.equal(added, x + part)
        assert error(normed, TORCH.add_and_normalise(x, part, weights, EPS, kind)[1]) <= TOLERANCES[dtype], shape


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_heads_have_norms_of_their_own(operations, dtype, kind):
    wide = random(9, 8, 24, dtype=dtype)
    x = wide[:, :6]
    weights = norm_weights((6, 24), dtype, has_bias=kind is Norm.LAYER, is_wide=False)
    expected = TORCH.normalise(x, weights, EPS, kind)
    assert error(operations.normalise(x, weights, EPS, kind), expected) <= TOLERANCES[dtype]
    wrong = NormWeights(weights.weight.roll(1, 0), weights.bias)
    assert error(operations.normalise(x, wrong, EPS, kind), expected) > 10 * TOLERANCES[dtype]


def test_another_epsilon_would_be_noticed(operations):
    x, weights = random(4, 64, dtype=torch.float32) * 1e-2, NormWeights(torch.ones(64), None)
    expected = TORCH.normalise(x, weights, EPS, Norm.RMS)
    assert error(operations.normalise(x, weights, 2 * EPS, Norm.RMS), expected) > 100 * TOLERANCES[torch.float32]


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_activations_are_those_of_torch(operations, dtype, kind, is_gated):
    for rows, width in SHAPES:
        inner = random(rows, 2 * width if is_gated else width, dtype=dtype)
        found = operations.activation(kind, is_gated=is_gated)(inner)
        assert error(found, TORCH.activation(kind, is_gated=is_gated)(inner)) <= TOLERANCES[dtype], (rows, width)
    others = [other for other in Activation if other is not kind]
    farthest = max(error(operations.activation(other, is_gated=is_gated)(inner), found) for other in others)
    assert farthest > 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_hold_at_the_ends_of_what_can_be_said(operations, kind):
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4, 3e38, torch.inf, torch.nan]])
    found, expected = (each.activation(kind, is_gated=False)(x)[0] for each in (operations, TORCH))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("rotary_dim", [None, 8, 32, 64], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_queries_turn_and_keys_and_values_land_in_their_places(operations, dtype, rotary_dim):
    num_tokens, heads, kv_heads, head_dim, num_pages = 21, 6, 2, 64, 5
    qkv = random(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    turned, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    slots = torch.randperm(num_pages * 16, generator=torch.Generator().manual_seed(1))[:num_tokens]
    turns = None
    if rotary_dim:
        frequencies = 1.0 / 100.0 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
        turns = angles(torch.arange(3, 3 + num_tokens), both_ways(frequencies), torch.float32, 1.25)
    found, expected, other = [], [], []
    for each, way, places in ((found, operations, slots), (expected, TORCH, slots), (other, operations, slots.flip(0))):
        pages = tuple(torch.zeros(num_pages, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        each += [way.turn_and_write(turned, v, heads, turns, pages, places), *pages]
    for one, reference in zip(found, expected, strict=True):
        assert error(one.contiguous(), reference.contiguous()) <= TOLERANCES[dtype]
    assert error(other[1], expected[1]) > 0.1 and error(other[2], expected[2]) > 0.1


@pytest.mark.parametrize("amplitude", [1.0, 1.3])
@pytest.mark.parametrize("num_pairs", [1, 32, 100])
def test_angles_are_those_of_torch(operations, num_pairs, amplitude):
    positions = torch.tensor([0, 1, 77, 4095, 1 << 20, 3])
    frequencies = both_ways(0.9 ** torch.arange(num_pairs, dtype=torch.float32))
    expected = angles(positions, frequencies, torch.float32, amplitude)
    for found, wanted, other in zip(
        operations.angles(positions, frequencies, torch.float32, amplitude), expected, expected[::-1], strict=True
    ):
        assert error(found, wanted) <= 2**-22 < error(found, other)
    wide = operations.angles(positions, frequencies, torch.float64, amplitude)
    assert all(torch.equal(*pair) for pair in zip(wide, angles(positions, frequencies, torch.float64, amplitude)))


def test_a_row_is_the_same_in_every_company(operations):
    x, weights = random(600, 100, dtype=torch.bfloat16), NormWeights(random(100, dtype=torch.bfloat16), None)
    activate = operations.activation(Activation.SILU, is_gated=True)
    everyone, gated = operations.normalise(x, weights, EPS, Norm.RMS), activate(x)
    assert torch.equal(operations.normalise(x[7:9], weights, EPS, Norm.RMS), everyone[7:9])
    assert torch.equal(activate(x[590:]), gated[590:])


def test_other_types_are_left_to_torch(operations):
    x, weights = random(3, 8, dtype=torch.float64), NormWeights(torch.ones(8, dtype=torch.float64), None)
    assert torch.equal(operations.normalise(x, weights, EPS, Norm.RMS), TORCH.normalise(x, weights, EPS, Norm.RMS))
    silu = Activation.SILU
    assert torch.equal(*(each.activation(silu, is_gated=True)(x) for each in (operations, TORCH)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("columns", [1, 5, 16, 1000, 32001])
def test_rows_of_logits_are_summarised_as_in_torch(operations, dtype, columns):
    assert type(operations).summarise is not Operations.summarise
    logits = random(9, columns, dtype=dtype) * 8
    found, expected = operations.summarise(logits), TORCH.summarise(logits)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(np.take_along_axis(logits.float().numpy(), found[1][:, None], 1)[:, 0], found[0])
    np.testing.assert_allclose(found[2], expected[2], rtol=3e-6, atol=3e-6)
    shifted = operations.summarise(logits.roll(1, 0))
    assert not np.array_equal(shifted[0], expected[0]) and not np.allclose(shifted[2], expected[2])


def test_of_columns_that_tie_the_first_is_picked(operations):
    logits = torch.zeros(3, 100)
    logits[0, [37, 5, 80]], logits[1, [99, 98]] = 2.0, 1.0
    assert operations.summarise(logits)[1].tolist() == [5, 98, 0]


def test_rows_that_cannot_be_sampled_have_no_finite_normaliser(operations):
    logits = random(5, 70, dtype=torch.float32)
    logits[0, 69], logits[1, 3], logits[2], logits[3, :69] = torch.nan, torch.inf, -torch.inf, -torch.inf
    most, columns, normalisers = operations.summarise(logits)
    assert np.isfinite(normalisers).tolist() == [False, False, False, True, True]
    assert columns[3] == 69 and normalisers[3] == most[3]
