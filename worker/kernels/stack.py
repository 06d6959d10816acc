"""A step of a plain decoder in one call (source/stack.cpp), where every part of its layers is a kernel of ours.

Between two kernels Python takes longer than it seems: the weights that have just passed through the caches have taken
its own code and objects with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.attention.native import NativeAttention, NativeMeta
from worker.kernels.products import INTEGER, POINTER, PackedEmbedding, PackedLinear, function_of
from worker.model.lora import AdaptedLinear
from worker.model.operations import Layers, Summary
from worker.model.spec import Norm, Rope
from worker.model.untouched import untouched_zeros
from worker.model.weights import DenseEmbedding, Embedding, LayerWeights, Linear, MlpWeights, NormWeights
from worker.parallel.exchange import require

NUM_ROWS = 128
"""Of logits that are promised room at first; those that no step writes take no memory."""


class _Norm(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("weight_rows", INTEGER), ("has_wide_weight", INTEGER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "qk_norm", "mlp_norm")),
        *((name, POINTER) for name in ("qkv", "out", "up", "down", "attention")),
        ("turning", INTEGER),
    )


class Turning(ctypes.Structure):
    """A rope, of which `rope.both_ways` made the frequencies."""

    _fields_ = (("frequencies", POINTER), ("rotary_dim", INTEGER), ("amplitude", ctypes.c_double))


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER),
        ("final_norm", _Norm),
        *(
            (name, INTEGER)
            for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "activation", "is_rms")
        ),
        ("eps", ctypes.c_double),
        ("exchange", POINTER),
        ("turnings", POINTER),
        ("num_turnings", INTEGER),
        *((name, POINTER) for name in ("table", "tied", "head")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", POINTER),
        ("positions", POINTER),
        ("num_tokens", INTEGER),
        *((name, POINTER) for name in ("x", "slots", "batch", "pages")),
        ("page_bytes", INTEGER),
        ("wanted", POINTER),
        ("num_wanted", INTEGER),
        *((name, POINTER) for name in ("out", "most", "places", "normalisers")),
    )


class NewSummary:
    """Memory for one of so many rows, which takes few words: here they all come from cold caches."""

    def __init__(self, num_rows: int) -> None:
        both, columns = np.empty((2, num_rows), np.float32), np.empty(num_rows, np.int64)
        self.arrays: Summary = both[0], columns, both[1]
        first = both.__array_interface__["data"][0]
        self.addresses = first, columns.__array_interface__["data"][0], first + 4 * num_rows


class NativeStack:
    """Tokens to logits, which the next step writes over; bit for bit what the layers come to one by one. `is_ready`
    says whether a step can go this way. Raises RankLost as a group does."""

    def __init__(self, library: ctypes.CDLL, layers: Layers, attention: NativeAttention, activation: int) -> None:
        dtype, hidden = _products(layers.weights[0])[0].dtype, _products(layers.weights[0])[0].num_in
        linears = [linear for weights in layers.weights for linear in _linears(weights)]
        self._adapted = [each for each in linears if isinstance(each, AdaptedLinear)]
        ropes = sorted(layers.frequencies, key=repr)
        turnings = [_turning(rope, layers.frequencies[rope]) for rope in ropes]
        made = [_layer(layers, attention, dtype, number, ropes) for number in range(len(layers.weights))]
        self._arrays = (_Layer * len(made))(*made), (Turning * len(turnings))(*turnings)
        table, tied = _addresses(layers.rows, dtype, hidden)
        head = layers.product if isinstance(layers.product, PackedLinear) and layers.product.dtype is dtype else None
        self._has_rows, self._has_head = (table or tied) is not None, head is not None
        self._width = hidden if head is None else head.num_out
        self._stack = _Stack(
            ctypes.addressof(self._arrays[0]),
            _norm(layers.final_norm),
            len(made),
            hidden,
            layers.num_heads,
            layers.num_kv_heads,
            layers.head_dim,
            activation,
            layers.norm is Norm.RMS,
            layers.norm_eps,
            None if layers.exchange is None else layers.exchange.address,
            ctypes.addressof(self._arrays[1]),
            len(turnings),
            table,
            tied,
            None if head is None else head.address,
        )
        arguments = [POINTER, POINTER]
        self._run: Callable[..., Any] = function_of(library, "run_stack", dtype, arguments, ctypes.c_bool)
        self._dtype, self._layers = dtype, layers
        self._out = torch.empty((0, self._width), dtype=dtype)
        self._last: tuple[Tensor, Summary] | None = None

    def is_ready(self, pages: Tensor) -> bool:
        fits = pages.dtype is self._dtype and pages.is_contiguous()
        return fits and not any(each.is_changed for each in self._adapted)

    def __call__(
        self, tokens: Tensor, positions: Tensor, pages: Tensor, slots: Tensor, meta: NativeMeta, wanted: Tensor
    ) -> Tensor:
        x = None if self._has_rows else self._layers.embed(tokens, positions)
        assert x is None or (x.dtype is self._dtype and x.is_contiguous())
        num_wanted = len(wanted)
        out = self._rows(num_wanted)
        summary = NewSummary(num_wanted)
        step = _Step(
            tokens.data_ptr(),
            positions.data_ptr(),
            len(tokens),
            None if x is None else x.data_ptr(),
            slots.data_ptr(),
            meta.address,
            pages.data_ptr(),
            pages.stride(1) * pages.itemsize,
            wanted.data_ptr(),
            num_wanted,
            out.data_ptr(),
            *summary.addresses,
        )
        require(self._run(ctypes.addressof(self._stack), ctypes.addressof(step)))
        if not self._has_head:
            return self._layers.head(out)
        self._last = out, summary.arrays
        return out

    def _rows(self, num_rows: int) -> Tensor:
        """Apart from an allocator's memory, where each step's would leave another hole between small things."""
        if num_rows > len(self._out):
            self._out = untouched_zeros((max(num_rows, NUM_ROWS), self._width), self._dtype)
        return self._out[:num_rows]

    def summary_of(self, logits: Tensor) -> Summary | None:
        return self._last[1] if self._last is not None and self._last[0] is logits else None


def can_stack(layers: Layers) -> bool:
    """Whether all layers are made of nothing but kernels of ours, and so is what stands behind them."""
    if not layers.weights or not all(map(_is_plain, layers.weights)):
        return False
    return layers.final_norm is None or _can_normalise(layers.final_norm, _products(layers.weights[0])[0].dtype)


def _is_plain(weights: LayerWeights) -> bool:
    if not isinstance(weights.mlp, MlpWeights) or not weights.attention_norm or not weights.mlp_norm:
        return False
    if weights.attention_out_norm or weights.mlp_out_norm:
        return False
    products = [_base(linear) for linear in _linears(weights)]
    if not all(isinstance(product, PackedLinear) for product in products):
        return False
    dtypes = {product.dtype for product in products if isinstance(product, PackedLinear)}
    norms = (weights.attention_norm, weights.qk_norm, weights.mlp_norm)
    return len(dtypes) == 1 and all(_can_normalise(norm, *dtypes) for norm in norms if norm)


def _can_normalise(norm: NormWeights, dtype: torch.dtype) -> bool:
    tensors = [each for each in (norm.weight, norm.bias) if each is not None]
    has_fitting_bias = norm.bias is None or norm.bias.dtype is dtype
    return norm.weight.dtype in (dtype, torch.float32) and has_fitting_bias and all(t.is_contiguous() for t in tensors)


def _linears(weights: LayerWeights) -> list[Linear]:
    assert isinstance(weights.mlp, MlpWeights)
    return [weights.qkv, weights.out, weights.mlp.up, weights.mlp.down]


def _base(linear: Linear) -> Linear:
    return linear.base if isinstance(linear, AdaptedLinear) else linear


def _products(weights: LayerWeights) -> list[PackedLinear]:
    return [product for product in map(_base, _linears(weights)) if isinstance(product, PackedLinear)]


def _norm(weights: NormWeights | None) -> _Norm:
    if weights is None:
        return _Norm(None, None, 1, 0)
    weight, bias = weights.weight, weights.bias
    num_rows = 1 if weight.dim() == 1 else weight.shape[0]
    return _Norm(weight.data_ptr(), None if bias is None else bias.data_ptr(), num_rows, weight.dtype is torch.float32)


def _turning(rope: Rope, frequencies: Tensor) -> Turning:
    return Turning(frequencies.data_ptr(), len(frequencies), rope.amplitude)


def _layer(layers: Layers, attention: NativeAttention, dtype: torch.dtype, number: int, ropes: list[Rope]) -> _Layer:
    weights, rope = layers.weights[number], layers.ropes[number]
    products = [product.address for product in _products(weights)]
    sizes = layers.num_heads, layers.num_kv_heads, layers.head_dim
    shape = attention.address_of(layers.shapes[number], *sizes, dtype, dtype)
    norms = (weights.attention_norm, weights.qk_norm, weights.mlp_norm)
    return _Layer(*(_norm(each) for each in norms), *products, shape, ropes.index(rope) if rope else -1)


def _addresses(rows: Embedding | None, dtype: torch.dtype, hidden: int) -> tuple[int | None, int | None]:
    """Those of rows that lie one after the other, and of a matrix in panels that has them."""
    if isinstance(rows, DenseEmbedding):
        can_be_read = rows.weight.dtype is dtype and rows.weight.is_contiguous() and rows.weight.shape[1] == hidden
        return rows.weight.data_ptr() if can_be_read else None, None
    return None, rows.address if isinstance(rows, PackedEmbedding) and rows.dtype is dtype else None
