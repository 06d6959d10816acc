"""Writes a model again with its matrices in few bits, file by file, so that what was stopped goes on.

Rounded to the nearest, matrices are independent and share files up to a size. By GPTQ every layer has a file of its
own: all of the text has got as far as the layer, whose products are watched and rounded, and goes on through what they
have become. What it is then, the input of the next layer, is kept beside the files until that one is written too, so
that a model made in several runs is the very one that a single run makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import ConfigurationError
from worker.calibration import OnStep, Reader, Watched, bytes_to_read, sequences_of
from worker.hub import ProgressFunction
from worker.model.loading import Builder
from worker.model.quant.calibrated import gptq, nearest
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.spec import Spec
from worker.quantising import Job, Modules
from worker.runner.hardware import cpu_dtype
from worker.runner.memory import available_bytes, readable
from worker.shards import (
    Report,
    Shard,
    check_space,
    chunks_of,
    groups_of,
    is_written,
    shard_names,
    shard_of,
    write_index,
    write_shard,
    written_whole,
)

WATCHED, ROUNDED = 0.4, 0.6
"""Shares of a layer's work that are done when the text has been read once, and when its matrices are rounded."""


@dataclass(frozen=True)
class Planned:
    """A file: tensors of the source as they are, or what `modules` become; `number` counts the latter. `num_bytes` are
    the source's."""

    shard: Shard
    path: Path
    modules: Modules
    number: int
    num_bytes: int


def plan_files(job: Job, target: Path, shard_bytes: int) -> list[Planned]:
    """What stays as it is, then the matrices in their order: by layers, or as many together as a file may hold."""
    taken = {f"{name}.weight" for name in job.modules}
    others = list(groups_of([entry for name, entry in job.stored.items() if name not in taken], shard_bytes))
    made = job.layers if job.is_calibrated else list(_cut(job, shard_bytes))
    paths = [target / name for name in shard_names(len(others) + len(made))]
    files = [
        Planned(shard_of(job.folder, group), path, {}, 0, sum(entry.num_bytes for entry in group))
        for group, path in zip(others, paths, strict=False)
    ]
    for number, (modules, path) in enumerate(zip(made, paths[len(others) :], strict=True)):
        shard = shard_of(job.folder, [entry for name, part in modules.items() for entry in job.planned(name, part)])
        num_bytes = sum(job.stored[f"{name}.weight"].num_bytes for name in modules)
        files.append(Planned(shard, path, modules, number, num_bytes))
    return files


def _cut(job: Job, shard_bytes: int) -> Iterator[Modules]:
    modules: Modules = {}
    num_bytes = 0
    for name, part in job.modules.items():
        size = sum(entry.num_bytes for entry in job.planned(name, part))
        if modules and num_bytes + size > shard_bytes:
            yield modules
            modules, num_bytes = {}, 0
        modules[name] = part
        num_bytes += size
    yield modules


class Work:
    """The files of a job that are not there yet. Nothing is written before `run`. `note` is a line for who waits.

    Raises:
        ConfigurationError: there is no room for them, or the text is not what it should be.
    """

    def __init__(self, job: Job, target: Path, *, is_resumed: bool, shard_bytes: int) -> None:
        self._job, self._target, self._plan = job, target, plan_files(job, target, shard_bytes)
        self._maker = _Calibrated(job, target) if job.is_calibrated else _Nearest(job)
        self.note = self._maker.note
        self._missing = [file for file in self._plan if not (is_resumed and is_written(file.shard, file.path))]
        first = next((file.number for file in self._missing if file.modules), 0)
        if not self._maker.can_begin(first):
            self._missing = self._plan
        num_bytes = sum(file.shard.num_bytes for file in self._missing)
        check_space(target, num_bytes + self._maker.extra_bytes, "quantised")

    @torch.inference_mode()
    def run(self, on_progress: ProgressFunction) -> tuple[int, int]:
        """Write them, then the index. Returns the bytes of all weights before and after.

        Raises:
            ConfigurationError: a weight is no number, or what the model computes from the text.
        """
        total, num_missing = (sum(file.num_bytes for file in files) for files in (self._plan, self._missing))
        report = Report(on_progress, total - num_missing, total)
        for file in self._missing:
            if file.modules:
                self._maker.write(file, report)
            else:
                write_shard(file.path, file.shard, self._job.checkpoint.tensor, report.add)
        write_index([file.shard for file in self._plan], [file.path for file in self._plan], self._target)
        return total, sum(file.shard.num_bytes for file in self._plan)


class _Nearest:
    extra_bytes, note = 0, ""

    def __init__(self, job: Job) -> None:
        self._job = job

    def can_begin(self, number: int) -> bool:
        return True

    def write(self, file: Planned, report: Report) -> None:
        tensors: dict[str, Tensor] = {}
        for name, part in file.modules.items():
            tensors |= self._job.tensors(name, nearest(self._job.read(name, part), self._job.grid))
            report.add(self._job.stored[f"{name}.weight"].num_bytes)
        write_shard(file.path, file.shard, tensors.__getitem__)


class _Calibrated:
    """Every file is a layer, and they are written in their order."""

    def __init__(self, job: Job, target: Path) -> None:
        assert isinstance(job.spec, Spec)
        self._job, self._target = job, target
        self._builder = Builder(job.family, job.checkpoint, cpu_dtype("auto", job.checkpoint.dtype, []))
        limits = job.settings.calibration_tokens, job.spec.max_positions
        self._sequences = sequences_of(job.text, _tokenizer(job.folder), *limits)
        if int(self._sequences.max()) >= job.spec.vocab_size:
            raise ConfigurationError(f"{job.folder}: tokenizer.json has more tokens than the model")
        count, length = self._sequences.shape
        self._shape = (count, length, job.spec.hidden_size)
        self.note = f"calibrating with {count * length} tokens: {count} times {length}"
        self._reader: Reader | None = None
        needed, free = bytes_to_read(job.spec, self._builder, count * length), available_bytes()
        if needed > free:
            raise ConfigurationError(
                f"one layer and {count * length} tokens of text need about {readable(needed)} of memory, "
                f"and {readable(free)} is free; choose fewer --calibration-tokens, or free memory"
            )

    @property
    def extra_bytes(self) -> int:
        """Those of what layers saw; the next one's are written before the last one's go."""
        return 2 * self._state_bytes

    @property
    def _state_bytes(self) -> int:
        return int(math.prod(self._shape)) * self._builder.dtype.itemsize

    def can_begin(self, number: int) -> bool:
        path = self._path(number)
        return number == 0 or (path.is_file() and path.stat().st_size == self._state_bytes)

    def write(self, file: Planned, report: Report) -> None:
        reader, stretch = self._reader_at(file.number), _Stretch(report, file.num_bytes)
        weights, watched = reader.load(file.number)
        reader.watch(weights, watched, file.number, stretch.until(WATCHED))
        tensors = self._rounded(watched, stretch.until(ROUNDED))
        if file.number + 1 < len(self._job.layers):
            reader.advance(weights, file.number, stretch.until(1.0))
            self._keep(reader.states, file.number + 1)
        write_shard(file.path, file.shard, tensors.__getitem__)
        self._path(file.number).unlink(missing_ok=True)
        stretch.until(1.0)(1, 1)

    def _reader_at(self, layer: int) -> Reader:
        if self._reader is None:
            assert isinstance(self._job.spec, Spec)
            self._reader = Reader(self._job.spec, self._builder)
            if layer == 0:
                self._reader.begin(self._sequences)
            else:
                stored = torch.from_file(str(self._path(layer)), size=self._state_bytes, dtype=torch.uint8)
                self._reader.states = stored.view(self._builder.dtype).view(self._shape).clone()
        return self._reader

    def _keep(self, states: Tensor, layer: int) -> None:
        with written_whole(self._path(layer)) as file:
            for chunk in chunks_of(states):
                file.write(chunk)

    def _path(self, layer: int) -> Path:
        return self._target / f".inferfleet-prepare-{layer}.states"

    def _rounded(self, watched: Sequence[Watched], on_step: OnStep) -> dict[str, Tensor]:
        """Tensors of the layer's file. The products go on with what these stand for."""
        tensors: dict[str, Tensor] = {}
        for number, each in enumerate(watched):
            matrices = self._round(each)
            for name, matrix in matrices.items():
                tensors |= self._job.tensors(name, matrix)
            each.replace({name: matrix.dequantised() for name, matrix in matrices.items()})
            on_step(number + 1, len(watched))
        return tensors

    def _round(self, watched: Watched) -> dict[str, QuantisedMatrix]:
        """All matrices of a product at once: they have the same inputs."""
        weights = {name: self._job.read(name, part) for name, part in watched.parts.items()}
        together, has_order = torch.cat(list(weights.values())), self._job.settings.desc_act
        hessian, watched.hessian = watched.hessian, None
        assert hessian is not None
        try:
            matrix = gptq(together, hessian, self._job.grid, has_order=has_order)
        except ValueError as error:
            raise ConfigurationError(
                f"{next(iter(weights))} gets inputs that are no numbers when the model reads the text of --calibration"
            ) from error
        ends = list(accumulate(len(weight) for weight in weights.values()))
        rows = map(slice, [0, *ends[:-1]], ends)
        return {name: matrix.rows(own) for name, own in zip(weights, rows, strict=True)}


class _Stretch:
    """Shows the bytes of a layer bit by bit, as its work goes on."""

    def __init__(self, report: Report, num_bytes: int) -> None:
        self._report, self._num_bytes, self._shown, self._reached = report, num_bytes, 0, 0.0

    def until(self, share: float) -> OnStep:
        """For steps that end where this share of the work is done."""
        start, self._reached = self._reached, share

        def on_step(done: int, total: int) -> None:
            reached = int(self._num_bytes * (start + (share - start) * done / total))
            self._report.add(reached - self._shown)
            self._shown = reached

        return on_step


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        # the library has no type of its own for it
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"{folder}/tokenizer.json is not a tokenizer: {reason}") from error
