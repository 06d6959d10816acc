"""Products of few rows with a matrix, and of any number with one whose numbers are codes of few bits.

A step that decodes for one request reads every weight once and multiplies it once, so that the memory is the limit and
everything here is about keeping enough of it on the way: an H200 needs about 25 KB in flight on each of its 132
processors. Sums are always made in the same order: parts of a row that several programs add up are put down one beside
the other, and a second kernel adds them from the first to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton._utils import canonicalize_dtype

from worker.kernels.triton.ahead import Specimen
from worker.model.weights import num_bytes_of

MAX_ROWS = 16
"""Of an input, up to which a dense product is done here: a tensor core's smallest tile. What has more is torch's."""
FULL = 264
"""Programs that fill an H200: two for each processor, so that one computes while the other one waits for memory."""
TILE_BYTES, NUM_STAGES = 8192, 4
"""Of a matrix that a program of one row multiplies at a time, and how many such tiles it has on the way."""
LINE_BYTES = 512
"""Of one row that a tile has at least: what a warp reads at once."""
MIN_STEPS = 4
"""Tiles of few columns that a program adds up at least before the sum is split among more of them."""
RUN_BYTES = 16
"""What a thread reads at once. The products of such a run are added up before anything else is done with them."""
SUM_ELEMENTS = 1024

DENSE, INTEGERS, FLOAT8, NIBBLES, PLACES = range(5)
"""What a matrix is made of: numbers, whole numbers of a byte, float8_e4m3fn, or words of eight times half a byte, which
is a whole number or a place in a table."""
_DENSE, _FLOAT8, _NIBBLES, _PLACES = map(tl.constexpr, (DENSE, FLOAT8, NIBBLES, PLACES))


@triton.jit
def _float8_bits(codes):
    """float32 that are 2^-120 times what e4m3 says: its bits at their places there, as before sm_89 nobody knows it."""
    return (codes.to(tl.int32) << 20 & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def _numbers(codes, table, KIND: tl.constexpr):
    """float32 of bytes [rows, columns], or of words [rows, columns / 8]."""
    if KIND == _FLOAT8:
        return _float8_bits(codes) * 1.329227995784916e36
    elif KIND >= _NIBBLES:
        words = tl.reshape(codes, [codes.shape[0], codes.shape[1] // 4, 1, 4])
        nibbles = words >> tl.arange(0, 8)[None, None, :, None] * 4 & 15
        numbers = nibbles if KIND == _NIBBLES else tl.load(table + nibbles)
        return tl.reshape(numbers.to(tl.float32), [codes.shape[0], codes.shape[1] * 8])
    else:
        return codes.to(tl.float32)


@triton.jit
def _sums_of_runs(codes, x, start, k, KIND: tl.constexpr, BLOCK_K: tl.constexpr, RUN: tl.constexpr):
    """float32 [rows, BLOCK_K / RUN] of `codes` [rows, BLOCK_K], the first of which are for column `start`: products
    with `x`, added up within runs; and [1, BLOCK_K / RUN] what a code of one in all places would give."""
    columns = start + tl.arange(0, BLOCK_K)
    inputs = tl.load(x + columns, columns < k, 0.0).to(tl.float32)
    of_inputs = tl.sum(tl.reshape(inputs, [BLOCK_K // RUN, RUN]), 1)[None, :]
    if KIND == _FLOAT8:
        # the factor, in two parts, which neither inputs nor sums leave float32 with
        numbers, inputs = _float8_bits(codes), inputs * 1.152921504606847e18
    else:
        numbers = codes.to(tl.float32)
    sums = tl.sum(tl.reshape(numbers * inputs[None, :], [codes.shape[0], BLOCK_K // RUN, RUN]), 2)
    return sums * 1.152921504606847e18 if KIND == _FLOAT8 else sums, of_inputs


@triton.jit
def _sums_of_words(words, x, table, start, k, KIND: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of `words` [rows, BLOCK_K], in runs of four.

    Four bits anywhere in the mantissa are a float32 without exponent, code * 2^(place - 149), which a product takes as
    it is: two instructions for a code. Inputs make up for the place, and sums for the rest.
    """
    nibbles = tl.arange(0, 8)[None, :, None]
    columns = start * 8 + tl.arange(0, BLOCK_K // 4)[:, None, None] * 32 + nibbles * 4 + tl.arange(0, 4)[None, None, :]
    inputs = tl.load(x + columns, columns < k, 0.0).to(tl.float32)
    of_inputs = tl.sum(tl.sum(inputs, 2), 1)[None, :]
    words = tl.reshape(words.to(tl.uint32, bitcast=True), [words.shape[0], BLOCK_K // 4, 1, 4])
    if KIND == _PLACES:
        numbers = tl.load(table + (words >> (nibbles * 4)[None] & 15)).to(tl.float32)
        sums = tl.sum(tl.sum(numbers * inputs[None], 3), 2)
    else:
        places = nibbles % 4 * 4
        inputs *= (207 - places << 23).to(tl.float32, bitcast=True)
        numbers = (words >> (nibbles // 4 * 16)[None] & (15 << places)[None]).to(tl.float32, bitcast=True)
        sums = tl.sum(tl.sum(numbers * inputs[None], 3), 2) * 5.902958103587057e20
    return sums, of_inputs


@triton.jit
def multiply_row(
    x,
    matrix,
    scale,
    zero,
    table,
    bias,
    out,
    n,
    k,
    width,
    num_groups,
    span,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row `x` [k] times `matrix` [n, width], program (i, s) from element s * span of its rows on, to row s of
    `out`.

    Nibbles: of every 32 columns, number 4 * i + j is in the i-th nibble of word j, the lowest bits first. `scale` and
    `zero` [n, num_groups] are for GROUP elements of a row, or with GROUP 0 for all. `table` [16] is of PLACES.

    Reads n * width * bytes of an element + 4 * n * num_groups, and x from the caches; does 2 * n * k operations. Memory
    is the limit as long as a number takes no more than some three instructions: it is multiplied by no tensor core,
    whose tiles of 16 rows would leave no work for a second processor where n is 4,096.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    is_row = (rows < n)[:, None]
    lines = matrix + rows.to(tl.int64)[:, None] * width
    scales, zeros = scale + rows[:, None] * num_groups, zero + rows[:, None] * num_groups
    sums = tl.zeros([BLOCK_N, BLOCK_K // RUN], tl.float32)
    for start in tl.range(part * span, tl.minimum(part * span + span, width), BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        codes = tl.load(lines + columns[None, :], is_row & (columns < width)[None, :], 0)
        if KIND >= _NIBBLES:
            of_codes, of_inputs = _sums_of_words(codes, x, table, start, k, KIND, BLOCK_K)
        else:
            of_codes, of_inputs = _sums_of_runs(codes, x, start, k, KIND, BLOCK_K, RUN)
        firsts = start + tl.arange(0, BLOCK_K // RUN) * RUN
        groups = (firsts // GROUP if GROUP else firsts * 0)[None, :]
        is_there = is_row & (firsts < width)[None, :]
        if HAS_ZERO:
            of_codes -= tl.load(zeros + groups, is_there, 0.0).to(tl.float32) * of_inputs
        if GROUP:
            of_codes *= tl.load(scales + groups, is_there, 0.0).to(tl.float32)
        sums += of_codes
    result = tl.sum(sums, 1)
    if KIND != _DENSE and GROUP == 0:
        result *= tl.load(scale + rows, rows < n, 0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + rows, rows < n, 0.0).to(tl.float32)
    tl.store(out + part * n + rows, result.to(out.dtype.element_ty), rows < n)


@triton.jit
def multiply_rows(
    x,
    matrix,
    scale,
    zero,
    table,
    bias,
    out,
    m,
    n,
    k,
    width,
    num_groups,
    span,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`x` [m, k] times `matrix` as `multiply_row` has it, program (i, j, s) from element s * span of its rows on, to
    `out` [parts, m, n] at s. BLOCK_K is a power of two that divides GROUP.

    Reads the matrix once for every BLOCK_M rows of x, from memory the first time, and x once for every BLOCK_N rows of
    the matrix, from the second-level cache; does 2 * m * n * k operations in tensor cores. The matrix is the left
    operand, [outputs, tokens] the result: what has just been made of codes goes from registers into the tensor cores,
    and the few tokens of a step that decodes are the side that may be narrow.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    is_output, is_token = (outputs < n)[:, None], (tokens < m)[None, :]
    lines = matrix + outputs.to(tl.int64)[:, None] * width
    inputs = x + tokens.to(tl.int64)[None, :] * k
    scales, zeros = scale + outputs[:, None] * num_groups, zero + outputs[:, None] * num_groups
    EACH: tl.constexpr = 8 if KIND >= _NIBBLES else 1
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, width), BLOCK_K):
        places, columns = start + tl.arange(0, BLOCK_K), start * EACH + tl.arange(0, BLOCK_K * EACH)
        codes = tl.load(lines + places[None, :], is_output & (places < width)[None, :], 0)
        values = tl.load(inputs + columns[:, None], is_token & (columns < k)[:, None], 0.0)
        if KIND == _DENSE:
            sums = tl.dot(codes, values, sums)
        else:
            numbers, group = _numbers(codes, table, KIND), start // GROUP if GROUP else 0
            if HAS_ZERO:
                # whole numbers of eight bits, which every type holds
                numbers -= tl.load(zeros + group, is_output, 0.0).to(tl.float32)
            if GROUP:
                factor = tl.load(scales + group, is_output, 0.0).to(tl.float32)
                sums += tl.dot(numbers.to(values.dtype), values) * factor
            else:
                sums = tl.dot(numbers.to(values.dtype), values, sums)
    if KIND != _DENSE and GROUP == 0:
        sums *= tl.load(scale + outputs, outputs < n, 0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + outputs, outputs < n, 0.0).to(tl.float32)[:, None]
    places = out + (part * m + tokens).to(tl.int64)[None, :] * n + outputs[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), is_output & is_token)


@triton.jit
def add_parts(parts, bias, out, size, n, num_parts, HAS_BIAS: tl.constexpr, ELEMENTS: tl.constexpr):
    """`out` [size] of `parts` float32 [num_parts, size], added from the first to the last; rows are of n elements.

    Moves (4 * num_parts + 2) * size bytes, out of the second-level cache, with as many operations.
    """
    places = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_there = places < size
    result = tl.zeros([ELEMENTS], tl.float32)
    for part in range(num_parts):
        result += tl.load(parts + part * size + places, is_there, 0.0)
    if HAS_BIAS:
        result += tl.load(bias + places % n, is_there, 0.0).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty), is_there)


@dataclass(frozen=True, slots=True)
class Matrix:
    """[n, num_columns] numbers of which `codes` [n, width] are what is stored, of one KIND; less `zero` and times
    `scale` [n, groups], of which each has `group_size` of what is stored, or with 0 a row. `table` [16] is for PLACES,
    of float16: what is read again and again is not to be copied into shared memory first, as four bytes would."""

    codes: Tensor
    num_columns: int
    kind: int = DENSE
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int = 0
    table: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.codes, self.scale, self.zero, self.table)

    @property
    def num_groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of a launch: tokens, outputs and columns of a tile, and what runs it."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """`x` [m, k] -> [m, n] of its type, with one rounding."""
    x = x.contiguous()
    (m, k), n = x.shape, len(matrix.codes)
    if k != matrix.num_columns:
        raise ValueError(f"an input of {matrix.num_columns} numbers in a row is expected, not {k}")
    out = x.new_empty((m, n))
    if not out.numel():
        return out
    tiles, num_parts, span = _plan(matrix, m)
    parts = out if num_parts == 1 else x.new_empty((num_parts, m, n), dtype=torch.float32)
    _launch(x, matrix, bias if num_parts == 1 else None, parts, tiles, num_parts, span)
    if num_parts > 1:
        grid = (triton.cdiv(m * n, SUM_ELEMENTS),)
        has_bias = bias is not None
        add_parts[grid](parts, bias if has_bias else out, out, m * n, n, num_parts, has_bias, SUM_ELEMENTS)
    return out


def _launch(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, tiles: Tiles, num_parts: int, span: int
) -> None:
    (m, k), (n, width) = x.shape, matrix.codes.shape
    codes = matrix.codes if matrix.kind != FLOAT8 else matrix.codes.view(torch.int8)
    # what is not there is not read, but has to be a pointer
    tensors = (
        x,
        codes,
        *(out if each is None else each for each in (matrix.scale, matrix.zero, matrix.table, bias)),
        out,
    )
    sizes, flags = (n, k, width, matrix.num_groups, span), _flags(matrix, m, tiles)
    if m == 1:
        grid = (triton.cdiv(n, tiles.n), num_parts)
        multiply_row[grid](*tensors, *sizes, **flags, HAS_BIAS=bias is not None, num_warps=tiles.num_warps)
    else:
        blocks = (triton.cdiv(n, tiles.n), triton.cdiv(m, tiles.m), num_parts)
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        multiply_rows[blocks](*tensors, m, *sizes, **flags, HAS_BIAS=bias is not None, **options)


def _flags(matrix: Matrix, m: int, tiles: Tiles) -> dict[str, int | bool]:
    """Constants of either kernel, but for the bias."""
    both = {"KIND": matrix.kind, "GROUP": matrix.group_size, "HAS_ZERO": matrix.zero is not None}
    both |= {"BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    if m == 1:
        return both | {"RUN": RUN_BYTES // matrix.codes.element_size(), "STAGES": tiles.num_stages}
    return both | {"BLOCK_M": tiles.m}


def _plan(matrix: Matrix, m: int) -> tuple[Tiles, int, int]:
    """Tiles, among how many programs the elements of a row are split, and how many each has."""
    tiles = _tiles_of_row(matrix) if m == 1 else _tiles_of_rows(matrix, m)
    n, width = matrix.codes.shape
    num_programs = triton.cdiv(n, tiles.n) * triton.cdiv(m, tiles.m)
    return tiles, *_split(num_programs, width, tiles.k, 1 if m == 1 else MIN_STEPS)


def _tiles_of_row(matrix: Matrix) -> Tiles:
    """Rows of the matrix so few that every processor has two programs, if four of them still give each warp one."""
    n, width = matrix.codes.shape
    size = matrix.codes.element_size()
    rows = next((rows for rows in (16, 8) if n >= rows * FULL), 4)
    columns = min(TILE_BYTES // rows, max(triton.next_power_of_2(width * size), LINE_BYTES)) // size
    return Tiles(1, rows, columns, 4, NUM_STAGES)


def _tiles_of_rows(matrix: Matrix, m: int) -> Tiles:
    """Few rows wait for memory, with small tiles on the way for many programs; many rows share what was read."""
    columns = 128 if m <= MAX_ROWS else 64
    elements = columns // 8 if matrix.kind >= NIBBLES else columns
    elements = min(elements, matrix.group_size & -matrix.group_size or elements)
    if m <= MAX_ROWS:
        is_wide = matrix.kind >= NIBBLES or len(matrix.codes) >= 64 * FULL
        return Tiles(MAX_ROWS, 64 if is_wide else 32, elements, 4, 4)
    return Tiles(64, 64, elements, 4, 3) if m <= 64 else Tiles(128, 128, elements, 8, 3)


def _split(num_programs: int, width: int, block: int, min_steps: int) -> tuple[int, int]:
    """So many parts that there are FULL programs, of which none is empty, and elements of each."""
    num_steps = triton.cdiv(width, block)
    wanted = max(min(FULL // num_programs, num_steps // min_steps), 1)
    steps = triton.cdiv(num_steps, wanted)
    return triton.cdiv(num_steps, steps), steps * block


@dataclass(frozen=True, slots=True)
class FewRowLinear:
    """A DenseLinear whose products of few rows are done here. `weight` [out, in], `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        if num_rows > MAX_ROWS:
            return F.linear(x, self.weight, self.bias)
        flat = multiply(x.reshape(num_rows, x.shape[-1]), Matrix(self.weight, self.weight.shape[1]), self.bias)
        return flat.view(*x.shape[:-1], len(self.weight))


UP, DOWN, RANK_OUT = (28672, 4096), (4096, 14336), (1024, 1024)
"""Rows and columns of matrices of Llama 3.1 8B, and of the smallest one that a rank of small models has."""


def specimens() -> list[Specimen]:
    """Dense products of a step that decodes for a few requests."""
    found = []
    for name, shape in (("up", UP), ("down", DOWN), ("rank_out", RANK_OUT)):
        matrix = Matrix(torch.empty(shape, dtype=torch.bfloat16, device="meta"), shape[1])
        found += [specimen_of(f"bf16_{name}_{m}", matrix, m) for m in (1, MAX_ROWS)]
    parts = {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "size": "i32:16", "n": "i32:16", "num_parts": "i32"}
    constants = {"HAS_BIAS": True, "ELEMENTS": SUM_ELEMENTS}
    return [*found, Specimen("bf16", add_parts, parts, constants, is_decode=True)]


def specimen_of(name: str, matrix: Matrix, m: int) -> Specimen:
    """As `multiply` would launch it for `m` rows of bfloat16, without a bias; `matrix` may be on the meta device."""
    tiles, num_parts, span = _plan(matrix, m)
    n, width = matrix.codes.shape
    sizes = {"m": m, "n": n, "k": matrix.num_columns, "width": width, "num_groups": matrix.num_groups, "span": span}
    codes = torch.empty(0, dtype=torch.int8) if matrix.kind == FLOAT8 else matrix.codes
    out = "*bf16" if num_parts == 1 else "*fp32"
    tensors = {"x": "*bf16", "matrix": _pointer(codes), "scale": _pointer(matrix.scale), "zero": _pointer(matrix.zero)}
    tensors |= {"table": _pointer(matrix.table)}
    types = tensors | {"bias": "*bf16", "out": out} | {key: _integer(size) for key, size in sizes.items()}
    kernel = multiply_row if m == 1 else multiply_rows
    constants = _flags(matrix, m, tiles) | {"HAS_BIAS": False}
    signature = {key: types[key] for key in kernel.arg_names if key not in constants}
    is_decode = m <= MAX_ROWS
    return Specimen(name, kernel, signature, constants, is_decode, tiles.num_warps, tiles.num_stages)


def _pointer(tensor: Tensor | None) -> str:
    return "*bf16" if tensor is None else f"*{canonicalize_dtype(tensor.dtype)}"


def _integer(size: int) -> str:
    return "i32:16" if size % 16 == 0 else "i32"
