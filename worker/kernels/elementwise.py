"""Norms, activations and rope by the kernels of source/elementwise.cpp; what these do not have is torch's to do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.attention import Attention
from worker.attention.native import NativeAttention
from worker.kernels.products import INTEGER, POINTER, SUFFIXES, alone, function_of
from worker.kernels.stack import NativeStack, NewSummary, Turning, can_stack
from worker.model.operations import Activate, Layers, Operations, Stack, Summary, Turns
from worker.model.spec import Activation, Norm
from worker.model.weights import Linear, MlpWeights, NormWeights

ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1, Activation.RELU: 2}
"""By their numbers in the kernel. The exact GELU is torch's."""


class _Norm(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        *((name, INTEGER) for name in ("num_outer", "num_inner", "size", "outer_stride")),
        ("weight", POINTER),
        ("bias", POINTER),
        *((name, INTEGER) for name in ("weight_rows", "has_wide_weight", "is_rms")),
        ("eps", ctypes.c_double),
        *((name, POINTER) for name in ("part", "sums", "out")),
    )


class _Turn(ctypes.Structure):
    _fields_ = (
        ("turned", POINTER),
        ("v", POINTER),
        *(
            (name, INTEGER)
            for name in ("turned_stride", "v_stride", "num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary")
        ),
        *((name, POINTER) for name in ("cos", "sin", "slots", "q", "k_pages", "v_pages")),
    )


class CpuOperations(Operations):
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._normalise = _functions(library, "normalise", [ctypes.POINTER(_Norm)])
        self._activate = _functions(library, "activate", [POINTER, *[INTEGER] * 4, POINTER])
        self._turn = _functions(library, "turn", [ctypes.POINTER(_Turn)])
        self._find_angles = library.inferfleet_find_angles
        self._find_angles.argtypes, self._find_angles.restype = [POINTER, POINTER, INTEGER, POINTER, POINTER], None
        self._summarise = _functions(library, "summarise", [POINTER, INTEGER, INTEGER, *[POINTER] * 3])

    def normalise(self, x: Tensor, weights: NormWeights, eps: float, kind: Norm) -> Tensor:
        if not _can_normalise(x, weights):
            return super().normalise(x, weights, eps, kind)
        out = x.new_empty(x.shape)
        self._normalise[x.dtype](_norm_arguments(x, weights, eps, kind, 0, 0, out.data_ptr()))
        return out

    def add_and_normalise(
        self, x: Tensor, part: Tensor, weights: NormWeights, eps: float, kind: Norm
    ) -> tuple[Tensor, Tensor]:
        if not _can_normalise(x, weights) or not part.is_contiguous() or part.dtype is not x.dtype:
            return super().add_and_normalise(x, part, weights, eps, kind)
        added, out = torch.empty_like(x), torch.empty_like(x)
        pointers = part.data_ptr(), added.data_ptr(), out.data_ptr()
        self._normalise[x.dtype](_norm_arguments(x, weights, eps, kind, *pointers))
        return added, out

    def activation(self, kind: Activation, *, is_gated: bool) -> Activate:
        in_torch, number = super().activation(kind, is_gated=is_gated), ACTIVATIONS.get(kind)
        return in_torch if number is None else CpuActivation(number, is_gated, self._activate, in_torch)

    def feed_forward(
        self, x: Tensor, weights: MlpWeights, activate: Activate, residual: Tensor | None = None
    ) -> Tensor:
        inner, down = _expand(x, weights.up, activate), alone(weights.down)
        if down is not None and residual is not None and down.can_add(residual):
            return down.multiply(inner, residual=residual)
        result = weights.down(inner)
        return result if residual is None else residual + result

    def stack(self, layers: Layers, attention: Attention, activate: Activate) -> Stack | None:
        if not isinstance(attention, NativeAttention) or not isinstance(activate, CpuActivation):
            return None
        if not can_stack(layers):
            return None
        return NativeStack(self._library, layers, attention, activate.number)

    def angles(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float) -> Turns:
        if dtype is not torch.float32 or not positions.is_contiguous():
            return super().angles(positions, frequencies, dtype, amplitude)
        size = len(frequencies)
        cos, sin = (torch.empty(len(positions), 1, size) for _ in range(2))
        turning = Turning(frequencies.data_ptr(), size, amplitude)
        pointers = positions.data_ptr(), len(positions), cos.data_ptr(), sin.data_ptr()
        self._find_angles(ctypes.addressof(turning), *pointers)
        return cos, sin

    def turn_and_write(
        self,
        turned: Tensor,
        v: Tensor,
        num_heads: int,
        turns: Turns | None,
        pages: tuple[Tensor, ...],
        slots: Tensor,
    ) -> Tensor:
        if not _can_turn(turned, v, turns, pages):
            return super().turn_and_write(turned, v, num_heads, turns, pages, slots)
        num_tokens, num_kv_heads, head_dim = v.shape
        q = v.new_empty((num_tokens, num_heads, head_dim))
        rotary, cos, sin = (0, None, None) if turns is None else _angles(turns)
        self._turn[v.dtype](
            _Turn(
                turned.data_ptr(),
                v.data_ptr(),
                turned.stride(0),
                v.stride(0),
                num_tokens,
                num_heads,
                num_kv_heads,
                head_dim,
                rotary,
                cos,
                sin,
                slots.data_ptr(),
                q.data_ptr(),
                *(each.data_ptr() for each in pages),
            )
        )
        return q

    def summarise(self, logits: Tensor) -> Summary:
        if logits.dtype not in SUFFIXES or not logits.is_contiguous():
            return super().summarise(logits)
        num_rows, size = logits.shape
        summary = NewSummary(num_rows)
        self._summarise[logits.dtype](logits.data_ptr(), num_rows, size, *summary.addresses)
        return summary.arrays


@dataclass(frozen=True, slots=True)
class CpuActivation:
    """[t, width] of one width, or of a gated one from [t, 2 * width]; `number` is the kernel's."""

    number: int
    is_gated: bool
    functions: dict[torch.dtype, Callable[..., Any]]
    in_torch: Activate

    def __call__(self, inner: Tensor) -> Tensor:
        if inner.dtype not in SUFFIXES or inner.dim() != 2 or not inner.is_contiguous():
            return self.in_torch(inner)
        num_rows, width = inner.shape
        width = width // 2 if self.is_gated else width
        out = inner.new_empty((num_rows, width))
        self.functions[inner.dtype](inner.data_ptr(), self.number, num_rows, width, self.is_gated, out.data_ptr())
        return out


def _expand(x: Tensor, up: Linear, activate: Activate) -> Tensor:
    product = alone(up)
    if product is None or not isinstance(activate, CpuActivation) or product.is_gated is not activate.is_gated:
        return activate(up(x))
    return product.multiply(x, activate.number)


def _functions(library: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> dict[torch.dtype, Callable[..., Any]]:
    return {dtype: function_of(library, name, dtype, arguments) for dtype in SUFFIXES}


def _can_normalise(x: Tensor, weights: NormWeights) -> bool:
    weight, bias = weights.weight, weights.bias
    if x.dtype not in SUFFIXES or weight.dtype not in (x.dtype, torch.float32) or x.shape[-1] == 0:
        return False
    has_fitting_bias = bias is None or (bias.dtype is x.dtype and bias.is_contiguous() and bias.shape == weight.shape)
    are_rows_neighbours = x.is_contiguous() if x.dim() != 3 else x.stride()[1:] == (x.shape[2], 1)
    has_one_each = weight.dim() == 1 or (x.dim() == 3 and weight.shape[0] == x.shape[1])
    return has_fitting_bias and are_rows_neighbours and has_one_each and weight.is_contiguous()


def _norm_arguments(x: Tensor, weights: NormWeights, eps: float, kind: Norm, part: int, sums: int, out: int) -> _Norm:
    weight, bias, size = weights.weight, weights.bias, x.shape[-1]
    is_by_head = x.dim() == 3
    return _Norm(
        x.data_ptr(),
        x.shape[0] if is_by_head else x.numel() // size,
        x.shape[1] if is_by_head else 1,
        size,
        x.stride(0) if is_by_head else size,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        1 if weight.dim() == 1 else weight.shape[0],
        weight.dtype is torch.float32,
        kind is Norm.RMS,
        eps,
        part,
        sums,
        out,
    )


def _can_turn(turned: Tensor, v: Tensor, turns: Turns | None, pages: tuple[Tensor, ...]) -> bool:
    """Pages of another type are written by torch, which encodes them."""
    if v.dtype not in SUFFIXES or any(each.dtype is not v.dtype or not each.is_contiguous() for each in pages):
        return False
    if turns is not None and turns[0].dtype is not torch.float32:
        return False
    return all(each.stride()[1:] == (v.shape[2], 1) for each in (turned, v))


def _angles(turns: Turns) -> tuple[int, int, int]:
    cos, sin = turns
    return cos.shape[-1], cos.data_ptr(), sin.data_ptr()
