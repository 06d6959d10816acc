"""Rotary position embedding: frequencies from a Rope, angles from positions, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.model.spec import Rope, RopeKind


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeKind.LLAMA3:
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Llama 3.1's rule: short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    periods = rope.original_positions * frequencies / (2 * math.pi)
    share = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return share * frequencies + (1.0 - share) * frequencies / rope.factor


def angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `positions` [t], each [t, 1, head_dim / 2] of `dtype`, computed in float32."""
    radians = positions.to(torch.float32)[:, None, None] * frequencies
    return radians.cos().to(dtype), radians.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head of `x` [t, heads, head_dim] against each other."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
