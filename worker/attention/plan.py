"""What of a step on the CPU all layers of one shape share: the pages to gather, and masks over padding and distance.

Worked out when the first layer of a shape asks. Rows of one query form padded groups, other rows are cut along queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.attention import Batch, Integers, LayerShape

GROUP_GROWTH = 1.3
"""Rows share a group while the longest has at most this many times the pages of the shortest."""

SMALL_ROW_BLOCKS = 8
"""Rows with up to this many pages are one group whatever their lengths."""

MAX_GATHERED_TOKENS = 16_384
"""Tokens of keys copied at a time; beyond it a group is split, so that copies stay small beside the pool."""

MAX_MASK_ELEMENTS = 1 << 21
"""Elements of the mask of one prompt chunk, or of its scores in all heads where a softcap has them written out; longer
chunks are cut along the queries."""

NO_WINDOW = 1 << 62
"""A window that no request outgrows."""

MIN_SLICE_QUERIES = 16
"""Queries of a slice, however many keys they see: fewer would read all keys for little work."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """b rows of one query each. `tokens` [b] their places among the step's tokens, `blocks` [b * n] pages to gather.

    `mask` [b, kv heads, queries that share one, n * page size] is what a head adds to its scores, minus infinity where
    no key is visible; [b, 1, 1, n * page size] where all heads add the same.
    """

    tokens: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class ChunkSlice:
    """Queries `first` .. `end` of a step that see keys `key_first` .. `key_end` of what their row gathered.

    `mask` [queries, keys] as in DecodeGroup; None hides nothing, or with `is_causal` what is plain causal over equal
    ranges. With `is_backward` it is [kv heads, queries that share one, queries, keys] and its first query is the last.
    """

    first: int
    end: int
    key_first: int
    key_end: int
    mask: Tensor | None
    is_causal: bool = False
    is_backward: bool = False


@dataclass(frozen=True, slots=True)
class PromptChunk:
    blocks: Tensor
    slices: list[ChunkSlice]


@dataclass(frozen=True, slots=True)
class Plan:
    groups: list[DecodeGroup]
    chunks: list[PromptChunk]


class StepMeta:
    """Plans of one step by layer shape, made when the first layer of that shape asks."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        self.batch, self.block_size = batch, block_size
        self._plans: dict[LayerShape, Plan] = {}

    def plan(self, layer: LayerShape, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> Plan:
        if layer not in self._plans:
            planner = _Planner(self.batch, self.block_size, layer, dtype, num_heads, num_kv_heads)
            self._plans[layer] = Plan(planner.groups(), planner.chunks())
        return self._plans[layer]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Planner:
    """Works out the plan of a step for layers of one shape."""

    batch: Batch
    block_size: int
    layer: LayerShape
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        assert self.layer.window is None or self.is_causal

    @property
    def is_causal(self) -> bool:
        return self.batch.num_keys is None

    @property
    def window(self) -> int:
        """The most keys that a query sees."""
        return self.layer.window or NO_WINDOW

    @property
    def differs_by_head(self) -> bool:
        return self.layer.slopes is not None or self.layer.bias is not None

    def groups(self) -> list[DecodeGroup]:
        rows = np.flatnonzero(self.batch.num_queries == 1)
        if not len(rows):
            return []
        positions, lengths = self.batch.starts[rows], self._lengths()[rows]
        first_visible = np.maximum(positions + 1 - self.window, 0)
        first_blocks = first_visible // self.block_size
        num_blocks = -(-lengths // self.block_size) - first_blocks
        tokens = np.cumsum(self.batch.num_queries)[rows] - 1
        groups = []
        for members in _similar(num_blocks, self.block_size):
            blocks = _gathered_blocks(
                self.batch.block_tables[rows[members]], first_blocks[members], num_blocks[members]
            )
            keys = first_blocks[members, None] * self.block_size + np.arange(blocks.shape[1] * self.block_size)
            is_visible = (keys < lengths[members, None]) & (keys >= first_visible[members, None])
            mask = self._decode_mask(keys - positions[members, None], is_visible)
            groups.append(DecodeGroup(torch.from_numpy(tokens[members]), torch.from_numpy(blocks.ravel()), mask))
        return groups

    def chunks(self) -> list[PromptChunk]:
        chunks, ends, lengths = [], np.cumsum(self.batch.num_queries), self._lengths()
        for row in np.flatnonzero(self.batch.num_queries > 1).tolist():
            start, end, length = int(self.batch.starts[row]), int(ends[row]), int(lengths[row])
            first_block, last_block = max(start + 1 - self.window, 0) // self.block_size, -(-length // self.block_size)
            blocks = torch.from_numpy(self.batch.block_tables[row, first_block:last_block])
            positions = range(start, start + int(self.batch.num_queries[row]))
            slices = self._slices(positions, end - positions.stop, first_block * self.block_size, length)
            chunks.append(PromptChunk(blocks, slices))
        return chunks

    def _lengths(self) -> Integers:
        """[n] keys that the last query of each row sees, or would without a window."""
        if self.batch.num_keys is not None:
            return self.batch.num_keys
        return self.batch.starts + self.batch.num_queries

    def _slices(self, positions: range, shift: int, origin: int, length: int) -> list[ChunkSlice]:
        """Cut queries at `positions`, in the step `shift` further on, for keys gathered from `origin` to `length`."""
        heads = 1 if self.layer.softcap is None else self.num_heads
        size = max(MAX_MASK_ELEMENTS // ((length - origin) * heads), MIN_SLICE_QUERIES)
        parts = [positions[begin : begin + size] for begin in range(0, len(positions), size)]
        return [self._slice(part, shift, origin, length) for part in parts]

    def _slice(self, queries: range, shift: int, origin: int, length: int) -> ChunkSlice:
        keys = range(max(queries.start + 1 - self.window, 0), queries.stop) if self.is_causal else range(length)
        is_plain = self._is_plain_causal(queries)
        hides_nothing = not self.is_causal and not self.differs_by_head
        return ChunkSlice(
            first=queries.start + shift,
            end=queries.stop + shift,
            key_first=keys.start - origin,
            key_end=keys.stop - origin,
            mask=None if is_plain or hides_nothing else self._chunk_mask(queries, keys),
            is_causal=is_plain,
            is_backward=self.differs_by_head,
        )

    def _is_plain_causal(self, queries: range) -> bool:
        is_additive = self.differs_by_head or self.layer.softcap is not None
        return self.is_causal and not is_additive and queries.start == 0 and queries.stop <= self.window

    def _chunk_mask(self, queries: range, keys: range) -> Tensor:
        lowest, band = self._band
        begin = keys.start - queries[-1] - lowest
        backward = band[:, begin : begin + len(queries) + len(keys) - 1].unfold(1, len(keys), 1)
        if not self.differs_by_head:
            # not flip, which would keep the layout of overlapping windows, slow to read
            return backward[0].index_select(0, torch.arange(len(queries) - 1, -1, -1))
        return backward.view(self.num_kv_heads, -1, len(queries), len(keys))

    @cached_property
    def _band(self) -> tuple[int, Tensor]:
        """The lowest of key position - query position in any chunk, and what is added from there on, [heads or 1, n].

        All of a mask depends on that difference alone, so each query's row of it is the next one's moved by one key.
        With the last query first the rows are windows over the band, and masks that differ by head need no memory of
        their own: for 64 heads and 2,048 tokens it would be a gigabyte.
        """
        is_chunk = self.batch.num_queries > 1
        starts = self.batch.starts[is_chunk]
        lowest = 1 - int((starts + self.batch.num_queries[is_chunk]).max())
        distances = torch.arange(lowest, int((self._lengths()[is_chunk] - starts).max()))
        is_visible = distances > -self.window
        if self.is_causal:
            is_visible &= distances <= 0
        return lowest, self._added(distances, is_visible)

    def _decode_mask(self, distances: Integers, is_visible: npt.NDArray[np.bool_]) -> Tensor:
        """By row and key, both [b, keys]; DecodeGroup says how it looks."""
        added = self._added(torch.from_numpy(distances.ravel()), torch.from_numpy(is_visible.ravel()))
        num_rows, num_keys = distances.shape
        by_row = added.view(-1, num_rows, num_keys).transpose(0, 1)
        return by_row.view(num_rows, self.num_kv_heads if self.differs_by_head else 1, -1, num_keys)

    def _added(self, distances: Tensor, is_visible: Tensor) -> Tensor:
        """What is added to scores at `distances` [n], which are key position - query position; [heads or 1, n]."""
        if not self.differs_by_head:
            return torch.zeros((1, len(distances)), dtype=self.dtype).masked_fill_(~is_visible, -torch.inf)
        # the kernel takes a float32 mask beside queries of 16 bits, in which far distances would lose their last digits
        # (bfloat16 tells 1,000 from 1,004 only); beside float64 it reads it as if it were float64
        wide = wide_type(self.dtype)
        added = torch.zeros((self.num_heads, len(distances)), dtype=wide)
        if self.layer.slopes is not None:
            added += self.layer.slopes.to(wide)[:, None] * distances
        if self.layer.bias is not None:
            reach = self.layer.bias.shape[1] // 2
            added += self.layer.bias.to(wide)[:, distances.clamp(-reach, reach) + reach]
        return added.masked_fill_(~is_visible, -torch.inf)


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
