"""Tiny checkpoints, saved once per session, with the reference's logits beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny_models

LENGTHS = (40, 23, 7, 33)


@dataclass
class TinyModel:
    name: str
    folder: Path
    reference: Any
    sequences: list[list[int]]
    logits: list[torch.Tensor]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    torch.set_num_threads(1)

    @cache
    def get(name: str) -> TinyModel:
        folder = tiny_models.save(name, tmp_path_factory.mktemp(name))
        reference = tiny_models.build(name)
        randomness = torch.Generator().manual_seed(5)
        ids = [torch.randint(tiny_models.VOCAB_SIZE, (length,), generator=randomness) for length in LENGTHS]
        with torch.no_grad():
            logits = [reference(sequence[None]).logits[0] for sequence in ids]
        return TinyModel(name, folder, reference, [sequence.tolist() for sequence in ids], logits)

    return get


@pytest.fixture()
def folder(tiny, tmp_path) -> Path:
    """A copy of a llama checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny("llama").folder, tmp_path / "model"))
