"""What it is to quantise a model: which matrices, to which codes, in which tensors, and what config.json then says."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.settings import PrepareSettings
from worker.calibration import matrices_of, read_text
from worker.model.checkpoint import Checkpoint, weights_digest
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.families.base import Family
from worker.model.loading import Builder, load_layer
from worker.model.quant.calibrated import Grid
from worker.model.quant.matrix import QuantisedMatrix, neighbours
from worker.model.quant.reading import WORD_BITS
from worker.model.quant.stored import stored_quantisation
from worker.model.quant.writing import GPTQ_SCALE, as_compressed, as_gptq, compressed_config, gptq_config
from worker.model.spec import AnySpec, T5Spec
from worker.model.t5 import load_t5
from worker.model.weights import Part
from worker.shards import STORED_DTYPES, Entry

GROUP_SIZES = (256, 128, 64, 32)
Modules = dict[str, Part]
"""Matrices, whole, by the names of their modules."""


@dataclass(frozen=True)
class Job:
    """A model that can be quantised as the settings say. `layers` has the matrices that will be, layer by layer where
    the model has one stack of layers. `text` is that of calibration."""

    settings: PrepareSettings
    folder: Path
    checkpoint: Checkpoint
    values: Mapping[str, Any]
    spec: AnySpec
    family: Family
    layers: Sequence[Modules]
    text: str

    @property
    def is_calibrated(self) -> bool:
        return self.settings.quantize == "gptq"

    @cached_property
    def grid(self) -> Grid:
        size = None if self.settings.group_size == -1 or self.settings.quantize == "int8" else self.settings.group_size
        if self.is_calibrated:
            return Grid(self.settings.bits, size, GPTQ_SCALE)
        return Grid(8 if self.settings.quantize == "int8" else 4, size, self.checkpoint.dtype)

    @cached_property
    def modules(self) -> Modules:
        return {name: part for layer in self.layers for name, part in layer.items()}

    @cached_property
    def stored(self) -> dict[str, Entry]:
        """The tensors that there are, by name."""
        return {name: _entry(name, place) for name, place in self.checkpoint.entries.items()}

    @cached_property
    def config(self) -> bytes:
        """config.json of the quantised model."""
        own = self._gptq_config() if self.is_calibrated else self._compressed_config()
        return json.dumps({**self.values, "quantization_config": own}, indent=2, ensure_ascii=False).encode()

    def _gptq_config(self) -> dict[str, Any]:
        grid, block = self.grid, next(iter(self.layers[0])).partition(".0.")[0]
        config = gptq_config(grid.num_bits, grid.group_size, has_order=self.settings.desc_act, block=block)
        note = {"sha256": hashlib.sha256(self.text.encode()).hexdigest(), "tokens": self.settings.calibration_tokens}
        return config | {"meta": {"quantizer": [f"inferfleet:{version('inferfleet')}"], "calibration": note}}

    def _compressed_config(self) -> dict[str, Any]:
        others = [name.removesuffix(".weight") for name, entry in self.stored.items() if len(entry.shape) == 2]
        heads = self.family.candidates("head", 0, 0)[:1]
        ignored = sorted({*heads, *others} - set(self.modules))
        return compressed_config(self.grid.num_bits, self.grid.group_size, ignored)

    def read(self, name: str, part: Part) -> Tensor:
        """A matrix as float32 [rows, columns]."""
        weight = torch.empty(part.shape)
        self.checkpoint.copy_into(f"{name}.weight", weight, part)
        if not weight.isfinite().all():
            raise ConfigurationError(f"{name}.weight holds what is no number; download the model again")
        return weight

    def tensors(self, name: str, matrix: QuantisedMatrix) -> dict[str, Tensor]:
        """What files hold of a matrix, by name."""
        as_tensors = as_gptq if self.is_calibrated else as_compressed
        return {f"{name}.{end}": tensor for end, tensor in as_tensors(matrix, self.grid.scale_dtype).items()}

    def planned(self, name: str, part: Part) -> list[Entry]:
        """What files are going to hold of a matrix."""
        codes = torch.empty(part.shape, dtype=torch.uint8, device="meta")
        groups = neighbours(part.shape[1], self.grid.size(part.shape[1]))
        scale = torch.empty((part.shape[0], int(groups[-1]) + 1), device="meta")
        return [
            Entry(name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, tensor.itemsize)
            for name, tensor in self.tensors(name, self.grid.matrix(codes, scale, groups)).items()
        ]

    @cached_property
    def stamp(self) -> list[str]:
        """What work that goes on must have in common with what was stopped."""
        return [weights_digest(self.values, self.checkpoint.files), hashlib.sha256(self.config).hexdigest()]


def _entry(name: str, place: Mapping[str, Any]) -> Entry:
    start, end = place["data_offsets"]
    shape = tuple(place["shape"])
    return Entry(name, place["dtype"], shape, end - start, (end - start) // max(math.prod(shape), 1))


def plan_job(settings: PrepareSettings, source: Path) -> Job:
    """Raises ConfigurationError if the model cannot be quantised so; one sentence with the fix."""
    if not any(source.glob("*.safetensors")):
        raise ConfigurationError(
            f"{settings.model} has no safetensors to quantise; where it has pickled weights, `inferfleet prepare "
            f"{settings.model}` converts them first"
        )
    values = read_config(source)
    stored = stored_quantisation(values)
    if stored is not None:
        raise ConfigurationError(
            f"{settings.model} is quantised already, by {stored.name}; quantise the model that it was made of"
        )
    spec, family = read_spec(values)
    _check_architecture(settings, spec)
    if settings.quantize == "gptq" and not (source / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"{settings.model} has no tokenizer.json for the text of --calibration; `inferfleet prepare "
            f"{settings.model}` makes one first"
        )
    checkpoint = Checkpoint(source)
    layers = _layers(spec, Builder(family, checkpoint, checkpoint.dtype))
    text = read_text(Path(settings.calibration).expanduser()) if settings.calibration else ""
    job = Job(settings, source, checkpoint, values, spec, family, layers, text)
    _check_shapes(job)
    return job


def _check_architecture(settings: PrepareSettings, spec: AnySpec) -> None:
    if settings.quantize != "gptq":
        return
    if isinstance(spec, T5Spec):
        raise ConfigurationError(
            f"--quantize gptq is for decoders, and {spec.model_type} has an encoder too; choose int8 or int4"
        )
    if spec.moe is not None:
        raise ConfigurationError(
            f"--quantize gptq is for models without experts, of which {spec.model_type} has {spec.moe.num_experts}, "
            "most with too little of the text to go by; choose int8 or int4"
        )


def _layers(spec: AnySpec, builder: Builder) -> list[Modules]:
    if isinstance(spec, T5Spec):
        return [matrices_of(partial(load_t5, spec), builder)]
    return [matrices_of(partial(load_layer, spec, layer=layer), builder) for layer in range(spec.num_layers)]


def _check_shapes(job: Job) -> None:
    """Of what every reader takes: whole groups and, of GPTQ's files, whole words along rows and columns.

    Raises:
        ConfigurationError: naming a matrix that has another shape, or is missing.
    """
    unit = WORD_BITS // job.grid.num_bits if job.is_calibrated else 1
    widths = {part.shape[1] for part in job.modules.values()}
    for name, part in job.modules.items():
        num_rows, num_columns = part.shape
        job.checkpoint.shape(f"{name}.weight")
        if num_columns % job.grid.size(num_columns):
            possible = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
            raise ConfigurationError(
                f"{name} has {num_columns} columns, which groups of {job.grid.group_size} do not divide; "
                f"--group-size may be {' or '.join(map(str, [*possible, -1]))}"
            )
        if num_rows % unit or num_columns % unit:
            raise ConfigurationError(
                f"{name} has {num_rows} rows and {num_columns} columns, and GPTQ's files hold {job.grid.num_bits} bits "
                f"in multiples of {unit} only; choose other --bits, or --quantize int8 or int4"
            )
