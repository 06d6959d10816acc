"""T5 (Raffel et al., arXiv 1910.10683) and its kin: an encoder, and a decoder over the pages of a KV pool.

Positions enter attention only, as a learned bias on the distance of key and query. The encoder runs once per request;
the keys and values that its output means to each layer of the decoder lie in pages that later steps only read:

    x = embed(tokens)
    each layer   x = x + self-attention(norm(x))
                 x = x + attention over the encoder's output(norm(x))     decoder only
                 x = x + feed-forward network(norm(x))
    logits = norm(x) * scale @ head                                       decoder only

Ranks hold parts of heads, widths and vocabulary, and add up what they have before each "x +".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.attention import AnyBatch, Attention, Batch, DeviceBatch, LayerShape
from worker.attention.pages import write_pages
from worker.model.decoder import vocabulary_parallel_embedding
from worker.model.families.base import Family
from worker.model.loading import Builder, Finish, Piece, ProgressFunction, as_read, bytes_of, load_with
from worker.model.lora import LoraSlots
from worker.model.operations import Operations, Summary
from worker.model.quant.scheme import NOT_QUANTISED, Quantisation
from worker.model.spec import Norm, T5Spec
from worker.model.weights import Embedding, Linear, MlpWeights, NormWeights, Part, TensorSource
from worker.parallel.group import Alone, Group
from worker.parallel.shard import WHOLE, Shard

CROSS_SHAPE = LayerShape(scale=1.0)
"""Attention over the encoder's output knows no distances."""


@dataclass(frozen=True, slots=True)
class StackLayer:
    """A layer without what only the decoder has. `qkv` rows are queries, keys, values."""

    attention_norm: NormWeights
    qkv: Linear
    out: Linear
    mlp_norm: NormWeights
    mlp: MlpWeights


@dataclass(frozen=True, slots=True)
class CrossLayer:
    """A layer's attention over the encoder's output. `kv` rows are keys, values."""

    norm: NormWeights
    q: Linear
    kv: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class Stack:
    """`bias` float32 [heads, 2 * max_distance + 1] by key position - query position, the same for all layers."""

    bias: Tensor
    layers: list[StackLayer]
    final_norm: NormWeights


@dataclass(frozen=True, slots=True)
class T5Weights:
    """`embed` and `head` have the rank's part of the vocabulary, and share their tensors where they are tied; `crosses`
    has one entry per layer of the decoder. `dtype` is that of activations."""

    dtype: torch.dtype
    embed: Embedding
    encoder: Stack
    decoder: Stack
    crosses: list[CrossLayer]
    head: Linear


class T5:
    """Forward passes of encoder and decoder on one rank. Holds weights, no state of requests."""

    can_be_captured = True

    def __init__(
        self,
        spec: T5Spec,
        weights: T5Weights,
        attention: Attention,
        group: Group | None = None,
        operations: Operations | None = None,
    ) -> None:
        self.spec, self.dtype, self.weights, self.attention = spec, weights.dtype, weights, attention
        self.group = group or Alone()
        self.num_kv_heads = len(self.group.shard.heads(spec.num_heads))
        self._head_shape = (self.num_kv_heads, spec.head_dim)
        self.vocabulary = self.group.shard.bounds(spec.vocab_size)
        self.operations = operations or Operations()
        self._activate = self.operations.activation(spec.activation, is_gated=spec.is_gated)
        self._encoder_shape = LayerShape(scale=1.0, bias=weights.encoder.bias)
        self._decoder_shape = LayerShape(scale=1.0, bias=weights.decoder.bias)

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head_dim) of the keys and values that this rank keeps."""
        return self.spec.num_layers, self.num_kv_heads, self.spec.head_dim

    def encode(self, tokens: Tensor, slots: Tensor, pages: Tensor, batch: DeviceBatch | None = None) -> None:
        """Run the encoder over one request, and write what it leaves for each layer of the decoder into `pages`.

        `tokens` int64 [e]; `slots` int64 [e] a place for each among all places of all pages; `pages` as in `forward`.
        `batch`, for attention that wants one of a device, has one row, the whole input in pages of that size.
        """
        if batch is None:
            x = self._encoder_output(tokens, whole_input(tokens), 1, len(tokens))
        else:
            x = self._encoder_output(tokens, batch, batch.tables.shape[1], pages.shape[3])
        for layer, cross in enumerate(self.weights.crosses):
            k, v = cross.kv(x).view(len(x), 2, *self._head_shape).unbind(1)
            write_pages(pages[layer, 0], k, slots)
            write_pages(pages[layer, 1], v, slots)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, batch: AnyBatch, pages: Tensor, wanted: Tensor, cross: AnyBatch
    ) -> Tensor:
        """Run one step of the decoder and write its keys and values into `pages`.

        `tokens`, `positions` int64 [t], the latter those that `batch` implies; `pages` [layers, 2, pages, page size,
        the rank's heads, page width]; `wanted` int64 [k] indices of the tokens whose logits are needed; `cross` has the
        queries of `batch` over the pages that `encode` filled. Returns logits [k, the rank's part of the vocabulary].
        """
        stack, x = self.weights.decoder, self._embed(tokens)
        meta, cross_meta = (self.attention.prepare(each, pages.shape[3]) for each in (batch, cross))
        layers = zip(stack.layers, self.weights.crosses, pages, strict=True)
        for weights, cross_weights, layer_pages in layers:
            x = x + self._attend(x, weights, layer_pages, batch.slots, meta, self._decoder_shape)
            x = x + self._attend_across(x, cross_weights, layer_pages, cross_meta)
            x = self._feed_forward(x, weights)
        return self.weights.head(self._norm(x[wanted], stack.final_norm) * self.spec.output_scale)

    def summarise(self, logits: Tensor) -> Summary:
        """Operations.summarise of what `forward` returned."""
        return self.operations.summarise(logits)

    def _encoder_output(self, tokens: Tensor, batch: AnyBatch, num_pages: int, page_size: int) -> Tensor:
        """[e, hidden]."""
        stack, x = self.weights.encoder, self._embed(tokens)
        meta = self.attention.prepare(batch, page_size)
        pages = x.new_empty((2, num_pages, page_size, *self._head_shape))
        for weights in stack.layers:
            x = x + self._attend(x, weights, pages, batch.slots, meta, self._encoder_shape)
            x = self._feed_forward(x, weights)
        return self._norm(x, stack.final_norm)

    def _embed(self, tokens: Tensor) -> Tensor:
        return vocabulary_parallel_embedding(tokens, self.weights.embed, self.vocabulary, self.group)

    def _norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        return self.operations.normalise(x, weights, self.spec.norm_eps, Norm.RMS)

    def _attend(
        self, x: Tensor, weights: StackLayer, pages: Tensor, slots: Tensor, meta: Any, shape: LayerShape
    ) -> Tensor:
        num_heads, head_dim = self._head_shape
        heads = weights.qkv(self._norm(x, weights.attention_norm)).view(len(x), 3 * num_heads, head_dim)
        turned, v = torch.split(heads, [2 * num_heads, num_heads], 1)
        q = self.operations.turn_and_write(turned, v, num_heads, None, tuple(pages), slots)
        attended = self.attention.attend(q, pages[0], pages[1], meta, shape)
        return self.group.all_reduce(weights.out(attended.flatten(1)))

    def _attend_across(self, x: Tensor, weights: CrossLayer, pages: Tensor, meta: Any) -> Tensor:
        q = weights.q(self._norm(x, weights.norm)).view(len(x), *self._head_shape)
        attended = self.attention.attend(q, pages[0], pages[1], meta, CROSS_SHAPE)
        return self.group.all_reduce(weights.out(attended.flatten(1)))

    def _feed_forward(self, x: Tensor, weights: StackLayer) -> Tensor:
        """`x` and what the network makes of it."""
        normed, feed_forward = self._norm(x, weights.mlp_norm), self.operations.feed_forward
        if self.group.shard.size == 1:
            return feed_forward(normed, weights.mlp, self._activate, x)
        return x + self.group.all_reduce(feed_forward(normed, weights.mlp, self._activate))


def whole_input(tokens: Tensor) -> Batch:
    """To attention what an encoder reads is one page."""
    zero, size = np.zeros(1, np.int64), len(tokens)
    slots = torch.arange(size, device=tokens.device)
    return Batch(zero + size, zero, zero[None], slots, num_keys=zero + size)


# Weights.


def load_t5_weights(
    spec: T5Spec,
    family: Family,
    source: TensorSource,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    on_progress: ProgressFunction | None = None,
    quantisation: Quantisation = NOT_QUANTISED,
    adapters: LoraSlots | None = None,
    finish: Finish = as_read,
) -> T5Weights:
    """Read one rank's weights as `dtype`, or as `quantisation` says, where the source wants them. `adapters` will
    know each layer, and `finish` gets each.

    Raises:
        ConfigurationError: if a tensor is missing, misshapen or superfluous, which the message names; or for float16.
    """
    if dtype is torch.float16:
        raise ConfigurationError(
            f"--dtype float16 is too narrow for {spec.model_type}, whose activations overflow it; "
            "choose bfloat16 or float32"
        )
    builder = Builder(family, source, dtype, shard, quantisation, adapters=adapters, finish=finish)
    return load_with(partial(load_t5, spec), builder, on_progress)


def t5_weight_bytes(
    spec: T5Spec,
    family: Family,
    source: TensorSource,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    quantisation: Quantisation = NOT_QUANTISED,
) -> int:
    """What `load_t5_weights` will take, without taking it."""
    return bytes_of(partial(load_t5, spec), Builder(family, source, dtype, shard, quantisation))


def load_t5(spec: T5Spec, builder: Builder) -> T5Weights:
    embed = builder.embedding(spec.vocab_size, spec.hidden_size)
    weights = T5Weights(
        dtype=builder.dtype,
        embed=embed,
        encoder=_load_stack(spec, builder, "encoder", spec.num_encoder_layers, is_causal=False),
        decoder=_load_stack(spec, builder, "decoder", spec.num_layers, is_causal=True),
        crosses=[builder.finish(_load_cross(spec, builder, layer)) for layer in range(spec.num_layers)],
        head=builder.head(spec.vocab_size, spec.hidden_size, embed),
    )
    builder.source.finish(builder.family.ignored)
    return weights


def _load_stack(spec: T5Spec, builder: Builder, stack: str, num_layers: int, *, is_causal: bool) -> Stack:
    heads = builder.shard.heads(spec.num_heads)
    part = Part((spec.num_buckets, spec.num_heads), [range(spec.num_buckets)], heads)
    by_bucket = builder.fill([Piece(f"{stack}_bias", part)], dtype=torch.float32)
    return Stack(
        bias=bias_by_distance(by_bucket, spec.max_distance, is_causal=is_causal),
        layers=[builder.finish(_load_layer(spec, builder, stack, layer)) for layer in range(num_layers)],
        final_norm=_load_norm(spec, builder, f"{stack}_final_norm", 0),
    )


def _load_layer(spec: T5Spec, builder: Builder, stack: str, layer: int) -> StackLayer:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    ups = [f"{stack}_gate", f"{stack}_gated_up"] if spec.is_gated else [f"{stack}_up"]
    mine = builder.width(ffn)
    return StackLayer(
        attention_norm=_load_norm(spec, builder, f"{stack}_attention_norm", layer),
        qkv=_load_heads(spec, builder, [f"{stack}_{which}" for which in "qkv"], layer),
        out=_load_out(spec, builder, f"{stack}_out", layer),
        mlp_norm=_load_norm(spec, builder, f"{stack}_mlp_norm", layer),
        mlp=MlpWeights(
            up=builder.split_by_rows(ups, (ffn, hidden), mine, layer, has_bias=False),
            down=builder.split_by_columns(f"{stack}_down", (hidden, ffn), mine, layer, has_bias=False),
        ),
    )


def _load_cross(spec: T5Spec, builder: Builder, layer: int) -> CrossLayer:
    return CrossLayer(
        norm=_load_norm(spec, builder, "cross_norm", layer),
        q=_load_heads(spec, builder, ["cross_q"], layer),
        kv=_load_heads(spec, builder, ["cross_k", "cross_v"], layer),
        out=_load_out(spec, builder, "cross_out", layer),
    )


def _load_norm(spec: T5Spec, builder: Builder, key: str, layer: int) -> NormWeights:
    return NormWeights(builder.vector(key, spec.hidden_size, layer), None)


def _load_heads(spec: T5Spec, builder: Builder, keys: list[str], layer: int) -> Linear:
    return builder.split_by_rows(keys, (_inner(spec), spec.hidden_size), _rows(spec, builder), layer, has_bias=False)


def _load_out(spec: T5Spec, builder: Builder, key: str, layer: int) -> Linear:
    return builder.split_by_columns(key, (spec.hidden_size, _inner(spec)), _rows(spec, builder), layer, has_bias=False)


def _inner(spec: T5Spec) -> int:
    """Width of all heads together."""
    return spec.num_heads * spec.head_dim


def _rows(spec: T5Spec, builder: Builder) -> range:
    """Those of the rank's heads."""
    heads = builder.shard.heads(spec.num_heads)
    return range(heads.start * spec.head_dim, heads.stop * spec.head_dim)


def bias_by_distance(by_bucket: Tensor, max_distance: int, *, is_causal: bool) -> Tensor:
    """From [buckets, heads] to [heads, 2 * max_distance + 1], by key position - query position from -max_distance on.

    The shorter half of all distances has a bucket each, the other buckets grow with the logarithm of the distance.
    Without `is_causal` there is such a set of buckets for keys before the query, and one for keys after it.
    """
    distances = torch.arange(-max_distance, max_distance + 1)
    num_buckets = len(by_bucket) if is_causal else len(by_bucket) // 2
    first = 0 if is_causal else (distances > 0) * num_buckets
    lengths = -distances.clamp(max=0) if is_causal else distances.abs()
    num_exact = num_buckets // 2
    # float32 and this order of operations: models were trained with how they round at the edges of buckets
    growth = torch.log(lengths.float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    buckets = first + torch.where(lengths < num_exact, lengths, far)
    return by_bucket[buckets.to(by_bucket.device)].t().contiguous()
