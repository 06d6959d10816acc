"""Safetensors files that appear whole: what goes into which, whether it is there already, and writing it.

A file gets its name only when its last byte is on the disk, so work that was stopped goes on with the first file that
is missing. Format of the files: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.hub import ProgressFunction, free_bytes
from worker.model.checkpoint import read_header
from worker.runner.memory import readable

SHARD_BYTES = 2_000_000_000
CHUNK_BYTES = 16 << 20
ALIGNMENT = 8
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
PART_SUFFIX = ".part"
STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    item_bytes: int


@dataclass(frozen=True)
class Shard:
    """Tensors of one source that go into one file. `ties` maps names left out to those kept."""

    source: Path
    entries: tuple[Entry, ...]
    ties: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @cached_property
    def places(self) -> dict[str, dict[str, Any]]:
        """Type, shape and place of every tensor, as the header says it."""
        places, start = {}, 0
        for entry in self.entries:
            offsets = [start, start + entry.num_bytes]
            places[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            start += entry.num_bytes
        return places

    def header(self) -> bytes:
        """Length, then JSON, padded so that the tensors begin aligned."""
        text = json.dumps({"__metadata__": {"format": "pt"} | dict(self.ties)} | self.places).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def groups_of(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        if group and num_bytes + entry.num_bytes > shard_bytes:
            yield group
            group, num_bytes = [], 0
        group.append(entry)
        num_bytes += entry.num_bytes
    yield group


def shard_of(source: Path, entries: Sequence[Entry], ties: Mapping[str, str] | None = None) -> Shard:
    """Wide types first, so that every tensor begins at a multiple of its item's size."""
    names = {entry.name for entry in entries}
    ordered = sorted(entries, key=lambda entry: -entry.item_bytes)
    return Shard(source, tuple(ordered), {name: kept for name, kept in (ties or {}).items() if kept in names})


def shard_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]


class Report:
    """Adds up bytes."""

    def __init__(self, on_progress: ProgressFunction, done: int, total: int) -> None:
        self._on_progress, self._done, self._total = on_progress, done, total

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._on_progress(self._done, self._total)


def is_written(shard: Shard, path: Path) -> bool:
    """Whether the file holds these tensors: its name appeared only after its last byte was on disk."""
    if not path.is_file():
        return False
    try:
        return read_header(path) == shard.places
    except ConfigurationError:
        return False


def check_space(target: Path, num_bytes: int, word: str) -> None:
    """Raises ConfigurationError if the weights, which are `word`, do not fit."""
    free = free_bytes(target)
    if num_bytes > free:
        raise ConfigurationError(
            f"the {word} weights need {readable(num_bytes)} more in {target}, where {readable(free)} are free: "
            "free some, or choose another --output"
        )


def write_shard(
    path: Path, shard: Shard, tensor: Callable[[str], Tensor], on_bytes: Callable[[int], None] | None = None
) -> None:
    """`tensor` gives each by its name, `on_bytes` gets the bytes that were written since."""
    with written_whole(path) as file:
        file.write(shard.header())
        for entry in shard.entries:
            for chunk in chunks_of(tensor(entry.name)):
                file.write(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name once all of it is on the disk, and is gone if anything goes wrong before."""
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def chunks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major; a copy is made of one whose memory is in another order."""
    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def write_index(shards: Sequence[Shard], paths: Sequence[Path], target: Path) -> None:
    weight_map = {entry.name: path.name for shard, path in zip(shards, paths, strict=True) for entry in shard.entries}
    content = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    with written_whole(target / INDEX_NAME) as file:
        file.write(json.dumps(content, indent=2).encode())
