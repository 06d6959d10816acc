"""Reads and spoils checkpoint folders of tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path, **config) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def rewrite(folder: Path, edit) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
