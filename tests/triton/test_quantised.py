"""Products with quantised matrices against float64, from what formats hold to what a layer gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import quantised as formats
from tests.support import tiny_models
from tests.support.paged import load_decoder
from tests.worker.model.quant.test_linear import matrix_of, numbers_of, roundings
from worker.kernels.triton import products, quantised
from worker.kernels.triton.products import FLOAT8, INTEGERS, MAX_ROWS, NIBBLES, PLACES
from worker.kernels.triton.quantised import FLOAT8_NOTE, QuantisedLinear, for_gpu, in_float8, linear_for_gpu, nibbles
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import load_weights, weight_bytes
from worker.model.quant.choice import MADE, choose_quantisation
from worker.model.quant.linear import CodedLinear, MakeProduct
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.reading import EIGHT_BITS_NOTE
from worker.model.quant.scheme import Quantisation
from worker.model.weights import DenseLinear, Linear, MlpWeights
from worker.runner import hardware
from worker.runner.cuda import triton_kernels

DTYPES = (torch.bfloat16, torch.float16)
BAR = 1
"""Roundings of the type, of the sum of the products' sizes: codes are multiplied as they are, sums are float32."""
KINDS = {"u4": NIBBLES, "u4plain": NIBBLES, "u2": NIBBLES, "u8": INTEGERS, "i8": INTEGERS, "i8zeros": INTEGERS}
KINDS |= {"f8": FLOAT8, "t4": PLACES}
SIZES = [(7, 40, None), (20, 33, None), (3, 1, None), (70, 256, 32), (33, 192, 64), (18, 256, 128), (5, 96, 96)]
COUNTS = (1, 2, MAX_ROWS, MAX_ROWS + 1)


def moved(layer: Linear, device: torch.device) -> Linear:
    """As loading moves it."""
    if not isinstance(layer, QuantisedLinear):
        return layer

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    matrix = layer.matrix
    codes = there(matrix.codes)
    assert codes is not None
    tensors = {name: there(getattr(matrix, name)) for name in ("scale", "zero", "table")}
    matrix = replace(matrix, codes=codes, **tensors)
    return replace(layer, matrix=matrix, order=there(layer.order), bias=there(layer.bias))


def error(layer: Linear, x: Tensor, matrix: QuantisedMatrix, bias: Tensor | None, device: torch.device) -> float:
    got = moved(layer, device)(x.to(device)).cpu()
    assert got.shape == (len(x), matrix.shape[0]) and got.dtype is x.dtype
    return roundings(got, x, numbers_of(matrix), bias)


def inputs(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """So large that float16 holds what becomes of them without losing bits."""
    return (16 * torch.randn(count, width, generator=torch.Generator().manual_seed(count))).to(dtype)


def rounded(matrix: QuantisedMatrix) -> QuantisedMatrix:
    """With scales as files keep them."""
    return replace(matrix, scale=matrix.scale.half().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_the_numbers_of_the_matrix(device, kind, dtype):
    for (n, k, size), count in product(SIZES, COUNTS):
        if (n + count) % 2 and size:
            continue
        matrix, bias = rounded(matrix_of(n, k, kind, size)), torch.randn(n).to(dtype) if count % 2 else None
        layer = linear_for_gpu(matrix, bias, dtype)
        assert isinstance(layer, QuantisedLinear) and layer.matrix.kind == KINDS[kind]
        assert error(layer, inputs(count, k, dtype), matrix, bias, device) <= BAR, (n, k, size, count)


def test_a_step_of_many_rows_is_multiplied_in_larger_tiles(device):
    for kind, size in (("u4", 64), ("i8", None), ("f8", None)):
        matrix = rounded(matrix_of(130, 128, kind, size))
        x = inputs(150, 128, torch.bfloat16)
        assert error(linear_for_gpu(matrix, None, torch.bfloat16), x, matrix, None, device) <= BAR


@pytest.mark.parametrize("count", [1, 3])
def test_sums_that_are_split_are_whole(device, count):
    for kind, size in (("u4", 64), ("i8", None)):
        matrix = rounded(matrix_of(9, 8192, kind, size))
        layer = linear_for_gpu(matrix, None, torch.bfloat16)
        assert isinstance(layer, QuantisedLinear) and products._plan(layer.matrix, count)[1] > 1
        assert error(layer, inputs(count, 8192, torch.bfloat16), matrix, None, device) <= BAR


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [None, 32])
def test_wrong_zeros_scales_and_places_show(device, count, size):
    matrix = rounded(matrix_of(40, 128, "u4", size))
    layer, x = linear_for_gpu(matrix, None, torch.float16), inputs(count, 128, torch.float16)
    assert error(layer, x, matrix, None, device) <= BAR
    swapped = matrix.codes.view(40, -1, 2).flip(2).view(40, -1)
    assert matrix.zero is not None
    for wrong in (
        replace(matrix, zero=matrix.zero + 1),
        replace(matrix, codes=swapped),
        replace(matrix, scale=matrix.scale.flip(0)),
        replace(matrix, codes=matrix.codes ^ 8),
    ):
        assert error(layer, x, wrong, None, device) > 4 * BAR


def test_columns_in_another_order_than_their_groups_are_put_in_order(device):
    matrix = rounded(matrix_of(40, 128, "u4", 32))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    matrix = replace(matrix, groups=matrix.groups[order])
    assert matrix.group_size() is None
    layer = linear_for_gpu(matrix, None, torch.bfloat16)
    assert isinstance(layer, QuantisedLinear) and layer.order is not None
    for count in (1, 5):
        x = inputs(count, 128, torch.bfloat16)
        assert error(layer, x, matrix, None, device) <= BAR
        assert error(replace(layer, order=None), x, matrix, None, device) > 4 * BAR


def test_what_has_no_kernel_is_dequantised(device):
    odd_groups, wide_table = matrix_of(8, 40, "u4", 20), replace(matrix_of(8, 64, "t4", 32), num_bits=8)
    halves = replace(matrix_of(8, 64, "u4", 32), zero=torch.full((8, 2), 0.3))
    unequal = matrix_of(8, 64, "u4", 32)
    unequal = replace(unequal, groups=(torch.arange(64) >= 16).long())
    for matrix in (odd_groups, wide_table, halves, unequal):
        assert isinstance(linear_for_gpu(matrix, None, torch.bfloat16), CodedLinear)
    assert isinstance(linear_for_gpu(matrix_of(8, 64, "u4", 32), None, torch.float32), CodedLinear)
    wide = replace(matrix_of(8, 64, "f8"), codes=torch.randn(8, 64).to(torch.float8_e5m2))
    assert isinstance(linear_for_gpu(wide, None, torch.bfloat16), CodedLinear)


def test_scales_that_float16_cannot_hold_stay_wide(device):
    matrix, x = matrix_of(8, 64, "u4", 32), inputs(2, 64, torch.bfloat16)
    tiny_scales = replace(matrix, scale=matrix.scale * 1e-7)
    for each, dtype in ((rounded(matrix), torch.float16), (tiny_scales, torch.float32)):
        layer = linear_for_gpu(each, None, torch.bfloat16)
        assert isinstance(layer, QuantisedLinear) and layer.matrix.scale is not None
        assert layer.matrix.scale.dtype is dtype
        assert error(layer, x, each, None, device) <= BAR


def test_inputs_keep_their_shape(device):
    layer = moved(linear_for_gpu(matrix_of(24, 64, "u4", 32), None, torch.bfloat16), device)
    x = inputs(6, 64, torch.bfloat16).to(device)
    assert torch.equal(layer(x.view(3, 2, 64)), layer(x).view(3, 2, 24))
    assert layer(x.view(3, 2, 64)[:, :0]).shape == (3, 0, 24)


def test_nibbles_lie_where_the_layout_says():
    codes = torch.randint(16, (3, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    words = nibbles(codes)
    assert words.shape == (3, 12) and words.dtype is torch.int32
    for column in range(70):
        block, place = divmod(column, 32)
        word = words[:, block * 4 + place % 4] >> place // 4 * 4 & 15
        assert torch.equal(word, codes[:, column].int())


# Floats of eight bits.


def test_eight_bits_of_inputs_are_those_that_torch_rounds_to(device):
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    # with 448 in each row nothing is scaled, and there are ties, subnormals and zeros of both signs
    rows = torch.cat((numbers, between, torch.tensor([-0.0, 448.0, 2.0**-10, 2.0**-11])))[None].repeat(2, 1)
    rows[1] *= 0.37
    codes, scale = (each.cpu() for each in in_float8(rows.to(device)))
    assert scale[0] == 1 and torch.equal(scale[:, 0], rows.amax(1) / 448)
    assert torch.equal(codes.view(torch.uint8), (rows / scale).to(torch.float8_e4m3fn).view(torch.uint8))
    wrong = (rows / scale * 1.07).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert not torch.equal(codes.view(torch.uint8), wrong.view(torch.uint8))


@pytest.mark.parametrize("count", [1, 2])
def test_every_code_of_eight_bits_is_read_as_the_number_it_is(device, count):
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()][:, None]
    assert len(codes) == 254 and codes.float().abs()[codes.float() != 0].min() == 2.0**-9
    matrix = QuantisedMatrix(codes, torch.ones(254, 1), None, torch.zeros(1, dtype=torch.int64), 8)
    layer = moved(linear_for_gpu(matrix, None, torch.float16), device)
    assert isinstance(layer, QuantisedLinear)
    got = layer(torch.ones(count, 1, dtype=torch.float16, device=device)).cpu()
    assert torch.equal(got.float(), codes.float().t().repeat(count, 1))


def test_rows_with_what_is_no_number_say_so_in_eight_bits(device):
    rows = torch.ones(4, 20, dtype=torch.bfloat16)
    rows[1, 3], rows[2, 4], rows[3] = float("nan"), float("-inf"), 0.0
    codes, scale = (each.cpu() for each in in_float8(rows.to(device)))
    has_none = (codes.float() * scale).isnan().any(1)
    assert has_none.tolist() == [False, True, True, False]
    assert torch.equal(codes[3].float(), torch.zeros(20))


def test_many_rows_are_multiplied_in_eight_bits_where_the_gpu_can(device, monkeypatch):
    monkeypatch.setattr(quantised, "has_float8", lambda: True)
    matrix, bias = matrix_of(48, 64, "f8"), torch.randn(48).to(torch.bfloat16)
    layer = linear_for_gpu(matrix, bias, torch.bfloat16)
    assert isinstance(layer, QuantisedLinear) and layer.rounds_inputs
    few, many = inputs(MAX_ROWS, 64, torch.bfloat16), inputs(MAX_ROWS + 1, 64, torch.bfloat16)
    assert error(layer, few, matrix, bias, device) <= BAR
    codes, scale = (each.cpu() for each in in_float8(many.to(device)))
    seen = (codes.float() * scale).double()
    got = moved(layer, device)(many.to(device)).cpu()
    assert roundings(got, seen, numbers_of(matrix), bias) <= BAR
    assert BAR < roundings(got, many, numbers_of(matrix), bias) < 2**-4 / 2**-8
    wrong = replace(layer, matrix=replace(layer.matrix, scale=matrix.scale.flip(0)))
    assert roundings(moved(wrong, device)(many.to(device)).cpu(), seen, numbers_of(matrix), bias) > 4 * BAR


@pytest.mark.parametrize(("shape", "size", "dtype"), [((40, 64), None, DTYPES[0]), ((48, 64), None, DTYPES[1])])
def test_other_sizes_and_types_are_not_rounded(device, monkeypatch, shape, size, dtype):
    monkeypatch.setattr(quantised, "has_float8", lambda: True)
    layer = linear_for_gpu(matrix_of(*shape, "f8", size), None, dtype)
    assert isinstance(layer, QuantisedLinear) and not layer.rounds_inputs
    monkeypatch.setattr(quantised, "has_float8", lambda: False)
    layer = linear_for_gpu(matrix_of(48, 64, "f8"), None, torch.bfloat16)
    assert isinstance(layer, QuantisedLinear) and not layer.rounds_inputs


def test_the_log_says_what_becomes_of_activations(monkeypatch):
    stored = Quantisation("fp8", notes=("kept", EIGHT_BITS_NOTE))
    for has_cores, notes in ((False, stored.notes), (True, ("kept", FLOAT8_NOTE))):
        monkeypatch.setattr(quantised, "has_float8", lambda has_cores=has_cores: has_cores)
        assert for_gpu(stored).notes == notes and for_gpu(stored).product is linear_for_gpu
        assert for_gpu(MADE["fp8"]).notes == ((FLOAT8_NOTE,) if has_cores else ())
        assert for_gpu(MADE["int4"]).notes == ()


# From files.


FORMATS = {
    "gptq": formats.gptq(4, 32, has_order=True),
    "awq": formats.awq(32),
    "int8": formats.compressed("int-quantized", num_bits=8, strategy="channel"),
    "fp8": formats.fp8(),
    "nf4": formats.bitsandbytes("nf4"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    tiny_models.build_from("Llama", **sizes).save_pretrained(folder)
    return folder


def layers_of(folder: Path, product: MakeProduct) -> list[Linear]:
    """Of its one layer, in bfloat16."""
    config = read_config(folder)
    spec, family = read_spec(config)
    quantisation = replace(choose_quantisation(None, config), product=product)
    layer = load_weights(spec, family, Checkpoint(folder), torch.bfloat16, quantisation=quantisation).layers[0]
    assert isinstance(layer.mlp, MlpWeights)
    return [layer.qkv, layer.out, layer.mlp.up, layer.mlp.down]


@pytest.mark.parametrize("name", FORMATS)
def test_stored_matrices_become_products_of_a_gpu(base, tmp_path, device, name):
    stored, dense = formats.save(base, tmp_path, FORMATS[name])
    weights = [layer.weight for layer in load_dense(dense)]
    found = layers_of(stored, linear_for_gpu)
    for layer, weight in zip(found, weights, strict=True):
        assert isinstance(layer, QuantisedLinear)
        for count in (1, 3):
            x = inputs(count, weight.shape[1], torch.bfloat16)
            got = moved(layer, device)(x.to(device)).cpu()
            assert roundings(got, x, weight.double()) <= BAR
            assert roundings(got, x, weight.double().roll(1, 1)) > 4 * BAR


def load_dense(folder: Path) -> list[DenseLinear]:
    layer = load_decoder(folder).weights.layers[0]
    return [layer.qkv, layer.out, layer.mlp.up, layer.mlp.down]


@pytest.mark.parametrize("option", ["int4", "int8", "fp8"])
def test_what_a_gpu_will_take_is_known_before(base, option):
    spec, family = read_spec(read_config(base))
    quantisation = replace(MADE[option], product=linear_for_gpu)
    weights = load_weights(spec, family, Checkpoint(base), torch.bfloat16, quantisation=quantisation)
    layer, norms = weights.layers[0], 3 * spec.hidden_size * 2
    assert isinstance(layer.qkv, QuantisedLinear)
    layers = sum(each.num_bytes for each in (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down))
    expected = weight_bytes(spec, family, Checkpoint(base), torch.bfloat16, quantisation=quantisation)
    assert weights.embed.num_bytes + weights.head.num_bytes + layers + norms == expected


def test_models_on_a_gpu_are_loaded_with_these_products(device):
    kernels, _ = triton_kernels("triton", torch.device(device), torch.bfloat16, [])
    assert kernels.adapt(MADE["int4"]).product is linear_for_gpu
    assert hardware.as_it_is(MADE["int4"]).product is not linear_for_gpu, "a CPU has its own"
