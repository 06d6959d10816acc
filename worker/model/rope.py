"""Rotary position embedding: frequencies from a Rope, angles from positions, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.model.spec import Rope, RopeKind


def inverse_frequencies(rope: Rope, head_dim: int, max_length: int) -> Tensor:
    """Radians per position, float32 [rotary dim / 2]. `max_length`: the most tokens that a sequence may have."""
    size = rope.rotary_dim or head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
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


def angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float) -> tuple[Tensor, Tensor]:
    """`amplitude` times cosine and sine for `positions` [t], each [t, 1, rotary dim / 2] of `dtype`, computed in
    float32."""
    radians = positions.to(torch.float32)[:, None, None] * frequencies
    cos, sin = radians.cos(), radians.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of the first elements of every head of `x` [t, heads, head_dim] against each other."""
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned if size == x.shape[-1] else (*turned, x[..., size:]), -1)
