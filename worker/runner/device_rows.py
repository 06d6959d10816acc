"""What a GPU knows of its rows: parameters, last sampled ids, block tables and token counts.

The host decides everything and reads nothing back. What a plan changes is packed into one array of int32 words
(`changes`), which travels with the step's other numbers in one copy, and is written where it belongs by what `apply`
launches. Order is that of the stream: a late token of a request that left is written before whoever follows moves in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.device import RowInit, StepPlan
from worker.runner.rows import PARAMETERS, Ints, columns_of, is_among, parameters_of

Words = npt.NDArray[np.int32]

MAX_STOPS = 192
"""Of a row with a minimum length. Clients may name 128, and no model has nearly as many ends of its own as the rest."""

TOO_MANY_STOPS = f"min_tokens is possible with at most {MAX_STOPS} stop tokens on a GPU, ends of the model included"

NO_SLOT = -1
FIRST_SLOTS = 4


class Word(IntEnum):
    """Columns of `DeviceRows.parameters`. Names are those of PARAMETERS; floats are float32, by their bits."""

    SAMPLES = 0
    IS_RAW = 1
    IS_OPENAI = 2
    NUM_PROMPT = 3
    MIN_TOKENS = 4
    NUM_STOPS = 5
    SLOT = 6
    TOP_K = 7
    SEED_LOW = 8
    SEED_HIGH = 9
    TEMPERATURE = 10
    TOP_P = 11
    TYPICAL_P = 12
    MIN_P = 13
    REPETITION = 14
    FREQUENCY = 15
    PRESENCE = 16


FLOATS = [word for word in Word if word >= Word.TEMPERATURE]
COUNTED = (Word.NUM_PROMPT, Word.MIN_TOKENS, Word.TOP_K)
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Changes:
    """What a plan changes: `words` int32 on the host, in parts of `sizes`; afterwards there must be `num_slots` for
    token counts. `errors` by row: one sentence each, for requests that the device cannot serve."""

    words: Words
    sizes: list[int]
    num_slots: int
    errors: dict[int, str] = field(default_factory=dict)


class DeviceRows:
    """State of `num_rows` rows and of `spare_row`, one more, that padding may use: greedy, its pages all page 0.

    On the device, int32, with r = num_rows + 1:

    parameters    [r, words], columns as in Word
    stops         [r, MAX_STOPS] stop ids of rows with a minimum length
    last_ids      [r] what each row sampled last
    tables        [r, max_blocks] its pages; entries behind those of its present request are garbage
    cross_tables  the same of what its encoder left, [r, 0] without `has_encoder`
    counts        [slots, 2, vocab]: how often each token occurred in prompt and output together, and in the output
                  alone, for rows with penalties. There are as many slots as such rows have ever been there at once,
                  rounded up; to have more is the only allocation, when a row arrives. Ranks count all tokens alike.

    On the host: `host` [r] of PARAMETERS, and `cross_lengths` [r] tokens that each row's encoder read.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, vocab_size: int, device: torch.device, *, has_encoder: bool = False
    ) -> None:
        self.spare_row = num_rows
        self.host = np.zeros(num_rows + 1, dtype=PARAMETERS)
        self.host["is_plain"][num_rows] = True
        self.cross_lengths = np.zeros(num_rows + 1, dtype=np.int64)
        self._ids = range(vocab_size)
        self._slots = _Slots()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.parameters = zeros(num_rows + 1, len(Word))
        self.parameters[:, Word.SLOT] = NO_SLOT
        self.stops = zeros(num_rows + 1, MAX_STOPS)
        self.last_ids = zeros(num_rows + 1)
        self.tables = zeros(num_rows + 1, max_blocks)
        self.cross_tables = zeros(num_rows + 1, max_blocks if has_encoder else 0)
        self.counts = zeros(0, 2, vocab_size)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    @property
    def num_slots(self) -> int:
        """That rows of the last `changes` want at least; the device has them when these are applied."""
        return self._slots.number

    def changes(self, plan: StepPlan) -> Changes:
        """Take over what `plan` says of rows, on the host; what the device is to hear of it. In the order of plans."""
        for row in plan.freed_rows.tolist():
            self._slots.release(row)
        errors = {init.row: error for init in plan.new_rows if (error := self._move_in(init))}
        sections: list[Ints | Words] = [
            *_block_changes(plan.block_rows, plan.block_offsets, plan.block_ids, self.tables.shape[1]),
            *self._cross_blocks(plan.new_rows),
            *self._new_parameters(plan.new_rows),
            *self._new_stops(plan.new_rows),
            *self._new_counts(plan.new_rows),
        ]
        words = np.concatenate(sections, dtype=np.int32, casting="same_kind")
        return Changes(words, [len(section) for section in sections], self._slots.number, errors)

    def apply(self, changes: Changes, words: Tensor) -> None:
        """Launch what makes them true on the device; `words` is its copy of theirs. In the order of plans, on the
        stream that samples."""
        ends = tuple(np.cumsum(changes.sizes[:-1]).tolist())
        places, blocks, cross_places, crosses, *arrivals = torch.tensor_split(words, ends)
        _write(self.tables, places, blocks)
        _write(self.cross_tables, cross_places, crosses)
        if arrivals[0].numel():
            self._apply_arrivals(changes.num_slots, *arrivals)

    def _apply_arrivals(
        self,
        num_slots: int,
        new: Tensor,
        parameters: Tensor,
        held_back: Tensor,
        stops: Tensor,
        slots: Tensor,
        counted: Tensor,
        tokens: Tensor,
    ) -> None:
        self.parameters.index_copy_(0, new.long(), parameters.view(-1, len(Word)))
        self.stops.index_copy_(0, held_back.long(), stops.view(-1, MAX_STOPS))
        if num_slots > len(self.counts):
            more = self.counts.new_zeros((num_slots - len(self.counts), *self.counts.shape[1:]))
            self.counts = torch.cat((self.counts, more))
        self.counts.index_fill_(0, slots.long(), 0)
        slots, is_output = counted.long() >> 1, counted & 1
        both = slots * (2 * len(self._ids)) + tokens
        self.counts.view(-1).scatter_add_(0, both, torch.ones_like(is_output))
        self.counts.view(-1).scatter_add_(0, both + len(self._ids), is_output)

    def _move_in(self, init: RowInit) -> str | None:
        row = init.row
        self._slots.release(row)
        self.host[row] = parameters_of(init.params, len(init.prompt_ids))
        self.cross_lengths[row] = len(init.encoder_ids)
        if self.host["needs_counts"][row]:
            self._slots.take(row)
        is_too_much = self.host["min_tokens"][row] and len(self._stops_of(init)) > MAX_STOPS
        return TOO_MANY_STOPS if is_too_much else None

    def _cross_blocks(self, inits: Sequence[RowInit]) -> tuple[Ints, Ints]:
        crosses = [(init.row, init.cross_blocks) for init in inits if len(init.cross_blocks)]
        rows = np.repeat([row for row, _ in crosses], [len(blocks) for _, blocks in crosses]).astype(np.int64)
        offsets = [np.arange(len(blocks)) for _, blocks in crosses]
        blocks = [blocks for _, blocks in crosses]
        return _block_changes(rows, _joined(offsets), _joined(blocks), self.cross_tables.shape[1])

    def _new_parameters(self, inits: Sequence[RowInit]) -> tuple[Ints, Words]:
        rows = np.array([init.row for init in inits], dtype=np.int64)
        words = _words_of(self.host[rows])
        words[:, Word.SLOT] = [self._slots.of(row) for row in rows.tolist()]
        words[:, Word.NUM_STOPS] = [len(self._stops_of(init)[:MAX_STOPS]) for init in inits]
        return rows, words.ravel()

    def _new_stops(self, inits: Sequence[RowInit]) -> tuple[Ints, Ints]:
        held_back = [init for init in inits if init.params.min_tokens]
        stops = np.zeros((len(held_back), MAX_STOPS), dtype=np.int64)
        for place, init in enumerate(held_back):
            mine = self._stops_of(init)[:MAX_STOPS]
            stops[place, : len(mine)] = mine
        return np.array([init.row for init in held_back], dtype=np.int64), stops.ravel()

    def _new_counts(self, inits: Sequence[RowInit]) -> tuple[Ints, Ints, Ints]:
        """Slots to begin in, and of every token 2 * slot, plus one if it is of the output, and its id."""
        counted = [init for init in inits if self.host["needs_counts"][init.row]]
        slots = np.array([self._slots.of(init.row) for init in counted], dtype=np.int64)
        runs = [ids for init in counted for ids in (init.prompt_ids, init.output_ids)]
        kinds = np.stack((2 * slots, 2 * slots + 1), 1).ravel()
        tokens, owners = _joined(runs), np.repeat(kinds, [len(ids) for ids in runs])
        return slots, owners[is_among(tokens, self._ids)], columns_of(tokens, self._ids)

    def _stops_of(self, init: RowInit) -> Ints:
        return columns_of(init.stop_ids, self._ids)


class _Slots:
    """Which rows have which slots: each the first one that is free, so that what many rows once wanted, and a step
    without memory may have failed to get, is asked for no longer when they are gone."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}

    @property
    def number(self) -> int:
        """How many there must be."""
        last = max(self._slots.values(), default=NO_SLOT)
        return 0 if last == NO_SLOT else max(1 << last.bit_length(), FIRST_SLOTS)

    def of(self, row: int) -> int:
        return self._slots.get(row, NO_SLOT)

    def take(self, row: int) -> None:
        used = set(self._slots.values())
        self._slots[row] = next(slot for slot in range(len(used) + 1) if slot not in used)

    def release(self, row: int) -> None:
        self._slots.pop(row, None)


def _words_of(parameters: npt.NDArray[np.void]) -> Words:
    """[n, words] of n PARAMETERS, but for the columns that only DeviceRows knows."""
    words = np.zeros((len(parameters), len(Word)), dtype=np.int32)
    for word in (Word.SAMPLES, Word.IS_RAW, Word.IS_OPENAI):
        words[:, word] = parameters[word.name.lower()]
    for word in COUNTED:
        words[:, word] = np.minimum(parameters[word.name.lower()], INT32_MAX)
    words[:, Word.SEED_LOW : Word.SEED_HIGH + 1] = parameters["seed"].copy().view(np.int32).reshape(-1, 2)
    for word in FLOATS:
        words[:, word] = parameters[word.name.lower()].astype(np.float32).view(np.int32)
    return words


def _block_changes(rows: Ints | Words, offsets: Ints | Words, ids: Ints | Words, width: int) -> tuple[Ints, Ints]:
    """Places in a table of that width, and what to write there."""
    return rows.astype(np.int64) * width + offsets, ids.astype(np.int64)


def _joined(runs: Sequence[Ints | Words]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *runs])


def _write(table: Tensor, places: Tensor, values: Tensor) -> None:
    if len(places):
        table.view(-1).scatter_(0, places.long(), values)
