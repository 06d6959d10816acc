"""Products with quantised matrices. What is fast depends on the device; what is not is dequantised for every product.

Each keeps its weights small in memory, and the block that is being dequantised is all it takes besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.quant.matrix import QuantisedMatrix, neighbours
from worker.model.weights import Linear, num_bytes_of

FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_INT8_ROWS, MAX_INT4_ROWS = 8, 48
"""Rows of an input from which on dequantising pays: torch's kernels go through the weights once for every four."""
INT8_COLUMN_UNIT = 16
"""What torch's kernel goes by in 16-bit types; it reads on beyond the end of other rows."""
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROW_UNIT, INT4_BLOCK_ROWS = 16, 64
DEQUANTISED_ELEMENTS = 1 << 23
"""Of weights that are dequantised at a time: 16 MB in bfloat16."""


MakeProduct = Callable[[QuantisedMatrix, Tensor | None, torch.dtype], Linear]
"""Of a matrix and a bias, for inputs of a type."""


def linear_of(matrix: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest product with `matrix` there is on a CPU for inputs of `dtype`."""
    if dtype in FAST_DTYPES:
        if (signed := _as_int8(matrix)) is not None:
            return Int8Linear(signed, matrix.scale[:, 0].to(dtype), bias)
        if (ordered := _as_int4(matrix)) is not None:
            return _int4_linear(*ordered, bias, dtype)
    return coded_linear(matrix, bias, dtype)


def has_slow_products(weights: object) -> bool:
    """Whether anything in a tree of dataclasses and lists is dequantised for every product."""
    if isinstance(weights, list | tuple):
        return any(map(has_slow_products, weights))
    inner = fields(weights) if is_dataclass(weights) else ()
    return isinstance(weights, CodedLinear) or any(has_slow_products(getattr(weights, part.name)) for part in inner)


# Eight bits, one scale for a row.


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """`codes` int8 [out, in] times `scale` [out]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.codes, self.scale, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= MAX_INT8_ROWS and flat.shape[1] % INT8_COLUMN_UNIT == 0:
            result = torch._weight_int8pack_mm(flat.contiguous(), self.codes, self.scale)
        else:
            result = self._many(flat)
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], result.shape[1])

    def _many(self, x: Tensor) -> Tensor:
        size = max(DEQUANTISED_ELEMENTS // self.codes.shape[1], 1)
        blocks = [F.linear(x, codes.to(x.dtype)) for codes in torch.split(self.codes, size)]
        result = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
        return result.mul_(self.scale)


def _as_int8(matrix: QuantisedMatrix) -> Tensor | None:
    """Codes with a sign, of a matrix without zeros and groups."""
    is_plain = matrix.table is None and matrix.zero is None and matrix.scale.shape[1] == 1
    return matrix.codes if is_plain and matrix.codes.dtype is torch.int8 else None


# Four bits, a scale and a zero for a group of a row.


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """In the layout of torch's kernel: `packed` uint8 [out, in / 2], of which the second half of every 64 rows is in
    the upper four bits; `scales` [in / group, out, 2], each a scale and a shift: (code - 8) * scale + shift.

    `order` is that of the columns of x, where they are not in their own (GPTQ's act-order).
    """

    packed: Tensor
    scales: Tensor
    group_size: int
    order: Tensor | None
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.packed, self.scales, self.order, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.contiguous() if self.order is None else flat.index_select(1, self.order)
        if len(flat) <= MAX_INT4_ROWS or not _knows_layout() or len(self.packed) % INT4_BLOCK_ROWS:
            result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group_size, self.scales)
        else:
            result = self._many(flat)
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], result.shape[1])

    def _many(self, x: Tensor) -> Tensor:
        num_columns = self.packed.shape[1] * 2
        size = max(DEQUANTISED_ELEMENTS // (INT4_BLOCK_ROWS * num_columns), 1)
        parts = torch.split(self.packed.view(-1, num_columns, INT4_BLOCK_ROWS // 2), size)
        scales = torch.split(self.scales.view(num_columns // self.group_size, -1, INT4_BLOCK_ROWS, 2), size, 1)
        blocks = [x @ self._dequantised(*pair) for pair in zip(parts, scales, strict=True)]
        result = torch.cat([block.transpose(0, 1).flatten(1) for block in blocks], -1)
        return result.contiguous()

    def _dequantised(self, packed: Tensor, scales: Tensor) -> Tensor:
        """[blocks, in, 64], transposed as the layout is; from [blocks, in, 32] and [in / group, blocks, 64, 2]."""
        weight = packed.new_empty((*packed.shape[:2], INT4_BLOCK_ROWS), dtype=scales.dtype)
        weight[..., : INT4_BLOCK_ROWS // 2] = packed & 15
        weight[..., INT4_BLOCK_ROWS // 2 :] = packed >> 4
        scale, shift = scales.transpose(0, 1).unbind(-1)
        grouped = weight.view(len(packed), -1, self.group_size, INT4_BLOCK_ROWS)
        grouped.sub_(8.0).mul_(scale[:, :, None]).add_(shift[:, :, None])
        return weight


@cache
def _knows_layout() -> bool:
    """Whether torch packs four bits here as `Int4Linear` says, which depends on the processor."""
    codes = torch.arange(2 * INT4_BLOCK_ROWS * 8, dtype=torch.int32).view(2 * INT4_BLOCK_ROWS, 8) * 7 // 3 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    blocks = packed.view(2, 8, INT4_BLOCK_ROWS // 2)
    found = torch.cat((blocks & 15, blocks >> 4), -1).transpose(1, 2).reshape(codes.shape)
    return torch.equal(found.int(), codes)


def _as_int4(matrix: QuantisedMatrix) -> tuple[QuantisedMatrix, int, Tensor | None] | None:
    """The matrix with its columns in the order of their groups, the size of these, and that order, None if it was so.

    None if groups are not of one size that the kernel knows; larger ones are cut, codes of two bits are widened.
    """
    num_rows, num_columns = matrix.shape
    is_affine = matrix.num_bits in (2, 4) and matrix.table is None
    if not is_affine or num_rows % INT4_ROW_UNIT or num_columns % matrix.scale.shape[1]:
        return None
    size, ordered = num_columns // matrix.scale.shape[1], matrix.in_groups()
    fitting = [known for known in INT4_GROUPS if size % known == 0]
    return (ordered[0], fitting[-1], ordered[1]) if ordered is not None and fitting else None


def _int4_linear(
    matrix: QuantisedMatrix, group_size: int, order: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Int4Linear:
    columns = torch.arange(0, matrix.shape[1], group_size)
    groups = matrix.groups[columns]
    scale = matrix.scale[:, groups]
    shift = scale * (8.0 if matrix.zero is None else 8.0 - matrix.zero[:, groups])
    scales = torch.stack((scale.t(), shift.t()), -1).to(dtype).contiguous()
    return Int4Linear(_packed(matrix.codes), scales, group_size, order, bias)


def _packed(codes: Tensor) -> Tensor:
    """uint8 [rows, columns / 2], some rows at a time because torch wants to have them as integers of 32 bits."""
    size = max(DEQUANTISED_ELEMENTS // codes.shape[1] // INT4_BLOCK_ROWS, 1) * INT4_BLOCK_ROWS
    parts = [torch._convert_weight_to_int4pack_for_cpu(part.int(), 1) for part in torch.split(codes, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# Everything else.


@dataclass(frozen=True, slots=True)
class CodedLinear:
    """Any quantised matrix, dequantised block by block for every product.

    `codes` are as in QuantisedMatrix, but of up to four bits two neighbours share a byte, the first in its lower half.
    `pairs` [256 or 65536, 2] are the numbers of two neighbouring codes, where looking up two at once beats converting
    one. `groups` is None where groups are neighbours of one size.
    """

    codes: Tensor
    pairs: Tensor | None
    scale: Tensor
    zero: Tensor | None
    groups: Tensor | None
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.codes, self.scale, self.zero, self.groups, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        size = max(DEQUANTISED_ELEMENTS // x.shape[-1], 1)
        num_rows = len(self.codes)
        blocks = [F.linear(x, self._dequantised(slice(at, at + size), x.dtype)) for at in range(0, num_rows, size)]
        result = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
        return result if self.bias is None else result + self.bias

    def _dequantised(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """`dtype` [rows, in]."""
        numbers = self._numbers(self.codes[rows], dtype)
        scale, zero = self.scale[rows], None if self.zero is None else self.zero[rows]
        if self.groups is not None:
            numbers = numbers if zero is None else numbers.sub_(zero[:, self.groups])
            return numbers.mul_(scale[:, self.groups])
        grouped = numbers.view(len(numbers), scale.shape[1], -1)
        grouped = grouped if zero is None else grouped.sub_(zero[..., None])
        return grouped.mul_(scale[..., None]).view(numbers.shape)

    def _numbers(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if self.pairs is None:
            return codes.to(dtype, copy=True)
        places = codes if codes.dtype is torch.uint8 else codes.view(torch.uint16)
        return F.embedding(places.int(), self.pairs.to(dtype)).flatten(1)


def coded_linear(matrix: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype) -> CodedLinear:
    """`dtype` is that of the products; scales stay float32 where it is narrower."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = None if matrix.group_size() else matrix.groups.to(matrix.codes.device)
    codes, pairs = matrix.codes, None
    if matrix.num_bits <= 4 and codes.shape[1] % 2 == 0:
        codes, pairs = codes[:, ::2] | codes[:, 1::2] << 4, _pairs_of_nibbles(matrix.table)
    elif codes.dtype.is_floating_point and codes.shape[1] % 2 == 0:
        pairs = _pairs_of_bytes(codes.dtype)
    elif matrix.table is not None:
        codes = matrix.table.to(codes.device)[codes.int()].to(dtype)
    zero = None if matrix.zero is None else matrix.zero.to(wide)
    pairs = None if pairs is None else pairs.to(codes.device)
    return CodedLinear(codes, pairs, matrix.scale.to(wide), zero, groups, bias)


def _pairs_of_nibbles(table: Tensor | None) -> Tensor:
    """float32 [256, 2]: what the lower and the upper half of a byte stand for."""
    numbers = torch.arange(16, dtype=torch.float32) if table is None else table
    return torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), -1)


@cache
def _pairs_of_bytes(dtype: torch.dtype) -> Tensor:
    """float32 [65536, 2]: what the two bytes of a word, the lower one first, stand for in an 8-bit float type."""
    numbers = torch.arange(256).to(torch.uint8).view(dtype).float()
    return torch.stack((numbers.repeat(256), numbers.repeat_interleave(256)), -1)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Products of one input whose matrices are of different kinds, their results one after the other."""

    parts: tuple[Linear, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


# Embeddings.


@dataclass(frozen=True, slots=True)
class Int8Embedding:
    """`codes` int8 [rows, width] times `scale` [rows]."""

    codes: Tensor
    scale: Tensor

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.codes, self.scale)

    @property
    def matrix(self) -> QuantisedMatrix:
        width = self.codes.shape[1]
        return QuantisedMatrix(self.codes, self.scale[:, None].float(), None, neighbours(width, width), 8)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.codes[tokens].to(self.scale.dtype).mul_(self.scale[tokens][..., None])
