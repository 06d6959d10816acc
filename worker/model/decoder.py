"""The one decoder block, driven by a Spec, over the pages of a KV pool.

    x = embed(tokens) * scale [+ learned positions] [norm] [project in]
    each layer, by its residual form (see Residual):
        q, k, v = split(norm(x) @ qkv)   [clamp] [norm of q, k] [rope]   k, v -> pages
        x = x + attention(q, pages) @ out
        x = x + feed forward network or mixture of experts
    logits = [project out](norm(x)) @ head * scale [softcap]

Ranks hold parts of heads, widths and vocabulary, and add up what they have before each "x +".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.attention import AnyBatch, Attention, LayerShape
from worker.model import rope
from worker.model.layers import softcap
from worker.model.moe import ListedExperts, mixture
from worker.model.operations import Layers, Operations, Stack, Summary, Turns
from worker.model.spec import QkNorm, Residual, Rope, Spec
from worker.model.weights import DecoderWeights, Embedding, LayerWeights, MlpWeights, MoeWeights, NormWeights
from worker.parallel.group import Alone, Group


@dataclass(slots=True)
class Step:
    """What all layers of a step share: angles by rope, pages of all layers, places in them, and attention's own."""

    turns: dict[Rope, Turns]
    pages: Tensor
    slots: Tensor
    meta: Any


class Decoder:
    """Forward pass of a batch of chunks on one rank. Holds weights, no state of requests.

    `max_length` is the most tokens that a request may have; ropes that depend on a length take this one for all.
    """

    def __init__(
        self,
        spec: Spec,
        weights: DecoderWeights,
        attention: Attention,
        group: Group | None = None,
        max_length: int | None = None,
        operations: Operations | None = None,
    ) -> None:
        self.spec, self.dtype, self.weights, self.attention = spec, weights.dtype, weights, attention
        self.group = group or Alone()
        shard = self.group.shard
        self._num_heads = len(shard.heads(spec.num_heads))
        self.num_kv_heads = len(shard.kv_heads(spec.num_kv_heads))
        self.vocabulary = shard.bounds(spec.vocab_size)
        self.operations = operations or Operations()
        self._activate = self.operations.activation(spec.activation, is_gated=spec.is_gated)
        self._wide = torch.promote_types(self.dtype, torch.float32)
        self._frequencies = {
            turning: rope.both_ways(rope.inverse_frequencies(turning, spec.head_dim, max_length or spec.max_positions))
            for turning in set(filter(None, spec.ropes))
        }
        # the factor was rounded to the type of the weights when such models were trained
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self.dtype)
        self._shapes = self._layer_shapes()
        self._is_plain = spec.residual is Residual.SEQUENTIAL and spec.residual_scale == 1.0
        self._adds_plainly = self._is_plain and shard.size == 1
        self._stack = self._whole_stack()

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head_dim) of the keys and values that this rank keeps."""
        return self.spec.num_layers, self.num_kv_heads, self.spec.head_dim

    @property
    def can_be_captured(self) -> bool:
        """Whether a graph may hold a step: the host asks the device for nothing in it."""
        mlps = [layer.mlp for layer in self.weights.layers if isinstance(layer.mlp, MoeWeights)]
        return not any(isinstance(experts, ListedExperts) for mlp in mlps for experts in (mlp.up, mlp.down))

    def forward(self, tokens: Tensor, positions: Tensor, batch: AnyBatch, pages: Tensor, wanted: Tensor) -> Tensor:
        """Run one step and write its keys and values into `pages`.

        `tokens`, `positions` int64 [t]; `pages` [layers, 2, pages, page size, the rank's kv heads, page width];
        `wanted` int64 [k] indices of the tokens whose logits are needed, on a CPU ascending. Returns logits [k, the
        rank's part of the vocabulary].
        """
        if self._stack is not None and self._stack.is_ready(pages):
            meta = self.attention.prepare(batch, pages.shape[3])
            return self._stack(tokens, positions, pages, batch.slots, meta, wanted)
        return self._layer_by_layer(tokens, positions, batch, pages, wanted)

    @torch.inference_mode()
    def _layer_by_layer(
        self, tokens: Tensor, positions: Tensor, batch: AnyBatch, pages: Tensor, wanted: Tensor
    ) -> Tensor:
        x, step = self.embed(tokens, positions), self.begin(positions, batch, pages)
        for layer, weights in enumerate(self.weights.layers):
            x = self.run_layer(x, weights, step, layer)
        return self._head(self._norm(x[wanted], self.weights.final_norm))

    def summarise(self, logits: Tensor) -> Summary:
        """Operations.summarise of logits. Those that `forward` returned last must be as it returned them."""
        made = None if self._stack is None else self._stack.summary_of(logits)
        return made or self.operations.summarise(logits)

    def begin(self, positions: Tensor, batch: AnyBatch, pages: Tensor) -> Step:
        """What the layers of a step need besides its hidden states."""
        turns = {
            turning: self.operations.angles(positions, frequencies, self._wide, turning.amplitude)
            for turning, frequencies in self._frequencies.items()
        }
        return Step(turns, pages, batch.slots, self.attention.prepare(batch, pages.shape[3]))

    def run_layer(self, x: Tensor, weights: LayerWeights, step: Step, layer: int) -> Tensor:
        """One layer alone: hidden states [t, hidden] before it to those behind it."""
        run = self._parallel if self.spec.residual.is_parallel else self._sequential
        return run(x, weights, step, layer)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weights = self.weights
        x = vocabulary_parallel_embedding(tokens, weights.embed, self.vocabulary, self.group)
        if self.spec.embedding_scale != 1.0:
            x = x * self._embedding_scale
        if weights.project_in is not None:
            x = F.linear(x, weights.project_in)
        if weights.positions is not None and self.spec.position_offset is not None:
            x = x + F.embedding(positions + self.spec.position_offset, weights.positions)
        return self._norm(x, weights.embedding_norm)

    def _head(self, x: Tensor) -> Tensor:
        spec, weights = self.spec, self.weights
        if weights.project_out is not None:
            x = F.linear(x, weights.project_out)
        logits = weights.head(x)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        return logits if spec.logit_softcap is None else softcap(logits, spec.logit_softcap)

    # One layer.

    def _parallel(self, x: Tensor, weights: LayerWeights, step: Step, layer: int) -> Tensor:
        normed = self._norm(x, weights.attention_norm)
        mlp_input = normed if weights.mlp_norm is None else self._norm(x, weights.mlp_norm)
        part = self._attend(normed, weights, step, layer) + self._feed_forward(mlp_input, weights)
        return x + self.group.all_reduce(part)

    def _sequential(self, x: Tensor, weights: LayerWeights, step: Step, layer: int) -> Tensor:
        part = self._attend(self._norm(x, weights.attention_norm), weights, step, layer)
        x, normed = self._add_and_norm(x, part, weights)
        if self._adds_plainly and isinstance(weights.mlp, MlpWeights) and weights.mlp_out_norm is None:
            return self.operations.feed_forward(normed, weights.mlp, self._activate, x)
        return self._add(x, self._feed_forward(normed, weights), weights.mlp_out_norm)

    def _add_and_norm(self, x: Tensor, part: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """Hidden states behind attention, and what the feed-forward network sees of them."""
        spec = self.spec
        if self._is_plain and weights.mlp_norm is not None:
            part = self.group.all_reduce(part)
            return self.operations.add_and_normalise(x, part, weights.mlp_norm, spec.norm_eps, spec.norm)
        x = self._add(x, part, weights.attention_out_norm)
        return x, self._norm(x, weights.mlp_norm)

    def _add(self, x: Tensor, part: Tensor, norm: NormWeights | None) -> Tensor:
        part = self.group.all_reduce(part)
        if self.spec.residual is Residual.POST:
            return self._norm(x + part, norm)
        part = self._norm(part, norm)
        return x + (part if self.spec.residual_scale == 1.0 else part * self.spec.residual_scale)

    def _norm(self, x: Tensor, weights: NormWeights | None) -> Tensor:
        if weights is None:
            return x
        return self.operations.normalise(x, weights, self.spec.norm_eps, self.spec.norm)

    def _feed_forward(self, x: Tensor, weights: LayerWeights) -> Tensor:
        if isinstance(weights.mlp, MoeWeights):
            assert self.spec.moe is not None
            return mixture(x, weights.mlp, self.spec.moe, self._activate, self.operations)
        return self.operations.feed_forward(x, weights.mlp, self._activate)

    # Attention.

    def _attend(self, x: Tensor, weights: LayerWeights, step: Step, layer: int) -> Tensor:
        num_heads, num_kv_heads = self._num_heads, self.num_kv_heads
        heads = weights.qkv(x).view(x.shape[0], -1, self.spec.head_dim)
        if self.spec.clip_qkv is not None:
            heads = heads.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        turned, v = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], 1)
        if weights.qk_norm is not None:
            turned = self._normalise_qk(turned, weights.qk_norm)
        turning, pages = self.spec.ropes[layer], step.pages[layer].unbind()
        turns = None if turning is None else step.turns[turning]
        q = self.operations.turn_and_write(turned, v, num_heads, turns, pages, step.slots)
        attended = self.attention.attend(q, pages[0], pages[1], step.meta, self._shapes[layer])
        return weights.out(attended.flatten(1))

    def _normalise_qk(self, heads: Tensor, weights: NormWeights) -> Tensor:
        if self.spec.qk_norm is QkNorm.HEAD:
            return self._norm(heads, weights)
        sizes = [self._num_heads, self.num_kv_heads]
        parts = zip(torch.split(heads, sizes, 1), torch.split(weights.weight, sizes), strict=True)
        return torch.cat([self._normalise_together(part, weight) for part, weight in parts], 1)

    def _normalise_together(self, heads: Tensor, weight: Tensor) -> Tensor:
        return self._norm(heads.flatten(1), NormWeights(weight.flatten(), None)).view(heads.shape)

    def _whole_stack(self) -> Stack | None:
        spec, exchange = self.spec, self.group.exchange
        can_add = self._is_plain and (self.group.shard.size == 1 or exchange is not None)
        if not can_add or spec.clip_qkv is not None or spec.qk_norm is QkNorm.FULL:
            return None
        layers = Layers(
            embed=self.embed,
            rows=self.weights.embed if self._embeds_plainly else None,
            weights=self.weights.layers,
            final_norm=self.weights.final_norm,
            head=self._head,
            product=self.weights.head if self._has_plain_head else None,
            ropes=spec.ropes,
            frequencies=self._frequencies,
            shapes=self._shapes,
            num_heads=self._num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=spec.head_dim,
            norm=spec.norm,
            norm_eps=spec.norm_eps,
            exchange=exchange,
        )
        return self.operations.stack(layers, self.attention, self._activate)

    @property
    def _embeds_plainly(self) -> bool:
        weights, is_whole = self.weights, self.group.shard.size == 1
        added = weights.project_in, weights.positions, weights.embedding_norm
        return is_whole and self.spec.embedding_scale == 1.0 and all(each is None for each in added)

    @property
    def _has_plain_head(self) -> bool:
        is_scaled = self.spec.logit_scale != 1.0 or self.spec.logit_softcap is not None
        return self.weights.project_out is None and not is_scaled

    def _layer_shapes(self) -> list[LayerShape]:
        """One object for all layers that attend alike."""
        spec, slopes = self.spec, None
        if spec.alibi_scale is not None:
            mine = self.group.shard.heads(spec.num_heads)
            slopes = alibi_slopes(spec.num_heads)[mine.start : mine.stop] * spec.alibi_scale
        by_window = {
            window: LayerShape(spec.scale, window, spec.attention_softcap, slopes) for window in set(spec.windows)
        }
        return [by_window[window] for window in spec.windows]


def vocabulary_parallel_embedding(tokens: Tensor, table: Embedding, mine: range, group: Group) -> Tensor:
    """Look up [t] tokens in a table of which each rank holds some rows, [t, width]."""
    if group.shard.size == 1:
        return table(tokens)
    local = tokens - mine.start
    is_mine = (local >= 0) & (local < len(mine))
    found = table(local.clamp(0, len(mine) - 1))
    return group.all_reduce(found.masked_fill_(~is_mine[:, None], 0.0))


def alibi_slopes(num_heads: int) -> Tensor:
    """float32 [heads], falling from head to head (Press et al., arXiv 2108.12409).

    For a head count that is no power of two: those of the next larger one, every second first.
    """
    size = 1 << (num_heads - 1).bit_length()
    slopes = 2.0 ** (-8.0 * torch.arange(1, size + 1, dtype=torch.float64) / size)
    ordered = slopes if size == num_heads else torch.cat((slopes[1::2], slopes[::2]))
    return ordered[:num_heads].to(torch.float32)
