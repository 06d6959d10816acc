"""Random LoRA adapters for tiny models in PEFT's format, and what a model is with one of them merged into it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny_models, tiny_t5
from worker.model.families import read_spec
from worker.model.loading import load_weights
from worker.model.lora import LoraSlots
from worker.model.spec import T5Spec
from worker.model.t5 import load_t5_weights
from worker.model.weights import DummySource

PREFIX = "base_model.model."
DEFAULTS = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    base_model_name_or_path="somebody/base",
    bias="none",
    fan_in_fan_out=False,
    inference_mode=True,
    init_lora_weights=True,
    lora_dropout=0.05,
    modules_to_save=None,
    target_modules="all-linear",
    use_dora=False,
    use_rslora=False,
    rank_pattern={},
    alpha_pattern={},
)
DEVIATION = 0.12


def write_adapter(
    folder: Path,
    model: Any,
    modules: Iterable[str],
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """An adapter of transformers' `model` for `modules` by their full names; `ranks` has those of other rank."""
    randomness = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        num_out, num_in = shape_of(model.get_submodule(name))
        size = (ranks or {}).get(name, rank)
        for side, shape in (("A", (size, num_in)), ("B", (num_out, size))):
            drawn = torch.randn(shape, generator=randomness) * DEVIATION
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = drawn.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = DEFAULTS | dict(r=rank, lora_alpha=2 * rank, rank_pattern=dict(ranks or {})) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, which GPT-2 keeps the other way round."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


@torch.no_grad()
def merged(model: Any, folder: Path, *, factor: float = 1.0) -> Any:
    """A copy of transformers' `model` with W + alpha / r * B A in the place of every W, by PEFT's definition.

    `factor` on the second part, other than one, makes another model.
    """
    result = copy.deepcopy(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}:
        a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
        module, delta = result.get_submodule(name), scale_of(config, name, len(a)) * factor * (b @ a)
        module.weight.add_(delta.t() if is_transposed(module) else delta)
    return result


def scale_of(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


@cache
def slots_of(name: str) -> LoraSlots:
    """What adapters may change in a model of that name, whatever its weights are."""
    config = tiny_t5.build(name).config if name in tiny_t5.CASES else tiny_models.config_of(name)
    spec, family = read_spec(config.to_dict())
    slots = LoraSlots(family, torch.float32)
    source = DummySource(is_tied=False, head_name=family.candidates("head", 0, 0)[0])
    load = load_t5_weights if isinstance(spec, T5Spec) else load_weights
    load(spec, family, source, torch.float32, adapters=slots)
    return slots
