"""The adapters of one rank: checked when somebody asks, loaded when a row brings one that its slot does not hold.

No copies are kept beside the slots: the page cache has what was read lately, and slots change rarely.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.job import Adapter
from worker.engine.adapters import NO_SLOT
from worker.engine.device import RowInit
from worker.model.lora import LoraSlots
from worker.model.peft import StoredAdapter, read_adapter
from worker.parallel.group import Group, agree_on_minimum
from worker.pipe import AdapterChecked
from worker.runner.memory import available_bytes, readable
from worker.runner.rows import Ints


class RowAdapters:
    """Which of `slots` each row uses, and by digest what lies in them; "" where nothing useful does. They may take
    `max_bytes` of memory: the system counts as free what a KV cache that is not full yet was promised, and knows
    nothing of a GPU's."""

    def __init__(self, slots: LoraSlots, group: Group, *, num_rows: int, max_rank: int, max_bytes: int) -> None:
        self._slots, self._group, self._max_rank, self._max_bytes = slots, group, max_rank, max_bytes
        self._slot_of_row = np.full(num_rows, NO_SLOT, np.int64)
        self._digests: dict[int, str] = {}

    def check(self, name: str, source: str) -> AdapterChecked:
        """Whether what a folder holds fits the model; loads nothing."""
        try:
            stored = self._read(source)
        except ConfigurationError as error:
            return AdapterChecked(name, source, "", 0, f"adapter {name}: {error}")
        return AdapterChecked(name, source, stored.digest, stored.rank, "")

    def move_in(self, init: RowInit) -> str:
        """Have the adapter of a new row in its slot. Returns why that cannot be, on every rank if on one; the row goes
        without then."""
        self._slot_of_row[init.row] = NO_SLOT
        if init.adapter is None:
            return ""
        error = ""
        if self._digests.get(init.adapter_slot) != init.adapter.digest:
            error = self._load(init.adapter, init.adapter_slot)
        if not error:
            self._slot_of_row[init.row] = init.adapter_slot
        return error

    def use(self, rows: Ints) -> None:
        """Begin a step whose tokens belong to `rows` [t]."""
        if self._digests:  # else there never was an adapter
            self._slots.use(self._slot_of_row[rows])

    def slots_of(self, rows: Ints) -> Ints:
        """[t] slots of tokens that belong to `rows` [t], or [0] if none has any."""
        slots = self._slot_of_row[rows]
        return slots if (slots != NO_SLOT).any() else slots[:0]

    def begin(self, slots: Ints, sent: Tensor) -> None:
        """Begin a step whose tokens use these `slots_of`, of which the device has a copy `sent`."""
        self._slots.use(slots, sent)

    def _load(self, adapter: Adapter, slot: int) -> str:
        error = ""
        try:
            self._fill(adapter, slot)
        except ConfigurationError as refusal:
            error = f"adapter {adapter.name} cannot be loaded any more: {refusal}"
        except torch.OutOfMemoryError:
            error = f"adapter {adapter.name} cannot be loaded any more: the GPU has no memory for it; lower --max-loras"
        if not agree_on_minimum(self._group, int(not error)):
            error = error or f"adapter {adapter.name} cannot be loaded by another rank"
        if error:
            self._slots.clear(slot)
        self._digests[slot] = "" if error else adapter.digest
        return error

    def _fill(self, adapter: Adapter, slot: int) -> None:
        stored = self._read(adapter.source)
        if stored.digest != adapter.digest:
            raise ConfigurationError(f"{adapter.source} changed since the job was accepted")
        growth = self._slots.growth(slot, stored.rank, stored.targets)
        free = self._max_bytes - self._slots.num_bytes
        if self._slots.device.type == "cpu":
            free = min(free, available_bytes())
        if growth > free:
            raise ConfigurationError(
                f"it needs {readable(growth)} of memory but only {readable(max(free, 0))} is free; lower --max-loras"
            )
        self._slots.put(slot, stored.rank, stored.targets, stored.changes(self._slots.dtype))

    def _read(self, source: str) -> StoredAdapter:
        try:
            return read_adapter(Path(source), self._slots.targets, self._max_rank)
        except OSError as error:
            raise ConfigurationError(f"{source} cannot be read: {error.strerror}") from error
