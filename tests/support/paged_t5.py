"""Drives an encoder-decoder over pages as the device does, keeping every logit for comparison with a reference."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.support.paged import BLOCK_SIZE, used_pages
from worker.attention import Attention, Batch
from worker.attention.cpu import CpuAttention
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.quant.choice import choose_quantisation
from worker.model.spec import T5Spec
from worker.model.t5 import T5, load_t5_weights
from worker.parallel.group import Alone, Group


@dataclass
class Pair:
    """Input of the encoder and input of the decoder."""

    source: list[int]
    target: list[int]


def load_t5(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    spec: T5Spec | None = None,
    attention: Attention | None = None,
    group: Group | None = None,
) -> T5:
    """The model of a folder, or the part of it that is the rank's; `spec` replaces what its config says."""
    config = read_config(folder)
    read, family = read_spec(config)
    group, quantisation = group or Alone(), choose_quantisation(None, config)
    weights = load_t5_weights(spec or read, family, Checkpoint(folder), dtype, group.shard, quantisation=quantisation)
    return T5(spec or read, weights, attention or CpuAttention(), group)


@torch.inference_mode()
def paged_logits(
    model: T5, pairs: list[Pair], seed: int = 0, kv_type: torch.dtype | None = None
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits [target, the rank's vocabulary] of every pair. Pairs come one a step, encoder first, and all that are
    there take random chunks of their targets together. Also returns the sizes of the chunks of each step.

    Pages are dealt at random.
    """
    randomness = random.Random(seed)
    lengths = [len(ids) for pair in pairs for ids in (pair.target, pair.source)]
    deck = list(range(1, sum(_num_blocks(length) for length in lengths) + 1))
    randomness.shuffle(deck)
    tables = np.zeros((len(lengths), _num_blocks(max(lengths))), dtype=np.int64)
    for row, length in enumerate(lengths):
        tables[row, : _num_blocks(length)] = [deck.pop() for _ in range(_num_blocks(length))]
    pages = used_pages(model, int(tables.max()) + 1, kv_type)
    computed, outputs, steps = [0] * len(pairs), [[] for _ in pairs], []
    num_there = 0
    while any(done < len(pair.target) for done, pair in zip(computed, pairs)):
        if num_there < len(pairs):
            source = torch.tensor(pairs[num_there].source)
            slots = _slots(tables, np.full(len(source), 2 * num_there + 1), np.arange(len(source)))
            model.encode(source, slots, pages)
            num_there += 1
        rows = [row for row in range(num_there) if computed[row] < len(pairs[row].target)]
        sizes = [min(randomness.choice((1, 1, 1, 6, 40)), len(pairs[row].target) - computed[row]) for row in rows]
        logits = _step(model, pairs, tables, pages, np.array(computed), np.array(rows, int), np.array(sizes, int))
        for row, part in zip(rows, logits.split(sizes)):
            outputs[row].append(part)
            computed[row] += len(part)
        steps.append(sizes)
    return [torch.cat(parts) for parts in outputs], steps


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK_SIZE)


def _slots(tables, rows, positions) -> torch.Tensor:
    return torch.from_numpy(tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)


def _step(model: T5, pairs: list[Pair], tables, pages: torch.Tensor, computed, rows, sizes) -> torch.Tensor:
    starts, owner = computed[rows], np.repeat(rows, sizes)
    positions = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes)])
    tokens = torch.tensor([pairs[row].target[position] for row, position in zip(owner, positions)])
    slots, lengths = _slots(tables, 2 * owner, positions), np.array([len(pairs[row].source) for row in rows])
    batch = Batch(sizes, starts, tables[2 * rows], slots)
    cross = Batch(sizes, starts, tables[2 * rows + 1], slots, num_keys=lengths)
    return model.forward(tokens, torch.from_numpy(positions), batch, pages, torch.arange(len(tokens)), cross)
