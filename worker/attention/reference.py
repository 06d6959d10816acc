"""The oracle: attention written out, one row after the other, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.attention import Batch, LayerShape


class ReferenceAttention:
    """Scores in the type of the queries, softmax in float32 or wider. Slow on purpose: nothing here is clever."""

    def prepare(self, batch: Batch, block_size: int) -> Batch:
        return batch

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: Batch, layer: LayerShape) -> Tensor:
        outputs, first = [], 0
        for row, count in enumerate(meta.num_queries.tolist()):
            start = int(meta.starts[row])
            table = torch.from_numpy(meta.block_tables[row]).to(q.device)
            k = _gather(k_pages, table, start + count)
            v = _gather(v_pages, table, start + count)
            outputs.append(_attend_row(q[first : first + count], k, v, start, layer))
            first += count
        return torch.cat(outputs)


def _gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the row with this block table, [length, kv heads, d]."""
    num_blocks = -(-length // pages.shape[1])
    return pages[table[:num_blocks]].flatten(0, 1)[:length]


def _attend_row(q: Tensor, k: Tensor, v: Tensor, start: int, layer: LayerShape) -> Tensor:
    """`q` [n, heads, d] at positions start .. start + n - 1; `k`, `v` [start + n, kv heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
    query_positions = torch.arange(start, start + len(q), device=q.device)
    distances = query_positions[:, None] - torch.arange(len(k), device=q.device)
    hidden = distances < 0
    if layer.window is not None:
        hidden = hidden | (distances >= layer.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1, dtype=wide).to(q.dtype), v)
