"""RMS and layer norms over the last dimension, alone or behind a sum, with the roundings of worker/model/layers.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.ahead import Specimen
from worker.model.spec import Norm
from worker.model.weights import NormWeights

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 1 << 15
"""A row is held in the registers of one program."""

TILE_ELEMENTS = 1 << 10
"""Short rows, which are heads, share a program up to this many elements."""


@triton.jit
def normalise_rows(
    x,
    part,
    sums,
    weight,
    bias,
    out,
    num_rows,
    num_inner,
    outer_stride,
    inner_stride,
    size,
    weight_stride,
    eps,
    IS_RMS: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_PART: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Row r of `out` [num_rows, size] from row (r // num_inner, r % num_inner) of `x`, whose weights are that many
    `weight_stride` on; with HAS_PART from the sum with `part`, which goes to `sums`.

    Moves 2 * num_rows * size elements, or 4 with a sum, and does about 5 operations with each (layer norm 8): memory
    is the limit. Every row is read once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    is_there = (rows < num_rows) & (columns < size)
    outer, inner = rows // num_inner, rows % num_inner
    values = tl.load(x + outer * outer_stride + inner * inner_stride + columns, is_there, 0.0)
    if HAS_PART:
        added = values.to(tl.float32) + tl.load(part + rows * size + columns, is_there, 0.0).to(tl.float32)
        values = added.to(out.dtype.element_ty)
        tl.store(sums + rows * size + columns, values, is_there)
    wide = values.to(tl.float32)
    if not IS_RMS:
        wide -= tl.sum(wide, 1)[:, None] / size
        wide = tl.where(is_there, wide, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1) / size + eps)[:, None]
    places = inner * weight_stride + columns
    if ROUNDS_FIRST:
        wide = wide.to(out.dtype.element_ty).to(tl.float32)
    wide *= tl.load(weight + places, is_there, 0.0).to(tl.float32)
    if HAS_BIAS:
        if ROUNDS_FIRST:
            wide = wide.to(out.dtype.element_ty).to(tl.float32)
        wide += tl.load(bias + places, is_there, 0.0).to(tl.float32)
    tl.store(out + rows * size + columns, wide.to(out.dtype.element_ty), is_there)


def can_normalise(x: Tensor, weights: NormWeights, kind: Norm) -> bool:
    weight, bias, size = weights.weight, weights.bias, x.shape[-1]
    types = (x.dtype, torch.float32) if kind is Norm.RMS else (x.dtype,)
    if x.dtype not in TYPES or weight.dtype not in types or not 0 < size <= MAX_SIZE or x.dim() not in (2, 3):
        return False
    has_fitting_bias = bias is None or (bias.dtype is x.dtype and bias.is_contiguous())
    has_one_each = weight.dim() == 1 or (x.dim() == 3 and weight.shape[0] == x.shape[1])
    return has_fitting_bias and has_one_each and weight.is_contiguous() and x.stride(-1) == 1


def normalise(
    x: Tensor, weights: NormWeights, eps: float, kind: Norm, part: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` [t, size] or [t, heads, size] of any stride between rows, or where there is a `part` [t, size] their sum, and
    the norm of it, both contiguous; `can_normalise` says whether it can."""
    weight, size, is_rms = weights.weight, x.shape[-1], kind is Norm.RMS
    bias = None if is_rms else weights.bias
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = x if part is None else torch.empty_like(out)
    num_rows, num_inner = x.numel() // size, x.shape[1] if x.dim() == 3 else 1
    rows, tile = tile_of(size)
    normalise_rows[(triton.cdiv(num_rows, rows),)](
        x,
        x if part is None else part,
        sums,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        num_inner,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        size,
        size if weight.dim() == 2 else 0,
        eps,
        IS_RMS=is_rms,
        ROUNDS_FIRST=weight.dtype is x.dtype and x.dtype is not torch.float32 if is_rms else weight.dim() == 2,
        HAS_PART=part is not None,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        SIZE=tile,
        num_warps=num_warps_of(rows * tile),
    )
    return sums, out


def tile_of(size: int) -> tuple[int, int]:
    """Rows of a program, and a power of two for the elements of each."""
    tile = triton.next_power_of_2(size)
    return max(TILE_ELEMENTS // tile, 1), tile


def num_warps_of(elements: int) -> int:
    """So many that a thread has about sixteen of a power of two of elements: of 16 bits, two loads of 16 bytes."""
    return min(max(elements // 512, 1), 16)


def specimens() -> list[Specimen]:
    return [
        _specimen("bf16, hidden 4096, sum", 4096, IS_RMS=True, ROUNDS_FIRST=True, HAS_PART=True),
        _specimen("bf16, hidden 3584, sum, float32 weight", 3584, "*fp32", IS_RMS=True, HAS_PART=True),
        _specimen("bf16, heads of 128", 128, IS_RMS=True, ROUNDS_FIRST=True),
        _specimen("bf16, hidden 14848, layer norm, bias", 14848, HAS_BIAS=True),
        _specimen("bf16, hidden 32768", MAX_SIZE, IS_RMS=True, ROUNDS_FIRST=True),
    ]


def _specimen(name: str, size: int, weight: str = "*bf16", **chosen: bool) -> Specimen:
    pointers = dict.fromkeys(("x", "part", "sums", "bias", "out"), "*bf16") | {"weight": weight}
    sizes = {"num_rows": "i32", "num_inner": "i32"} | dict.fromkeys(
        ("outer_stride", "inner_stride", "size", "weight_stride"), "i32:16"
    )
    flags = dict.fromkeys(("IS_RMS", "ROUNDS_FIRST", "HAS_PART", "HAS_BIAS"), False) | chosen
    rows, tile = tile_of(size)
    constexprs = flags | {"ROWS": rows, "SIZE": tile}
    signature = pointers | sizes | {"eps": "fp32"}
    return Specimen(name, normalise_rows, signature, constexprs, is_decode=True, num_warps=num_warps_of(rows * tile))
