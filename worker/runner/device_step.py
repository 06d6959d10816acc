"""The numbers of one step: packed on the host into one array of int32, taken apart and completed on the device.

    rows, starts, num_keys, tokens | query_starts, wanted | asked | changes | unfilled | encoder_ids | adapter_slots
    what a graph has of its own    | only without a graph |

Positions, places in pages and ids that only the device knows are worked out there, by a handful of small operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from worker.attention import DeviceBatch
from worker.engine.device import TOKEN_ON_DEVICE, StepPlan
from worker.runner.device_rows import Changes, DeviceRows, Words
from worker.runner.gpu_sampler import Ask, num_alternatives
from worker.runner.rows import AnyInts, Ints

WORDS_OF_LINE = 4


class Sections(NamedTuple):
    """int32, of the host or of the device: n rows, t tokens, k sampling ones.

    rows, starts   [n] as in StepPlan
    num_keys       [n] what the encoder left for each, [0] without an encoder
    tokens         [t] as in StepPlan
    query_starts   [n + 1] first token of each row, and t
    wanted         [k] tokens behind which is sampled
    asked, changes words of `Ask` and `Changes`
    unfilled       blocks to be made zero
    encoder_ids    of the one row that brings some
    adapter_slots  [t], [0] where no token has one
    """

    rows: Tensor
    starts: Tensor
    num_keys: Tensor
    tokens: Tensor
    query_starts: Tensor
    wanted: Tensor
    asked: Tensor
    changes: Tensor
    unfilled: Tensor
    encoder_ids: Tensor
    adapter_slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStep:
    """What the host knows of a step: `words`, which are `Sections` of these `sizes`, and what goes by them.

    With a `graph_size` there are as many rows as that, of one token each, the last ones spare. `adapter_slots` and
    `encoder_slots` are those of Sections, and of the encoder ids of `encoder_row`. `errors` by place in the plan.
    """

    plan: StepPlan
    words: Words
    sizes: list[int]
    max_queries: int
    max_keys: int
    is_fresh: bool
    changes: Changes
    asked: Ask
    graph_size: int | None
    encoder_row: int
    adapter_slots: Ints
    encoder_slots: Ints
    errors: dict[int, str]

    def num_results(self, vocab_size: int) -> int:
        """Words of what the sampler answers."""
        num_tops = len(self.asked.tops)
        size = (len(self.asked.words) - num_tops) // 2
        return 3 * size + 2 * num_tops * num_alternatives(vocab_size)

    def split(self, words: Tensor) -> Sections:
        """The device's copy of `words`."""
        widths = [aligned(size) for size in self.sizes]
        return Sections(*(each[:size] for each, size in zip(torch.split(words, widths), self.sizes, strict=True)))


def pack(sections: Sequence[AnyInts]) -> tuple[Words, list[int]]:
    """One array of all, in the order of Sections, each from an aligned place on, and their sizes."""
    sizes = [len(section) for section in sections]
    words, end = np.zeros(sum(map(aligned, sizes)), np.int32), 0
    for section, size in zip(sections, sizes, strict=True):
        words[end : end + size] = section
        end += aligned(size)
    return words, sizes


def aligned(size: int) -> int:
    """Words that so many take. Kernels are compiled for addresses that are multiples of 16 bytes, and once more, in the
    middle of a step, for each that is not."""
    return -(-size // WORDS_OF_LINE) * WORDS_OF_LINE


def padded(numbers: Ints, size: int, filling: int) -> Ints:
    """`numbers` with `filling` up to `size`; none stay none."""
    if not len(numbers):
        return numbers
    return np.concatenate((numbers, np.full(size - len(numbers), filling, numbers.dtype)))


class Inputs(NamedTuple):
    """What a model wants of a step; `cross` where there is an encoder."""

    tokens: Tensor
    positions: Tensor
    batch: DeviceBatch
    cross: DeviceBatch | None


def inputs_of(
    sections: tuple[Tensor, Tensor, Tensor, Tensor],
    query_starts: Tensor,
    max_queries: int,
    max_keys: int,
    state: DeviceRows,
    block_size: int,
    is_fresh: bool = False,
) -> Inputs:
    """Launch what completes the first four of Sections. `query_starts`, bounds and `is_fresh` as in DeviceBatch."""
    rows, starts, num_keys, tokens = sections
    owners, positions = rows.long(), starts.long()
    if max_queries > 1:
        order = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        places = torch.searchsorted(query_starts[1:], order, right=True)
        owners, positions = owners[places], positions[places] + (order - query_starts[places])
    tokens = torch.where(tokens == TOKEN_ON_DEVICE, state.last_ids[owners], tokens).long()
    slots = slots_of(state.tables, owners, positions, block_size)
    batch = DeviceBatch(rows, query_starts, starts, state.tables, slots, max_queries, max_keys, is_fresh=is_fresh)
    if not len(num_keys):
        return Inputs(tokens, positions, batch, None)
    longest = state.cross_tables.shape[1] * block_size
    cross = replace(batch, tables=state.cross_tables, num_keys=num_keys, max_keys=longest)
    return Inputs(tokens, positions, batch, cross)


def whole_input(ids: Tensor, block_size: int) -> DeviceBatch:
    """What an encoder reads, in pages one after the other. Kernels are compiled for a size of pages, so these are no
    larger than others; and for the width of a table, as far as 16 divides it."""
    size, zero = len(ids), ids.new_zeros(1)
    ends = torch.arange(2, dtype=torch.int32, device=ids.device) * size
    num_pages = 16 * -(-size // (16 * block_size))
    return DeviceBatch(
        rows=zero,
        query_starts=ends,
        starts=zero,
        tables=torch.arange(num_pages, dtype=torch.int32, device=ids.device)[None],
        slots=torch.arange(size, device=ids.device),
        max_queries=size,
        max_keys=size,
        num_keys=ends[1:],
        is_fresh=True,
    )


def slots_of(tables: Tensor, owners: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Among all places of all pages, that of each position of each of the rows, int64."""
    pages = tables[owners, positions // block_size].long()
    return pages * block_size + positions % block_size
