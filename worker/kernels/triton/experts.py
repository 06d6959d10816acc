"""The products of a mixture of experts, each over all groups of rows at once: what worker/model/moe.py says, with the
gathering of rows, the activation and the routing weights done where rows are read and results written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.activations import NUMBERS, TritonActivation, activated
from worker.kernels.triton.ahead import Specimen
from worker.model.spec import Activation

TYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_ACTIVATION = -1
NEIGHBOURS = 8
"""Tiles of rows that share the same columns of a matrix while these are in the second-level cache."""


@triton.jit
def tile_of(ends, pid, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile of rows, where its rows begin and where its expert's end, which is before that for one of
    the tiles that are left over. Groups are cut into tiles one after the other; `ends` [experts] is where each ends."""
    numbers = tl.arange(0, EXPERTS)
    stops = tl.load(ends + numbers, numbers < num_experts, 0)
    starts = tl.load(ends + numbers - 1, (numbers > 0) & (numbers < num_experts), 0)
    tiles_before = tl.cumsum(tl.where(numbers < num_experts, tl.cdiv(stops - starts, ROWS), 0), 0)
    expert = tl.sum((tiles_before <= pid).to(tl.int32), 0)
    is_mine, is_earlier = numbers == expert, numbers == expert - 1
    start = tl.sum(tl.where(is_mine, starts, 0), 0)
    first_tile = tl.sum(tl.where(is_earlier, tiles_before, 0), 0)
    return expert, start + (pid - first_tile) * ROWS, tl.sum(tl.where(is_mine, stops, 0), 0)


@triton.jit
def multiply_groups(
    x,
    order,
    ends,
    matrices,
    shares,
    out,
    num_active,
    num_experts,
    num_outputs,
    size,
    num_row_tiles,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    GATHERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Row r of n sorted ones by the matrix of its expert, `matrices` [experts, out or with IS_GATED 2 * out, size].

    It is row r of `x`, or with GATHERS row order[r] // num_active, and its result row r of `out`, or with SCATTERS row
    order[r], multiplied by shares[order[r]]. KIND is the activation's number, -1 for none.

    Moves the matrices of all experts that have rows, once for each NEIGHBOURS * ROWS rows, n * size + n * out elements
    besides, and does 2 * n * out * size operations, twice that where it is gated. A few rows for each expert are
    limited by memory, from about 200 on (H100, 16 bits) by arithmetic.
    """
    pid, num_column_tiles = tl.program_id(0), tl.cdiv(num_outputs, COLUMNS)
    band = NEIGHBOURS * num_column_tiles
    first_tile = pid // band * NEIGHBOURS
    num_tiles = tl.minimum(num_row_tiles - first_tile, NEIGHBOURS)
    row_tile, column_tile = first_tile + pid % band % num_tiles, pid % band // num_tiles
    expert, first_row, stop = tile_of(ends, row_tile, num_experts, ROWS, EXPERTS)
    if first_row < stop:
        rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < stop
        copies = rows
        if GATHERS or SCATTERS:
            copies = tl.load(order + rows, is_row, 0)
        columns, depths = column_tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        is_column = columns < num_outputs
        rows_of_x = copies // num_active if GATHERS else rows
        places = rows_of_x[:, None] * size + depths[None, :]
        first_output = expert.to(tl.int64) * num_outputs * (2 if IS_GATED else 1)
        gates = matrices + (first_output + columns)[None, :] * size + depths[:, None]
        ups = gates + num_outputs.to(tl.int64) * size
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total_up = total
        for at in range(0, size, DEPTH):
            is_depth = depths < size - at
            values = tl.load(x + at + places, is_row[:, None] & is_depth[None, :], 0.0)
            is_there = is_depth[:, None] & is_column[None, :]
            total = tl.dot(values, tl.load(gates + at, is_there, 0.0), total, input_precision="ieee")
            if IS_GATED:
                total_up = tl.dot(values, tl.load(ups + at, is_there, 0.0), total_up, input_precision="ieee")
        # rounded wherever torch would write it
        result = total.to(out.dtype.element_ty)
        if KIND >= 0:
            result = activated(result.to(tl.float32), KIND).to(out.dtype.element_ty)
        if IS_GATED:
            up = total_up.to(out.dtype.element_ty).to(tl.float32)
            result = (result.to(tl.float32) * up).to(out.dtype.element_ty)
        if SCATTERS:
            share = tl.load(shares + copies, is_row, 0.0).to(tl.float32)
            result = (result.to(tl.float32) * share[:, None]).to(out.dtype.element_ty)
        to = copies if SCATTERS else rows
        tl.store(out + to[:, None] * num_outputs + columns[None, :], result, is_row[:, None] & is_column[None, :])


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile_for(rows_per_expert: int, element_bytes: int, *, is_gated: bool) -> Tile:
    """Sizes for about so many rows of each expert.

    Few rows: narrow tiles, for many programs that read, and deep ones, for long reads. Many: as large as registers
    hold, of which a gated product has two. What all stages hold of operands is about 100 KiB, which sm_80 has too.
    """
    rows = min(max(triton.next_power_of_2(rows_per_expert), 16), 256 // element_bytes)
    if rows <= 32:
        return Tile(rows, 32, 256 // element_bytes, num_warps=4, num_stages=4)
    return Tile(rows, 64 if is_gated else 128, 128 // element_bytes, num_warps=8 if rows == 128 else 4, num_stages=3)


def can_multiply(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """`up` and `down` are stacked matrices."""
    are_alike = all(each.dtype is x.dtype and each.is_contiguous() for each in (x, up, down))
    return are_alike and x.dtype in TYPES


def expand(x: Tensor, up: Tensor, order: Tensor, ends: Tensor, activation: TritonActivation) -> Tensor:
    """Of `x` [t, hidden] the rows of all copies in their `order` [t * active], [t * active, width]."""
    num_rows, num_outputs = len(order), up.shape[1] // (2 if activation.is_gated else 1)
    out = x.new_empty((num_rows, num_outputs))
    kind = NUMBERS[activation.kind]
    _launch(x, order, ends, up, x, out, num_rows // max(len(x), 1), KIND=kind, IS_GATED=activation.is_gated)
    return out


def contract(inner: Tensor, down: Tensor, order: Tensor, ends: Tensor, shares: Tensor) -> Tensor:
    """Of `inner` [t * active, width] what each adds to its token, [t * active, hidden], by token, with its share."""
    out = inner.new_empty((len(order), down.shape[1]))
    _launch(inner, order, ends, down, shares, out, 1, KIND=NO_ACTIVATION, IS_GATED=False)
    return out


def _launch(
    x: Tensor,
    order: Tensor,
    ends: Tensor,
    matrices: Tensor,
    shares: Tensor,
    out: Tensor,
    num_active: int,
    *,
    KIND: int,
    IS_GATED: bool,
) -> None:
    num_rows, num_experts, is_first = len(order), len(ends), KIND != NO_ACTIVATION
    tile = tile_for(triton.cdiv(num_rows, num_experts), x.itemsize, is_gated=IS_GATED)
    # each expert that has rows may leave one tile almost empty
    num_row_tiles = (num_rows + min(num_rows, num_experts) * (tile.rows - 1)) // tile.rows
    multiply_groups[(num_row_tiles * triton.cdiv(out.shape[1], tile.columns),)](
        x,
        order,
        ends,
        matrices,
        shares,
        out,
        num_active,
        num_experts,
        out.shape[1],
        matrices.shape[2],
        num_row_tiles,
        KIND=KIND,
        IS_GATED=IS_GATED,
        GATHERS=is_first,
        SCATTERS=not is_first,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        EXPERTS=triton.next_power_of_2(num_experts),
        NEIGHBOURS=NEIGHBOURS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def specimens() -> list[Specimen]:
    """Of Mixtral and Qwen3's mixtures: one row for each expert, several, and a prompt's."""
    rows = {"decode": 1, "decode of 32 rows": 32, "64 rows": 64, "prompt": 128}
    return [
        _specimen(f"{name}, {type_name}, {'up' if is_gated else 'down'}", count, type_name, is_gated=is_gated)
        for type_name in ("bf16", "fp32")
        for name, count in rows.items()
        for is_gated in (True, False)
        if type_name == "bf16" or count in (1, 128)
    ]


def _specimen(name: str, rows_per_expert: int, type_name: str, *, is_gated: bool) -> Specimen:
    """`is_gated` ones come first."""
    tile = tile_for(rows_per_expert, 2 if type_name == "bf16" else 4, is_gated=is_gated)
    pointers = dict.fromkeys(("x", "matrices", "shares", "out"), f"*{type_name}") | {"order": "*i64", "ends": "*i32"}
    sizes = dict.fromkeys(("num_active", "num_experts", "num_row_tiles"), "i32")
    kind = NUMBERS[Activation.SILU] if is_gated else NO_ACTIVATION
    flags = {"KIND": kind, "IS_GATED": is_gated, "GATHERS": is_gated, "SCATTERS": not is_gated}
    tiles = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "EXPERTS": 128, "NEIGHBOURS": NEIGHBOURS}
    return Specimen(
        name,
        multiply_groups,
        pointers | sizes | {"num_outputs": "i32:16", "size": "i32:16"},
        flags | tiles,
        is_decode=rows_per_expert <= 32,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
