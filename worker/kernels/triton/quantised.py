"""Products with quantised matrices on a GPU: codes stay as small as they are stored until a product has them at hand.

Up to four bits are kept as nibbles, as `worker.kernels.triton.products` lays them out, all else as bytes. Columns whose
groups are no neighbours (GPTQ's act-order) are put in order once, and inputs at every product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.ahead import Specimen
from worker.kernels.triton.float8 import in_8_bits
from worker.kernels.triton.products import (
    DOWN,
    FLOAT8,
    INTEGERS,
    MAX_ROWS,
    NIBBLES,
    PLACES,
    UP,
    FewRowLinear,
    Matrix,
    multiply,
    specimen_of,
)
from worker.model.quant.linear import coded_linear
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.reading import EIGHT_BITS_NOTE
from worker.model.quant.rounding import LEAST_SCALE
from worker.model.quant.scheme import Quantisation
from worker.model.tree import mapped
from worker.model.weights import DenseLinear, Linear, num_bytes_of

DTYPES = (torch.bfloat16, torch.float16)
"""Of inputs and results."""
NIBBLE_UNIT, BYTE_UNIT = 32, 16
"""Columns that a group must have a multiple of: what a thread has of a row at a time."""
SCALED_UNIT = 16
"""Of rows and columns, what torch's product of eight bits goes by."""
MAX_REGISTERED = 1 << 14
"""Columns that eight warps hold in registers; twice as many warps hold more."""

WeightsType = TypeVar("WeightsType")


@triton.jit
def quantise_rows(x, codes, scale, k, BLOCK: tl.constexpr):
    """`codes` of e4m3 [m, k] as bytes, and `scale` float32 [m], of `x` [m, k]: to the nearest, ties to even, a row's
    largest at the largest number there is. What is no number stays none, and a row with infinity has some.

    Moves 3 * m * k bytes, and does some 15 operations with each number: memory is the limit.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * k + columns, columns < k, 0.0).to(tl.float32)
    # `/` is two units off on a device
    factor = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), 1e-12), 448.0)
    tl.store(scale + row, factor)
    tl.store(codes + row * k + columns, in_8_bits(tl.div_rn(values, factor), 3, -6, 448.0), columns < k)


def in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [m, k] and float32 [m, 1] of `x` [m, k]."""
    x = x.contiguous()
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    num_warps = 8 if k <= MAX_REGISTERED else 16
    quantise_rows[(m,)](x, codes.view(torch.uint8), scale, k, triton.next_power_of_2(k), num_warps=num_warps)
    return codes, scale


@dataclass(frozen=True, slots=True)
class QuantisedLinear:
    """`order` is that of the columns of inputs, None for their own. Where `rounds_inputs`, more than MAX_ROWS rows are
    multiplied as eight bits by eight bits; few are not, which only wait for the matrix."""

    matrix: Matrix
    order: Tensor | None
    bias: Tensor | None
    rounds_inputs: bool = False

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes + num_bytes_of(self.order, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        flat = x.reshape(num_rows, x.shape[-1])
        flat = flat if self.order is None else flat.index_select(1, self.order)
        is_rounded = self.rounds_inputs and num_rows > MAX_ROWS
        result = self._in_float8(flat) if is_rounded else multiply(flat, self.matrix, self.bias)
        return result.view(*x.shape[:-1], result.shape[1])

    def _in_float8(self, x: Tensor) -> Tensor:
        (codes, scale), own = in_float8(x), self.matrix.scale
        assert own is not None
        return torch._scaled_mm(
            codes,
            self.matrix.codes.t(),
            scale_a=scale,
            scale_b=own.t(),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )


def has_float8() -> bool:
    """Whether the GPU multiplies eight bits by eight bits with a scale for each row, as Hopper is the first to."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


FLOAT8_NOTE = (
    f"products with fp8 weights round activations to 8 bits in steps of more than {MAX_ROWS} tokens: this GPU is "
    "fastest with both"
)


def for_gpu(quantisation: Quantisation) -> Quantisation:
    """The same with a GPU's products."""
    notes = quantisation.notes
    if has_float8() and (quantisation.name == "fp8" or EIGHT_BITS_NOTE in notes):
        notes = (*(note for note in notes if note != EIGHT_BITS_NOTE), FLOAT8_NOTE)
    return replace(quantisation, product=linear_for_gpu, notes=notes)


def linear_for_gpu(matrix: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest product with `matrix` that there is on a GPU for inputs of `dtype`, where its codes are.

    What has no kernel (other types than DTYPES, odd groups, zeros that are no whole numbers) is dequantised for every
    product.
    """
    ordered = matrix.in_groups() if dtype in DTYPES else None
    packed = None if ordered is None else _packed(ordered[0])
    if ordered is None or packed is None:
        return coded_linear(matrix, bias, dtype)
    order = None if ordered[1] is None else ordered[1].to(packed.codes.device)
    can_round = packed.kind == FLOAT8 and not packed.group_size and dtype is torch.bfloat16
    fits = not any(size % SCALED_UNIT for size in packed.codes.shape)
    return QuantisedLinear(packed, order, bias, can_round and fits and has_float8())


def _packed(matrix: QuantisedMatrix) -> Matrix | None:
    """None if there is no kernel for it."""
    kind, zero = _kind(matrix), matrix.zero
    size = 0 if matrix.scale.shape[1] == 1 else matrix.shape[1] // matrix.scale.shape[1]
    is_small = kind in (NIBBLES, PLACES)
    unit = NIBBLE_UNIT if is_small else BYTE_UNIT
    has_odd_zeros = zero is not None and not torch.equal(zero.half().float(), zero)
    if kind is None or size % unit or has_odd_zeros:
        return None
    zero = None if zero is None else zero.half()
    codes = nibbles(matrix.codes) if is_small else matrix.codes.contiguous()
    # torch's product of eight bits takes no other than these
    scale = matrix.scale if kind == FLOAT8 and not size else _narrow(matrix.scale)
    table = None if matrix.table is None else matrix.table.to(codes.device, torch.float16)
    return Matrix(codes, matrix.shape[1], kind, scale, zero, size // 8 if is_small else size, table)


def _kind(matrix: QuantisedMatrix) -> int | None:
    if matrix.table is not None:
        return PLACES if matrix.num_bits == 4 and matrix.zero is None else None
    if matrix.codes.dtype is torch.float8_e4m3fn:
        return FLOAT8
    if matrix.codes.dtype is torch.uint8 and matrix.num_bits <= 4:
        return NIBBLES
    return INTEGERS if matrix.codes.dtype in (torch.uint8, torch.int8) else None


def _narrow(scale: Tensor) -> Tensor:
    """float16 where it holds all of them as precisely as numbers of its size; the least ones are of zeros only."""
    half = scale.half()
    is_near = (half.float() - scale).abs() <= scale.abs() * 2.0**-11
    return half if bool((is_near | (scale.abs() <= LEAST_SCALE)).all()) else scale


def nibbles(codes: Tensor) -> Tensor:
    """int32 [rows, columns / 8], columns filled up to a multiple of 32, of uint8 [rows, columns] below 16."""
    padded = F.pad(codes, (0, -codes.shape[1] % NIBBLE_UNIT))
    places = padded.view(len(codes), -1, 4, 2, 4)
    octets = places[:, :, :, 0] | places[:, :, :, 1] << 4
    return octets.transpose(2, 3).contiguous().view(torch.int32).view(len(codes), -1)


def pack_for_gpu(weights: WeightsType) -> WeightsType:
    """A tree of dataclasses and lists whose dense products of few rows are done by a kernel of ours. Tensors stay what
    and where they are, so that it does not matter whether they are on the device yet."""
    packed: WeightsType = mapped(weights, _with_few_rows)
    return packed


def _with_few_rows(node: object) -> object:
    if isinstance(node, DenseLinear) and node.weight.dtype in DTYPES and node.weight.numel():
        return FewRowLinear(node.weight, node.bias)
    return node


MANY_ROWS = 1024


def specimens() -> list[Specimen]:
    """Of matrices of Llama 3.1 8B in four bits, eight bits and floats of eight bits, and of its inputs."""
    found = []
    for name, (n, k), counts in (("up", UP, (1, MANY_ROWS)), ("down", DOWN, (1, MAX_ROWS))):
        kinds = {"int8": _empty(n, k, torch.int8, INTEGERS), "fp8": _empty(n, k, torch.float8_e4m3fn, FLOAT8)}
        kinds |= {f"int4_{size}": _empty(n, k, torch.int32, NIBBLES, size) for size in (64, 128)}
        table = torch.empty(16, dtype=torch.float16, device="meta")
        kinds["nf4"] = replace(kinds["int4_64"], kind=PLACES, zero=None, table=table)
        found += [specimen_of(f"{kind}_{name}_{m}", kinds[kind], m) for kind in kinds for m in counts]
    signature = {"x": "*bf16", "codes": "*u8", "scale": "*fp32", "k": "i32:16"}
    block = {"BLOCK": triton.next_power_of_2(DOWN[1])}
    return [*found, Specimen("bf16_down", quantise_rows, signature, block, num_warps=8)]


def _empty(n: int, k: int, dtype: torch.dtype, kind: int, group_size: int = 0) -> Matrix:
    """Without numbers, on the meta device; with zeros where there are groups."""

    def empty(num_columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((n, num_columns), dtype=dtype, device="meta")

    if not group_size:
        return Matrix(empty(k, dtype), k, kind, empty(1, torch.float32))
    scale, zero = (empty(k // group_size, torch.float16) for _ in range(2))
    return Matrix(empty(k // 8, dtype), k, kind, scale, zero, group_size // 8)
