from __future__ import annotations

import itertools

import pytest
import torch

from worker.kernels import products
from worker.kernels.elementwise import ACTIVATIONS, CpuOperations
from worker.kernels.products import PackedLinear, pack
from worker.kernels.room import Room
from worker.model.lora import AdaptedLinear
from worker.model.weights import DenseLinear, MlpWeights

SHAPES = [(1, 1), (7, 3), (32, 32), (33, 31), (100, 70), (192, 96), (64, 1030)]
"""Of matrices, [out, in]: less than a panel, whole ones, and ends of both."""
ROWS = [1, 2, 3, 8, 9, 16, 17, 31, 32, 33, 70]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Relative to the largest number of the result; that of bfloat16 is its rounding."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def dense(shape: tuple[int, int], dtype: torch.dtype, *, has_bias: bool = True) -> DenseLinear:
    return DenseLinear(random(*shape, dtype=dtype), random(shape[0], dtype=dtype, seed=1) if has_bias else None)


def error_of(result: torch.Tensor, x: torch.Tensor, product: DenseLinear) -> float:
    exact = x.double() @ product.weight.double().T
    if product.bias is not None:
        exact += product.bias.double()
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_products_of_any_shape_are_those_of_float64(library, dtype, has_bias):
    for shape in SHAPES:
        product = dense(shape, dtype, has_bias=has_bias)
        packed = PackedLinear(library, product)
        for num_rows in ROWS:
            x = random(num_rows, shape[1], dtype=dtype, seed=2)
            assert error_of(packed(x), x, product) <= TOLERANCES[dtype], (shape, num_rows)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_product_that_leaves_out_one_pair_would_be_noticed(library, dtype):
    for shape in [shape for shape in SHAPES if shape[1] > 2]:
        product = dense(shape, dtype)
        wrong = DenseLinear(product.weight.clone(), product.bias)
        wrong.weight[:, -2:] = 0
        x = random(9, shape[1], dtype=dtype, seed=2)
        assert error_of(PackedLinear(library, wrong)(x), x, product) > 2 * TOLERANCES[dtype], shape


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_row_is_the_same_to_the_last_bit_in_every_company(library, dtype):
    packed = PackedLinear(library, dense((100, 1030), dtype))
    x = random(1300, 1030, dtype=dtype, seed=3)
    everyone = packed(x)
    assert len(everyone.unique(dim=0)) == len(x), "rows are to differ"
    for start, count in ((0, 1), (5, 2), (7, 16), (1000, 33), (600, 700)):
        assert torch.equal(packed(x[start : start + count]), everyone[start : start + count])


@pytest.mark.parametrize("pass_by", [False, True])
def test_weights_that_leave_caches_to_others_give_the_same(library, pass_by):
    packed = PackedLinear(library, dense((100, 1030), torch.bfloat16))
    x = random(9, 1030, dtype=torch.bfloat16, seed=3)
    in_company = packed(x)
    library.inferfleet_let_weights_pass(pass_by)
    for count in (1, 2):
        assert torch.equal(packed(x[:count]), in_company[:count])
    assert not torch.equal(packed(x[1:2]), in_company[:1])


def test_weights_pass_where_they_are_too_many_for_caches_and_few_for_a_step(library, monkeypatch):
    said = []
    monkeypatch.setattr(library, "inferfleet_let_weights_pass", said.append)
    monkeypatch.setattr(products, "LEAST_PASSING", 40_000)
    monkeypatch.setattr(products, "MOST_PASSING", 90_000)
    room = Room()
    for _ in range(4):
        pack([dense((100, 128), torch.bfloat16)], library, room)
    assert room.num_bytes == 4 * 128 * 128 * 2 and said == [False, True, False, False]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_wide_rows_which_no_cache_holds_are_the_same_to_the_last_bit_too(library, dtype):
    packed, x = PackedLinear(library, dense((290, 4100), dtype)), random(330, 4100, dtype=dtype, seed=3)
    everyone = packed(x)
    assert len(everyone.unique(dim=0)) == len(x), "rows are to differ"
    for start, count in ((0, 1), (150, 20), (329, 1)):
        assert torch.equal(packed(x[start : start + count]), everyone[start : start + count])
    assert not torch.equal(packed(x[150:170]), everyone[151:171])


def test_what_is_no_number_stays_in_its_row(library):
    packed = PackedLinear(library, dense((64, 96), torch.bfloat16))
    x = random(40, 96, dtype=torch.bfloat16)
    expected = packed(x)
    x[17, 5], x[18, 6] = torch.nan, torch.inf
    found = packed(x)
    assert found[17].isnan().all() and not found[18].isfinite().any()
    is_other = (torch.arange(40) < 17) | (torch.arange(40) > 18)
    assert torch.equal(found[is_other], expected[is_other])


def test_inputs_may_be_parts_of_wider_ones_and_have_any_dimensions(library):
    product = dense((48, 64), torch.float32)
    packed, wide = PackedLinear(library, product), random(6, 5, 200, dtype=torch.float32)
    part, turned = wide[..., 70:134], wide[0, :, :64].t().contiguous().t()
    assert not part.is_contiguous() and turned.stride(1) != 1
    for x in (part, part[0], turned, part[0, 0]):
        assert packed(x).shape == (*x.shape[:-1], 48)
        assert error_of(packed(x), x, product) <= 2e-6
    assert packed(part[0, :0]).shape == (0, 48)


def test_an_input_of_another_width_or_type_is_refused(library):
    packed = PackedLinear(library, dense((48, 64), torch.float32))
    for x in (torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"64 torch.float32 in a row is expected"):
            packed(x)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rows_come_back_out_of_panels(library, dtype):
    for shape in SHAPES:
        product, numbers = dense(shape, dtype), torch.randint(shape[0], (40,))
        assert torch.equal(PackedLinear(library, product).rows(numbers), product.weight[numbers])
    with pytest.raises(IndexError):
        PackedLinear(library, product).rows(torch.tensor([0, len(product.weight)]))


def test_a_tree_is_packed_where_it_is_dense_and_of_a_known_type(library):
    adapted = AdaptedLinear(dense((8, 4), torch.float32), 4, slots=None)
    half = DenseLinear(torch.zeros(4, 8, dtype=torch.float16), None)
    layers = [MlpWeights(adapted, half)]
    packed = pack(layers, library)
    assert packed is layers and isinstance(layers[0].up.base, PackedLinear) and layers[0].down is half
    assert pack(half, None) is half


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_what_follows_a_product_is_the_same_as_one_after_the_other(library, dtype, kind):
    activate = CpuOperations(library).activation(kind, is_gated=True)
    for num_rows, (half, num_in) in itertools.product((1, 16, 33, 70, 130), ((16, 32), (23, 31), (64, 1030))):
        product = dense((2 * half, num_in), dtype, has_bias=num_rows != 33)
        gated, plain = (PackedLinear(library, product, is_gated=is_gated) for is_gated in (True, False))
        x = random(num_rows, num_in, dtype=dtype, seed=2)
        assert torch.equal(gated(x), plain(x))
        assert torch.equal(gated.multiply(x, ACTIVATIONS[kind]), activate(plain(x)))
        assert not torch.equal(gated.multiply(x, ACTIVATIONS[kind]), activate(plain(x).roll(half, 1)))
        alone = CpuOperations(library).activation(kind, is_gated=False)
        assert torch.equal(plain.multiply(x, ACTIVATIONS[kind]), alone(plain(x)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_sum_with_what_came_before_is_rounded_as_two_steps_are(library, dtype):
    for num_rows, shape in itertools.product((1, 31, 65, 200), ((33, 31), (64, 96))):
        packed = PackedLinear(library, dense(shape, dtype))
        x, residual = random(num_rows, shape[1], dtype=dtype), random(num_rows, shape[0], dtype=dtype, seed=7)
        assert packed.can_add(residual) and not packed.can_add(residual.double())
        assert torch.equal(packed.multiply(x, residual=residual), residual + packed(x))


def test_rows_of_a_gated_matrix_come_back_out_of_panels(library):
    product, numbers = dense((46, 40), torch.bfloat16), torch.arange(46)
    packed = PackedLinear(library, product, is_gated=True)
    assert torch.equal(packed.rows(numbers), product.weight)
