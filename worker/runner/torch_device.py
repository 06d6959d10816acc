"""The device of the engine core on torch: applies a plan to rows and pages, runs the model, samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.attention import Batch
from worker.attention.pages import page_width
from worker.engine.device import NO_IDS, TOKEN_ON_DEVICE, RowInit, StepPlan, StepResult
from worker.model.decoder import Decoder
from worker.model.lora import LoraSlots
from worker.model.t5 import T5
from worker.model.untouched import untouched_zeros
from worker.pipe import AdapterChecked
from worker.runner.adapters import RowAdapters
from worker.runner.places import Places, ascending
from worker.runner.provided import Provided
from worker.runner.rows import Ints, Rows
from worker.runner.sampler import Sampled, chosen, most_likely, sample
from worker.runner.vocabulary import Vocabulary

Model = Decoder | T5

NOT_IN_VOCABULARY = "a token of the prompt is outside the model's vocabulary"


def unfilled_blocks(plan: StepPlan, block_size: int) -> Ints:
    """Those that are new to their rows and that the step does not fill."""
    ends = np.zeros(1 + max([*plan.rows.tolist(), *plan.block_rows.tolist()]), np.int64)
    ends[plan.rows] = plan.starts + plan.num_tokens
    is_filled = (plan.block_offsets + 1) * block_size <= ends[plan.block_rows]
    crosses = [init.cross_blocks[-1] for init in plan.new_rows if len(init.encoder_ids) % block_size]
    return np.array([*plan.block_ids[~is_filled], *crosses], np.int64)


class TorchDevice:
    """A CPU runs what it is told at once, so nothing is ever in flight: `forward` and `sample` return when done.

    `pages` [layers, 2, num_blocks + 1, block size, kv heads, page width] of `kv_type` holds all keys and values; page 0
    is for padding.
    """

    depth = 0

    def __init__(
        self,
        model: Model,
        kv_type: torch.dtype,
        adapters: LoraSlots,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_total_tokens: int,
        max_lora_rank: int,
        max_lora_bytes: int,
    ) -> None:
        self._model, self._block_size = model, block_size
        self._adapters = RowAdapters(
            adapters, model.group, num_rows=max_num_seqs, max_rank=max_lora_rank, max_bytes=max_lora_bytes
        )
        num_layers, num_heads, head_dim = model.page_shape
        shape = (num_layers, 2, num_blocks + 1, block_size, num_heads, page_width(head_dim, kv_type))
        self.pages = untouched_zeros(shape, kv_type)
        self.provided = Provided(self.pages)
        self._vocabulary = Vocabulary(model.spec.vocab_size, model.group)
        self.rows = Rows(max_num_seqs, -(-max_total_tokens // block_size) + 1, self._vocabulary.mine)
        self._row_errors: dict[int, str] = {}
        self._step_slots = torch.zeros(0, dtype=torch.int64)
        self._places: Places
        self._logits = torch.zeros((0, len(model.vocabulary)), dtype=model.dtype)

    @property
    def model(self) -> Model:
        return self._model

    def forward(self, plan: StepPlan) -> None:
        self._apply(plan)
        rows, num_queries = plan.rows.astype(np.int64), plan.num_tokens.astype(np.int64)
        starts, ends = plan.starts.astype(np.int64), np.cumsum(num_queries)
        tokens = self._tokens(plan, ends)
        has_one_each = len(tokens) == len(rows)
        positions = starts if has_one_each else ascending(starts, num_queries)
        owners = rows if has_one_each else np.repeat(rows, num_queries)
        slots = self._slots(self.rows.block_tables, owners, positions)
        self._adapters.use(owners)
        batch = Batch(num_queries, starts, self._tables(self.rows.block_tables, rows, starts + num_queries), slots)
        self._step_slots, self._places = slots, Places(plan)
        wanted = torch.from_numpy(self._places.tokens)
        step = (torch.from_numpy(tokens), torch.from_numpy(positions), batch, self.pages, wanted)
        if isinstance(self._model, T5):
            self._logits = self._model.forward(*step, self._cross(rows, batch))
        else:
            self._logits = self._model.forward(*step)

    def sample(self, plan: StepPlan) -> StepResult:
        places, sampled = self._places, None
        assert places.plan is plan, "the step that ran last is the one to be sampled"
        if self.rows.want_best_only and not self._vocabulary.is_split:
            sampled = most_likely(self._logits, self._model.summarise)
        sampled = sampled or self._sample(places)
        rows, num_ids, errors = plan.rows[plan.samples], NO_IDS, places.errors(sampled)
        if places.has_drafts:
            found = places.num_ids(sampled)
            self._clear_spoilt(places.tokens[places.that_spoil(sampled, found)])
            sampled = chosen(sampled, places.that_count(found))
            rows, num_ids = np.repeat(rows, found), found.astype(np.int32)
        self.rows.remember(rows, sampled.ids)
        if self._row_errors:
            errors |= {place: self._row_errors[row] for place, row in enumerate(plan.rows) if row in self._row_errors}
        return StepResult(
            ids=sampled.ids.astype(np.int32),
            logprobs=sampled.logprobs,
            top_tokens=sampled.top_tokens,
            errors=errors,
            num_ids=num_ids,
        )

    @torch.inference_mode()
    def _sample(self, places: Places) -> Sampled:
        output_indices = places.positions + 1 - self.rows.parameters["num_prompt"][places.rows]
        before = places.drafts_before if places.has_drafts else ()
        summarise = self._model.summarise
        return sample(self._logits, places.rows, output_indices, self.rows, self._vocabulary, before, summarise)

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        return self._adapters.check(name, source)

    def _apply(self, plan: StepPlan) -> None:
        for row in [*plan.freed_rows.tolist(), *(init.row for init in plan.new_rows)]:
            self._row_errors.pop(row, None)
        self.rows.apply(plan)
        self.provided.use(plan.block_ids)
        self._clear_ends(plan)
        for init in plan.new_rows:
            self._move_in(init)

    @torch.inference_mode()
    def _move_in(self, init: RowInit) -> None:
        if error := self._adapters.move_in(init):
            self._row_errors[init.row] = error
        if isinstance(self._model, T5):
            self._encode(self._model, init)

    def _clear_ends(self, plan: StepPlan) -> None:
        """Make zero those new pages of rows that the step does not fill. Where attention reads whole pages,
        masking cannot hide what others left there that is not a number."""
        if not self._model.attention.reads_whole_pages:
            return
        blocks = unfilled_blocks(plan, self._block_size)
        if len(blocks):
            self.pages.view(torch.uint8).index_fill_(2, torch.from_numpy(blocks), 0)

    def _clear_spoilt(self, tokens: Ints) -> None:
        """Leave nothing of drafts that masking could not hide from their row when it goes on without them."""
        if len(tokens):
            slots = self._step_slots[torch.from_numpy(tokens)]
            self.pages.view(torch.uint8).flatten(2, 3).index_fill_(2, slots, 0)

    def _encode(self, model: T5, init: RowInit) -> None:
        tokens = init.encoder_ids.astype(np.int64)
        is_unknown = self._is_unknown(tokens)
        if is_unknown.any():
            self._row_errors[init.row] = NOT_IN_VOCABULARY
            tokens[is_unknown] = 0
        owners = np.full(len(tokens), init.row)
        slots = self._slots(self.rows.cross_tables, owners, np.arange(len(tokens)))
        self._adapters.use(owners)
        model.encode(torch.from_numpy(tokens), slots, self.pages)

    def _cross(self, rows: Ints, batch: Batch) -> Batch:
        """The queries of `batch`, over what the encoder left for their rows."""
        lengths = self.rows.cross_lengths[rows]
        return replace(batch, block_tables=self._tables(self.rows.cross_tables, rows, lengths), num_keys=lengths)

    def _tokens(self, plan: StepPlan, ends: Ints) -> Ints:
        """The step's input ids, with what the rows sampled last filled in."""
        tokens = plan.tokens.astype(np.int64)
        if tokens.view(np.uint64).max() < self._model.spec.vocab_size:
            # nor is any below zero
            return tokens
        from_device = tokens[ends - 1] == TOKEN_ON_DEVICE
        tokens[ends[from_device] - 1] = self.rows.last_ids[plan.rows[from_device]]
        is_unknown = self._is_unknown(tokens)
        if is_unknown.any():
            # one request's error must not take the step's company with it
            at_fault = plan.rows[np.searchsorted(ends, np.flatnonzero(is_unknown), side="right")]
            self._row_errors |= dict.fromkeys(at_fault.tolist(), NOT_IN_VOCABULARY)
            tokens[is_unknown] = 0
        return tokens

    def _is_unknown(self, tokens: Ints) -> npt.NDArray[np.bool_]:
        return (tokens < 0) | (tokens >= self._model.spec.vocab_size)

    def _slots(self, tables: Ints, rows: Ints, positions: Ints) -> Tensor:
        """Among all places of all pages, that of each position of each of the rows."""
        pages = tables[rows, positions // self._block_size]
        return torch.from_numpy(pages * self._block_size + positions % self._block_size)

    def _tables(self, tables: Ints, rows: Ints, lengths: Ints) -> Ints:
        return tables[rows, : -(-int(lengths.max()) // self._block_size)]
