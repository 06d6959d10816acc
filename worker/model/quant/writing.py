"""What a quantised matrix is in files that others read, by the ends of its tensors' names, and what config.json says.

The formats are told where they are read: `worker.model.quant.gptq` and `worker.model.quant.compressed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.quant.calibrated import DAMPINGS
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.reading import WORD_BITS

GPTQ_SCALE = torch.float16
OCTET_BITS = 8

AsTensors = Callable[[QuantisedMatrix, torch.dtype], dict[str, Tensor]]
"""Of a symmetric matrix whose scales are numbers of that type already."""


def as_gptq(matrix: QuantisedMatrix, scale_dtype: torch.dtype = GPTQ_SCALE) -> dict[str, Tensor]:
    """In the first form of the format, which keeps zeros less one and is the one that every reader knows."""
    assert matrix.zero is not None
    zeros = (matrix.zero - 1).to(torch.uint8)
    return {
        "qweight": pack(matrix.codes, matrix.num_bits).t().contiguous(),
        "qzeros": pack(zeros.t(), matrix.num_bits),
        "scales": matrix.scale.t().to(scale_dtype).contiguous(),
        "g_idx": matrix.groups.int(),
    }


def as_compressed(matrix: QuantisedMatrix, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed, the one form that every reader of whole activations knows."""
    return {
        "weight_packed": pack(matrix.codes, matrix.num_bits),
        "weight_scale": matrix.scale.to(scale_dtype),
        "weight_shape": torch.tensor(matrix.shape),
    }


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """uint8 [n, m] to int32 [n, m * bits / 32, rounded up]: neighbours of a row in one word, the lowest bits first."""
    padded = F.pad(codes, (0, -codes.shape[1] % (WORD_BITS // num_bits))).contiguous()
    places = padded.view(len(codes), -1, OCTET_BITS // num_bits).unbind(-1)
    octets = places[0].clone(memory_format=torch.contiguous_format)
    for place, octet in enumerate(places[1:], 1):
        octets |= octet << (place * num_bits)
    return octets.view(torch.int32)


def gptq_config(num_bits: int, group_size: int | None, *, has_order: bool, block: str) -> dict[str, Any]:
    """`block` is what the names of all layers begin with, before their numbers."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": num_bits,
        "group_size": group_size or -1,
        "desc_act": has_order,
        "static_groups": False,
        "sym": True,
        "true_sequential": False,
        "lm_head": False,
        "damp_percent": DAMPINGS[0],
        "pack_dtype": "int32",
        "block_name_to_quantize": block,
    }


def compressed_config(num_bits: int, group_size: int | None, ignored: Sequence[str]) -> dict[str, Any]:
    """`ignored` are the linear modules that stay as they are."""
    weights = {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
