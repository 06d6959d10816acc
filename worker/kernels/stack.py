"""All layers of a plain decoder in one call (source/stack.cpp), where every part of them is a kernel of ours.

Between two kernels Python takes longer than it seems: the weights that have just passed through the caches have taken
its own code and objects with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker.attention.native import NativeAttention, NativeMeta
from worker.kernels.products import INTEGER, POINTER, PackedLinear, function_of
from worker.model.lora import AdaptedLinear
from worker.model.operations import Layers, Turns
from worker.model.spec import Norm
from worker.model.weights import LayerWeights, Linear, MlpWeights, NormWeights
from worker.parallel.exchange import require


class _Norm(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("weight_rows", INTEGER), ("has_wide_weight", INTEGER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "qk_norm", "mlp_norm")),
        *((name, POINTER) for name in ("qkv", "out", "up", "down", "attention")),
        ("turn", INTEGER),
    )


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
    )


class _Angles(ctypes.Structure):
    _fields_ = (("cos", POINTER), ("sin", POINTER), ("rotary_dim", INTEGER))


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("num_tokens", INTEGER),
        *((name, POINTER) for name in ("angles", "slots", "batch", "pages")),
    )


class NativeStack:
    """x [t, hidden] before the first layer to what is behind the final norm; bit for bit what the layers come to one by
    one. `is_ready` says whether a step can go this way. Raises RankLost as a group does."""

    def __init__(self, library: ctypes.CDLL, layers: Layers, attention: NativeAttention, activation: int) -> None:
        dtype = _products(layers.weights[0])[0].dtype
        linears = [linear for weights in layers.weights for linear in _linears(weights)]
        self._adapted = [each for each in linears if isinstance(each, AdaptedLinear)]
        self._turnings = sorted({turning for turning in layers.ropes if turning}, key=repr)
        made = [self._layer(layers, attention, dtype, number) for number in range(len(layers.weights))]
        self._layers = (_Layer * len(made))(*made)
        sizes = layers.num_heads, layers.num_kv_heads, layers.head_dim
        hidden, is_rms = _products(layers.weights[0])[0].num_in, layers.norm is Norm.RMS
        pointer = ctypes.addressof(self._layers)
        exchange = None if layers.exchange is None else layers.exchange.address
        self._stack = _Stack(
            pointer, _norm(layers.final_norm), len(made), hidden, *sizes, activation, is_rms, layers.norm_eps, exchange
        )
        arguments = [POINTER, POINTER]
        self._run: Callable[..., Any] = function_of(library, "run_layers", dtype, arguments, ctypes.c_bool)
        self._dtype, self._kept = dtype, layers

    def _layer(self, layers: Layers, attention: NativeAttention, dtype: torch.dtype, number: int) -> _Layer:
        weights, turning = layers.weights[number], layers.ropes[number]
        products = [product.address for product in _products(weights)]
        shape = attention.address_of(
            layers.shapes[number], layers.num_heads, layers.num_kv_heads, layers.head_dim, dtype, dtype
        )
        norms = (weights.attention_norm, weights.qk_norm, weights.mlp_norm)
        turn = self._turnings.index(turning) if turning else -1
        return _Layer(*(_norm(each) for each in norms), *products, shape, turn)

    def is_ready(self, x: Tensor, pages: Tensor) -> bool:
        fits = x.dtype is self._dtype and pages.dtype is self._dtype and x.is_contiguous() and pages.is_contiguous()
        return fits and not any(each.is_changed for each in self._adapted)

    def __call__(self, x: Tensor, turns: dict[Any, Turns], pages: Tensor, slots: Tensor, meta: NativeMeta) -> Tensor:
        """`x` is taken: its memory becomes the result."""
        angles = [turns[turning] for turning in self._turnings]
        assert all(cos.dtype is torch.float32 for cos, _ in angles)
        found = (_Angles * len(angles))(
            *(_Angles(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in angles)
        )
        first, size = pages.data_ptr(), pages.stride(1) * pages.itemsize
        num_pages = 2 * len(self._layers)
        addresses = (POINTER * num_pages)(*range(first, first + num_pages * size, size))
        pointers = (ctypes.addressof(found), slots.data_ptr(), meta.address, ctypes.addressof(addresses))
        step = _Step(x.data_ptr(), x.shape[0], *pointers)
        require(self._run(ctypes.addressof(self._stack), ctypes.addressof(step)))
        return x


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
