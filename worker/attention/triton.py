"""Paged attention on a GPU by kernels of our own, which read pages where they are: all that a layer may ask for."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from worker.attention import Batch, DeviceBatch, Integers, LayerShape
from worker.attention import triton_kernels as kernels
from worker.attention.triton_kernels import attention_kernel, combine_kernel
from worker.kernels.triton.ahead import TARGETS, Specimen

AS_THEY_ARE, E4M3_BITS, MULTIPLES = (int(kind) for kind in (kernels.AS_THEY_ARE, kernels.E4M3_BITS, kernels.MULTIPLES))

MIN_TILE = 16
"""Rows of the smallest product of matrices that tensor cores do."""

MAX_FEW = 64
"""Rows of the largest tile that a row's tokens are put into whatever their number, so that its keys may be cut."""

WANTED_PROGRAMS = 512
"""Programs that keep a GPU's memory busy: three or four for each of the 108 to 148 processors. With fewer rows than
that, the keys of each are cut, and what that costs, writing and reading parts, is small beside the keys."""

MAX_PARTS = 64
"""Parts of a row's keys at most, which one program puts together."""


class Tile(NamedTuple):
    """Queries (times the heads that share a kv head) and keys of one product, and how it is done."""

    num_queries: int
    num_keys: int
    num_warps: int
    num_stages: int


class TritonAttention:
    """Agrees with ReferenceAttention within the rounding of the type; scores and sums are float32, and the weights of
    values have the type of the queries.

    Rows whose tokens fit into one tile are one launch, all others another one. `num_parts` cuts the keys of the former
    into so many parts, whatever their number.
    """

    reads_whole_pages = False

    def __init__(self, num_parts: int | None = None) -> None:
        self._num_parts = num_parts

    def prepare(self, batch: Batch | DeviceBatch, block_size: int) -> DeviceBatch:
        return batch if isinstance(batch, DeviceBatch) else to_device(batch)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DeviceBatch, layer: LayerShape) -> Tensor:
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not len(q):
            return out
        step = _Step(q, k_pages, v_pages, out, meta, layer)
        step.attend_short_rows(self._num_parts)
        step.attend_long_rows()
        return out


class _Step:
    """One layer's attention of one step."""

    def __init__(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, out: Tensor, meta: DeviceBatch, layer: LayerShape
    ) -> None:
        assert k_pages.stride() == v_pages.stride()
        self.q, self.out, self.meta, self.layer, self.kind = q, out, meta, layer, kind_of(k_pages)
        if self.kind == E4M3_BITS:
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
        self.k_pages, self.v_pages, self.page_size, self.num_kv_heads = k_pages, v_pages, *k_pages.shape[1:3]
        self.num_rows, self.num_heads, self.head_dim = len(meta.starts), *q.shape[1:]
        self.group = self.num_heads // self.num_kv_heads
        shape = self.group, self.head_dim, q.dtype.itemsize
        self.few = few_tile(*shape, meta.max_queries, k_pages.dtype.itemsize, self.kind)
        self.many = many_tile(*shape, self.kind, has_much_memory(q))

    def attend_short_rows(self, num_parts: int | None) -> None:
        num_parts = num_parts or choose_num_parts(self.num_rows * self.num_kv_heads, self.meta, self.layer, self.few)
        if num_parts == 1:
            return self._launch(self.few, self.num_rows)
        tile_queries = self.few.num_queries // self.group
        parts = self.q.new_empty(
            (self.num_rows, tile_queries, self.num_heads, num_parts, self.head_dim), dtype=torch.float32
        )
        logs = parts.new_empty(parts.shape[:-1])
        self._launch(self.few, self.num_rows, parts=parts, logs=logs)
        combine_kernel[(self.num_rows * tile_queries, self.num_heads)](
            parts,
            logs,
            self.out,
            self.meta.query_starts,
            num_parts,
            NUM_HEADS=self.num_heads,
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_of(self.head_dim),
            TILE_QUERIES=tile_queries,
            MAX_PARTS=MAX_PARTS,
            num_stages=1,
        )

    def attend_long_rows(self) -> None:
        most = self.few.num_queries // self.group
        if self.meta.max_queries > most:
            num_tiles = len(self.q) // (self.many.num_queries // self.group) + self.num_rows
            self._launch(self.many, num_tiles, min_queries=most + 1)

    def _launch(
        self, tile: Tile, num_tiles: int, min_queries: int = 1, parts: Tensor | None = None, logs: Tensor | None = None
    ) -> None:
        meta, layer = self.meta, self.layer
        attention_kernel[(num_tiles * self.num_kv_heads, 1 if parts is None else parts.shape[3])](
            self.q,
            self.k_pages,
            self.v_pages,
            self.out,
            parts,
            logs,
            meta.rows,
            meta.query_starts,
            meta.starts,
            meta.num_keys,
            meta.tables,
            layer.slopes,
            layer.bias,
            layer.scale,
            layer.softcap,
            layer.window,
            None if layer.bias is None else layer.bias.shape[1] // 2,
            self.num_rows,
            self.q.stride(0),
            self.k_pages.stride(0),
            self.k_pages.stride(1),
            meta.tables.stride(0),
            **constants(self.num_kv_heads, self.group, self.head_dim, self.page_size, self.kind, tile, min_queries),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def to_device(batch: Batch) -> DeviceBatch:
    """The same step on the device of its slots."""

    def moved(values: Integers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(batch.slots.device)

    lengths = batch.starts + batch.num_queries if batch.num_keys is None else batch.num_keys
    return DeviceBatch(
        rows=moved(np.arange(len(batch.starts))),
        query_starts=moved(np.concatenate(([0], np.cumsum(batch.num_queries)))),
        starts=moved(batch.starts),
        tables=moved(batch.block_tables),
        slots=batch.slots,
        max_queries=int(batch.num_queries.max(initial=0)),
        max_keys=int(lengths.max(initial=0)),
        num_keys=None if batch.num_keys is None else moved(batch.num_keys),
        is_fresh=not batch.starts.any(),
    )


def few_tile(group: int, head_dim: int, num_bytes: int, max_queries: int, page_bytes: int, kind: int) -> Tile:
    """For rows of few tokens: all of a row's where they fit, else at least one. Keys come from memory as fast as they
    can: two tiles of 32 KiB, of keys and values each, are on their way or in use, three times in a processor. There are
    two sizes, so that guesses of any number share what was compiled."""
    num_queries = _rows_of(group * max_queries if group * max_queries <= MAX_FEW else group)
    num_stages = 2 if num_queries >= MAX_FEW else 4 if page_bytes == 1 else 3
    num_keys = num_keys_of_tile(head_dim, num_bytes, kind)
    return Tile(num_queries, num_keys, 4 if num_queries == MIN_TILE else 8, num_stages)


def _rows_of(num_queries: int) -> int:
    """More than MAX_FEW only where so many heads share a kv head."""
    return MIN_TILE if num_queries <= MIN_TILE else max(MAX_FEW, next_power_of_2(num_queries))


def many_tile(group: int, head_dim: int, num_bytes: int, kind: int, has_much_memory: bool) -> Tile:
    """For prompts: 128 queries, so that each key that is read does as much as tensor cores need, two warp groups of 64
    on sm_90; fewer where sums of 128 would not fit into registers. Where there is little memory keys come in smaller
    tiles, of which three fit again: with two large ones registers are spilled."""
    most = 32 if num_bytes == 4 else 128 if head_dim <= 128 else 64
    num_queries = max(most, next_power_of_2(group))
    num_keys = num_keys_of_tile(head_dim, num_bytes, kind)
    num_keys, num_stages = (num_keys, 3) if has_much_memory else (min(num_keys, 32), 3 if head_dim <= 128 else 2)
    return Tile(num_queries, num_keys, 4 if num_queries <= 32 else 8, num_stages)


def num_keys_of_tile(head_dim: int, num_bytes: int, kind: int) -> int:
    """64 of heads of 128 in 16 bits; fewer where they are larger or pass through registers on their way, as those of
    int8 and those that no tensor core multiplies."""
    if num_bytes == 4:
        return 16
    return 64 if head_dim <= 128 and kind != MULTIPLES else 32


def block_of(head_dim: int) -> int:
    return max(int(next_power_of_2(head_dim)), MIN_TILE)


def constants(
    num_kv_heads: int, group: int, head_dim: int, page_size: int, kind: int, tile: Tile, min_queries: int
) -> dict[str, int]:
    """Those of attention_kernel."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_of(head_dim),
        "BLOCK_M": tile.num_queries,
        "BLOCK_N": tile.num_keys,
        "PAGE_SIZE": page_size,
        "KIND": kind,
        "MIN_QUERIES": min_queries,
    }


def choose_num_parts(num_programs: int, meta: DeviceBatch, layer: LayerShape, tile: Tile) -> int:
    """By what the host knows, so that a recorded step is right for rows of any length up to its bound."""
    num_visible = meta.max_keys if layer.window is None else min(meta.max_keys, layer.window + meta.max_queries)
    most = min(int(cdiv(num_visible, tile.num_keys)), MAX_PARTS)
    return max(min(WANTED_PROGRAMS // num_programs, most), 1)


def kind_of(pages: Tensor) -> int:
    """How kernels read pages of this type on this device."""
    if pages.dtype is torch.int8:
        return MULTIPLES
    is_known = pages.dtype is not torch.float8_e4m3fn or not pages.is_cuda or capability_of(pages.device) >= (8, 9)
    return AS_THEY_ARE if is_known else E4M3_BITS


def has_much_memory(q: Tensor) -> bool:
    """Whether a program has 160 KiB of shared memory, as on GPUs made for servers; others have 99."""
    return not q.is_cuda or capability_of(q.device) in ((8, 0), (9, 0), (10, 0), (10, 3))


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Asked for once, not in every layer of a step."""
    return torch.cuda.get_device_capability(device)


def specimens() -> list[Specimen]:
    """In bfloat16, with eight kv heads and pages of 16 tokens where a name says nothing else."""
    return [
        *(
            _specimen(f"decode, {head_dim}, group {group}", head_dim, group)
            for head_dim in (64, 128)
            for group in (1, 4, 8)
        ),
        _specimen("decode, 128, group 4, pages of 64", 128, 4, page_size=64),
        _specimen("decode, 128, group 4, parts", 128, 4, has=PARTS),
        _specimen("decode, 128, group 4, float8 pages", 128, 4, "*fp8e4nv", targets=("sm_90", "sm_100")),
        _specimen("decode, 128, group 4, float8 pages, parts", 128, 4, "*fp8e4nv", PARTS, targets=("sm_90", "sm_100")),
        _specimen("decode, 128, group 4, float8 pages as bytes", 128, 4, "*u8", targets=("sm_80",)),
        _specimen("decode, 128, group 4, int8 pages", 128, 4, "*i8"),
        _specimen("decode, 128, group 1, slopes", 128, 1, has=("slopes",)),
        _specimen("decode, 256, group 2, softcap, window", 256, 2, has=("softcap", "window")),
        _specimen("decode, 64, group 1, bias", 64, 1, has=BIAS),
        _specimen("decode, 64, group 1, all keys", 64, 1, has=("num_keys",)),
        _specimen("decode, 128, group 4, float32, parts", 128, 4, "*fp32", PARTS),
        _specimen("guesses, 128, group 4, parts", 128, 4, has=PARTS, max_queries=6),
        _specimen("guesses, 256, group 2", 256, 2, max_queries=12),
        _specimen("prompt, 128, group 4", 128, 4, max_queries=PROMPT),
        _specimen("prompt, 128, group 4, little memory", 128, 4, max_queries=PROMPT, has_much_memory=False),
        _specimen("prompt, 80, group 1, float32", 80, 1, "*fp32", max_queries=PROMPT),
        _specimen("prompt, 256, group 2, softcap, window", 256, 2, has=("softcap", "window"), max_queries=PROMPT),
        _specimen("prompt, 64, group 1, bias, all keys", 64, 1, has=(*BIAS, "num_keys"), max_queries=PROMPT),
        _combining_specimen(),
    ]


PARTS, BIAS, PROMPT = ("parts", "part_logs"), ("bias", "reach"), 1000
KINDS = {"*u8": E4M3_BITS, "*i8": MULTIPLES}
OPTIONAL = {
    "parts": "*fp32",
    "part_logs": "*fp32",
    "num_keys": "*i32",
    "slopes": "*fp32",
    "bias": "*fp32",
    "softcap": "fp32",
    "window": "i32",
    "reach": "i32",
}


def _specimen(
    name: str,
    head_dim: int,
    group: int,
    pages: str = "*bf16",
    has: tuple[str, ...] = (),
    page_size: int = 16,
    max_queries: int = 1,
    targets: tuple[str, ...] = tuple(TARGETS),
    has_much_memory: bool = True,
) -> Specimen:
    """With those of the optional arguments that `has` names."""
    dtype, kind = (torch.float32 if pages == "*fp32" else torch.bfloat16), KINDS.get(pages, AS_THEY_ARE)
    page_bytes, is_prompt = (dtype.itemsize if pages in ("*fp32", "*bf16") else 1), max_queries == PROMPT
    tile, min_queries = few_tile(group, head_dim, dtype.itemsize, max_queries, page_bytes, kind), 1
    if is_prompt:
        min_queries = tile.num_queries // group + 1
        tile = many_tile(group, head_dim, dtype.itemsize, kind, has_much_memory)
    numbers = "*fp32" if dtype is torch.float32 else "*bf16"
    signature = {"q": numbers, "out": numbers, "k_pages": pages, "v_pages": pages, "scale": "fp32", "num_rows": "i32"}
    signature |= dict.fromkeys(("rows", "query_starts", "starts", "tables"), "*i32")
    signature |= dict.fromkeys(("q_stride", "page_stride", "place_stride", "table_stride"), "i32:16")
    signature |= {each: OPTIONAL[each] for each in has}
    constexprs: dict[str, int | None] = {each: None for each in OPTIONAL if each not in has}
    constexprs |= constants(8, group, head_dim, page_size, kind, tile, min_queries)
    return Specimen(
        name, attention_kernel, signature, constexprs, not is_prompt, tile.num_warps, tile.num_stages, targets
    )


def _combining_specimen() -> Specimen:
    signature = {"parts": "*fp32", "part_logs": "*fp32", "out": "*bf16", "query_starts": "*i32", "num_parts": "i32"}
    sizes = {"NUM_HEADS": 32, "HEAD_DIM": 128, "BLOCK_D": 128, "TILE_QUERIES": 4, "MAX_PARTS": MAX_PARTS}
    return Specimen("128", combine_kernel, signature, sizes, is_decode=True, num_stages=1)
