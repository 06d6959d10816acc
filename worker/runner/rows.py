"""Per-request state that lives beside the model: parameters, token counts, block tables and the last sampled ids.

One slot per row of the engine core, held in arrays so that a step touches it with vector operations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.job import LogprobKind, PenaltyKind, SamplingParams
from worker.engine.device import RowInit, StepPlan

Ints = npt.NDArray[np.int64]
AnyInts = npt.NDArray[np.integer[Any]]

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
        ("needs_whole", np.bool_),
    ]
)
"""What the sampler must know of a row. `is_plain`: greedy without any processor, the case of one argmax. `needs_whole`:
what becomes of a token depends on all others, not only on the best one."""

SEED_MASK = (1 << 64) - 1


class Rows:
    """State of `num_rows` rows, with block tables of `max_blocks` pages and counts of the token ids `ids`.

    `cross_tables` and `cross_lengths` say where an encoder left how many tokens, none for decoder-only models.
    """

    def __init__(self, num_rows: int, max_blocks: int, ids: range) -> None:
        self.parameters = np.zeros(num_rows, dtype=PARAMETERS)
        self.block_tables = np.zeros((num_rows, max_blocks), dtype=np.int64)
        self.cross_tables = np.zeros((num_rows, max_blocks), dtype=np.int64)
        self.cross_lengths = np.zeros(num_rows, dtype=np.int64)
        self.last_ids = np.zeros(num_rows, dtype=np.int64)
        self.stop_ids: list[Ints] = [np.zeros(0, dtype=np.int64)] * num_rows
        self.counts = TokenCounts(ids)
        self._special: set[int] = set()

    @property
    def want_best_only(self) -> bool:
        """Whether the likeliest token and its log-probability are all that any row asks for."""
        return not self._special

    def apply(self, plan: StepPlan) -> None:
        """Take over what `plan` says of rows: departures, arrivals, then pages."""
        for row in plan.freed_rows.tolist():
            self.counts.release(row)
            self._special.discard(row)
        for init in plan.new_rows:
            self._move_in(init)
        self.block_tables[plan.block_rows, plan.block_offsets] = plan.block_ids

    def remember(self, rows: AnyInts, ids: Ints) -> None:
        """Note what `rows` have sampled, in this order where one occurs again: the last is input of its next step, and
        each one more occurrence for its penalties."""
        self.last_ids[rows] = ids
        if not self.counts.num_rows:
            return
        is_counted = self.parameters["needs_counts"][rows]
        if is_counted.any():
            self.counts.add(rows[is_counted], ids[is_counted])

    def _move_in(self, init: RowInit) -> None:
        row = init.row
        self.counts.release(row)
        self.parameters[row] = parameters_of(init.params, len(init.prompt_ids))
        self.stop_ids[row] = init.stop_ids.astype(np.int64)
        self.block_tables[row] = 0
        self.cross_tables[row, : len(init.cross_blocks)] = init.cross_blocks
        self.cross_lengths[row] = len(init.encoder_ids)
        wants_best_only = self.parameters["is_plain"][row] and not self.parameters["num_top"][row]
        (self._special.discard if wants_best_only else self._special.add)(row)
        if self.parameters["needs_counts"][row]:
            self.counts.start(row, init.prompt_ids, init.output_ids)


class TokenCounts:
    """How often each token occurred, for the rows with penalties only: a full vocabulary is too large for every row.

    `table` int32 [slots, 2, columns]: occurrences in prompt and output together, and in the output alone. A column
    belongs to each of the token ids `ids`; what happens to others is not counted here.
    """

    def __init__(self, ids: range) -> None:
        self.table = torch.zeros((0, 2, len(ids)), dtype=torch.int32)
        self._ids = ids
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    def of(self, rows: Ints, beyond: Sequence[AnyInts] = ()) -> Tensor:
        """int32 [m, 2, columns]: counts of these rows, which must have been started; the i-th as if its row had put out
        the ids `beyond[i]` besides."""
        counts = self.table[self._slots_of(rows)]
        for place, ids in enumerate(beyond):
            if len(ids):
                counts[place] += torch.from_numpy(self._count(ids))
        return counts

    def start(self, row: int, prompt_ids: AnyInts, output_ids: AnyInts) -> None:
        """Count what `row` begins with, out of nothing."""
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        output = self._count(output_ids)
        both = output + self._count(prompt_ids)
        self.table[slot] = torch.from_numpy(np.stack((both, output)))

    def add(self, rows: Ints, ids: Ints) -> None:
        """One more of `ids` [m] in the output of each of `rows` [m]."""
        slots = self._slots_of(rows[is_among(ids, self._ids)])
        columns = torch.from_numpy(columns_of(ids, self._ids))
        one = self.table.new_ones(())
        for plane in self.table.unbind(1):
            plane.index_put_((slots, columns), one, accumulate=True)

    @property
    def num_rows(self) -> int:
        """That are counted."""
        return len(self._slots)

    def release(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def _slots_of(self, rows: Ints) -> Tensor:
        return torch.tensor([self._slots[row] for row in rows.tolist()], dtype=torch.int64)

    def _count(self, ids: AnyInts) -> Ints:
        return np.bincount(columns_of(ids, self._ids), minlength=len(self._ids))

    def _grow(self) -> None:
        old = len(self.table)
        new = max(2 * old, 4)
        self._free += range(new - 1, old - 1, -1)
        self.table = torch.cat((self.table, self.table.new_zeros((new - old, *self.table.shape[1:]))))


def is_among(ids: AnyInts, mine: range) -> npt.NDArray[np.bool_]:
    """Which of `ids` are a rank's own. Others are another rank's, or the tokenizer's alone: it may have more than the
    model."""
    return (ids >= mine.start) & (ids < mine.stop)


def columns_of(ids: AnyInts, mine: range) -> Ints:
    """The columns of those `ids` that are a rank's own."""
    return ids[is_among(ids, mine)].astype(np.int64) - mine.start


def parameters_of(params: SamplingParams, num_prompt: int) -> tuple[object, ...]:
    """In the order of PARAMETERS."""
    samples = params.do_sample and params.temperature > 0
    is_cut = params.top_k > 0 or params.top_p < 1 or params.typical_p < 1 or params.min_p > 0
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
        (samples and is_cut) or params.num_top_logprobs > 0,
    )
