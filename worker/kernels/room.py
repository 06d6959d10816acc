"""Memory for what stays as long as a model does."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.model.untouched import untouched_zeros

CHUNK_BYTES = 256 << 20
"""Asked for at a time; what is not used of it takes no memory."""
LINE_BYTES = 64


class Room:
    """One piece behind the other: an allocator would put them between what is given back after loading, where small
    things of steps then take a large page each."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Zeros [num_elements], at the beginning of a cache line."""
        num_bytes = num_elements * dtype.itemsize
        whole = -(-num_bytes // LINE_BYTES) * LINE_BYTES
        if whole > len(self._rest):
            self._rest = untouched_zeros((max(whole, CHUNK_BYTES),), torch.uint8)
        self.num_bytes += whole
        taken, self._rest = self._rest[:num_bytes], self._rest[whole:]
        return taken.view(dtype)
