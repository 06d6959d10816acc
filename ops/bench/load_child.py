"""What a rank of the loading benchmark does; everything it needs is imported before it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.settings import WorkerSettings
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import load_weights
from worker.model.spec import Spec
from worker.model.weights import Part
from worker.parallel.shard import Shard
from worker.runner.load import load_device

KV_TOKENS = 64
Work = Callable[[], Any]


class OneOfMany:
    """A rank that never has to speak: loading weights needs no word from the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.shard, self.exchange = Shard(rank, size), None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.expand(self.shard.size, *x.shape)


class InMemory:
    """All tensors of a checkpoint, read already."""

    device, dtype = torch.device("cpu"), torch.bfloat16

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in Checkpoint(folder).files:
            self._tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def whole(self, name: str) -> Tensor:
        return self._tensors[name]

    def copy_into(self, name: str, target: Tensor, part: Part) -> None:
        start = 0
        for rows in part.rows:
            target[start : start + len(rows)].copy_(self._tensors[name][rows.start : rows.stop])
            start += len(rows)

    def skip(self, name: str) -> None: ...

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None: ...


def prepare(folder: Path, what: str, rank: int, num_shards: int) -> Work:
    """`load` as a worker does; `pack` from memory to memory; `eager` reads everything before it cuts."""
    torch.set_num_threads(1)
    if what == "pack":
        spec, family = read_spec(read_config(folder))
        source = InMemory(folder)
        assert isinstance(spec, Spec)
        return lambda: load_weights(spec, family, source, torch.bfloat16)
    settings = WorkerSettings(model_id=str(folder), kv_tokens=KV_TOKENS, max_total_tokens=KV_TOKENS // 2, threads=1)

    def load() -> Any:
        return load_device(settings, lambda phase, done, total: None, OneOfMany(rank, num_shards))

    def eager() -> Any:
        return InMemory(folder), load()

    return eager if what == "eager" else load
