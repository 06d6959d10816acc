"""Activations against float64."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from tests.triton.test_norms import UNITS, error, random
from worker.kernels.triton.activations import BLOCK, NUMBERS
from worker.kernels.triton.operations import TritonOperations
from worker.model.operations import Operations
from worker.model.spec import Activation

TORCH, OURS = Operations(), TritonOperations()
SHAPES = [(1, 2), (3, 5), (2, 16), (7, 100), (2, BLOCK + 3), (0, 8)]


def exact(kind: Activation, x: torch.Tensor) -> torch.Tensor:
    """The definitions, in float64."""
    x = x.double()
    if kind is Activation.SILU:
        return x / (1 + (-x).exp())
    if kind is Activation.GELU:
        return x * (1 + (x / math.sqrt(2)).erf()) / 2
    if kind is Activation.GELU_TANH:
        return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2
    return x.clamp(min=0.0)


def test_there_is_a_kernel_for_every_activation():
    assert set(NUMBERS) == set(Activation)


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_activations_are_what_their_definitions_say(device, dtype, kind, is_gated):
    # float32 has exponentials and products of its own; 16 bits are rounded twice where they are gated
    bar = 16 if dtype is torch.float32 else 3
    for rows, width in SHAPES:
        inner = random(rows, 2 * width if is_gated else width, dtype=dtype, device=device) * 2
        gate, up = inner.chunk(2, -1) if is_gated else (inner, torch.ones_like(inner))
        found = OURS.activation(kind, is_gated=is_gated)(inner)
        assert found.dtype is dtype and error(found, exact(kind, gate) * up.double()) <= bar, (rows, width)


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_activations_are_told_apart(device, is_gated):
    inner = random(9, 200, dtype=torch.float32, device=device) * 2
    gate, up = inner.chunk(2, -1) if is_gated else (inner, torch.ones_like(inner))
    for kind, other in permutations(Activation, 2):
        found = OURS.activation(kind, is_gated=is_gated)(inner)
        assert error(found, exact(other, gate) * up.double()) > 1000


@pytest.mark.parametrize("kind", Activation)
def test_a_gate_is_rounded_before_it_multiplies(device, kind):
    inner = random(30, 256, dtype=torch.bfloat16, device=device)
    found, expected = (each.activation(kind, is_gated=True)(inner) for each in (OURS, TORCH))
    assert float((found == expected).float().mean()) > 0.99
    gate, up = inner.chunk(2, -1)
    rounded_once = (exact(kind, gate) * up.double()).bfloat16()
    assert kind is Activation.RELU or float((rounded_once == expected).float().mean()) < 0.9


@pytest.mark.parametrize("kind", Activation)
def test_activations_hold_at_the_ends_of_what_can_be_said(device, kind):
    ends = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4, 1e38, torch.inf, torch.nan]
    x = torch.tensor([ends], device=device)
    found = OURS.activation(kind, is_gated=False)(x)
    torch.testing.assert_close(found, exact(kind, x).float(), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_other_types_and_strided_rows_are_left_to_torch(device):
    double = random(3, 8, dtype=torch.float64, device=device)
    strided = random(3, 8, dtype=torch.float32, device=device).t()
    for x in (double, strided):
        assert torch.equal(*(each.activation(Activation.SILU, is_gated=True)(x) for each in (OURS, TORCH)))
