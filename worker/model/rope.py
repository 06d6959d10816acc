"""Rotary position embedding: frequencies from a Rope, angles from positions, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.model.spec import Rope, RopeKind


def inverse_frequencies(rope: Rope, head_dim: int, max_length: int) -> Tensor:
    """Radians per position, float32 [rotary dim / 2]. `max_length`: the most tokens that a sequence may have.

    Kinds that depend on the length (dynamic, longrope) take `max_length` for every sequence: keys in the cache were
    turned once, and a sequence that grows must not change what they mean.
    """
    size = rope.rotary_dim or head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeKind.DYNAMIC:
        return 1.0 / _dynamic_theta(rope, size, max_length) ** exponents
    if rope.kind is RopeKind.LLAMA3:
        return _llama3(rope, frequencies)
    if rope.kind is RopeKind.YARN:
        return _yarn(rope, frequencies)
    if rope.kind is RopeKind.LONGROPE:
        return frequencies / torch.tensor(
            rope.long_factors if max_length > rope.original_positions else rope.short_factors
        )
    return frequencies


def _dynamic_theta(rope: Rope, size: int, max_length: int) -> float:
    """The base at which a sequence of `max_length` turns its slowest pair as far as one of the original length did."""
    stretch = max(max_length / rope.original_positions, 1.0)
    # a single pair turns alike at any base
    return float(rope.theta * (rope.factor * stretch - (rope.factor - 1.0)) ** (size / max(size - 2, 1)))


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Llama 3.1's rule: short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    periods = rope.original_positions * frequencies / (2 * math.pi)
    share = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(frequencies, rope.factor, share.clamp(0.0, 1.0))


def _yarn(rope: Rope, frequencies: Tensor) -> Tensor:
    """The blend of YaRN (Peng et al., arXiv 2309.00071), linear in the number of the pair."""
    first, last = (
        _yarn_place(rope, rope.beta_fast, len(frequencies)),
        _yarn_place(rope, rope.beta_slow, len(frequencies)),
    )
    if rope.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(frequencies) - 1)
    # a step where both places are one
    width = last - first or 0.001
    share = (torch.arange(len(frequencies), dtype=torch.float32) - first) / width
    return _blend(frequencies, rope.factor, 1.0 - share.clamp(0.0, 1.0))


def _yarn_place(rope: Rope, num_turns: float, num_pairs: int) -> float:
    """Number of the pair that makes `num_turns` within the original length."""
    return num_pairs * math.log(rope.original_positions / (num_turns * 2 * math.pi)) / math.log(rope.theta)


def _blend(frequencies: Tensor, factor: float, share: Tensor) -> Tensor:
    """`share` of every frequency as it is, the rest stretched."""
    return share * frequencies + (1.0 - share) * frequencies / factor


def both_ways(frequencies: Tensor) -> Tensor:
    """[2 n] of [n]: the first half is for angles turned the other way round, which is what `rotate` needs."""
    return torch.cat((-frequencies, frequencies))


def angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float) -> tuple[Tensor, Tensor]:
    """`amplitude` times cosine and sine for `positions` [t], each [t, 1, rotary dim] of `dtype`, computed in float32;
    `frequencies` [rotary dim] are `both_ways`."""
    radians = positions.to(torch.float32)[:, None, None] * frequencies
    cos, sin = radians.cos(), radians.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of the first elements of every head of `x` [t, heads, head_dim] against each other, in the type
    of `cos` and `sin`."""
    size = cos.shape[-1]
    wide = x[..., :size].to(cos.dtype)
    turned = torch.addcmul(wide * cos, wide.roll(size // 2, -1), sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)
