"""What a step does between its products: in torch, which says what is meant, for any type and device.

Kernels for a device are another class with the same methods (worker/kernels/elementwise.py has those for a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.attention import Attention, LayerShape
from worker.attention.pages import write_pages
from worker.model import rope
from worker.model.layers import ACTIVATION_FUNCTIONS, layer_norm, rms_norm
from worker.model.spec import Activation, Norm, Rope
from worker.model.weights import Embedding, LayerWeights, Linear, MlpWeights, MoeWeights, NormWeights

if TYPE_CHECKING:
    # which has a kernel, and kernels are made of these operations
    from worker.parallel.exchange import Exchange

Turns = tuple[Tensor, Tensor]
Activate = Callable[[Tensor], Tensor]
Summary = tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]


@dataclass(frozen=True, slots=True)
class Layers:
    """Those of a decoder that adds each part to what came in, without any factor, and what is around them; heads are
    the rank's. Several ranks add up through `exchange`. `ropes` and `shapes` of attention are by layer, `frequencies`
    those of `rope.angles` for each rope.

    `embed(tokens, positions)` gives what the first layer takes, and `head(x)` makes logits of what is behind the final
    norm. Where they do nothing else they are these `rows` and this `product`.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    rows: Embedding | None
    weights: list[LayerWeights]
    final_norm: NormWeights | None
    head: Callable[[Tensor], Tensor]
    product: Linear | None
    ropes: tuple[Rope | None, ...]
    frequencies: dict[Rope, Tensor]
    shapes: list[LayerShape]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm
    norm_eps: float
    exchange: Exchange | None


class Stack(Protocol):
    """All of a step in one go, where it `is_ready` for it."""

    def is_ready(self, pages: Tensor) -> bool: ...

    def __call__(
        self, tokens: Tensor, positions: Tensor, pages: Tensor, slots: Tensor, meta: Any, wanted: Tensor
    ) -> Tensor:
        """Logits of the tokens `wanted`, as Decoder.forward; `slots` and `meta` as layers get them."""

    def summary_of(self, logits: Tensor) -> Summary | None:
        """Operations.summarise of what the last call returned, if it made it by the way."""


class Operations:
    """Of one forward pass; they hold no state."""

    def normalise(self, x: Tensor, weights: NormWeights, eps: float, kind: Norm) -> Tensor:
        """A norm over the last dimension of `x` [..., size], as `worker.model.layers` has them."""
        return (rms_norm if kind is Norm.RMS else layer_norm)(x, weights, eps)

    def add_and_normalise(
        self, x: Tensor, part: Tensor, weights: NormWeights, eps: float, kind: Norm
    ) -> tuple[Tensor, Tensor]:
        """`x + part` [t, hidden], and the norm of it."""
        added = x + part
        return added, self.normalise(added, weights, eps, kind)

    def activation(self, kind: Activation, *, is_gated: bool) -> Activate:
        """From what a network's first product gives to what its second one takes: [t, width] of one width, or where it
        is gated from [t, 2 * width], of which the second half is multiplied with what becomes of the first one."""
        function = ACTIVATION_FUNCTIONS[kind]
        if not is_gated:
            return function

        def gated(inner: Tensor) -> Tensor:
            gate, up = inner.chunk(2, -1)
            return function(gate) * up

        return gated

    def feed_forward(
        self, x: Tensor, weights: MlpWeights, activate: Activate, residual: Tensor | None = None
    ) -> Tensor:
        """The feed-forward network of one rank, whose results ranks add up, [t, hidden] -> [t, hidden]; `residual` plus
        that where there is one. `activate` is one of `activation`."""
        result = weights.down(activate(weights.up(x)))
        return result if residual is None else residual + result

    def experts(self, x: Tensor, weights: MoeWeights, shares: Tensor, chosen: Tensor, activate: Activate) -> Tensor:
        """The sum of what the experts `chosen` [t, active] for each token of `x` [t, hidden] make of it, each times its
        one of `shares` [t, active]: [t, hidden]. Copies of tokens are sorted by expert, so that each product has one
        group of rows."""
        order, ends = by_expert(chosen, len(weights.router))
        parts = weights.down(activate(weights.up(x[order // chosen.shape[1]], ends)), ends)
        # back in the order of tokens, whose parts are then added up without any other token having a say
        sorted_back = torch.empty_like(parts)
        sorted_back[order] = parts
        return (sorted_back.view(*chosen.shape, -1) * shares[..., None]).sum(1)

    def stack(self, layers: Layers, attention: Attention, activate: Activate) -> Stack | None:
        """One, if there are kernels for all that these layers have."""
        return None

    def angles(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float) -> Turns:
        """As in `rope.angles`."""
        return rope.angles(positions, frequencies, dtype, amplitude)

    def turn_and_write(
        self,
        turned: Tensor,
        v: Tensor,
        num_heads: int,
        turns: Turns | None,
        pages: tuple[Tensor, ...],
        slots: Tensor,
    ) -> Tensor:
        """Turn queries and keys `turned` [t, heads + kv heads, d] by `turns` (None leaves them), write keys and values
        `v` [t, kv heads, d] to the places `slots` of `pages`, one for each, and return the queries [t, heads, d]."""
        if turns is not None:
            turned = rope.rotate(turned, *turns)
        q, k = torch.split(turned, [num_heads, turned.shape[1] - num_heads], 1)
        for each, values in zip(pages, (k, v), strict=True):
            write_pages(each, values, slots)
        return q

    def summarise(self, logits: Tensor) -> Summary:
        """Of each row of `logits` [k, columns] the largest number, a column where it stands, and the log-sum-exp, in
        float32 or wider. Where a row has numbers that are none, or no finite one, its log-sum-exp is not finite."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        most, columns = scores.max(-1)
        return most.numpy(), columns.numpy(), scores.logsumexp(-1).numpy()


def by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts the experts `chosen` [t, active], [t * active], and where each one's end in it, int32
    [experts]. Nothing waits for a device."""
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, device=chosen.device)
    return order, torch.searchsorted(experts, numbers, right=True, out_int32=True)
