"""Writes tiny checkpoints in the formats of quantised files, by their definitions and number by number, and beside
each a dense one with the numbers that its codes stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Format:
    """`config` is what config.json says; `write` makes of a matrix [out, in] the tensors of a module, by the ends of
    their names, and the numbers that these stand for."""

    config: dict[str, Any]
    write: Callable[[Array], tuple[dict[str, Array | Tensor], Array]]


def save(
    folder: Path,
    out: Path,
    form: Format,
    modules: Callable[[str], bool] | None = None,
    *,
    is_transposed: bool = False,
) -> tuple[Path, Path]:
    """Folders with the matrices of a dense model's `modules`, by default those of layers, quantised and dense.

    `is_transposed`: the dense model stores them [in, out].
    """
    stored, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = dense[name] = tensor
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.dim() == 2 and (modules or _is_of_layer)(module):
            del stored[name]
            turn = np.transpose if is_transposed else np.asarray
            parts, numbers = form.write(turn(tensor.double().numpy()))
            stored |= {module + end: torch.as_tensor(part).contiguous() for end, part in parts.items()}
            dense[name] = torch.from_numpy(turn(numbers.astype(np.float32)).copy())
    config = json.loads((folder / "config.json").read_text())
    _write(folder, out / "stored", stored, config | {"quantization_config": form.config})
    _write(folder, out / "dense", dense, config)
    return out / "stored", out / "dense"


def _is_of_layer(module: str) -> bool:
    is_embedding = any(part in module for part in ("embed", "wte", "wpe", "shared", "lm_head"))
    return not (is_embedding or module.endswith(".gate")) and any(character.isdigit() for character in module)


def _write(folder: Path, out: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))


def rounded(weight: Array, groups: Array, num_bits: int) -> tuple[Array, Array, Array]:
    """Codes [out, in], zeros and scales [out, groups] of a matrix between the least and the largest of each group."""
    num_groups, most = groups.max() + 1, (1 << num_bits) - 1
    low, high = (
        np.stack([pick(weight[:, groups == group], 1) for group in range(num_groups)], 1) for pick in (np.min, np.max)
    )
    scales = ((high - low) / most).astype(np.float16)
    # zero of the first version of GPTQ is at least one
    zeros = np.clip(np.rint(-low / scales), 1, most)
    codes = np.clip(np.rint(weight / scales[:, groups] + zeros[:, groups]), 0, most)
    return codes.astype(np.int64), zeros.astype(np.int64), scales


def numbers_of(codes: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    return (codes - zeros[:, groups]) * scales[:, groups].astype(np.float64)


def packed(values: Array, num_bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Values [n, m] in words int32 [n, m * bits / 32]: value `order[i]` of a word at its place i, lowest bits first."""
    per_word = 32 // num_bits
    words = np.zeros((values.shape[0], -(-values.shape[1] // per_word)), np.uint32)
    for column in range(values.shape[1]):
        word, place = divmod(column, per_word)
        place = place if order is None else order.index(place)
        words[:, word] |= values[:, column].astype(np.uint32) << np.uint32(place * num_bits)
    return words.view(np.int32)


def gptq(
    num_bits: int = 4, group_size: int = 16, *, has_order: bool = False, is_v2: bool = False, **config: Any
) -> Format:
    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        num_columns = weight.shape[1]
        groups = np.arange(num_columns) // (num_columns if group_size == -1 else group_size)
        if has_order:
            groups = np.random.default_rng(num_columns).permutation(groups)
        codes, zeros, scales = rounded(weight, groups, num_bits)
        return {
            ".qweight": packed(codes, num_bits).T,
            ".qzeros": packed((zeros if is_v2 else zeros - 1).T, num_bits),
            ".scales": scales.T,
            ".g_idx": groups.astype(np.int32),
        }, numbers_of(codes, zeros, scales, groups)

    named = dict(bits=num_bits, group_size=group_size, desc_act=has_order, sym=False, quant_method="gptq")
    return Format(named | dict(checkpoint_format="gptq_v2" if is_v2 else "gptq") | config, write)
