"""Memory that is apart from all other."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of their own, large ones where the system has them. It provides them when they are first written:
    a pool of gigabytes costs neither seconds at start nor memory before it is used. It gets them back when the last
    tensor of them is gone, which leaves no hole between things that stay.

    Raises:
        MemoryError: if the system does not even promise it.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system has no {num_bytes} bytes of memory: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)
