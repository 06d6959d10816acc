"""Rows for the sampler: moved into its state, and drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.job import LogprobKind, PenaltyKind, SamplingParams
from worker.engine.device import RowInit, StepPlan
from worker.runner.rows import Rows

EMPTY = np.zeros(0, dtype=np.int32)


@dataclass
class Row:
    params: SamplingParams
    prompt_ids: list[int]
    output_ids: list[int]
    stop_ids: tuple[int, ...] = ()


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def state_of(rows: list[Row], ids: range) -> tuple[Rows, np.ndarray]:
    """Rows moved in at places that are not their order, and those places; `ids` are the tokens counted."""
    state, places = Rows(2 * len(rows), 4, ids), np.arange(len(rows))[::-1] * 2
    inits = [
        RowInit(
            row=int(place),
            request_id=str(place),
            params=row.params,
            prompt_ids=ints(row.prompt_ids),
            output_ids=ints(row.output_ids),
            stop_ids=ints(row.stop_ids),
        )
        for place, row in zip(places, rows)
    ]
    state.apply(
        StepPlan(
            step=1, rows=EMPTY, num_tokens=EMPTY, num_drafts=EMPTY, starts=EMPTY, tokens=EMPTY,
            samples=EMPTY.astype(bool), block_rows=EMPTY, block_offsets=EMPTY, block_ids=EMPTY, new_rows=inits,
            freed_rows=EMPTY,
        )
    )  # fmt: skip
    return state, places


def output_indices(rows: list[Row]) -> np.ndarray:
    """Of the tokens that the rows are about to pick."""
    return np.array([len(row.output_ids) for row in rows], dtype=np.int64)


def random_row(draw: np.random.Generator, vocab_size: int) -> Row:
    def maybe(value, neutral):
        return value if draw.random() < 0.4 else neutral

    params = SamplingParams(
        max_new_tokens=100,
        do_sample=bool(draw.random() < 0.75),
        temperature=maybe(float(draw.uniform(0.3, 1.8)), 1.0),
        top_k=maybe(int(draw.integers(1, vocab_size + 20)), 0),
        top_p=maybe(float(draw.uniform(0.05, 0.99)), 1.0),
        typical_p=maybe(float(draw.uniform(0.2, 0.95)), 1.0),
        min_p=maybe(float(draw.uniform(0.01, 0.3)), 0.0),
        repetition_penalty=maybe(float(draw.uniform(0.7, 1.6)), 1.0),
        frequency_penalty=maybe(float(draw.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(draw.uniform(-2, 2)), 0.0),
        penalty_kind=PenaltyKind.OPENAI if draw.random() < 0.5 else PenaltyKind.TGI,
        seed=int(draw.integers(0, 2**64, dtype=np.uint64)),
        min_tokens=maybe(int(draw.integers(1, 20)), 0),
        logprob_kind=LogprobKind.RAW if draw.random() < 0.4 else LogprobKind.PROCESSED,
    )
    few = min(vocab_size, 30)
    prompt, output = draw.integers(0, few, 12).tolist(), draw.integers(0, few, draw.integers(0, 15)).tolist()
    return Row(params, prompt, output, tuple(draw.integers(0, few, 2).tolist()))


def random_batch(seed: int, num_rows: int, vocab_size: int) -> tuple[torch.Tensor, list[Row]]:
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.normal(0, 3, (num_rows, vocab_size)))
    return logits, [random_row(draw, vocab_size) for _ in range(num_rows)]
