"""Paged attention on the CPU, through torch's fused kernel: decoding rows in padded groups, prompt chunks one by one.

The kernel knows no pages, so those of a group are gathered into one tensor, in the type of the queries. It knows no
softcap either: such layers are written out over the same groups and slices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.attention import Batch, LayerShape
from worker.attention.pages import read_pages
from worker.attention.plan import ChunkSlice, DecodeGroup, PromptChunk, StepMeta, wide_type


class CpuAttention:
    """Agrees with ReferenceAttention within the rounding of the type; scores and softmax are in float32 or wider."""

    reads_whole_pages = True

    def prepare(self, batch: Batch, block_size: int) -> StepMeta:
        return StepMeta(batch, block_size)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: StepMeta, layer: LayerShape) -> Tensor:
        plan = meta.plan(layer, q.dtype, q.shape[1], k_pages.shape[2])
        if len(plan.groups) == 1 and len(plan.groups[0].tokens) == len(q):
            return _attend_group(q, k_pages, v_pages, plan.groups[0], layer)
        out = torch.empty_like(q)
        for group in plan.groups:
            queries = q.index_select(0, group.tokens)
            out.index_copy_(0, group.tokens, _attend_group(queries, k_pages, v_pages, group, layer))
        for chunk in plan.chunks:
            _attend_chunk(q, k_pages, v_pages, chunk, layer, out)
        return out


def _attend_group(q: Tensor, k_pages: Tensor, v_pages: Tensor, group: DecodeGroup, layer: LayerShape) -> Tensor:
    """`q` [rows of the group, heads, d], as the result."""
    k, v = _rows(k_pages, group, q.dtype), _rows(v_pages, group, q.dtype)
    # the query heads that share a kv head stand where the kernel expects a sequence of queries
    folded = q.reshape(len(q), k.shape[1], -1, q.shape[2])
    if layer.softcap is None:
        result = scaled_dot_product_attention(folded, k, v, attn_mask=group.mask, scale=layer.scale)
    else:
        result = _capped_rows(folded[..., None, :], k, v, group.mask[..., None, :], layer.scale, layer.softcap)
    return result.reshape(q.shape)


def _rows(pages: Tensor, group: DecodeGroup, dtype: torch.dtype) -> Tensor:
    """[rows of the group, kv heads, keys, d]."""
    tokens = read_pages(pages, group.blocks, dtype)
    return tokens.view(len(group.tokens), -1, *tokens.shape[1:]).transpose(1, 2)


def _attend_chunk(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, chunk: PromptChunk, layer: LayerShape, out: Tensor
) -> None:
    k = read_pages(k_pages, chunk.blocks, q.dtype).transpose(0, 1).unsqueeze(1)
    v = read_pages(v_pages, chunk.blocks, q.dtype).transpose(0, 1).unsqueeze(1)
    if layer.softcap is not None:
        k, v = _wide(k), _wide(v)
    for part in chunk.slices:
        queries = q[part.first : part.end].flip(0) if part.is_backward else q[part.first : part.end]
        folded = queries.view(-1, len(k), q.shape[1] // len(k), q.shape[2]).permute(1, 2, 0, 3)
        keys, values = k[:, :, part.key_first : part.key_end], v[:, :, part.key_first : part.key_end]
        result = _attend_slice(folded, keys, values, part, layer).permute(2, 0, 1, 3).flatten(1, 2)
        out[part.first : part.end] = result.flip(0) if part.is_backward else result


def _attend_slice(q: Tensor, k: Tensor, v: Tensor, part: ChunkSlice, layer: LayerShape) -> Tensor:
    """`q` [kv heads, group, queries, d], `k` and `v` [kv heads, 1, keys, d]."""
    if layer.softcap is not None:
        return _capped(q, k.squeeze(1), v.squeeze(1), part.mask, layer.scale, layer.softcap)
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return scaled_dot_product_attention(q, k, v, attn_mask=part.mask, is_causal=part.is_causal, scale=layer.scale)


def _capped_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """`_capped` of each row: all rows at once would need keys and values copied into another order."""
    rows = [_capped(q[row], _wide(k[row]), _wide(v[row]), mask[row], scale, softcap) for row in range(len(q))]
    return torch.stack(rows)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """`q` [kv heads, group, queries, d]; `k` and `v` [kv heads, keys, d] in the type to compute in."""
    folded = q.flatten(1, 2).to(k.dtype)
    scores = (folded @ k.mT).mul_(scale / softcap).tanh_().mul_(softcap).view(*q.shape[:-1], -1)
    if mask is not None:
        scores.add_(mask)
    result = scores.softmax(-1).flatten(1, 2) @ v
    return result.view(q.shape).to(q.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_type(x.dtype))
