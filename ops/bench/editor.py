"""A small model that edits text, byte by byte: it repeats what it reads with semicolons for commas and a # for every
digit. Trained from nothing in about a minute."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ops.demo_model.network import Llama, Shape

ROOT = Path(__file__).parents[2]
BEGIN_ID, ANSWER_ID, END_ID, NUM_IDS = 256, 257, 258, 260
EDITED = bytes.maketrans(b",0123456789", b";##########")
PEAK_RATE = 3e-3
NUM_WARM = 30


@dataclass(frozen=True)
class Lesson:
    """`num_bytes` of each text; the model can edit no other length."""

    hidden_size: int = 256
    num_layers: int = 4
    num_bytes: int = 128
    num_steps: int = 300
    batch: int = 16


class Texts:
    """Pieces of one length out of this project's pages: of `docs` to learn from, of the README to be asked."""

    def __init__(self, num_bytes: int, seed: int) -> None:
        self._num_bytes, self._rng = num_bytes, random.Random(seed)
        self._known = _printable(sorted((ROOT / "docs").glob("*.md")))
        self._held_out = _printable([ROOT / "README.md"])

    def known(self) -> bytes:
        return self._piece(self._known)

    def held_out(self) -> bytes:
        return self._piece(self._held_out)

    def _piece(self, text: bytes) -> bytes:
        first = self._rng.randrange(len(text) - self._num_bytes)
        return text[first : first + self._num_bytes]


def _printable(files: list[Path]) -> bytes:
    return bytes(byte for file in files for byte in file.read_bytes() if 32 <= byte < 127)


def question(text: bytes) -> list[int]:
    return [BEGIN_ID, *text, ANSWER_ID]


def answer(text: bytes) -> list[int]:
    """The only right one."""
    return [*text.translate(EDITED), END_ID]


def train_editor(folder: Path, lesson: Lesson, seed: int = 1) -> float:
    """Write a checkpoint; returns the loss of the last step, by token."""
    torch.manual_seed(seed)
    model, texts = Llama(_shape(lesson)), Texts(lesson.num_bytes, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    weights = torch.tensor([0.0] * (lesson.num_bytes + 2) + [1.0] * (lesson.num_bytes + 1)).expand(lesson.batch, -1)
    loss = torch.zeros(())
    for step in range(lesson.num_steps):
        pieces = [texts.known() for _ in range(lesson.batch)]
        ids = torch.tensor([question(piece) + answer(piece) for piece in pieces])
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / NUM_WARM) * (1 - step / lesson.num_steps)
        loss = _learn(model, optimizer, ids, weights)
    _export(model, folder)
    return float(loss)


def _learn(model: Llama, optimizer: torch.optim.Optimizer, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids, weights) / weights.sum()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _shape(lesson: Lesson) -> Shape:
    num_heads = 4
    return Shape(
        vocab_size=NUM_IDS,
        hidden_size=lesson.hidden_size,
        intermediate_size=2 * lesson.hidden_size,
        num_hidden_layers=lesson.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=lesson.hidden_size // num_heads,
        max_position_embeddings=1024,
    )


def _export(model: Llama, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().contiguous() for name, weight in model.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model.shape.config(BEGIN_ID, END_ID, END_ID)))
