"""Queries and keys turned, keys and values written to their pages, in one kernel: worker/model/rope.py says how turns
are meant, worker/attention/pages.py how pages hold numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.attention.pages import LARGEST_MULTIPLE
from worker.kernels.triton.ahead import Specimen
from worker.kernels.triton.float8 import in_8_bits
from worker.model.operations import Turns

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_ELEMENTS = 1 << 10
"""Of the heads that share a program; a decode step of one row still has several."""

PLAIN, E4M3, E5M2, INT8 = (tl.constexpr(number) for number in range(4))
ENCODINGS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2, torch.int8: 3}
MULTIPLES = tl.constexpr(float(LARGEST_MULTIPLE))
SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.bfloat16).tiny)


@triton.jit
def scales_of(x):
    """bfloat16 [heads]: that of each row of `x`; no number where the row has one that is none or infinite."""
    sizes = tl.abs(x)
    scales = tl.div_rn(tl.max(sizes, 1), MULTIPLES)
    scales = tl.where(scales < SMALLEST_SCALE, SMALLEST_SCALE, scales)
    are_finite = tl.min((sizes < float("inf")).to(tl.int32), 1) > 0
    return tl.where(are_finite, scales, float("nan")).to(tl.bfloat16)


@triton.jit
def multiples_of(x, scales):
    """The bytes of `x` [heads, d] by `scales` [heads], each the nearest: behind the point a float32 of this size has no
    places."""
    shifted = tl.div_rn(x, scales.to(tl.float32)[:, None]) + 12582912.0
    return (shifted.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)


@triton.jit
def put(pages, x, slot, heads, num_heads, head_dim, columns, is_there, ENCODING: tl.constexpr):
    """`x` [HEADS, SIZE] of a token to its place."""
    width = head_dim + 2 if ENCODING == INT8 else head_dim
    places = (slot * num_heads + heads) * width
    at = pages + places[:, None] + columns
    wide = x.to(tl.float32)
    if ENCODING == E4M3:
        tl.store(at, in_8_bits(wide, 3, -6, 448.0), is_there)
    elif ENCODING == E5M2:
        tl.store(at, in_8_bits(wide, 2, -14, 57344.0), is_there)
    elif ENCODING == INT8:
        scales = scales_of(wide)
        tl.store(at, multiples_of(wide, scales), is_there)
        # byte by byte: a head of odd size begins at an odd place
        bits, behind = scales.to(tl.uint16, bitcast=True), pages + places + head_dim
        tl.store(behind, (bits & 0xFF).to(tl.uint8), heads < num_heads)
        tl.store(behind + 1, (bits >> 8).to(tl.uint8), heads < num_heads)
    else:
        tl.store(at, x, is_there)


@triton.jit
def turned_heads(x, cos, sin, columns, is_there, rotary, HAS_TURNS: tl.constexpr):
    """`x` [HEADS, SIZE] are places of heads in memory; those of the other half of a turn come from the cache."""
    values = tl.load(x, is_there, 0.0)
    if HAS_TURNS:
        half = rotary // 2
        turns = columns < rotary
        others = tl.load(x + tl.where(columns < half, half, -half), is_there & turns, 0.0).to(tl.float32)
        c, s = tl.load(cos + columns, turns, 0.0), tl.load(sin + columns, turns, 0.0)
        wide = values.to(tl.float32) * c + others * s
        values = tl.where(turns, wide.to(values.dtype), values)
    return values


@triton.jit
def turn_and_write_heads(
    turned,
    v,
    cos,
    sin,
    slots,
    q,
    k_pages,
    v_pages,
    turned_stride,
    v_stride,
    num_heads,
    num_kv_heads,
    head_dim,
    rotary,
    HAS_TURNS: tl.constexpr,
    ENCODING: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`turned` [t, heads + kv heads, d] turned by `cos` and `sin` [t, rotary] into `q` [t, heads, d] and `k_pages`, and
    `v` [t, kv heads, d] into `v_pages`, both at `slots` [t]; a program has HEADS of one token, of one of the three.

    Moves t * (heads + 2 * kv heads) * d elements in and out, 8 * t * rotary bytes of angles, and does 3 operations with
    each element that turns: memory is the limit.
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, SIZE)[None, :]
    num_q_blocks, num_kv_blocks = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    cos += token * rotary
    sin += token * rotary
    if block < num_q_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        is_there = (heads < num_heads)[:, None] & (columns < head_dim)
        places = heads[:, None] * head_dim + columns
        values = turned_heads(turned + token * turned_stride + places, cos, sin, columns, is_there, rotary, HAS_TURNS)
        tl.store(q + token * num_heads * head_dim + places, values, is_there)
    else:
        is_key = block < num_q_blocks + num_kv_blocks
        first = num_q_blocks if is_key else num_q_blocks + num_kv_blocks
        heads = (block - first) * HEADS + tl.arange(0, HEADS)
        is_there = (heads < num_kv_heads)[:, None] & (columns < head_dim)
        places = heads[:, None] * head_dim + columns
        slot = tl.load(slots + token)
        if is_key:
            x = turned + token * turned_stride + num_heads * head_dim + places
            keys = turned_heads(x, cos, sin, columns, is_there, rotary, HAS_TURNS)
            put(k_pages, keys, slot, heads, num_kv_heads, head_dim, columns, is_there, ENCODING)
        else:
            values = tl.load(v + token * v_stride + places, is_there, 0.0)
            put(v_pages, values, slot, heads, num_kv_heads, head_dim, columns, is_there, ENCODING)


def can_turn_and_write(turned: Tensor, v: Tensor, turns: Turns | None, pages: tuple[Tensor, ...]) -> bool:
    if v.dtype not in TYPES or turned.dtype is not v.dtype or any(not each.is_contiguous() for each in pages):
        return False
    if any(each.dtype is not v.dtype and each.dtype not in ENCODINGS for each in pages):
        return False
    if turns is not None and any(each.dtype is not torch.float32 or not each.is_contiguous() for each in turns):
        return False
    return all(each.stride()[1:] == (v.shape[2], 1) for each in (turned, v))


def turn_and_write(
    turned: Tensor, v: Tensor, num_heads: int, turns: Turns | None, pages: tuple[Tensor, ...], slots: Tensor
) -> Tensor:
    """As `Operations` says it; `can_turn_and_write` says whether it can.

    Bytes are those of `write_pages`, but that compilers may round a product and its sum once, where torch does twice,
    so that a key may be its neighbour; and on a device torch divides by multiplying, so that a scale may.
    """
    num_tokens, num_kv_heads, head_dim = v.shape
    q = v.new_empty((num_tokens, num_heads, head_dim))
    size = triton.next_power_of_2(head_dim)
    heads = min(max(TILE_ELEMENTS // size, 1), triton.next_power_of_2(max(num_heads, num_kv_heads)))
    cos, sin = (slots, slots) if turns is None else turns
    encoding = ENCODINGS.get(pages[0].dtype, 0)
    turn_and_write_heads[(num_tokens, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))](
        turned,
        v,
        cos,
        sin,
        slots,
        q,
        *(each.view(torch.uint8) if encoding else each for each in pages),
        turned.stride(0),
        v.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        0 if turns is None else cos.shape[-1],
        HAS_TURNS=turns is not None,
        ENCODING=encoding,
        HEADS=heads,
        SIZE=size,
    )
    return q


def specimens() -> list[Specimen]:
    """Of Llama's heads, and of some that turn in part or not at all."""
    names = {
        0: "",
        **{number: f", pages {str(kv_type).removeprefix('torch.')}" for kv_type, number in ENCODINGS.items()},
    }
    return [
        *(_specimen(f"bf16, heads of 128{name}", 128, encoding) for encoding, name in names.items()),
        _specimen("bf16, heads of 256", 256, 0),
        _specimen("bf16, heads of 80", 80, 0),
        _specimen("bf16, heads of 64 that do not turn", 64, 0, has_turns=False),
    ]


def _specimen(name: str, head_dim: int, encoding: int, *, has_turns: bool = True) -> Specimen:
    size = triton.next_power_of_2(head_dim)
    angle, page = "*fp32" if has_turns else "*i64", "*u8" if encoding else "*bf16"
    pointers = dict.fromkeys(("turned", "v", "q"), "*bf16") | {"cos": angle, "sin": angle, "slots": "*i64"}
    strides = dict.fromkeys(("turned_stride", "v_stride", "head_dim", "rotary"), "i32:16")
    signature = pointers | {"k_pages": page, "v_pages": page, "num_heads": "i32", "num_kv_heads": "i32"} | strides
    constexprs = {"HAS_TURNS": has_turns, "ENCODING": encoding, "HEADS": TILE_ELEMENTS // size, "SIZE": size}
    return Specimen(name, turn_and_write_heads, signature, constexprs, is_decode=True)
