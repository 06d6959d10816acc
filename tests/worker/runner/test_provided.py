from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.model.untouched import untouched_zeros
from worker.runner import provided
from worker.runner.provided import Provided

NUM_BLOCKS, BLOCK_ELEMENTS = 64, 1 << 18
BLOCK_BYTES = 2 * 2 * BLOCK_ELEMENTS * 2
"""Of two layers' keys and values in bfloat16."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.setattr(provided, "LEAD_BYTES", 8 * BLOCK_BYTES)
    return untouched_zeros((2, 2, NUM_BLOCKS, BLOCK_ELEMENTS), torch.bfloat16)


def num_resident(before: int) -> float:
    return (resident_bytes() - before) / BLOCK_BYTES


def test_pages_are_there_before_they_are_used_and_no_more_than_some(pages):
    before = resident_bytes()
    ahead = Provided(pages)
    ahead.wait()
    assert 8 <= num_resident(before) + 0.5 and num_resident(before) < 16
    ahead.use(np.array([3, 19], np.int32))
    ahead.wait()
    assert 28 <= num_resident(before) + 0.5 and num_resident(before) < 36


def test_what_was_written_stays_as_it_is(pages):
    pages.fill_(1.5)
    ahead = Provided(pages)
    ahead.use(np.array([NUM_BLOCKS - 1], np.int32))
    ahead.wait()
    assert bool((pages == 1.5).all())


def test_a_system_that_refuses_is_not_asked_again(pages, monkeypatch):
    monkeypatch.setattr(provided, "MADV_POPULATE_WRITE", 12345)
    before = resident_bytes()
    ahead = Provided(pages)
    ahead.wait()
    first = ahead._thread
    ahead.use(np.array([40], np.int32))
    assert ahead._thread is first and num_resident(before) < 1


def test_a_process_may_end_meanwhile():
    text = """
import torch
from worker.model.untouched import untouched_zeros
from worker.runner import provided
provided.BYTES_AT_ONCE = 1
ahead = provided.Provided(untouched_zeros((100, 2, 2048, 1 << 12), torch.bfloat16))
print(ahead._thread.is_alive())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"
    assert done.returncode == 0, done.stderr
