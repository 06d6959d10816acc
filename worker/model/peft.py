"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors in a folder.

The tensors decide which matrices an adapter changes, the config only has to agree. Whatever would make the adapter mean
something else than W + scale * B A is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import ConfigurationError
from worker.model.checkpoint import STORED_DTYPES, read_header, weights_digest
from worker.model.config import MAX_SIZE, ConfigReader, read_object
from worker.model.lora import Change, Target

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DIGEST_LENGTH = 32
MAX_NAMES = 2048
"""A bound on modules that are named one by one; the largest models have about a thousand."""
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
MODULE_NAME = re.compile(r"(?P<name>\^?[\w-]+(?:\\?\.[\w-]+)*)\$?")
"""A module with ^, or the end of its name. PEFT takes any regular expression, which may take for ever to match."""
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
INNOCENT_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""What A and B may have been before training; other beginnings took something out of W, which others use here too."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says of how tensors are to be read; `alphas` by ^ and module, or end of its name."""

    ranks: frozenset[int]
    alpha: float
    alphas: Mapping[str, float]
    is_stabilised: bool
    targets: tuple[str, ...] | None
    layers: frozenset[int] | None

    def scale(self, module: str, rank: int) -> float:
        """The factor on B A; rank-stabilised adapters divide by the root (Kalajdzievski, arXiv 2312.03732)."""
        alpha = next((alpha for name, alpha in self.alphas.items() if _is_end(name, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_stabilised else rank)

    def covers(self, module: str) -> bool:
        """Whether PEFT would put an adapter there."""
        number = LAYER_NUMBER.search(module)
        is_layer = self.layers is None or (number is not None and int(number[1]) in self.layers)
        return is_layer and (self.targets is None or any(_is_end(name, module) for name in self.targets))


def _is_end(name: str, module: str) -> bool:
    return module == name.removeprefix("^") or module.endswith(f".{name}")


def read_lora_config(values: Mapping[str, Any]) -> LoraConfig:
    """What a parsed adapter_config.json says.

    Raises:
        ConfigurationError: if it is no LoRA adapter, or one of a kind that is not available; it names the key.
    """
    config = ConfigReader(values, CONFIG)
    config.require(peft_type="LORA", bias="none")
    # where it comes from, how it was trained, and how its makers store matrices: A and B are stored one way only
    config.ignore("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")
    config.ignore("lora_dropout", "loftq_config", "eva_config", "megatron_core", "fan_in_fan_out", "qalora_group_size")
    # what the tensors say better
    config.ignore("layers_pattern", "exclude_modules")
    beginning = config.get("init_lora_weights")
    if beginning not in INNOCENT_BEGINNINGS:
        raise config.error(
            f"init_lora_weights {beginning!r:.60} changed the base model too; convert the adapter while saving it "
            "(PEFT's path_initial_model_for_weight_conversion)"
        )
    rank, alpha = config.integer("r"), config.number("lora_alpha")
    found = LoraConfig(
        ranks=frozenset({rank, *_ranks(config)}),
        alpha=alpha,
        alphas=_alphas(config),
        is_stabilised=config.flag("use_rslora"),
        targets=_targets(config),
        layers=_layers(config),
    )
    config.finish("not supported in adapters")
    return found


def _pattern(config: ConfigReader, name: str) -> dict[str, Any]:
    values = config.get(name) or {}
    if not isinstance(values, dict) or len(values) > MAX_NAMES:
        raise config.error(f"{name} must be an object of {MAX_NAMES} modules at most, not {values!r:.60}")
    return values


def _ranks(config: ConfigReader) -> list[int]:
    """Tensors say themselves which rank belongs to which module."""
    ranks = list(_pattern(config, "rank_pattern").values())
    if any(type(rank) is not int or not 0 < rank <= MAX_SIZE for rank in ranks):
        raise config.error("rank_pattern must give positive integers")
    return ranks


def _alphas(config: ConfigReader) -> dict[str, float]:
    alphas: dict[str, float] = {}
    for name, alpha in _pattern(config, "alpha_pattern").items():
        module = MODULE_NAME.fullmatch(name)
        if module is None:
            raise config.error(f"alpha_pattern {name!r:.60} must be a module's name or the end of one")
        number = ConfigReader({name: alpha}, f"{CONFIG}: alpha_pattern").number(name)
        alphas.setdefault(module["name"].replace("\\", ""), number)
    return alphas


def _targets(config: ConfigReader) -> tuple[str, ...] | None:
    """None for a regular expression, or where nothing is said."""
    values = config.get("target_modules")
    if values is None or isinstance(values, str):
        return None
    if not isinstance(values, list) or len(values) > MAX_NAMES or not all(isinstance(name, str) for name in values):
        raise config.error(
            f"target_modules must be a string or a list of {MAX_NAMES} names at most, not {values!r:.60}"
        )
    return tuple(values)


def _layers(config: ConfigReader) -> frozenset[int] | None:
    values = config.get("layers_to_transform")
    values = [values] if type(values) is int else values
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise config.error(f"layers_to_transform must be numbers of layers, not {values!r:.60}")
    return frozenset(values)


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one target, by the beginning of their names, with their rank and the factor on B A."""

    name: str
    target: Target
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter that fits the model. `digest` is that of `common.job.Adapter`."""

    path: Path
    digest: str
    pairs: tuple[Pair, ...]

    @property
    def rank(self) -> int:
        """The largest there is."""
        return max(pair.rank for pair in self.pairs)

    @property
    def targets(self) -> list[Target]:
        return [pair.target for pair in self.pairs]

    def changes(self, dtype: torch.dtype) -> Iterator[Change]:
        """Read it, pair by pair, as `dtype`.

        Raises:
            ConfigurationError: if the file is damaged, or holds what is no number in this type.
        """
        with _opened(self.path) as file:
            for pair in self.pairs:
                a, b = (file.get_tensor(f"{pair.name}.lora_{side}.weight") for side in "AB")
                wide = torch.promote_types(dtype, torch.float32)
                change = Change(pair.target, a.to(dtype), (b.to(wide) * pair.scale).to(dtype))
                for side, tensor in (("A", change.a), ("B", change.b)):
                    if not tensor.isfinite().all():
                        raise ConfigurationError(f"{self.path}: {pair.name}.lora_{side}.weight is not finite")
                yield change


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); download it again") from error


def read_adapter(folder: Path, targets: Mapping[str, Target], max_rank: int) -> StoredAdapter:
    """Compare what a folder holds with the matrices that adapters may change, `targets` by their names. Reads no more
    than the header of the weights, and samples for the digest.

    Raises:
        ConfigurationError: if it is no adapter, of no supported kind, or does not fit; it names what is in the way.
    """
    values = read_object(folder / CONFIG, f"{folder} is not an adapter in PEFT's format")
    config, path = read_lora_config(values), _weights_of(folder)
    header = read_header(path)
    # what it says of places in the file is checked by who reads it
    with _opened(path):
        pairs = _pairs(path, header, config, targets, max_rank)
    return StoredAdapter(path, weights_digest(values, [path])[:DIGEST_LENGTH], pairs)


def _weights_of(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (folder / PICKLED).exists():
        raise ConfigurationError(
            f"{folder} has only pickled weights ({PICKLED}), which are never loaded because unpickling runs code; "
            f"save the adapter again as {WEIGHTS}"
        )
    raise ConfigurationError(f"{folder} has no {WEIGHTS}")


def _pairs(
    path: Path, header: Mapping[str, Any], config: LoraConfig, targets: Mapping[str, Target], max_rank: int
) -> tuple[Pair, ...]:
    found: dict[str, Pair] = {}
    for tensor in header:
        module = _module_of(path, tensor, config, targets)
        name = f"base_model.model.{module}"
        if name not in found:
            found[name] = _pair(path, header, name, targets[module], max_rank, config)
    if not found:
        raise ConfigurationError(f"{path} holds no tensors")
    if len({pair.target for pair in found.values()}) < len(found):
        raise ConfigurationError(f"{path} has two pairs for the same matrix, under two of its names")
    return tuple(found.values())


def _module_of(path: Path, tensor: str, config: LoraConfig, targets: Mapping[str, Target]) -> str:
    """The name of the target that a tensor belongs to."""
    match = TENSOR_NAME.fullmatch(tensor)
    if match is None:
        raise ConfigurationError(f"{path}: {tensor:.200} is no A or B of LoRA, of which alone adapters may consist")
    module = match["module"]
    if module not in targets:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
        raise ConfigurationError(
            f"{path}: {tensor:.200} is for a module that this model does not have or that adapters may not change; "
            f"they may change {ends} of its layers"
        )
    if not config.covers(module):
        raise ConfigurationError(f"{path}: {tensor:.200} is of a module that {CONFIG} does not name")
    return module


def _pair(path: Path, header: Mapping[str, Any], name: str, target: Target, max_rank: int, config: LoraConfig) -> Pair:
    a, b = (_entry(path, header, f"{name}.lora_{side}.weight") for side in "AB")
    num_out, num_in = target.shape
    rank = a["shape"][0] if a["shape"] else 0
    for side, entry, expected in (("A", a, [rank, num_in]), ("B", b, [num_out, rank])):
        if entry["shape"] != expected:
            raise ConfigurationError(
                f"{path}: {name}.lora_{side}.weight has shape {entry['shape']!s:.60}, but for this model it must have "
                f"{expected}"
            )
    if rank not in config.ranks:
        raise ConfigurationError(f"{path}: {name}.lora_A.weight has rank {rank}, which {CONFIG} does not name")
    if rank > max_rank:
        raise ConfigurationError(
            f"{path}: {name}.lora_A.weight has rank {rank}, more than the {max_rank} of --max-lora-rank"
        )
    return Pair(name, target, rank, config.scale(name.removeprefix("base_model.model."), rank))


def _entry(path: Path, header: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in header:
        raise ConfigurationError(f"{path}: {name} is missing; A and B belong together")
    entry: Mapping[str, Any] = header[name]
    if entry["dtype"] not in STORED_DTYPES:
        raise ConfigurationError(f"{path}: {name} is stored as {entry['dtype']:.20}, not as {', '.join(STORED_DTYPES)}")
    return entry
