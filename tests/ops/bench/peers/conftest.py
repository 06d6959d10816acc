"""A checkpoint of seconds, in both types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.bench.peers.checkpoints import COMMON, DTYPES, SHAPES, checkpoint

SMALL = COMMON | {
    "vocab_size": 700,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As `--environments`, with the shape `small`."""
    folder = tmp_path_factory.mktemp("peers")
    SHAPES["small"] = SMALL
    for dtype in DTYPES:
        checkpoint("small", dtype, folder / "checkpoints")
    yield folder
    del SHAPES["small"]


@pytest.fixture
def folders(small_folder: Path) -> dict[str, Path]:
    """The checkpoints by their types."""
    return {dtype: small_folder / "checkpoints" / f"small-{dtype}" for dtype in DTYPES}
