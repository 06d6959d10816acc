"""The oracle: attention written out, one row after the other, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.attention import Batch, LayerShape
from worker.attention.pages import read_pages


class ReferenceAttention:
    """All in float32 or wider, rounded to the type of the queries at the end. Slow on purpose: nothing is clever."""

    reads_whole_pages = True

    def prepare(self, batch: Batch, block_size: int) -> Batch:
        return batch

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: Batch, layer: LayerShape) -> Tensor:
        assert layer.window is None or meta.num_keys is None
        outputs, first = [], 0
        lengths = meta.starts + meta.num_queries if meta.num_keys is None else meta.num_keys
        wide = torch.promote_types(q.dtype, torch.float32)
        for row, count in enumerate(meta.num_queries.tolist()):
            start, length = int(meta.starts[row]), int(lengths[row])
            table = torch.from_numpy(meta.block_tables[row]).to(q.device)
            k, v = (_gather(pages, table, length, wide) for pages in (k_pages, v_pages))
            outputs.append(_attend_row(q[first : first + count], k, v, start, layer, meta.num_keys is None))
            first += count
        return torch.cat(outputs)


def _gather(pages: Tensor, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` tokens of the row with this block table, [length, kv heads, d]."""
    return read_pages(pages, table[: -(-length // pages.shape[1])], dtype)[:length]


def _attend_row(q: Tensor, k: Tensor, v: Tensor, start: int, layer: LayerShape, is_causal: bool) -> Tensor:
    """`q` [n, heads, d] at positions from `start` on; `k`, `v` [keys, kv heads, d] at positions from 0 on."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.to(k.dtype), k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    query_positions = torch.arange(start, start + len(q), device=q.device)
    distances = torch.arange(len(k), device=q.device) - query_positions[:, None]
    if layer.slopes is not None:
        scores = scores + layer.slopes.to(scores)[:, None, None] * distances
    if layer.bias is not None:
        reach = layer.bias.shape[1] // 2
        scores = scores + layer.bias.to(scores)[:, distances.clamp(-reach, reach) + reach]
    if is_causal:
        scores = scores.masked_fill(distances > 0, -torch.inf)
    if layer.window is not None:
        scores = scores.masked_fill(distances <= -layer.window, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
