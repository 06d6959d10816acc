"""The arithmetic that every architecture shares: norms and activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.spec import Activation
from worker.model.weights import NormWeights


def rms_norm(x: Tensor, weights: NormWeights, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    The statistics are float32 whatever the type of `x`; the product with the weight is in the wider type of weight and
    `x`: models were trained with exactly these roundings.
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weights.weight.dtype is torch.float32:
        return (wide * weights.weight).to(x.dtype)
    return wide.to(x.dtype) * weights.weight


def layer_norm(x: Tensor, weights: NormWeights, eps: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al., arXiv 1607.06450); a weight may differ by head."""
    if weights.weight.dim() == 1:
        return F.layer_norm(x, weights.weight.shape, weights.weight, weights.bias, eps)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) * weights.weight
    return normed if weights.bias is None else normed + weights.bias


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.RELU: F.relu,
}


def softcap(x: Tensor, limit: float) -> Tensor:
    """limit * tanh(x / limit) (Gemma 2, arXiv 2408.00118)."""
    return torch.tanh(x / limit) * limit
