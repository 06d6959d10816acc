"""Pickled checkpoints to safetensors, one tensor in memory at a time, without ever running their code.

Every file is unpickled by torch's restricted loader, which builds plain tensors and refuses all else. Its tensors go
into one or more shards.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.hub import IGNORED_FILES, PICKLED_FILES, ProgressFunction
from worker.model.checkpoint import files_of_index
from worker.shards import (
    STORED_DTYPES,
    Entry,
    Report,
    Shard,
    check_space,
    groups_of,
    is_written,
    shard_names,
    shard_of,
    write_index,
    write_shard,
)

ZIP_MAGIC = b"PK\x03\x04"
WRAPPERS = ("state_dict", "model")

Say = Callable[[str], None]


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
    return [shard_of(source, group, ties) for group in groups_of(entries, shard_bytes)]


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


def convert(shards: Sequence[Shard], target: Path, on_progress: ProgressFunction, *, is_resumed: bool) -> None:
    """Write the shards, then the index; when the work is resumed, only shards that are not there yet.

    Raises:
        ConfigurationError: there is no room for them.
    """
    paths = [target / name for name in shard_names(len(shards))]
    both = list(zip(shards, paths, strict=True))
    missing = [(shard, path) for shard, path in both if not (is_resumed and is_written(shard, path))]
    num_missing_bytes, total = sum(shard.num_bytes for shard, _ in missing), sum(shard.num_bytes for shard in shards)
    check_space(target, num_missing_bytes, "converted")
    report = Report(on_progress, total - num_missing_bytes, total)
    for source in dict.fromkeys(shard.source for shard, _ in missing):
        _write_source(source, [(shard, path) for shard, path in missing if shard.source == source], report)
    if len(shards) > 1:
        write_index(shards, paths, target)


def _say_nothing(_: str) -> None:
    """What is left out was said when the plan was made."""


def _write_source(source: Path, shards: Sequence[tuple[Shard, Path]], report: Report) -> None:
    tensors = read_pickle(source, _say_nothing)
    for shard, path in shards:
        write_shard(path, shard, tensors.__getitem__, report.add)
