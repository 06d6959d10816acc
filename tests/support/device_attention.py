"""The oracle of attention for steps whose numbers lie on a device: read from there when the device is that far."""

from __future__ import annotations

from worker.attention import AnyBatch, Batch, DeviceBatch
from worker.attention.reference import ReferenceAttention


class ReferenceOnDevice(ReferenceAttention):
    def prepare(self, batch: AnyBatch, block_size: int) -> Batch:
        if not isinstance(batch, DeviceBatch):
            return batch
        counts, starts = batch.query_starts.diff().long(), batch.starts.long()
        num_keys = None if batch.num_keys is None else batch.num_keys.long().numpy()
        assert int(counts.max()) <= batch.max_queries
        assert int((starts + counts).max() if num_keys is None else num_keys.max()) <= batch.max_keys
        if batch.max_queries > 1:
            assert batch.is_fresh == (not starts.any())
        tables = batch.tables[batch.rows.long()].long()
        return Batch(counts.numpy(), starts.numpy(), tables.numpy(), batch.slots, num_keys)
