"""Tiny models on a torch device, and the engine core around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from common.settings import WorkerSettings
from tests.support import tiny_models
from worker.pipe import Ready
from worker.runner.load import load_device
from worker.runner.torch_device import TorchDevice


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lru_cache(maxsize=None)(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture()
def load(tiny_folder) -> Callable[..., tuple[TorchDevice, Ready]]:
    """Load a tiny model with one thread; options as in WorkerSettings."""
    torch.set_num_threads(1)

    def make(name: str = "llama", **options) -> tuple[TorchDevice, Ready]:
        settings = dict(model_id=str(tiny_folder(name)), threads=1, kv_tokens=2048) | options
        return load_device(WorkerSettings(**settings), lambda phase, done, total: None)

    return make
