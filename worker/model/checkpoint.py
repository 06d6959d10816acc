"""The safetensors files of a model folder: finding them, checking their headers, reading tensors one at a time."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ConfigurationError
from worker.model.weights import CPU, Part

MAX_HEADER_BYTES = 100_000_000
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
SHARD_NAME = re.compile(r"-of-0*([2-9]|[1-9]\d+)\.safetensors$")
"""The name of one of several files: alone it is no model."""
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints hold although they follow from the config."""

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that models compute in."""
CODE_DTYPES = {
    **{"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Types of what quantised weights are made of, which are never converted."""
MAX_WHOLE_BYTES = 1 << 24
"""Of what is read to know what else there is, such as the order of columns."""
PARAMETERS = (".weight", ".bias")
PACKED = (".qweight", ".weight_packed")
"""What formats of quantised weights have in the place of a weight."""


class Checkpoint:
    """The safetensors files of a folder, opened lazily: a tensor is read when it is asked for, for targets on `device`.

    Raises:
        ConfigurationError: if the folder has no safetensors, or files that its index names are missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        self._folder, self.device = folder, device
        self.files = find_files(folder)
        self._places: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path in self.files:
            for name, entry in read_header(path).items():
                self._places[name] = (path, entry)
        self._left = set(self._places)
        self._handles: dict[Path, Any] = {}

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(entry) for _, entry in self._places.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds most of the bytes of what is not quantised, masks and scales aside."""
        sizes: Counter[str] = Counter()
        for name, (_, entry) in self._places.items():
            if name.endswith(PARAMETERS):
                sizes[entry["dtype"]] += _num_bytes(entry)
        found = [name for name, _ in sizes.most_common()]
        running = [name for name in found if name in STORED_DTYPES]
        if not found:
            raise ConfigurationError(f"{self._folder} holds no weights; download the model again")
        if not running:
            raise ConfigurationError(
                f"{self._folder} stores its weights as {found[0]}, which this version does not run; "
                f"it runs {', '.join(STORED_DTYPES)}"
            )
        return STORED_DTYPES[running[0]]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the files say of their tensors, by name: dtype, shape, data_offsets."""
        return {name: entry for name, (_, entry) in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """One as it is stored."""
        result: Tensor = self._open(self._place(name)[0]).get_tensor(name)
        return result

    def has(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._place(name)[1]["shape"])

    def whole(self, name: str) -> Tensor:
        path, entry = self._place(name)
        if entry["dtype"] not in STORED_DTYPES | CODE_DTYPES or _num_bytes(entry) > MAX_WHOLE_BYTES:
            raise ConfigurationError(
                f"{self._folder}: tensor {name} must be small and of a known type, not {_num_bytes(entry)} bytes of "
                f"{entry['dtype']}"
            )
        result: Tensor = self._open(path).get_tensor(name)
        self._left.discard(name)
        return result

    def copy_into(self, name: str, target: Tensor, part: Part) -> None:
        path, entry = self._place(name)
        expected = list(reversed(part.shape) if part.is_transposed else part.shape)
        if list(entry["shape"]) != expected:
            raise ConfigurationError(
                f"{self._folder}: tensor {name} has shape {list(entry['shape'])}, but config.json asks for {expected}"
            )
        self._check_dtype(name, entry["dtype"], target.dtype)
        self._copy(self._open(path), name, target, part)
        self._left.discard(name)

    def _place(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in self._places:
            raise ConfigurationError(f"{self._folder}: tensor {name} is missing; {self._why_missing(name)}")
        return self._places[name]

    def _why_missing(self, name: str) -> str:
        module = name.removesuffix(".weight")
        others = [module + ending for ending in PACKED if module + ending in self._places]
        if module == name or not others:
            return "the checkpoint is incomplete"
        return f"there is {others[0]} in its place, of which the quantization_config in config.json says nothing"

    def _check_dtype(self, name: str, stored: str, wanted: torch.dtype) -> None:
        allowed = [own for own, dtype in CODE_DTYPES.items() if dtype is wanted] or list(STORED_DTYPES)
        if stored not in allowed:
            raise ConfigurationError(
                f"{self._folder}: tensor {name} is stored as {stored}, but config.json asks for {' or '.join(allowed)}"
            )

    @staticmethod
    def _copy(file: Any, name: str, target: Tensor, part: Part) -> None:
        if not part.shape:
            target.copy_(file.get_tensor(name))
            return
        stored, start = file.get_slice(name), 0
        for rows in part.rows:
            target[start : start + len(rows)].copy_(_read(stored, rows, part))
            start += len(rows)

    def skip(self, name: str) -> None:
        self._left.discard(name)

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None:
        endings, beginnings = (*IGNORED_SUFFIXES, *ignored), tuple(foreign)
        left = sorted(name for name in self._left if not (name.endswith(endings) or name.startswith(beginnings)))
        left = [name for name in left if not self._is_bias_of_zeros(name)]
        self._handles.clear()
        if left:
            raise ConfigurationError(
                f"{self._folder}: {len(left)} tensors have no place in the model that config.json describes, "
                f"the first is {left[0]}"
            )

    def _is_bias_of_zeros(self, name: str) -> bool:
        """Tools that quantise write some for products that have none."""
        is_bias = name.endswith(".bias") and self._place(name)[1]["dtype"] in STORED_DTYPES
        return is_bias and not self.tensor(name).any()

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ConfigurationError(f"{path} is damaged ({error}); download it again") from error
        return self._handles[path]


def _read(stored: Any, rows: range, part: Part) -> Tensor:
    """`rows` of a slice that is read only where it is looked at, in our layout."""
    row_slice = slice(rows.start, rows.stop)
    if part.columns is None:
        result: Tensor = stored[row_slice]
        return result
    column_slice = slice(part.columns.start, part.columns.stop)
    result = stored[column_slice, row_slice].t() if part.is_transposed else stored[row_slice, column_slice]
    return result


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, else model.safetensors, else the only one there is.

    Files called consolidated are left alone: they hold the weights once more, in their maker's own layout.

    Raises:
        ConfigurationError: if there are none, or files of the index are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return files_of_index(index)
    found = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    single = folder / "model.safetensors"
    if single in found or (len(found) == 1 and not SHARD_NAME.search(found[0].name)):
        return [single if single in found else found[0]]
    raise ConfigurationError(_why_no_files(folder, found))


def _why_no_files(folder: Path, found: list[Path]) -> str:
    if found:
        return (
            f"{folder} has {found[0].name} but neither model.safetensors nor model.safetensors.index.json; finish "
            "`inferfleet prepare` or download the rest"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder} has only pickled weights, which are never loaded because unpickling runs code; "
            f"`{shlex.join(['inferfleet', 'prepare', str(folder)])}` converts them"
        )
    if any(folder.glob("consolidated*.safetensors")):
        return f"{folder} has weights in their maker's own layout only; use a revision with model.safetensors"
    return f"{folder} has no model.safetensors; check --model-id or use --load-format dummy"


def files_of_index(index: Path) -> list[Path]:
    """The files of weights that an index names, each once, in the order of their names.

    Raises:
        ConfigurationError: if it is no index, or names files that are missing or elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{index} is not an index of weight files") from error
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
    content = _header_bytes(path)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        if not all(map(_is_entry, header.values())):
            raise ValueError("the header describes something other than tensors")
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file") from error
    if path.stat().st_size < 8 + len(content) + max((entry["data_offsets"][1] for entry in header.values()), default=0):
        raise ConfigurationError(f"{path} is shorter than its header says; download it again")
    return dict(header)


def _is_entry(entry: Any) -> bool:
    """Whether it has the type of a tensor, its shape, and the bytes between which it lies."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return _are_integers(shape) and _are_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]


def _are_integers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)


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
