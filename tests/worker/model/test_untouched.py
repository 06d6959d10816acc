from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from worker.model.untouched import untouched_zeros


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_zeros_take_memory_when_they_are_written_and_give_it_back_with_the_last_tensor_of_them(dtype):
    before = resident_bytes()
    zeros = untouched_zeros((4, 1 << 22), dtype)
    assert resident_bytes() - before < 1 << 23
    assert (zeros.shape, zeros.dtype) == ((4, 1 << 22), dtype)
    assert not zeros[3, :100].any()
    zeros.fill_(1.0)
    num_bytes, part = zeros.nbytes, zeros[2:]
    assert resident_bytes() - before > num_bytes // 2
    del zeros
    assert resident_bytes() - before > num_bytes // 2 and part.min() == 1.0
    del part
    assert resident_bytes() - before < 1 << 23


def test_what_the_system_does_not_promise_is_a_lack_of_memory():
    with pytest.raises(MemoryError, match="the system has no 4611686018427387904 bytes of memory"):
        untouched_zeros((1 << 60,), torch.float32)
