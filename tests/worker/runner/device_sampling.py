"""Samplers of a device, asked as the device asks them."""

from __future__ import annotations

import numpy as np
import torch

from tests.worker.runner.sampling import EMPTY, Row, ints, output_indices
from worker.engine.device import RowInit, StepPlan
from worker.parallel.group import Alone
from worker.runner.device_rows import DeviceRows
from worker.runner.gpu_sampler import Ask, ask, read
from worker.runner.sampler import Sampled
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
