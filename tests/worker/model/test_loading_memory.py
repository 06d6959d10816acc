"""The short form of `python -m ops.bench.load`: what ranks take while they load, on a third of a gigabyte."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.bench.load import NUM_FILES, memory_bar, run_ranks, write_checkpoint

NUM_SHARDS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, 0.3)


def bar_of(folder: Path, largest_bytes: int) -> int:
    files = list(folder.glob("*.safetensors"))
    assert len(files) == NUM_FILES
    return memory_bar(sum(path.stat().st_size for path in files) // NUM_SHARDS, largest_bytes)


def test_ranks_take_their_share_and_little_more(checkpoint):
    bar = bar_of(*checkpoint)
    taken = [loaded.peak_bytes for loaded in run_ranks(checkpoint[0], "load", NUM_SHARDS)]
    weights = sum(path.stat().st_size for path in checkpoint[0].glob("*.safetensors"))
    assert sum(taken) > 0.95 * weights, "the ranks together do not hold the weights"
    assert max(taken) <= bar


def test_reading_everything_first_would_exceed_the_bar(checkpoint):
    assert max(loaded.peak_bytes for loaded in run_ranks(checkpoint[0], "eager", NUM_SHARDS)) > bar_of(*checkpoint)
