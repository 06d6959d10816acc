"""Mixtures of experts: a router chooses, copies of tokens are sorted by expert, one product takes all groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.layers import mlp
from worker.model.spec import Moe
from worker.model.weights import MoeWeights

GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_ALIGNMENT = 16
"""Bytes; the rows of matrices must begin at multiples of it for the grouped product."""


def mixture(x: Tensor, weights: MoeWeights, moe: Moe, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The experts' part of one rank, whose results ranks add up (Shazeer et al., arXiv 1701.06538).

    [t, hidden] -> [t, hidden]. Every rank holds a slice of every expert, so all route alike.
    """
    shares, chosen = route(x, weights.router, moe)
    result = _experts(x, weights, shares, chosen, activation)
    if weights.shared is None:
        return result
    shared = mlp(x, weights.shared, activation, is_gated=True)
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


def _experts(
    x: Tensor, weights: MoeWeights, shares: Tensor, chosen: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    num_tokens, num_active = chosen.shape
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(len(weights.up), device=x.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    gate, up = grouped_product(x[order // num_active], weights.up, ends).chunk(2, -1)
    parts = grouped_product(activation(gate) * up, weights.down, ends)
    # back in the order of tokens, whose parts are then added up without any other token having a say
    sorted_back = torch.empty_like(parts)
    sorted_back[order] = parts
    return (sorted_back.view(num_tokens, num_active, -1) * shares[..., None]).sum(1)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`rows` [n, in] from `ends[i - 1]` up to `ends[i]` times the transpose of `matrices[i]` [out, in]: [n, out].

    Matrices of empty groups are not read.
    """
    is_aligned = matrices.shape[2] * matrices.itemsize % GROUPED_ALIGNMENT == 0
    if is_aligned and rows.dtype in GROUPED_DTYPES:
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    result, start = rows.new_empty(len(rows), matrices.shape[1]), 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        if end > start:
            result[start:end] = F.linear(rows[start:end], matrix)
        start = end
    return result
