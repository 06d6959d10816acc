"""Steps in which every row decodes one token, captured once for some numbers of rows and launched as a whole.

A step of other numbers takes the next larger graph: the rest are spare rows, whose pages are all page 0. Forward pass
and sampling are graphs of their own, so that the host may have a say between them; of sampling there is one for each of
PROCESSORS, others run as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from worker.runner.device_step import aligned
from worker.runner.gpu_sampler import Processors, Sampler
from worker.runner.streams import Graph, Stream, Streams, Work

PROCESSORS = (Processors(), Processors(cuts=True))
MAX_CAPTURE_S = 60.0
MAX_FINE = 256

Columns = tuple[Tensor, Tensor, Tensor, Tensor]
"""The first four of Sections."""


def default_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, every 8 up to MAX_FINE, at most 32 beyond, and all rows: each is a graph of its own, with memory of the
    driver's for each of its kernels."""
    coarse = 8 * -(-max_num_seqs // MAX_FINE)
    sizes = {1, 2, 4, *range(8, MAX_FINE, 8), *range(MAX_FINE, max_num_seqs, coarse)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """All graphs of a device, over the same memory for inputs and results.

    `forward` launches the model for columns and query starts, and returns logits [rows, vocabulary]. Of `logits`, one
    row for each of the largest graph, all sizes have their first rows: a copy costs 2 * rows * vocabulary * itemsize
    bytes of traffic, and results that every size keeps for itself would cost gigabytes.
    """

    def __init__(
        self,
        streams: Streams,
        forward: Callable[[Columns, Tensor], Tensor],
        sampler: Sampler,
        logits: Tensor,
        spare_row: int,
        *,
        has_encoder: bool,
    ) -> None:
        self.sizes: list[int] = []
        self._streams, self._forward, self._sampler, self._logits = streams, forward, sampler, logits
        self._spare_row, self._num_columns = spare_row, 4 if has_encoder else 3
        largest, words = len(logits), partial(torch.zeros, dtype=torch.int32, device=logits.device)
        self._inputs = words(self._num_columns * aligned(largest))
        self._asked, self._answers = words(2 * largest), words(3 * largest)
        self._query_starts = torch.arange(largest + 1, dtype=torch.int32, device=logits.device)
        self._forwards: dict[int, Graph] = {}
        self._samplings: dict[tuple[int, Processors], Graph] = {}

    def size_for(self, num_rows: int) -> int | None:
        """Rows of the smallest graph that has room for so many."""
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def capture(self, sizes: Sequence[int], has_time: Callable[[], bool]) -> None:
        """Of `sizes` what can be had while it `has_time`, the largest first: the others find the memory that it
        took."""
        # what was made for them belongs to no stream
        self._streams.drain()
        for size in sorted(sizes, reverse=True):
            if not has_time():
                return
            self._streams.run(Stream.COMPUTE, partial(self._set_spare, size))
            self._forwards[size] = self._capture(partial(self._run_forward, size))
            for processors in PROCESSORS:
                self._samplings[size, processors] = self._capture(partial(self._run_sampling, size, processors))
            self.sizes.insert(0, size)

    def _capture(self, work: Work) -> Graph:
        return self._streams.capture(work, next(iter(self._forwards.values()), None))

    def forward(self, size: int, words: Tensor) -> Tensor:
        """Launch the forward pass for `words`, which begin with the columns; the logits."""
        number = self._num_columns * aligned(size)
        self._inputs[:number].copy_(words[:number])
        self._forwards[size].replay()
        return self._logits[:size]

    def sample(self, size: int, asked: Tensor, processors: Processors) -> Tensor:
        """As a Sampler, for the logits of the last `forward`."""
        graph = self._samplings.get((size, processors))
        if graph is None or len(asked) > 2 * size:
            return self._sampler(self._logits[:size], asked, processors)
        self._asked[: 2 * size].copy_(asked)
        graph.replay()
        return self._answers[: 3 * size]

    @torch.inference_mode()
    def _run_forward(self, size: int) -> None:
        columns = self._columns(size)
        rows, starts, *num_keys, tokens = columns.unbind()
        keys = num_keys[0] if num_keys else columns.new_zeros(0)
        self._logits[:size].copy_(self._forward((rows, starts, keys, tokens), self._query_starts[: size + 1]))

    @torch.inference_mode()
    def _run_sampling(self, size: int, processors: Processors) -> None:
        answer = self._sampler(self._logits[:size], self._asked[: 2 * size], processors)
        self._answers[: 3 * size].copy_(answer)

    def _columns(self, size: int) -> Tensor:
        width = aligned(size)
        return self._inputs[: self._num_columns * width].view(-1, width)[:, :size]

    def _set_spare(self, size: int) -> None:
        """Inputs and what is asked, so that the graph runs over spare rows when it is captured."""
        self._columns(size).zero_()[0] = self._spare_row
        # of what an encoder left they see one key
        self._columns(size)[2:-1] = 1
        self._asked[:size] = self._spare_row
        self._asked[size : 2 * size] = 0
