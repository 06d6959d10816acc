"""What is written of a quantised matrix, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.quantised import packed
from worker.model.quant.calibrated import Grid, nearest
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.writing import as_compressed, as_gptq, pack


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("width", [64, 37])
def test_codes_are_packed_with_the_first_in_the_lowest_bits(num_bits: int, width: int) -> None:
    codes = torch.randint(0, 1 << num_bits, (5, width), generator=torch.Generator().manual_seed(width)).to(torch.uint8)
    assert np.array_equal(pack(codes, num_bits).numpy(), packed(codes.numpy(), num_bits))
    assert np.array_equal(pack(codes.t(), num_bits).numpy(), packed(codes.t().numpy(), num_bits)), "however they lie"
    assert not np.array_equal(pack(codes.flip(1), num_bits).numpy(), packed(codes.numpy(), num_bits))


def matrix(num_bits: int, dtype: torch.dtype) -> QuantisedMatrix:
    return nearest(torch.randn(8, 96, generator=torch.Generator().manual_seed(1)), Grid(num_bits, 32, dtype))


def test_of_gptq_words_go_along_the_columns_and_zeros_are_less_one() -> None:
    made = matrix(4, torch.float16)
    tensors = as_gptq(made)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (12, 8)),
        "qzeros": (torch.int32, (3, 1)),
        "scales": (torch.float16, (3, 8)),
        "g_idx": (torch.int32, (96,)),
    }
    assert np.array_equal(tensors["qweight"].numpy(), packed(made.codes.numpy(), 4).T)
    assert (tensors["qzeros"] == 0x77777777).all()
    assert torch.equal(tensors["scales"].float().t(), made.scale)
    assert tensors["g_idx"].tolist() == [column // 32 for column in range(96)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_of_compressed_tensors_words_go_along_the_columns_too() -> None:
    made = matrix(8, torch.bfloat16)
    tensors = as_compressed(made, torch.bfloat16)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "weight_packed": (torch.int32, (8, 24)),
        "weight_scale": (torch.bfloat16, (8, 3)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert np.array_equal(tensors["weight_packed"].numpy(), packed(made.codes.numpy(), 8))
    assert torch.equal(tensors["weight_scale"].float(), made.scale)
    assert tensors["weight_shape"].tolist() == [8, 96]
