"""Products with quantised matrices against what the matrix is by definition, in every type."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.quant import linear
from worker.model.quant.linear import (
    MAX_INT4_ROWS,
    MAX_INT8_ROWS,
    CodedLinear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    SideBySide,
    coded_linear,
    linear_of,
)
from worker.model.quant.matrix import QuantisedMatrix, neighbours, stacked
from worker.model.weights import DenseLinear

NUM_INPUTS = (0, 1, 5, MAX_INT8_ROWS + 1, MAX_INT4_ROWS + 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BAR = 4
"""Roundings of the type, of the sum of the products' sizes."""


def matrix_of(num_rows: int, num_columns: int, kind: str, group_size: int | None = None) -> QuantisedMatrix:
    """`kind` is u4, u2 or u8 (with zeros), u4plain (without), i8, i8zeros, f8, or t4 (a table)."""
    random = torch.Generator().manual_seed(num_rows * 1000 + num_columns)
    size = group_size or num_columns
    num_groups, num_bits = -(-num_columns // size), int(kind[1])
    shape, zero = (num_rows, num_columns), None
    if kind[0] == "f":
        codes = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    elif kind[0] == "i":
        codes = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    else:
        codes = torch.randint(1 << num_bits, shape, generator=random, dtype=torch.uint8)
    if kind in ("u4", "u2", "u8", "i8zeros"):
        low, high = (-128, 128) if kind[0] == "i" else (0, 1 << num_bits)
        zero = torch.randint(low, high, (num_rows, num_groups), generator=random).float()
    scale = torch.rand((num_rows, num_groups), generator=random) * 0.02 + 0.005
    table = torch.randn(16, generator=random) if kind[0] == "t" else None
    return QuantisedMatrix(codes, scale, zero, neighbours(num_columns, size), num_bits, table)


def numbers_of(matrix: QuantisedMatrix) -> Tensor:
    """float64 [rows, columns], number by number."""
    numbers = matrix.codes.double() if matrix.table is None else matrix.table.double()[matrix.codes.long()]
    for column, group in enumerate(matrix.groups.tolist()):
        if matrix.zero is not None:
            numbers[:, column] -= matrix.zero[:, group].double()
        numbers[:, column] *= matrix.scale[:, group].double()
    return numbers


def roundings(got: Tensor, x: Tensor, numbers: Tensor, bias: Tensor | None = None) -> float:
    """The largest error, in roundings of the type of `got`, of the sum of the sizes of what is added up."""
    exact = F.linear(x.double(), numbers, None if bias is None else bias.double())
    size = x.double().abs() @ numbers.abs().t() + (0 if bias is None else bias.double().abs()) + 1e-30
    # scales and zeros are float32 also where everything else is wider
    epsilon = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps if got.dtype is torch.float64 else 0)
    return float(((got.double() - exact).abs() / size / epsilon).max()) if got.numel() else 0.0


def inputs(count: int, matrix: QuantisedMatrix, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, matrix.shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)


KINDS = {
    "u4": (Int4Linear, CodedLinear),
    "u4plain": (Int4Linear, CodedLinear),
    "u2": (Int4Linear, CodedLinear),
    "u8": (CodedLinear, CodedLinear),
    "i8": (Int8Linear, CodedLinear),
    "i8zeros": (CodedLinear, CodedLinear),
    "f8": (CodedLinear, CodedLinear),
    "t4": (CodedLinear, CodedLinear),
}
"""The product in types that have fast ones, for sizes that allow it, and in others."""
SIZES = [(16, 32, None), (48, 64, 32), (64, 256, 64), (208, 96, 96)]
ODD_SIZES = [(1, 32, None), (7, 40, 20), (20, 33, None), (64, 48, 16), (3, 1, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_the_numbers_of_the_matrix(kind, dtype):
    for num_rows, num_columns, group_size in SIZES + ODD_SIZES:
        is_grouped = kind == "i8" and group_size not in (None, num_columns)
        matrix = matrix_of(num_rows, num_columns, kind, None if is_grouped else group_size)
        bias = torch.randn(num_rows).to(dtype)
        layer, numbers = linear_of(matrix, bias, dtype), numbers_of(matrix)
        if (num_rows, num_columns, group_size) in SIZES:
            assert type(layer) is KINDS[kind][dtype is torch.float64]
        for count in NUM_INPUTS:
            x = inputs(count, matrix, dtype)
            got = layer(x)
            assert got.shape == (count, num_rows) and got.dtype is dtype
            assert roundings(got, x, numbers, bias) <= BAR, (num_rows, num_columns, count)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_keep_their_shape_and_their_numbers(kind):
    matrix = matrix_of(64, 64, kind)
    layer = linear_of(matrix, None, torch.float32)
    x = torch.randn(3, 2, 64)
    before = x.clone()
    assert layer(x).shape == (3, 2, 64)
    assert torch.allclose(layer(x)[1, 1], layer(x[1, 1]), atol=1e-4)
    assert layer(x[:, :0]).shape == (3, 0, 64)
    assert torch.allclose(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), atol=1e-4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["u4", "i8", "f8", "t4"])
def test_a_wrong_number_shows(kind):
    matrix = matrix_of(64, 64, kind)
    x = inputs(1, matrix, torch.float32)
    got = linear_of(matrix, None, torch.float32)(x)
    for wrong in (replace(matrix, scale=matrix.scale.flip(0)), matrix.rows(torch.arange(64).flip(0))):
        assert roundings(got, x, numbers_of(wrong)) > 1000 * BAR
    if matrix.zero is not None:
        assert roundings(got, x, numbers_of(replace(matrix, zero=matrix.zero + 1))) > 1000 * BAR


# Both ways of each product.


def test_many_rows_give_what_few_do():
    for kind, most in (("u4", MAX_INT4_ROWS), ("i8", MAX_INT8_ROWS)):
        matrix = matrix_of(128, 64, kind)
        layer = linear_of(matrix, None, torch.float32)
        x = inputs(most + 1, matrix, torch.float32)
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            many = type(layer)._many
            patch.setattr(type(layer), "_many", lambda self, x: calls.append(len(x)) or many(self, x))
            whole = layer(x)
            parts = torch.cat([layer(part) for part in x.split(1)])
        assert calls == [most + 1]
        assert torch.allclose(whole, parts, rtol=0, atol=1e-5 * float(parts.abs().max()))


def test_another_layout_of_four_bits_goes_through_the_kernel(monkeypatch):
    """Which knows its own, on any processor."""
    matrix = matrix_of(128, 64, "u4", 32)
    layer, x = linear_of(matrix, None, torch.float32), inputs(MAX_INT4_ROWS + 1, matrix, torch.float32)
    expected = layer(x)
    monkeypatch.setattr(linear, "_knows_layout", lambda: False)
    monkeypatch.setattr(Int4Linear, "_many", None)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_rows_beside_the_blocks_of_the_layout_go_through_the_kernel(monkeypatch):
    monkeypatch.setattr(Int4Linear, "_many", None)
    matrix = matrix_of(80, 64, "u4", 32)
    x = inputs(MAX_INT4_ROWS + 1, matrix, torch.float32)
    assert roundings(linear_of(matrix, None, torch.float32)(x), x, numbers_of(matrix)) <= BAR


def test_lengths_that_the_kernel_of_eight_bits_cannot_take_go_another_way(monkeypatch):
    matrix = matrix_of(32, 40, "i8")
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)
    x = inputs(1, matrix, torch.bfloat16)
    assert roundings(linear_of(matrix, None, torch.bfloat16)(x), x, numbers_of(matrix)) <= BAR


@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_are_taken_in_parts(monkeypatch, kind):
    matrix = matrix_of(200 if kind[1] == "8" else 256, 64, kind)
    x, numbers = inputs(MAX_INT4_ROWS + 1, matrix, torch.float32), numbers_of(matrix)
    sizes = []
    dequantised = CodedLinear._dequantised
    monkeypatch.setattr(linear, "DEQUANTISED_ELEMENTS", 64 * 70)
    monkeypatch.setattr(
        CodedLinear, "_dequantised", lambda self, rows, dtype: sizes.append(rows) or dequantised(self, rows, dtype)
    )
    layer = linear_of(matrix, None, torch.float32)
    assert roundings(layer(x), x, numbers) <= BAR
    assert isinstance(layer, CodedLinear) == bool(sizes)
    assert all(rows.stop - rows.start == 70 for rows in sizes)


def test_packing_in_parts_is_packing(monkeypatch):
    for num_rows in (128, 208, 336):
        matrix = matrix_of(num_rows, 64, "u4", 32)
        whole = linear_of(matrix, None, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "DEQUANTISED_ELEMENTS", 1)
            parts = linear_of(matrix, None, torch.float32)
        assert isinstance(whole, Int4Linear) and isinstance(parts, Int4Linear)
        assert torch.equal(whole.packed, parts.packed)


# Orders of columns and groups.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "expected"), [("u4", Int4Linear), ("t4", CodedLinear), ("i8zeros", CodedLinear)])
def test_columns_may_belong_to_any_group(kind, expected, dtype):
    matrix = matrix_of(64, 96, kind, 32)
    matrix = replace(matrix, groups=matrix.groups[torch.randperm(96, generator=torch.Generator().manual_seed(1))])
    assert matrix.group_size() is None
    layer, numbers = linear_of(matrix, None, dtype), numbers_of(matrix)
    assert type(layer) is expected
    for count in NUM_INPUTS:
        x = inputs(count, matrix, dtype)
        assert roundings(layer(x), x, numbers) <= BAR
    neighbouring = replace(matrix, groups=neighbours(96, 32))
    assert roundings(layer(x), x, numbers_of(neighbouring)) > 10 * BAR


def test_groups_of_several_sizes_are_right_too():
    """As a rank has them whose columns begin in the middle of a group."""
    whole = matrix_of(64, 128, "u4", 32)
    for columns in (range(16, 80), range(50, 128), range(0, 41)):
        part = whole.columns(columns).only_used_groups()
        assert part.scale.shape[1] == len({column // 32 for column in columns})
        layer, x = linear_of(part, None, torch.float32), inputs(3, part, torch.float32)
        assert type(layer) is CodedLinear
        assert roundings(layer(x), x, numbers_of(whole)[:, columns.start : columns.stop]) <= BAR


def test_two_halves_of_the_columns_add_up():
    for kind in KINDS:
        whole = matrix_of(64, 96, kind)
        x = inputs(3, whole, torch.float32)
        parts = [whole.columns(columns).only_used_groups() for columns in (range(41), range(41, 96))]
        halves = [linear_of(part, None, torch.float32) for part in parts]
        total = halves[0](x[:, :41]) + halves[1](x[:, 41:])
        assert roundings(total, x, numbers_of(whole)) <= BAR


# Several matrices as one.


def test_matrices_of_a_kind_are_stacked_and_others_stand_side_by_side():
    kinds = ["u4", "u4", "i8", "i8", "t4"]
    matrices = [matrix_of(rows, 64, kind) for rows, kind in zip((16, 32, 48, 16, 64), kinds)]
    matrices[4] = replace(matrices[4], table=torch.arange(16.0))
    stacks = stacked(matrices)
    assert [matrix.shape[0] for matrix in stacks] == [48, 64, 64]
    layer = SideBySide(tuple(linear_of(matrix, None, torch.float32) for matrix in stacks))
    x = inputs(4, matrices[0], torch.float32)
    assert roundings(layer(x), x, torch.cat([numbers_of(matrix) for matrix in matrices])) <= BAR
    assert layer.num_bytes == sum(part.num_bytes for part in layer.parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda matrix: replace(matrix, groups=matrix.groups.flip(0)),
        lambda matrix: replace(matrix, zero=None),
        lambda matrix: replace(matrix, num_bits=2),
        lambda matrix: replace(matrix, table=torch.arange(16.0)),
        lambda matrix: matrix_of(32, 64, "u4", 32),
    ],
)
def test_matrices_of_two_kinds_stay_two(change):
    matrix = matrix_of(32, 64, "u4", 16)
    assert len(stacked([matrix, matrix])) == 1
    assert len(stacked([matrix, change(matrix)])) == 2


def test_dense_and_quantised_products_stand_side_by_side():
    matrix, weight = matrix_of(32, 64, "i8"), torch.randn(16, 64)
    bias = torch.randn(48)
    parts = linear_of(matrix, bias[:32], torch.float32), DenseLinear(weight, bias[32:])
    x = inputs(2, matrix, torch.float32)
    numbers = torch.cat((numbers_of(matrix), weight.double()))
    assert roundings(SideBySide(parts)(x), x, numbers, bias) <= BAR


# Memory.


@pytest.mark.parametrize(("kind", "share"), [("u4", 0.29), ("u2", 0.29), ("t4", 0.32), ("i8", 0.51), ("f8", 0.54)])
def test_weights_stay_small(kind, share):
    matrix = matrix_of(256, 1024, kind, None if kind == "i8" else 64)
    layer = linear_of(matrix, None, torch.bfloat16)
    assert layer.num_bytes <= share * 256 * 1024 * 2


def test_what_is_kept_is_no_part_of_something_larger():
    for kind in KINDS:
        part = matrix_of(64, 128, kind).columns(range(32, 96)).only_used_groups()
        layer = linear_of(part, None, torch.float32)
        for name in ("codes", "packed", "scale", "scales"):
            tensor = getattr(layer, name, None)
            assert tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes, (kind, name)


# Embeddings.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_rows_of_their_numbers(dtype):
    matrix = matrix_of(50, 24, "i8")
    embedding = Int8Embedding(matrix.codes, matrix.scale[:, 0].to(dtype))
    tokens = torch.tensor([3, 49, 0, 3])
    got, expected = embedding(tokens), numbers_of(embedding.matrix)[tokens]
    assert got.dtype is dtype and got.shape == (4, 24)
    assert torch.allclose(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert not torch.allclose(got.double(), expected[[1, 0, 2, 3]])
    assert embedding(tokens[:0]).shape == (0, 24)
    assert embedding.num_bytes == 50 * 24 + 50 * dtype.itemsize


def test_a_head_that_is_the_embedding_uses_its_codes():
    matrix = matrix_of(64, 32, "i8")
    embedding = Int8Embedding(matrix.codes, matrix.scale[:, 0])
    head = linear_of(embedding.matrix, None, torch.float32)
    assert isinstance(head, Int8Linear) and head.codes is embedding.codes
    x = inputs(2, matrix, torch.float32)
    assert roundings(head(x), x, numbers_of(matrix)) <= BAR


def test_every_product_agrees_with_the_one_that_takes_anything():
    for kind, count in product(KINDS, (1, MAX_INT4_ROWS + 1)):
        matrix = matrix_of(64, 64, kind)
        x = inputs(count, matrix, torch.float32)
        got, expected = (make(matrix, None, torch.float32)(x) for make in (linear_of, coded_linear))
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
