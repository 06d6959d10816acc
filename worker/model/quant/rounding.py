"""Quantisation to the nearest code, of matrices that come whole."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.model.quant.matrix import QuantisedMatrix, neighbours

INT4_GROUP, CODEBOOK_BLOCK = 64, 64
LEAST_SCALE = 1e-12
"""Stands for the scale of numbers that are all zero."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E)."""
FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
"""What bitsandbytes' codes 0 to 7 stand for; 8 to 15 are their negatives."""


def int8_by_row(weight: Tensor) -> QuantisedMatrix:
    """Eight bits with a sign, a row's largest at 127."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=LEAST_SCALE)
    codes = (weight / scale).round_().to(torch.int8)
    return QuantisedMatrix(codes, scale, None, neighbours(weight.shape[1], weight.shape[1]), 8)


def fp8_by_row(weight: Tensor) -> QuantisedMatrix:
    """float8_e4m3fn, a row's largest at its largest number."""
    scale = (weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=LEAST_SCALE)
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return QuantisedMatrix(codes, scale, None, neighbours(weight.shape[1], weight.shape[1]), 8)


def int4_by_group(weight: Tensor, group_size: int = INT4_GROUP) -> QuantisedMatrix:
    """Four bits between the smallest and the largest of a group, zero among them and exact.

    Groups of rows whose length they do not divide are half as large, or the row is one.
    """
    num_columns = weight.shape[1]
    size = next((size for size in (group_size, group_size // 2) if num_columns % size == 0), num_columns)
    grouped = weight.view(len(weight), -1, size)
    low, high = grouped.amin(2).clamp(max=0.0), grouped.amax(2).clamp(min=0.0)
    scale = ((high - low) / 15).clamp(min=LEAST_SCALE)
    zero = (-low / scale).round_()
    codes = (grouped / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return QuantisedMatrix(codes.view(weight.shape), scale, zero, neighbours(num_columns, size), 4)


def nf4_by_block(weight: Tensor) -> QuantisedMatrix:
    """The nearest of 16 numbers times the largest of a block of 64, as bitsandbytes' NF4."""
    return _by_codebook(weight, torch.tensor(NF4))


def fp4_by_block(weight: Tensor) -> QuantisedMatrix:
    """The same with bitsandbytes' FP4."""
    positive = torch.tensor(FP4)
    return _by_codebook(weight, torch.cat((positive, -positive)))


def _by_codebook(weight: Tensor, table: Tensor) -> QuantisedMatrix:
    """Blocks begin anew with each row; the last one of a row may be shorter."""
    num_rows, num_columns = weight.shape
    num_blocks = -(-num_columns // CODEBOOK_BLOCK)
    padded = torch.nn.functional.pad(weight, (0, num_blocks * CODEBOOK_BLOCK - num_columns))
    blocks = padded.view(num_rows, num_blocks, CODEBOOK_BLOCK)
    scale = blocks.abs().amax(2).clamp(min=LEAST_SCALE)
    ordered, order = table.to(weight.device).sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    places = torch.bucketize(blocks / scale[..., None], middles)
    codes = order[places].to(torch.uint8).view(num_rows, -1)[:, :num_columns]
    return QuantisedMatrix(codes, scale, None, neighbours(num_columns, CODEBOOK_BLOCK), 4, table)
