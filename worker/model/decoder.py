"""The one decoder block, driven by a Spec, over the pages of a KV pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.attention import Attention, Batch, LayerShape, write_pages
from worker.model import rope
from worker.model.layers import ACTIVATION_FUNCTIONS, linear, rms_norm
from worker.model.spec import Spec
from worker.model.weights import DecoderWeights, LayerWeights


class Decoder:
    """Forward pass of a batch of chunks. Holds weights, no state of requests."""

    def __init__(self, spec: Spec, weights: DecoderWeights, attention: Attention) -> None:
        self.spec, self._weights, self._attention = spec, weights, attention
        self._activation = ACTIVATION_FUNCTIONS[spec.activation]
        self._frequencies = rope.inverse_frequencies(spec.rope, spec.head_dim)
        self._shapes = [LayerShape(spec.scale, window) for window in spec.windows]

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embed.dtype

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch, pages: Tensor, wanted: Tensor) -> Tensor:
        """Run one step and write its keys and values into `pages`.

        `tokens`, `positions` int64 [t]; `pages` [layers, 2, pages, page size, kv heads, d]; `wanted` int64 [k] indices
        of the tokens whose logits are needed. Returns logits [k, vocab].
        """
        x = F.embedding(tokens, self._weights.embed)
        turns = rope.angles(positions, self._frequencies, x.dtype)
        meta = self._attention.prepare(batch, pages.shape[3])
        for index, weights in enumerate(self._weights.layers):
            normed = rms_norm(x, weights.attention_norm, self.spec.norm_eps)
            x = x + self._attend(normed, weights, turns, batch.slots, pages[index], meta, self._shapes[index])
            x = x + self._mlp(rms_norm(x, weights.mlp_norm, self.spec.norm_eps), weights)
        x = rms_norm(x[wanted], self._weights.final_norm, self.spec.norm_eps)
        return F.linear(x, self._weights.head)

    def _attend(
        self,
        x: Tensor,
        weights: LayerWeights,
        turns: tuple[Tensor, Tensor],
        slots: Tensor,
        pages: Tensor,
        meta: Any,
        shape: LayerShape,
    ) -> Tensor:
        spec = self.spec
        heads = linear(x, weights.qkv).view(len(x), -1, spec.head_dim)
        turned, v = torch.split(heads, [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], 1)
        if weights.qk_norm is not None:
            turned = rms_norm(turned, weights.qk_norm, spec.norm_eps)
        q, k = torch.split(rope.rotate(turned, *turns), [spec.num_heads, spec.num_kv_heads], 1)
        write_pages(pages[0], k, slots)
        write_pages(pages[1], v, slots)
        return linear(self._attention.attend(q, pages[0], pages[1], meta, shape).flatten(1), weights.out)

    def _mlp(self, x: Tensor, weights: LayerWeights) -> Tensor:
        gate, up = linear(x, weights.gate_up).chunk(2, -1)
        return linear(self._activation(gate) * up, weights.down)
