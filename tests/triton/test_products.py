"""Products of few rows against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.triton import products
from worker.kernels.triton.products import MAX_ROWS, FewRowLinear, Matrix, multiply
from worker.kernels.triton.quantised import pack_for_gpu
from worker.model.lora import AdaptedLinear
from worker.model.weights import DenseLinear, MlpWeights

DTYPES = (torch.bfloat16, torch.float16)
BAR = 1
"""Roundings of the type, of the sum of the products' sizes: sums are float32, and results are rounded once."""
SHAPES = [(5, 7), (1, 1), (33, 300), (70, 130), (40, 2048), (9, 4097)]
"""Of matrices; the last two are split among programs."""


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))
    return numbers.to(device, dtype)


def roundings(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert got.shape == exact.shape
    return float(((got.double() - exact).abs() / size / torch.finfo(got.dtype).eps).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_multiplied_as_definitions_say(device, dtype):
    for n, k in SHAPES:
        weight, bias = random(n, k, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
        for count in (1, 2, 7, MAX_ROWS):
            x = random(count, k, dtype=dtype, device=device)
            has_bias = bool(count % 2)
            got = multiply(x, Matrix(weight, k), bias if has_bias else None)
            assert got.dtype is dtype and roundings(got, x, weight, bias if has_bias else None) <= BAR, (count, n, k)


@pytest.mark.parametrize("count", [1, 3])
def test_sums_that_are_split_are_whole_and_always_the_same(device, monkeypatch, count):
    n, k = 40, 4096
    weight, x = random(n, k, dtype=torch.bfloat16, device=device), random(count, k, dtype=torch.bfloat16, device=device)
    _, num_parts, span = products._plan(Matrix(weight, k), count)
    assert num_parts > 1 and (num_parts - 1) * span < k <= num_parts * span
    got = multiply(x, Matrix(weight, k))
    assert roundings(got, x, weight) <= BAR and torch.equal(got, multiply(x, Matrix(weight, k)))
    monkeypatch.setattr(products, "add_parts", _LeavesOutTheLast(products.add_parts))
    assert roundings(multiply(x, Matrix(weight, k)), x, weight) > 2 * BAR


class _LeavesOutTheLast:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(parts: Tensor, bias: Tensor, out: Tensor, size: int, n: int, num_parts: int, *rest: Any) -> None:
            self.kernel[grid](parts, bias, out, size, n, num_parts - 1, *rest)

        return launch


def test_programs_fill_a_gpu_wherever_a_matrix_is_large_enough():
    for n, k in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 2048), (256, 4096)):
        matrix = Matrix(torch.empty((n, k), dtype=torch.bfloat16, device="meta"), k)
        for count in (1, 5):
            tiles, num_parts, span = products._plan(matrix, count)
            # two for each of 132 processors, or all but a few
            assert -(-n // tiles.n) * num_parts >= 250 or count > 1 or n == 256
            assert num_parts == 1 or n < 64 * products.FULL
            assert (num_parts - 1) * span < k <= num_parts * span


def test_layers_keep_the_shape_of_inputs_and_leave_many_rows_to_torch(device, monkeypatch):
    weight, bias = random(20, 48, dtype=torch.bfloat16, device=device), random(20, dtype=torch.bfloat16, device=device)
    layer, counts = FewRowLinear(weight, bias), []
    monkeypatch.setattr(products, "multiply", lambda x, *rest: counts.append(len(x)) or multiply(x, *rest))
    for shape in ((0, 48), (1, 48), (3, 2, 48), (MAX_ROWS, 48), (MAX_ROWS + 1, 48)):
        x = random(*shape, dtype=torch.bfloat16, device=device)
        got = layer(x)
        assert got.shape == (*shape[:-1], 20)
        assert not x.numel() or roundings(got.view(-1, 20), x.view(-1, 48), weight, bias) <= BAR
    assert counts == [0, 1, 6, MAX_ROWS]


def test_what_a_product_gives_may_be_added_to_in_place_as_adapters_do(device):
    weight, x = random(20, 48, dtype=torch.float16, device=device), random(3, 48, dtype=torch.float16, device=device)
    expected, layer = FewRowLinear(weight, None)(x) + 1, FewRowLinear(weight, None)
    got = layer(x)
    got[:, 5:] += 1
    got[:, :5] += 1
    assert torch.equal(got, expected) and torch.equal(layer(x) + 1, expected)


def test_rows_that_are_no_neighbours_are_multiplied_too(device):
    weight, x = random(20, 48, dtype=torch.float16, device=device), random(48, 4, dtype=torch.float16, device=device)
    assert not x.t().is_contiguous()
    assert roundings(multiply(x.t(), Matrix(weight, 48)), x.t(), weight) <= BAR


def test_inputs_of_another_width_are_refused(device):
    weight, x = random(8, 32, dtype=torch.float16, device=device), random(2, 16, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"an input of 32 numbers in a row is expected, not 16"):
        multiply(x, Matrix(weight, 32))


def test_all_dense_products_of_a_tree_are_replaced_and_adapters_go_on_beside_them(device):
    def dense(n: int, k: int) -> DenseLinear:
        return DenseLinear(random(n, k, dtype=torch.bfloat16, device=device), None)

    adapted = AdaptedLinear(dense(24, 32), 32, slots=None)
    tree = [MlpWeights(adapted, dense(32, 24)), (dense(4, 32), DenseLinear(torch.ones(4, 4), None))]
    base, down = adapted.base, tree[0].down
    packed = pack_for_gpu(tree)
    assert packed[0].up is adapted and isinstance(adapted.base, FewRowLinear) and adapted.base.weight is base.weight
    assert isinstance(packed[0].down, FewRowLinear) and packed[0].down.weight is down.weight
    assert isinstance(packed[1][0], FewRowLinear) and isinstance(packed[1][1], DenseLinear)
