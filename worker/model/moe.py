"""Mixtures of experts: a router chooses, and one product takes what goes to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.operations import Activate, Operations
from worker.model.spec import Moe
from worker.model.weights import Linear, MoeWeights, num_bytes_of

GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_ALIGNMENT = 16
"""Bytes; the rows of matrices must begin at multiples of it for the grouped product."""


def mixture(x: Tensor, weights: MoeWeights, moe: Moe, activate: Activate, operations: Operations) -> Tensor:
    """The experts' part of one rank, whose results ranks add up (Shazeer et al., arXiv 1701.06538).

    [t, hidden] -> [t, hidden]. Every rank holds a slice of every expert, so all route alike.
    """
    shares, chosen = route(x, weights.router, moe)
    result = operations.experts(x, weights, shares, chosen, activate)
    if weights.shared is None:
        return result
    shared = operations.feed_forward(x, weights.shared, activate)
    if weights.shared_gate is not None:
        shared = F.linear(x, weights.shared_gate).sigmoid() * shared
    return result + shared


def route(x: Tensor, router: Tensor, moe: Moe) -> tuple[Tensor, Tensor]:
    """Weights, of the type of `x`, and experts of every token, [t, active] each; the softmax is float32 or wider."""
    logits = F.linear(x, router)
    probabilities = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    shares, chosen = probabilities.topk(moe.num_active, -1)
    if moe.is_renormalised:
        shares = shares / shares.sum(-1, keepdim=True)
    return shares.to(x.dtype), chosen


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """`matrices` [experts, out, in], taken as one grouped product where torch has one."""

    matrices: Tensor

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.matrices)

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        is_aligned = self.matrices.shape[2] * self.matrices.itemsize % GROUPED_ALIGNMENT == 0
        if is_aligned and rows.dtype in GROUPED_DTYPES:
            return F.grouped_mm(rows, self.matrices.transpose(1, 2), offs=ends)
        return each_group(rows, ends, [partial(F.linear, weight=matrix) for matrix in self.matrices])


@dataclass(frozen=True, slots=True)
class ListedExperts:
    """One product for each, of any kind."""

    experts: tuple[Linear, ...]

    @property
    def num_bytes(self) -> int:
        return sum(expert.num_bytes for expert in self.experts)

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        return each_group(rows, ends, self.experts)


def each_group(rows: Tensor, ends: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """What Experts says, one group after the other."""
    parts, start = [], 0
    for product, end in zip(products, ends.tolist(), strict=True):
        if end > start:
            parts.append(product(rows[start:end]))
        start = end
    return torch.cat(parts)
