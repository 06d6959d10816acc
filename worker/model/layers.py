"""The arithmetic that every architecture shares: products, norms, activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.spec import Activation
from worker.model.weights import Linear


def linear(x: Tensor, layer: Linear) -> Tensor:
    """[..., in] -> [..., out]."""
    return F.linear(x, layer.weight, layer.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    The statistics are float32 whatever the type of `x`, the product with the weight is in the type of `x`: models were
    trained with exactly these roundings.
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.RELU: F.relu,
}
