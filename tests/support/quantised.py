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
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
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
    num_bits: int = 4,
    group_size: int = 16,
    *,
    has_order: bool = False,
    is_v2: bool = False,
    is_symmetric: bool = False,
    **config: Any,
) -> Format:
    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        num_columns = weight.shape[1]
        groups = np.arange(num_columns) // (num_columns if group_size == -1 else group_size)
        if has_order:
            groups = np.random.default_rng(num_columns).permutation(groups)
        codes, zeros, scales = rounded(weight, groups, num_bits)
        zeros = np.full_like(zeros, 1 << num_bits - 1) if is_symmetric else zeros
        return {
            ".qweight": packed(codes, num_bits).T,
            ".qzeros": packed((zeros if is_v2 else zeros - 1).T, num_bits),
            ".scales": scales.T,
            ".g_idx": groups.astype(np.int32),
        }, numbers_of(codes, zeros, scales, groups)

    named = dict(bits=num_bits, group_size=group_size, desc_act=has_order, sym=is_symmetric, quant_method="gptq")
    return Format(named | dict(checkpoint_format="gptq_v2" if is_v2 else "gptq") | config, write)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group_size: int = 16, **config: Any) -> Format:
    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        num_columns = weight.shape[1]
        groups = np.arange(num_columns) // (num_columns if group_size == -1 else group_size)
        codes, zeros, scales = rounded(weight, groups, 4)
        return {
            ".qweight": packed(codes.T, 4, AWQ_ORDER),
            ".qzeros": packed(zeros.T, 4, AWQ_ORDER),
            ".scales": scales.T,
        }, numbers_of(codes, zeros, scales, groups)

    named = dict(bits=4, group_size=group_size, zero_point=True, version="gemm", quant_method="awq")
    return Format(named | config, write)


def in_float8(
    weight: Array, height: int, width: int, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Array, Array]:
    """Codes, a scale for each block of so many rows and columns, and the numbers."""
    blocks = np.arange(weight.shape[0])[:, None] // height, np.arange(weight.shape[1])[None] // width
    scales = np.zeros((blocks[0].max() + 1, blocks[1].max() + 1), np.float32)
    np.maximum.at(scales, np.broadcast_arrays(*blocks), np.abs(weight) / torch.finfo(dtype).max)
    codes = torch.from_numpy(weight / scales[blocks]).to(dtype)
    return codes, scales, codes.double().numpy() * scales[blocks]


def fp8(
    block: tuple[int, int] | None = None,
    *,
    has_scale_of_rows: bool = False,
    method: str = "fp8",
    dtype: torch.dtype = torch.float8_e4m3fn,
    **config: Any,
) -> Format:
    """With a `block` as in DeepSeek's files, else as in those of AutoFP8 or, with scales of rows, FBGEMM."""

    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        num_rows, num_columns = weight.shape
        size = block or (1 if has_scale_of_rows else num_rows, num_columns)
        codes, scales, numbers = in_float8(weight, *size, dtype)
        if block:
            return {".weight": codes, ".weight_scale_inv": scales}, numbers
        stored = scales if has_scale_of_rows else scales[0, 0]
        return {".weight": codes, ".weight_scale": stored, ".input_scale": np.float32(0.1)}, numbers

    named = dict(quant_method=method, activation_scheme="dynamic")
    return Format(named | (dict(weight_block_size=list(block)) if block else {}) | config, write)


def compressed(form: str, *, has_order: bool = False, inputs: dict[str, Any] | None = None, **weights: Any) -> Format:
    """`weights` as config.json has them."""
    num_bits, is_symmetric = weights.setdefault("num_bits", 8), weights.setdefault("symmetric", True)
    strategy = weights.setdefault("strategy", "channel")
    weights |= dict(type="float" if form == "float-quantized" else "int", actorder="group" if has_order else None)

    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        if form == "float-quantized":
            block = {"tensor": weight.shape, "channel": (1, weight.shape[1])}.get(strategy)
            codes, scales, numbers = in_float8(weight, *(block or weights["block_structure"]))
            return {".weight": codes, ".weight_scale": scales[0] if strategy == "tensor" else scales}, numbers
        groups = np.arange(weight.shape[1]) // weights.get("group_size", weight.shape[1])
        if has_order:
            groups = np.random.default_rng(len(groups)).permutation(groups)
        codes, zeros, scales = rounded(weight, groups, num_bits)
        half = 1 << num_bits - 1
        if is_symmetric:
            zeros = np.full_like(zeros, half)
        numbers = numbers_of(codes, zeros, scales, groups)
        order = {".weight_g_idx": groups.astype(np.int32)} if has_order else {}
        if form != "pack-quantized":
            zero_points = {} if is_symmetric else {".weight_zero_point": (zeros - half).astype(np.int8)}
            return {".weight": (codes - half).astype(np.int8), ".weight_scale": scales} | zero_points | order, numbers
        zero_points = {} if is_symmetric else {".weight_zero_point": packed(zeros.T, num_bits).T}
        shape = {".weight_shape": np.array(weight.shape)}
        tensors = {".weight_packed": packed(codes, num_bits), ".weight_scale": scales}
        return tensors | zero_points | shape | order, numbers

    group = dict(targets=["Linear"], weights=weights, input_activations=inputs)
    named = dict(quant_method="compressed-tensors", format=form, ignore=["lm_head"])
    return Format(named | dict(config_groups={"group_0": group}), write)


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

TABLES = {
    "nf4": NF4,
    "fp4": [sign * number for sign in (1, -1) for number in (0, 0.0052083333, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)],
}


def bitsandbytes(kind: str = "nf4", *, block: int = 64, nested_block: int = 4, is_nested: bool = False) -> Format:
    """`kind` is nf4, fp4 or int8."""

    def write(weight: Array) -> tuple[dict[str, Array | Tensor], Array]:
        if kind == "int8":
            largest = np.abs(weight).max(1).astype(np.float32)
            codes = np.rint(weight / largest[:, None] * 127).astype(np.int8)
            numbers = codes * (largest.astype(np.float64) / 127)[:, None]
            return {".weight": codes, ".SCB": largest, ".weight_format": np.uint8(0)}, numbers
        flat = weight.reshape(-1)
        blocks = np.arange(len(flat)) // block
        largest = np.zeros(blocks.max() + 1, np.float32)
        np.maximum.at(largest, blocks, np.abs(flat))
        tensors, largest = _nested(largest) if is_nested else ({".weight.absmax": largest}, largest)
        table = np.array(TABLES[kind], np.float32)
        codes = np.abs(flat[:, None] / largest[blocks][:, None] - table).argmin(1)
        state = dict(quant_type=kind, blocksize=block, dtype="float32", shape=list(weight.shape))
        state |= dict(nested_blocksize=nested_block, nested_dtype="float32", nested_offset=0.25) if is_nested else {}
        tensors |= {
            ".weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
            ".weight.quant_map": table,
            f".weight.quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
        }
        return tensors, (table[codes].astype(np.float64) * largest[blocks]).reshape(weight.shape)

    def _nested(largest: Array) -> tuple[dict[str, Array | Tensor], Array]:
        blocks = np.arange(len(largest)) // nested_block
        factors = np.zeros(blocks.max() + 1, np.float32)
        np.maximum.at(factors, blocks, np.abs(largest - 0.25))
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        codes = np.abs(((largest - 0.25) / factors[blocks])[:, None] - table).argmin(1)
        tensors = {".weight.nested_absmax": factors, ".weight.nested_quant_map": table}
        return tensors | {".weight.absmax": codes.astype(np.uint8)}, table[codes] * factors[blocks] + np.float32(0.25)

    bits = dict(load_in_4bit=kind != "int8", load_in_8bit=kind == "int8")
    return Format(
        bits | dict(quant_method="bitsandbytes", bnb_4bit_quant_type="nf4" if kind == "int8" else kind), write
    )


GPTQ_ENDS = ("qweight", "qzeros", "scales", "g_idx")
PACKED_ENDS = ("weight_packed", "weight_scale", "weight_shape")


def unpacked(words: Array, num_bits: int) -> Array:
    """What `packed` packs, with zeros to the end of the last word."""
    per_word = 32 // num_bits
    values = np.zeros((words.shape[0], words.shape[1] * per_word), np.int64)
    for column in range(values.shape[1]):
        word, place = divmod(column, per_word)
        values[:, column] = (words[:, word].view(np.uint32) >> np.uint32(place * num_bits)) & ((1 << num_bits) - 1)
    return values


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = [load_file(folder / name) for name in sorted({*index["weight_map"].values()})]
    return {name: tensor for file in files for name, tensor in file.items()}


def dense_twin(folder: Path, out: Path, num_bits: int, *, is_transposed: bool = False) -> dict[str, Array]:
    """Write to `out` the model that a folder in GPTQ's first form, or in packed symmetric compressed-tensors, stands
    for. Returns its matrices [out, in] by the names of modules. `is_transposed`: the dense model stores [in, out]."""
    tensors, numbers = stored_tensors(folder), {}
    for name in [name for name in tensors if name.endswith((".qweight", ".weight_packed"))]:
        module = name.rpartition(".")[0]
        is_gptq, ends = name.endswith("qweight"), GPTQ_ENDS if name.endswith("qweight") else PACKED_ENDS
        parts = {end: tensors.pop(f"{module}.{end}") for end in ends}
        parts = {end: (part.float() if "scale" in end else part).numpy() for end, part in parts.items()}
        numbers[module] = (_gptq_numbers if is_gptq else _packed_numbers)(parts, num_bits)
        matrix = numbers[module].astype(np.float32)
        tensors[f"{module}.weight"] = torch.from_numpy(np.ascontiguousarray(matrix.T if is_transposed else matrix))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    _write(folder, out, tensors, config)
    return numbers


def _gptq_numbers(parts: dict[str, Array], num_bits: int) -> Array:
    codes = unpacked(parts["qweight"].T, num_bits)
    zeros = unpacked(parts["qzeros"], num_bits).T[: len(codes)] + 1
    return numbers_of(codes, zeros, parts["scales"].T, parts["g_idx"])


def _packed_numbers(parts: dict[str, Array], num_bits: int) -> Array:
    num_columns = parts["weight_shape"][1]
    codes, scales = unpacked(parts["weight_packed"], num_bits)[:, :num_columns], parts["weight_scale"]
    groups = np.arange(num_columns) // (num_columns // scales.shape[1])
    return numbers_of(codes, np.full(scales.shape, 1 << num_bits - 1), scales, groups)
