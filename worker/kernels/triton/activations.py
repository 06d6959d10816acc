"""Activations, gated or plain, with the roundings of torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.ahead import Specimen
from worker.model.operations import Activate
from worker.model.spec import Activation

TYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024
NUMBERS = {Activation.SILU: 0, Activation.GELU: 1, Activation.GELU_TANH: 2, Activation.RELU: 3}
"""By which kernels know them."""


@triton.jit
def activated(x, KIND: tl.constexpr):
    """Of float32 `x`, by the numbers of NUMBERS."""
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        # 0.5 (1 + tanh(y / 2)) is 1 / (1 + exp(-y))
        return x / (1.0 + tl.exp((x + x * x * x * 0.044715) * -1.5957691216057308))
    else:
        # what is no number stays none
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activate_rows(x, out, width, KIND: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr):
    """`out` [rows, width] from `x` [rows, width], or [rows, 2 * width] of which the second half is multiplied with what
    becomes of the first one.

    Moves 2 * rows * width elements, 3 where it is gated, and does about 10 operations with each: memory is the limit.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < width
    gate = x + row * width * (2 if IS_GATED else 1) + columns
    value = activated(tl.load(gate, is_there, 0.0).to(tl.float32), KIND).to(out.dtype.element_ty)
    if IS_GATED:
        up = tl.load(gate + width, is_there, 0.0).to(tl.float32)
        value = (value.to(tl.float32) * up).to(out.dtype.element_ty)
    tl.store(out + row * width + columns, value, is_there)


@dataclass(frozen=True, slots=True)
class TritonActivation:
    """One of `Operations.activation`."""

    kind: Activation
    is_gated: bool
    in_torch: Activate

    def __call__(self, inner: Tensor) -> Tensor:
        if inner.dtype not in TYPES or inner.dim() != 2 or not inner.is_contiguous():
            return self.in_torch(inner)
        num_rows, width = inner.shape
        width = width // 2 if self.is_gated else width
        out = inner.new_empty((num_rows, width))
        grid = num_rows, triton.cdiv(width, BLOCK)
        activate_rows[grid](inner, out, width, KIND=NUMBERS[self.kind], IS_GATED=self.is_gated, BLOCK=BLOCK)
        return out


def specimens() -> list[Specimen]:
    signature = {"x": "*bf16", "out": "*bf16", "width": "i32:16"}
    return [
        Specimen(
            f"bf16, {kind}{', gated' if is_gated else ''}",
            activate_rows,
            signature,
            {"KIND": number, "IS_GATED": is_gated, "BLOCK": BLOCK},
            is_decode=True,
        )
        for kind, number in NUMBERS.items()
        for is_gated in (False, True)
    ]
