"""Samplers of a device, asked as the device asks them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker.runner.sampling import EMPTY, Row, ints, output_indices, state_of
from worker.engine.device import RowInit, StepPlan
from worker.parallel.group import Alone
from worker.runner.device_rows import DeviceRows
from worker.runner.gpu_sampler import Ask, ask, read
from worker.runner.sampler import Sampled, sample
from worker.runner.vocabulary import Vocabulary


def plan_of(inits: list[RowInit], blocks=(), freed=()) -> StepPlan:
    """A plan that only changes rows; `blocks` are (row, offset, id)."""
    columns = np.array(list(blocks), dtype=np.int32).reshape(-1, 3)
    return StepPlan(
        step=1, rows=EMPTY, num_tokens=EMPTY, num_drafts=EMPTY, starts=EMPTY, tokens=EMPTY,
        samples=EMPTY.astype(bool), block_rows=columns[:, 0], block_offsets=columns[:, 1], block_ids=columns[:, 2],
        new_rows=inits, freed_rows=ints(freed),
    )  # fmt: skip


def init_of(place: int, row: Row) -> RowInit:
    return RowInit(
        row=int(place),
        request_id=str(place),
        params=row.params,
        prompt_ids=ints(row.prompt_ids),
        output_ids=ints(row.output_ids),
        stop_ids=ints(row.stop_ids),
    )


def apply(state: DeviceRows, plan: StepPlan) -> dict[int, str]:
    """Returns the errors of rows."""
    changes = state.changes(plan)
    state.apply(changes, torch.from_numpy(changes.words).to(state.parameters.device))
    return changes.errors


def device_rows(rows: list[Row], vocab_size: int, device="cpu") -> tuple[DeviceRows, np.ndarray]:
    """As `state_of`."""
    state, places = DeviceRows(2 * len(rows), 4, vocab_size, torch.device(device)), np.arange(len(rows))[::-1] * 2
    assert not apply(state, plan_of([init_of(place, row) for place, row in zip(places, rows)]))
    return state, places


class Sampling:
    """Rows that go on from step to step, on one rank or on that of `group`."""

    def __init__(self, make, rows: list[Row], vocab_size: int, device="cpu", group=None) -> None:
        self.vocabulary = Vocabulary(vocab_size, group or Alone())
        self.state, self.places = device_rows(rows, vocab_size, device)
        self.sampler = make(self.state, self.vocabulary)
        self.indices = output_indices(rows)

    def ask(self, size: int | None = None) -> Ask:
        return ask(self.state, self.places, self.indices, size)

    def step(self, logits: torch.Tensor, size: int | None = None) -> Sampled:
        """`logits` [k, vocab] of the whole vocabulary."""
        device, asked = self.state.parameters.device, self.ask(size)
        part = logits[:, self.vocabulary.mine.start : self.vocabulary.mine.stop].to(device).contiguous()
        answer = self.sampler(part, torch.from_numpy(asked.words).to(device), asked.processors)
        self.indices = self.indices + 1
        return read(answer.cpu().numpy(), asked, self.vocabulary.size)


def on_cpu(logits: torch.Tensor, rows: list[Row], num_steps: int = 1) -> list[Sampled]:
    vocabulary = Vocabulary(logits.shape[1])
    state, places = state_of(rows, vocabulary.mine)
    results = []
    for step in range(num_steps):
        results.append(sample(logits, places, output_indices(rows) + step, state, vocabulary))
        state.remember(places, results[-1].ids)
    return results


def assert_equal(got: Sampled, wanted: Sampled) -> None:
    usable = [index for index in range(len(wanted.ids)) if index not in wanted.errors]
    assert got.errors == wanted.errors
    assert got.ids[usable].tolist() == wanted.ids[usable].tolist()
    assert got.logprobs[usable] == pytest.approx(wanted.logprobs[usable], rel=1e-5, abs=1e-5)
    for mine, other in zip(got.top_tokens, wanted.top_tokens, strict=True):
        assert [token for token, _ in mine] == [token for token, _ in other]
        assert [value for _, value in mine] == pytest.approx([value for _, value in other], rel=1e-5, abs=1e-5)


def asking(rows: list[Row], seed: int = 0) -> list[Row]:
    """Some of them want alternatives."""
    draw = np.random.default_rng(seed)
    return [
        Row(
            replace(row.params, num_top_logprobs=int(draw.integers(0, 5))), row.prompt_ids, row.output_ids, row.stop_ids
        )
        for row in rows
    ]
