"""Per-request state that lives beside the model: parameters, token counts, block tables and the last sampled ids.

One slot per row of the engine core, held in arrays so that a step touches it with vector operations only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.job import LogprobKind, PenaltyKind, SamplingParams
from worker.engine.device import RowInit, StepPlan

Ints = npt.NDArray[np.int64]

PARAMETERS = np.dtype(
    [
        ("samples", np.bool_),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("typical_p", np.float64),
        ("min_p", np.float64),
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("is_openai", np.bool_),
        ("seed", np.uint64),
        ("min_tokens", np.int64),
        ("num_top", np.int64),
        ("is_raw", np.bool_),
        ("num_prompt", np.int64),
        ("needs_counts", np.bool_),
        ("is_plain", np.bool_),
    ]
)
"""What the sampler must know of a row. `is_plain`: greedy without any processor, the case of one argmax."""

SEED_MASK = (1 << 64) - 1


class Rows:
    """State of `num_rows` rows for a vocabulary of `vocab_size`, with block tables of `max_blocks` pages."""

    def __init__(self, num_rows: int, max_blocks: int, vocab_size: int) -> None:
        self.parameters = np.zeros(num_rows, dtype=PARAMETERS)
        self.block_tables = np.zeros((num_rows, max_blocks), dtype=np.int64)
        self.last_ids = np.zeros(num_rows, dtype=np.int64)
        self.stop_ids: list[Ints] = [np.zeros(0, dtype=np.int64)] * num_rows
        self.counts = TokenCounts(vocab_size)
        self._vocab_size = vocab_size

    def apply(self, plan: StepPlan) -> None:
        """Take over what `plan` says of rows: departures, arrivals, then pages."""
        for row in plan.freed_rows.tolist():
            self.counts.release(row)
        for init in plan.new_rows:
            self._move_in(init)
        self.block_tables[plan.block_rows, plan.block_offsets] = plan.block_ids

    def remember(self, rows: Ints, ids: Ints) -> None:
        """Note what `rows` have sampled: input of their next step, and one more occurrence for their penalties."""
        self.last_ids[rows] = ids
        is_counted = self.parameters["needs_counts"][rows]
        if is_counted.any():
            self.counts.add(rows[is_counted], ids[is_counted])

    def _move_in(self, init: RowInit) -> None:
        row = init.row
        self.counts.release(row)
        self.parameters[row] = _parameters(init.params, len(init.prompt_ids))
        self.stop_ids[row] = self._known(init.stop_ids)
        self.block_tables[row] = 0
        if self.parameters["needs_counts"][row]:
            self.counts.start(row, self._known(init.prompt_ids), self._known(init.output_ids))

    def _known(self, ids: npt.NDArray[np.int32]) -> Ints:
        """The ids that the model has; a tokenizer may have more."""
        return ids[(ids >= 0) & (ids < self._vocab_size)].astype(np.int64)


class TokenCounts:
    """How often each token occurred, for the rows with penalties only: a full vocabulary is too large for every row.

    `table` int32 [slots, 2, vocab]: occurrences in prompt and output together, and in the output alone.
    """

    def __init__(self, vocab_size: int) -> None:
        self.table = torch.zeros((0, 2, vocab_size), dtype=torch.int32)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    def slots(self, rows: Ints) -> Tensor:
        """Index into `table` of each of these rows, which must have been started."""
        return torch.tensor([self._slots[row] for row in rows.tolist()])

    def start(self, row: int, prompt_ids: Ints, output_ids: Ints) -> None:
        """Count what `row` begins with, out of nothing."""
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        vocab_size = self.table.shape[2]
        output = np.bincount(output_ids, minlength=vocab_size)
        both = output + np.bincount(prompt_ids, minlength=vocab_size)
        self.table[slot] = torch.from_numpy(np.stack((both, output)))

    def add(self, rows: Ints, ids: Ints) -> None:
        # no row occurs twice, hence no element either
        self.table[self.slots(rows), :, torch.from_numpy(ids)] += 1

    def release(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def _grow(self) -> None:
        old = len(self.table)
        new = max(2 * old, 4)
        self._free += range(new - 1, old - 1, -1)
        self.table = torch.cat((self.table, self.table.new_zeros((new - old, *self.table.shape[1:]))))


def _parameters(params: SamplingParams, num_prompt: int) -> tuple[object, ...]:
    """In the order of PARAMETERS."""
    samples = params.do_sample and params.temperature > 0
    has_penalty = params.repetition_penalty != 1.0 or params.frequency_penalty != 0 or params.presence_penalty != 0
    return (
        samples,
        params.temperature,
        params.top_k,
        params.top_p,
        params.typical_p,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        params.penalty_kind is PenaltyKind.OPENAI,
        params.seed & SEED_MASK,
        params.min_tokens,
        params.num_top_logprobs,
        params.logprob_kind is LogprobKind.RAW,
        num_prompt,
        has_penalty,
        not (samples or has_penalty or params.min_tokens),
    )
