"""Attention on the CPU through torch's fused kernel: decoding rows in padded groups, prompt chunks one by one.

The kernel knows no pages, so the pages of a group are gathered into one tensor by one index_select; which pages, and
the masks over padding and window, are worked out once per step and shared by all layers of the same window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.attention import Batch, Integers, LayerShape

GROUP_GROWTH = 1.3
"""Rows share a group while the longest has at most this many times the pages of the shortest."""

SMALL_ROW_BLOCKS = 8
"""Rows with up to this many pages are one group whatever their lengths."""

MAX_GATHERED_TOKENS = 16_384
"""Tokens of keys copied at a time; beyond it a group is split, so that copies stay small beside the pool."""

MAX_MASK_ELEMENTS = 1 << 21
"""Elements of one prompt chunk's mask; longer chunks are cut along the queries."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """b rows of one query each. `tokens` [b] their places among the step's tokens, `blocks` [b * n] pages to gather,
    `mask` [b, 1, 1, n * page size] zero where a key is visible, else minus infinity."""

    tokens: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class ChunkSlice:
    """Queries `first` .. `end` of a step that see keys `key_first` .. `key_end` of what their row gathered.

    `mask` [queries, keys] as in DecodeGroup; None means plain causal over equal ranges.
    """

    first: int
    end: int
    key_first: int
    key_end: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PromptChunk:
    blocks: Tensor
    slices: list[ChunkSlice]


@dataclass(frozen=True, slots=True)
class WindowPlan:
    groups: list[DecodeGroup]
    chunks: list[PromptChunk]


class StepMeta:
    """Plans of one step by window, made when the first layer with that window asks."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        self.batch, self.block_size = batch, block_size
        self._plans: dict[int | None, WindowPlan] = {}

    def plan(self, window: int | None, dtype: torch.dtype) -> WindowPlan:
        if window not in self._plans:
            groups = _decode_groups(self.batch, self.block_size, window, dtype)
            self._plans[window] = WindowPlan(groups, _prompt_chunks(self.batch, self.block_size, window, dtype))
        return self._plans[window]


class CpuAttention:
    """Agrees with ReferenceAttention within the rounding of the type; softmax is in float32 or wider."""

    def prepare(self, batch: Batch, block_size: int) -> StepMeta:
        return StepMeta(batch, block_size)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: StepMeta, layer: LayerShape) -> Tensor:
        plan, out = meta.plan(layer.window, q.dtype), torch.empty_like(q)
        for group in plan.groups:
            _attend_group(q, k_pages, v_pages, group, layer.scale, out)
        for chunk in plan.chunks:
            _attend_chunk(q, k_pages, v_pages, chunk, layer.scale, out)
        return out


def _attend_group(q: Tensor, k_pages: Tensor, v_pages: Tensor, group: DecodeGroup, scale: float, out: Tensor) -> None:
    num_rows, num_keys = len(group.tokens), group.mask.shape[-1]
    shape = (num_rows, num_keys, *k_pages.shape[2:])
    k = k_pages.index_select(0, group.blocks).view(shape).transpose(1, 2)
    v = v_pages.index_select(0, group.blocks).view(shape).transpose(1, 2)
    # the query heads that share a kv head stand where the kernel expects a sequence of queries
    folded = q.index_select(0, group.tokens).view(num_rows, k.shape[1], -1, q.shape[2])
    result = scaled_dot_product_attention(folded, k, v, attn_mask=group.mask, scale=scale)
    out.index_copy_(0, group.tokens, result.reshape(num_rows, *q.shape[1:]))


def _attend_chunk(q: Tensor, k_pages: Tensor, v_pages: Tensor, chunk: PromptChunk, scale: float, out: Tensor) -> None:
    k = k_pages.index_select(0, chunk.blocks).flatten(0, 1).transpose(0, 1).unsqueeze(1)
    v = v_pages.index_select(0, chunk.blocks).flatten(0, 1).transpose(0, 1).unsqueeze(1)
    group = q.shape[1] // k.shape[0]
    for part in chunk.slices:
        queries = q[part.first : part.end].view(-1, len(k), group, q.shape[2]).permute(1, 2, 0, 3)
        keys = k[:, :, part.key_first : part.key_end].expand(-1, group, -1, -1)
        values = v[:, :, part.key_first : part.key_end].expand(-1, group, -1, -1)
        result = scaled_dot_product_attention(
            queries, keys, values, attn_mask=part.mask, is_causal=part.mask is None, scale=scale
        )
        out[part.first : part.end] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _decode_groups(batch: Batch, block_size: int, window: int | None, dtype: torch.dtype) -> list[DecodeGroup]:
    rows = np.flatnonzero(batch.num_queries == 1)
    if not len(rows):
        return []
    lengths = batch.starts[rows] + 1
    first_visible = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first_blocks = first_visible // block_size
    num_blocks = -(-lengths // block_size) - first_blocks
    tokens = np.cumsum(batch.num_queries)[rows] - 1
    groups = []
    for members in _similar(num_blocks, block_size):
        blocks = _gathered_blocks(batch.block_tables[rows[members]], first_blocks[members], num_blocks[members])
        positions = first_blocks[members, None] * block_size + np.arange(blocks.shape[1] * block_size)
        is_visible = (positions < lengths[members, None]) & (positions >= first_visible[members, None])
        mask = _mask(torch.from_numpy(is_visible), dtype)[:, None, None]
        groups.append(DecodeGroup(torch.from_numpy(tokens[members]), torch.from_numpy(blocks.ravel()), mask))
    return groups


def _similar(num_blocks: Integers, block_size: int) -> list[Integers]:
    """Indices of rows, grouped so that padding each group to its longest row wastes little."""
    growth = np.log(np.maximum(num_blocks, SMALL_ROW_BLOCKS) / SMALL_ROW_BLOCKS) / math.log(GROUP_GROWTH)
    buckets = np.ceil(growth - 1e-9).astype(np.int64)
    groups: list[Integers] = []
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        tokens_per_row = int(num_blocks[members].max()) * block_size
        num_rows = max(MAX_GATHERED_TOKENS // tokens_per_row, 1)
        groups += [members[start : start + num_rows] for start in range(0, len(members), num_rows)]
    return groups


def _gathered_blocks(tables: Integers, first_blocks: Integers, num_blocks: Integers) -> Integers:
    """[rows, most blocks] page ids from each row's first visible page on, padded with page 0."""
    offsets = np.arange(num_blocks.max())
    columns = np.minimum(first_blocks[:, None] + offsets, tables.shape[1] - 1)
    return np.where(offsets < num_blocks[:, None], np.take_along_axis(tables, columns, 1), 0)


def _prompt_chunks(batch: Batch, block_size: int, window: int | None, dtype: torch.dtype) -> list[PromptChunk]:
    chunks, ends = [], np.cumsum(batch.num_queries)
    for row in np.flatnonzero(batch.num_queries > 1).tolist():
        start, count = int(batch.starts[row]), int(batch.num_queries[row])
        first_visible = 0 if window is None else max(start - window + 1, 0)
        first_block, last_block = first_visible // block_size, -(-(start + count) // block_size)
        blocks = torch.from_numpy(batch.block_tables[row, first_block:last_block])
        origin, first_token = first_block * block_size, int(ends[row]) - count
        chunks.append(PromptChunk(blocks, _slices(first_token, start, count, origin, window, dtype)))
    return chunks


def _slices(
    first_token: int, start: int, count: int, origin: int, window: int | None, dtype: torch.dtype
) -> list[ChunkSlice]:
    """Cut `count` queries from position `start` on. Gathered keys begin at position `origin`."""
    size = max(MAX_MASK_ELEMENTS // (start + count - origin), 16)
    slices = []
    for first in range(0, count, size):
        end = min(first + size, count)
        key_first = 0 if window is None else max(start + first - window + 1, origin) - origin
        key_end = start + end - origin
        is_plain = start + first == 0 and (window is None or end <= window)
        mask = None if is_plain else _causal_mask(start + first, start + end, origin + key_first, window, dtype)
        slices.append(ChunkSlice(first_token + first, first_token + end, key_first, key_end, mask))
    return slices


def _causal_mask(first: int, end: int, key_first: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """For queries at `first` .. `end` and keys at `key_first` .. `end`."""
    distances = torch.arange(first, end)[:, None] - torch.arange(key_first, end)
    is_visible = distances >= 0
    return _mask(is_visible if window is None else is_visible & (distances < window), dtype)


def _mask(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(is_visible.shape, dtype=dtype).masked_fill_(~is_visible, -torch.inf)
