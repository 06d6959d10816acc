"""Pickled checkpoints to safetensors, one tensor in memory at a time, without ever running their code.

Every file is unpickled by torch's restricted loader, which builds plain tensors and refuses all else. Its tensors go
into one or more shards; a shard appears under its name only when it is whole, so a conversion that was stopped goes on
with the first shard that is missing. Format of the files: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.hub import IGNORED_FILES, PICKLED_FILES, ProgressFunction, free_bytes
from worker.model.checkpoint import files_of_index, read_header
from worker.runner.memory import readable

SHARD_BYTES = 2_000_000_000
CHUNK_BYTES = 16 << 20
ALIGNMENT = 8
ZIP_MAGIC = b"PK\x03\x04"
WRAPPERS = ("state_dict", "model")
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

Say = Callable[[str], None]


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
    """Tensors of one pickled file that go into one safetensors file. `ties` maps names left out to those kept."""

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


def find_pickles(folder: Path) -> list[Path]:
    """The pickled files of a model: those of its index, else pytorch_model.bin, else the only one there is.

    Raises:
        ConfigurationError: there are none, or it is not clear which ones belong together.
    """
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        return files_of_index(index)
    single = folder / "pytorch_model.bin"
    if single.is_file():
        return [single]
    names = {path for pattern in PICKLED_FILES for path in folder.glob(pattern)}
    found = sorted(path for path in names if not any(path.match(pattern) for pattern in IGNORED_FILES[1:]))
    if len(found) == 1:
        return found
    if found:
        listed = ", ".join(path.name for path in found[:3])
        raise ConfigurationError(f"{folder} has {listed} but no {index.name} that says which of them are the model")
    raise ConfigurationError(f"{folder} has neither model.safetensors nor pickled weights ({', '.join(PICKLED_FILES)})")


def plan(sources: Sequence[Path], shard_bytes: int, say: Say) -> list[Shard]:
    """What goes where: every file is cut into shards of at most `shard_bytes`, or one tensor where that is larger.

    Only the names and shapes are read here. `say` gets a line about what is left out.

    Raises:
        ConfigurationError: a file needs code, is damaged, or holds what safetensors cannot; the message names it.
    """
    shards = [shard for source in sources for shard in _plan_source(source, shard_bytes, say)]
    seen: dict[str, Path] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in seen:
                raise ConfigurationError(
                    f"tensor {entry.name} is in {seen[entry.name].name} and in {shard.source.name}; "
                    f"are both files in {shard.source.parent} of one model?"
                )
            seen[entry.name] = shard.source
    return shards


def _plan_source(source: Path, shard_bytes: int, say: Say) -> list[Shard]:
    tensors = read_pickle(source, say)
    ties = _ties(tensors)
    entries = [_entry(source, name, tensor) for name, tensor in tensors.items() if name not in ties]
    return [_shard(source, group, ties) for group in _groups(entries, shard_bytes)]


def read_pickle(path: Path, say: Say) -> dict[str, Tensor]:
    """The tensors of a pickled file, which stay on disk until they are looked at.

    Files of torch before 1.6 cannot be mapped: they are read into memory, one at a time.

    Raises:
        ConfigurationError: the file needs code, is damaged or holds no tensors.
    """
    with path.open("rb") as file:
        is_mapped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:
        # a damaged pickle can fail in any way
        raise ConfigurationError(_refusal(path, error)) from error
    return _tensors(path, content, say)


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    code = re.search(r"GLOBAL (\S+) (?:was not|whose)", text)
    if code is not None:
        return f"{path} needs {code[1]} to be loaded, and code of a checkpoint is never run; it holds more than weights"
    if "TorchScript" in text:
        return f"{path} is a TorchScript program and not a file of weights, and code of a checkpoint is never run"
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in text:
        return f"{path} does more than hold tensors, and code of a checkpoint is never run"
    return f"{path} is not a file of weights, or it is damaged: download it again"


def _tensors(path: Path, content: Any, say: Say) -> dict[str, Tensor]:
    """Tensors by name, out of the dictionaries that training programs wrap around them."""
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    entries = content if isinstance(content, dict) else {}
    tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ConfigurationError(f"{path} holds no tensors by name; is it the weights of a model?")
    others = [str(key) for key in entries if key not in tensors]
    if others:
        say(f"{path.name}: {len(others)} entries that are no tensors are left out, such as {others[0]}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the very same memory as another one, which is kept in their place."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
            groups.setdefault((*place, tensor.dtype, tensor.shape, tensor.stride()), []).append(name)
    return {name: kept for kept, *rest in (sorted(names, key=_rank) for names in groups.values()) for name in rest}


def _rank(name: str) -> tuple[bool, bool, bool, int, str]:
    """Embeddings stay and heads go: a model without a head of its own uses its embedding."""
    is_head = "head" in name or "embed_out" in name
    return "shared" not in name, is_head, "emb" not in name, len(name), name


def _entry(path: Path, name: str, tensor: Tensor) -> Entry:
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not is_plain or tensor.dtype not in STORED_DTYPES:
        kind = str(tensor.dtype if is_plain else tensor.layout).removeprefix("torch.")
        raise ConfigurationError(f"{path}: tensor {name} is {kind}, which is not converted")
    num_bytes = tensor.numel() * tensor.itemsize
    return Entry(name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape), num_bytes, tensor.itemsize)


def _groups(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        if group and num_bytes + entry.num_bytes > shard_bytes:
            yield group
            group, num_bytes = [], 0
        group.append(entry)
        num_bytes += entry.num_bytes
    yield group


def _shard(source: Path, entries: Sequence[Entry], ties: Mapping[str, str]) -> Shard:
    """Wide types first, so that every tensor begins at a multiple of its item's size."""
    names = {entry.name for entry in entries}
    ordered = sorted(entries, key=lambda entry: -entry.item_bytes)
    return Shard(source, tuple(ordered), {name: kept for name, kept in ties.items() if kept in names})


def convert(shards: Sequence[Shard], target: Path, on_progress: ProgressFunction, *, is_resumed: bool) -> None:
    """Write the shards, then the index; when the work is resumed, only shards that are not there yet.

    Raises:
        ConfigurationError: there is no room for them.
    """
    paths = [target / name for name in shard_names(len(shards))]
    both = list(zip(shards, paths, strict=True))
    missing = [(shard, path) for shard, path in both if not (is_resumed and _is_written(shard, path))]
    num_missing_bytes, total = sum(shard.num_bytes for shard, _ in missing), sum(shard.num_bytes for shard in shards)
    _check_space(target, num_missing_bytes)
    report = _Report(on_progress, total - num_missing_bytes, total)
    for source in dict.fromkeys(shard.source for shard, _ in missing):
        _write_source(source, [(shard, path) for shard, path in missing if shard.source == source], report)
    if len(shards) > 1:
        _write_index(shards, paths, target)


def shard_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]


def _say_nothing(_: str) -> None:
    """What is left out was said when the plan was made."""


class _Report:
    """Adds up bytes."""

    def __init__(self, on_progress: ProgressFunction, done: int, total: int) -> None:
        self._on_progress, self._done, self._total = on_progress, done, total

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._on_progress(self._done, self._total)


def _is_written(shard: Shard, path: Path) -> bool:
    """Whether the file holds these tensors: its name appeared only after its last byte was on disk."""
    if not path.is_file():
        return False
    try:
        return read_header(path) == shard.places
    except ConfigurationError:
        return False


def _check_space(target: Path, num_bytes: int) -> None:
    free = free_bytes(target)
    if num_bytes > free:
        raise ConfigurationError(
            f"the converted weights need {readable(num_bytes)} more in {target}, where {readable(free)} are free: "
            "free some, or choose another --output"
        )


def _write_source(source: Path, shards: Sequence[tuple[Shard, Path]], report: _Report) -> None:
    tensors = read_pickle(source, _say_nothing)
    for shard, path in shards:
        with written_whole(path) as file:
            file.write(shard.header())
            for entry in shard.entries:
                for chunk in _chunks(tensors[entry.name]):
                    file.write(chunk)
                    report.add(len(chunk))


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


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major; a copy is made of one whose memory is in another order."""
    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _write_index(shards: Sequence[Shard], paths: Sequence[Path], target: Path) -> None:
    weight_map = {entry.name: path.name for shard, path in zip(shards, paths, strict=True) for entry in shard.entries}
    content = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    with written_whole(target / INDEX_NAME) as file:
        file.write(json.dumps(content, indent=2).encode())
