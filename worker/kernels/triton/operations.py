"""Elementwise kernels and mixtures of experts for a GPU; what these do not have is torch's to do."""

from __future__ import annotations

from torch import Tensor

from worker.kernels.triton import experts, norms, rope
from worker.kernels.triton.activations import TritonActivation
from worker.model.moe import StackedExperts
from worker.model.operations import Activate, Operations, Turns, by_expert
from worker.model.spec import Activation, Norm
from worker.model.weights import MoeWeights, NormWeights


class TritonOperations(Operations):
    def normalise(self, x: Tensor, weights: NormWeights, eps: float, kind: Norm) -> Tensor:
        if not norms.can_normalise(x, weights, kind):
            return super().normalise(x, weights, eps, kind)
        return norms.normalise(x, weights, eps, kind)[1]

    def add_and_normalise(
        self, x: Tensor, part: Tensor, weights: NormWeights, eps: float, kind: Norm
    ) -> tuple[Tensor, Tensor]:
        if not norms.can_normalise(x, weights, kind) or not part.is_contiguous() or part.dtype is not x.dtype:
            return super().add_and_normalise(x, part, weights, eps, kind)
        return norms.normalise(x, weights, eps, kind, part)

    def activation(self, kind: Activation, *, is_gated: bool) -> Activate:
        return TritonActivation(kind, is_gated, super().activation(kind, is_gated=is_gated))

    def experts(self, x: Tensor, weights: MoeWeights, shares: Tensor, chosen: Tensor, activate: Activate) -> Tensor:
        up, down = weights.up, weights.down
        if not isinstance(up, StackedExperts) or not isinstance(down, StackedExperts):
            return super().experts(x, weights, shares, chosen, activate)
        if not isinstance(activate, TritonActivation) or not experts.can_multiply(x, up.matrices, down.matrices):
            return super().experts(x, weights, shares, chosen, activate)
        order, ends = by_expert(chosen, len(weights.router))
        inner = experts.expand(x, up.matrices, order, ends, activate)
        parts = experts.contract(inner, down.matrices, order, ends, shares)
        return parts.view(*chosen.shape, -1).sum(1)

    def turn_and_write(
        self,
        turned: Tensor,
        v: Tensor,
        num_heads: int,
        turns: Turns | None,
        pages: tuple[Tensor, ...],
        slots: Tensor,
    ) -> Tensor:
        if not rope.can_turn_and_write(turned, v, turns, pages):
            return super().turn_and_write(turned, v, num_heads, turns, pages, slots)
        return rope.turn_and_write(turned, v, num_heads, turns, pages, slots)
