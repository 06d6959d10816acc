"""Mixtures of experts: a router chooses, tokens are grouped by expert, each group is one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.layers import mlp
from worker.model.spec import Moe
from worker.model.weights import MoeWeights


def mixture(x: Tensor, weights: MoeWeights, moe: Moe, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The experts' part of one rank, whose results ranks add up (Shazeer et al., arXiv 1701.06538).

    [t, hidden] -> [t, hidden]. Every rank holds a slice of every expert, so all route alike.
    """
    shares, chosen = route(x, weights.router, moe)
    result = _grouped(x, weights, shares, chosen, activation)
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


def _grouped(
    x: Tensor, weights: MoeWeights, shares: Tensor, chosen: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    tokens, result = order // chosen.shape[1], torch.zeros_like(x)
    counts = chosen.flatten().bincount(minlength=len(weights.router)).tolist()
    start = 0
    for expert, count in enumerate(counts):
        members = order[start : start + count]
        rows = tokens[start : start + count]
        gate, up = F.linear(x[rows], weights.up[expert]).chunk(2, -1)
        part = F.linear(activation(gate) * up, weights.down[expert])
        result.index_add_(0, rows, part * shares.flatten()[members, None])
        start += count
    return result
