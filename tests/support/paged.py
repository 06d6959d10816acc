"""Drives a decoder over pages as the engine does, keeping every token's logits for comparison with a reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from worker.attention import Attention, Batch
from worker.attention.cpu import CpuAttention
from worker.attention.pages import page_width
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.decoder import Decoder
from worker.model.families import read_spec
from worker.model.loading import load_weights
from worker.model.lora import LoraSlots
from worker.model.quant.choice import choose_quantisation
from worker.model.spec import Spec
from worker.model.t5 import T5
from worker.parallel.group import Alone, Group

BLOCK_SIZE = 16


def load_decoder(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    spec: Spec | None = None,
    attention: Attention | None = None,
    group: Group | None = None,
    max_length: int | None = None,
    quantize: str | None = None,
    adapters: LoraSlots | None = None,
) -> Decoder:
    """The model of a folder, or the part of it that is the rank's; `spec` replaces what its config says, `quantize` is
    the option."""
    config = read_config(folder)
    read, family = read_spec(config)
    group, quantisation = group or Alone(), choose_quantisation(quantize, config)
    weights = load_weights(
        spec or read, family, Checkpoint(folder), dtype, group.shard, quantisation=quantisation, adapters=adapters
    )
    return Decoder(spec or read, weights, attention or CpuAttention(), group, max_length)


@torch.inference_mode()
def paged_logits(
    decoder: Decoder,
    sequences: list[list[int]],
    seed: int = 0,
    kv_type: torch.dtype | None = None,
    on_step: Callable[[np.ndarray], None] = lambda rows: None,
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits [length, vocab] of every position of every sequence, all running together in steps of random chunks.

    Pages are dealt at random. Before each step `on_step` gets the number of each token's sequence. Also returns the
    sizes of the chunks of each step, so that a test can assert what it mixed.
    """
    randomness = random.Random(seed)
    num_blocks = [-(-len(sequence) // BLOCK_SIZE) for sequence in sequences]
    deck = list(range(1, sum(num_blocks) + 1))
    randomness.shuffle(deck)
    tables = np.zeros((len(sequences), max(num_blocks)), dtype=np.int64)
    for row, count in enumerate(num_blocks):
        tables[row, :count] = [deck.pop() for _ in range(count)]
    pages = used_pages(decoder, sum(num_blocks) + 1, kv_type)
    computed = [0] * len(sequences)
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
    steps: list[list[int]] = []
    while any(done < len(sequence) for done, sequence in zip(computed, sequences)):
        rows = [row for row, sequence in enumerate(sequences) if computed[row] < len(sequence)]
        sizes = [min(randomness.choice((1, 1, 1, 5, 13)), len(sequences[row]) - computed[row]) for row in rows]
        on_step(np.repeat(rows, sizes))
        logits = run_step(decoder, sequences, tables, pages, computed, rows, sizes)
        for row, part in zip(rows, logits.split(sizes)):
            outputs[row].append(part.clone())
            computed[row] += len(part)
        steps.append(sizes)
    return [torch.cat(parts) for parts in outputs], steps


def used_pages(model: Decoder | T5, num_pages: int, kv_type: torch.dtype | None = None) -> torch.Tensor:
    """Pages of the model's type or another: what they held before must not matter, as long as it is numbers."""
    kv_type = kv_type or model.dtype
    num_layers, num_heads, head_dim = model.page_shape
    shape = (num_layers, 2, num_pages, BLOCK_SIZE, num_heads, page_width(head_dim, kv_type))
    return torch.full(shape, 7, dtype=kv_type)


def run_step(decoder, sequences, tables, pages, computed, rows, sizes, wanted=None) -> torch.Tensor:
    """Logits of the tokens `wanted`, or of all. Of each of `rows` `sizes` tokens are run behind those `computed`."""
    starts = np.array([computed[row] for row in rows])
    positions = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes)])
    owner = np.repeat(rows, sizes)
    tokens = torch.tensor([sequences[row][position] for row, position in zip(owner, positions)])
    slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    batch = Batch(np.array(sizes), starts, tables[rows], torch.from_numpy(slots))
    wanted = torch.arange(len(tokens)) if wanted is None else torch.tensor(wanted, dtype=torch.int64)
    return decoder.forward(tokens, torch.from_numpy(positions), batch, pages, wanted)


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest absolute difference over largest absolute logit."""
    scale = max(float(logits.abs().max()) for logits in expected)
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(got, expected)) / scale
