"""A model without weights, whose logits are a digest of exactly what its pages hold of a row.

A page that is wrong, stale, somebody else's or not yet written changes what comes out, and so does a wrong position.
It is as fast as a test with thousands of steps needs it, and takes steps of the host and of a device alike.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from worker.attention import AnyBatch, DeviceBatch
from worker.model.operations import Operations
from worker.parallel.group import Alone

VOCAB_SIZE = 40
MODULUS = 2**31 - 1


class ByTables:
    """Says of a step where each row's pages are."""

    reads_whole_pages = False

    def prepare(self, batch: AnyBatch, block_size: int) -> tuple[Tensor, Tensor]:
        """Tables [n, blocks], and the row of each token [t]."""
        if isinstance(batch, DeviceBatch):
            counts = batch.query_starts.diff().long()
            tables = batch.tables[batch.rows.long()].long()
        else:
            counts, tables = torch.from_numpy(batch.num_queries), torch.from_numpy(batch.block_tables)
        return tables, torch.arange(len(counts)).repeat_interleave(counts)


class HashingModel:
    dtype, group, attention, summarise = torch.float64, Alone(), ByTables(), Operations().summarise
    vocabulary, page_shape, can_be_captured = range(VOCAB_SIZE), (1, 1, 2), True
    spec = SimpleNamespace(vocab_size=VOCAB_SIZE)

    def forward(self, tokens: Tensor, positions: Tensor, batch: AnyBatch, pages: Tensor, wanted: Tensor) -> Tensor:
        keys = pages[0, 0].view(-1, 2)
        keys.index_copy_(0, batch.slots, torch.stack((tokens, positions), 1).to(pages.dtype))
        tables, owners = self.attention.prepare(batch, pages.shape[3])
        held = pages[0, 0, tables].view(len(tables), -1, 2).nan_to_num().long()
        places = torch.arange(held.shape[1])
        terms = (held[..., 0] + 1) * (places * 2654435761 % 1000003 + 1) + (held[..., 1] - places).abs() * 7919
        digests = (terms % MODULUS).cumsum(1) % MODULUS
        mine = digests[owners[wanted], positions[wanted]]
        columns = torch.arange(VOCAB_SIZE)
        return ((mine[:, None] * (columns * 7919 + 1) + columns * 104729) % 9973).double() / 1000
