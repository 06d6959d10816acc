"""Collects one step: the arrays that the device gets, and the entries that the host keeps to apply the result."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worker.engine.device import TOKEN_ON_DEVICE, RowInit, StepPlan
from worker.engine.request import Request, Residency
from worker.pipe import IDS


@dataclass(slots=True, eq=False)
class Entry:
    """The part of one request in one step: tokens that are its own, then drafts. It names the stay, so that what comes
    late finds the books it belongs to."""

    request: Request
    residency: Residency
    start: int
    num_tokens: int
    num_drafts: int
    samples: bool

    @property
    def num_sampled(self) -> int:
        """Places behind which something is sampled."""
        return 1 + self.num_drafts if self.samples else 0


@dataclass(slots=True, eq=False)
class Launch:
    """One scheduled step. `num_prompt_tokens` are of prompts (or recomputed), `num_encoder_tokens` of them run through
    the encoder; `num_decodes` rows compute one token, from which the next one is sampled, with `num_drafts` behind."""

    plan: StepPlan
    entries: list[Entry]
    num_prompt_tokens: int
    num_encoder_tokens: int
    num_decodes: int
    num_drafts: int


class PlanBuilder:
    """Grows while the scheduler decides. `prompt_budget` is what prompts may still take of this step."""

    def __init__(self, step: int, prompt_budget: int, freed_rows: list[int]) -> None:
        self.step, self.prompt_budget = step, prompt_budget
        self.has_preempted = False
        self.num_admitted = 0
        self.entries: list[Entry] = []
        self._num_prompt_tokens = 0
        self._num_encoder_tokens = 0
        self._num_decodes = 0
        self._num_drafts = 0
        self._tokens = array(IDS)
        self._freed_rows = freed_rows
        self._new_rows: list[RowInit] = []
        self._block_rows = array(IDS)
        self._block_offsets = array(IDS)
        self._block_ids = array(IDS)

    def can_encode(self, num_tokens: int) -> bool:
        """Whether an encoder pass of this length fits in.

        It cannot be cut, so a budget of which nobody has taken anything yet does for any: one that is longer than a
        paced budget would wait for ever.
        """
        return num_tokens <= self.prompt_budget or self._num_prompt_tokens == 0

    def first_chunk(self, num_encoder_tokens: int) -> int:
        """How many tokens a newcomer may compute at most. Behind an encoder pass the start token is free."""
        if num_encoder_tokens:
            return max(self.prompt_budget - num_encoder_tokens, 0) + 1
        return self.prompt_budget

    def admit(self, request: Request, residency: Residency) -> None:
        """The request moves into its row, with the blocks it found in the cache and those that its encoder fills."""
        self.num_admitted += 1
        self._num_encoder_tokens += len(request.encoder_ids)
        self._charge(len(request.encoder_ids))
        self._new_rows.append(_row_init(request, residency))
        self.grow(residency.row, 0, residency.blocks)

    def grow(self, row: int, offset: int, blocks: list[int]) -> None:
        """Append `blocks` to the table of `row`, which has `offset` already."""
        self._block_rows += array(IDS, [row]) * len(blocks)
        self._block_offsets.extend(range(offset, offset + len(blocks)))
        self._block_ids.extend(blocks)

    def add(self, request: Request, residency: Residency, num_tokens: int, drafts: Sequence[int] = ()) -> None:
        """The next `num_tokens` of the request take part, and with the last of all `drafts` behind it; its lengths
        advance as if the step were done and every draft right."""
        start = residency.num_computed
        end = start + num_tokens
        entry = Entry(request, residency, start, num_tokens, len(drafts), samples=end == request.num_total)
        self._append_tokens(request, start, end)
        self._tokens.extend(drafts)
        self._account(request, start, num_tokens, samples=entry.samples)
        self.entries.append(entry)
        self._num_drafts += len(drafts)
        residency.num_computed, residency.last_step = end + len(drafts), self.step
        request.num_in_flight += entry.num_sampled
        request.is_guessing = bool(drafts)

    def build(self) -> Launch:
        entries = self.entries
        plan = StepPlan(
            step=self.step,
            rows=np.array([entry.residency.row for entry in entries], np.int32),
            num_tokens=np.array([entry.num_tokens + entry.num_drafts for entry in entries], np.int32),
            num_drafts=np.array([entry.num_drafts for entry in entries], np.int32),
            starts=np.array([entry.start for entry in entries], np.int32),
            tokens=np.frombuffer(self._tokens, np.int32),
            samples=np.array([entry.samples for entry in entries], np.bool_),
            block_rows=np.frombuffer(self._block_rows, np.int32),
            block_offsets=np.frombuffer(self._block_offsets, np.int32),
            block_ids=np.frombuffer(self._block_ids, np.int32),
            new_rows=self._new_rows,
            freed_rows=np.array(self._freed_rows, np.int32),
        )
        num_prompt_tokens, num_encoder_tokens = self._num_prompt_tokens, self._num_encoder_tokens
        return Launch(plan, entries, num_prompt_tokens, num_encoder_tokens, self._num_decodes, self._num_drafts)

    def _append_tokens(self, request: Request, start: int, end: int) -> None:
        num_known = len(request.tokens)
        if end <= num_known:
            self._tokens += request.tokens[start:end]
            return
        self._tokens += request.tokens[start:num_known]
        self._tokens.append(TOKEN_ON_DEVICE)

    def _account(self, request: Request, start: int, num_tokens: int, *, samples: bool) -> None:
        is_behind_encoder = start == 0 and len(request.encoder_ids) > 0
        if num_tokens == 1 and samples and (start > 0 or is_behind_encoder):
            self._num_decodes += 1
        else:
            self._charge(num_tokens - is_behind_encoder)

    def _charge(self, num_tokens: int) -> None:
        self._num_prompt_tokens += num_tokens
        self.prompt_budget -= num_tokens


def _row_init(request: Request, residency: Residency) -> RowInit:
    tokens = np.array(request.tokens, np.int32)
    return RowInit(
        row=residency.row,
        request_id=request.request_id,
        params=request.params,
        prompt_ids=tokens[: request.num_prompt],
        output_ids=tokens[request.num_prompt :],
        stop_ids=np.array(request.stop_ids, np.int32),
        encoder_ids=np.array(request.encoder_ids, np.int32),
        cross_blocks=np.array(residency.cross_blocks, np.int32),
        adapter=request.adapter,
        adapter_slot=residency.adapter_slot,
    )
