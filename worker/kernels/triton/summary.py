"""What sampling wants to know of a row of logits, in one read of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.ahead import Specimen
from worker.model.operations import Summary

TYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def summarise_rows(logits, most, columns, normalisers, row_stride, size, BLOCK: tl.constexpr):
    """Of each row of `logits` [rows, size] the largest number, the first place where it stands, and the logarithm of
    the sum of all exponentials (by the running maximum of Milakov & Gimelshein, arXiv 1805.02867).

    Moves rows * size elements and does 5 operations with each: memory is the limit.
    """
    row = tl.program_id(0).to(tl.int64)
    high, place, total = -float("inf"), 0, 0.0
    for at in range(0, size, BLOCK):
        places = at + tl.arange(0, BLOCK)
        values = tl.load(logits + row * row_stride + places, places < size, -float("inf")).to(tl.float32)
        block_high, block_place = tl.max(values, 0, return_indices=True)
        is_higher = block_high > high
        place = tl.where(is_higher, at + block_place, place)
        before, high = high, tl.where(is_higher, block_high, high)
        # minus infinity from itself is no number, though nothing is what it adds
        base = tl.where(high > -float("inf"), high, 0.0)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(values - base), 0)
    tl.store(most + row, high)
    tl.store(columns + row, place)
    tl.store(normalisers + row, high + tl.log(total))


def can_summarise(logits: Tensor) -> bool:
    return logits.dtype in TYPES and logits.stride(-1) == 1


def summarise(logits: Tensor) -> Summary:
    """As `Operations` says it; `can_summarise` says whether it can."""
    num_rows, size = logits.shape
    most, normalisers = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    columns = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    outputs = most, columns, normalisers
    summarise_rows[(num_rows,)](logits, *outputs, logits.stride(0), size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return outputs


def specimens() -> list[Specimen]:
    return [
        Specimen(
            name,
            summarise_rows,
            {"logits": f"*{name}", "most": "*fp32", "columns": "*i64", "normalisers": "*fp32"}
            | {"row_stride": "i32:16", "size": "i32:16"},
            {"BLOCK": BLOCK},
            is_decode=True,
            num_warps=NUM_WARPS,
        )
        for name in ("bf16", "fp32")
    ]
