"""The safetensors files of a model folder: finding them, checking their headers, reading tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ConfigurationError

ProgressFunction = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

MAX_HEADER_BYTES = 100_000_000
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints hold although they follow from the config."""

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Checkpoint:
    """The safetensors files of a folder, opened lazily: a tensor is read when it is asked for.

    Raises:
        ConfigurationError: if the folder has no safetensors, or files that its index names are missing or damaged.
    """

    def __init__(self, folder: Path, on_progress: ProgressFunction | None = None) -> None:
        self._folder = folder
        self.files = find_files(folder)
        self._places: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path in self.files:
            for name, entry in read_header(path).items():
                self._places[name] = (path, entry)
        self._left = set(self._places)
        self._on_progress, self._done = on_progress, 0
        self._handles: dict[Path, Any] = {}

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(entry) for _, entry in self._places.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds most of the bytes."""
        sizes: dict[str, int] = {}
        for _, entry in self._places.values():
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + _num_bytes(entry)
        name = max(sizes, key=lambda key: sizes[key])
        if name not in STORED_DTYPES:
            raise ConfigurationError(
                f"{self._folder} stores its weights as {name}, which this version does not run; "
                f"it runs {', '.join(STORED_DTYPES)}"
            )
        return STORED_DTYPES[name]

    def has(self, name: str) -> bool:
        return name in self._places

    def copy_into(self, name: str, target: Tensor) -> None:
        if name not in self._places:
            raise ConfigurationError(f"{self._folder}: tensor {name} is missing; the checkpoint is incomplete")
        path, entry = self._places[name]
        if list(entry["shape"]) != list(target.shape):
            raise ConfigurationError(
                f"{self._folder}: tensor {name} has shape {list(entry['shape'])}, "
                f"but config.json asks for {list(target.shape)}"
            )
        target.copy_(self._open(path).get_tensor(name))
        self._left.discard(name)
        self._report(_num_bytes(entry))

    def finish(self) -> None:
        left = sorted(name for name in self._left if not name.endswith(IGNORED_SUFFIXES))
        self._handles.clear()
        if left:
            raise ConfigurationError(
                f"{self._folder}: {len(left)} tensors have no place in the model that config.json describes, "
                f"the first is {left[0]}"
            )

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ConfigurationError(f"{path} is damaged ({error}); download it again") from error
        return self._handles[path]

    def _report(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._on_progress is not None:
            self._on_progress(self._done, self.num_bytes)


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, else model.safetensors, else the only one there is.

    Raises:
        ConfigurationError: if there are none, or files of the index are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _files_of_index(index)
    found = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in found or len(found) == 1:
        return [single if single in found else found[0]]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ConfigurationError(
            f"{folder} has only pickled weights, which are never loaded because unpickling runs code; "
            "use a revision with safetensors files"
        )
    raise ConfigurationError(f"{folder} has no model.safetensors; check --model-id or use --load-format dummy")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{index} is not an index of safetensors files") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigurationError(f"{index} names files outside its folder")
    files = [index.parent / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigurationError(f"{index.parent}: {missing[0]} of the index is missing; download the model again")
    return files


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of a safetensors file (8 bytes of little-endian length, then JSON).

    Raises:
        ConfigurationError: if the file is damaged or shorter than its header says.
    """
    try:
        header = json.loads(_header_bytes(path))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values() if entry["dtype"] and entry["shape"] is not None]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file") from error
    if path.stat().st_size < 8 + len(_header_bytes(path)) + max(ends, default=0):
        raise ConfigurationError(f"{path} is shorter than its header says; download it again")
    return dict(header)


def _header_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ConfigurationError(f"{path} is not a safetensors file, or it is truncated")
        return file.read(length)


def _num_bytes(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end) - int(start)


def weights_digest(config: Mapping[str, Any], files: list[Path]) -> str:
    """Hex fingerprint of a model: config, and per file its size, its header and 64 samples of 4 KiB spread over it.

    It takes milliseconds for files of any size. Two checkpoints that differ only in bytes between the samples get the
    same fingerprint; retrained or requantised weights differ everywhere.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little") + _header_bytes(path))
        for sample in _samples(path, size):
            digest.update(sample)
    return digest.hexdigest()


def _samples(path: Path, size: int) -> Iterator[bytes]:
    span = max(size - SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(span * number // (NUM_SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
