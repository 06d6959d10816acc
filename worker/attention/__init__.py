"""Paged attention: one signature, a reference as the oracle, and implementations chosen by probing the machine.

Everything irregular about positions and scores is an argument of the call, never a code path in the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of one step are: n rows, t tokens, row after row.

    `num_queries` [n] tokens of each row in this step; `starts` [n] tokens it had before, whose keys and values are in
    pages already; `block_tables` [n, b] pages of each row, of which the first ceil((start + queries) / page size) are
    legal; `slots` int64 [t] index of each token's place among all places of all pages.

    With `num_keys` [n] attention is not causal: each query of a row sees the first `num_keys` keys of its pages, all of
    them (an encoder's own tokens, or what it left for its decoder), and `starts` only says where queries stand.
    """

    num_queries: Integers
    starts: Integers
    block_tables: Integers
    slots: Tensor
    num_keys: Integers | None = None


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A step as kernels read it: all on the device, int32 unless said. Nothing in it tells the host how long a row is.

    `rows` [n] index of each row of the step into `tables` [rows that there may be, b], pages of each; `query_starts`
    [n + 1] first token of each row in the step, and t; `starts` [n] tokens it had before; `slots` int64 [t] and
    `num_keys` [n] as in Batch. The host knows of every row at most `max_queries` tokens in this step, and at most
    `max_keys` keys: how much is launched follows from these two and from shapes. `is_fresh` if it knows that no row had
    any tokens before.

    Rows may have no queries. What is left of a recorded step is filled with rows of one query at position 0, whose
    table and slot are of page 0.
    """

    rows: Tensor
    query_starts: Tensor
    starts: Tensor
    tables: Tensor
    slots: Tensor
    max_queries: int
    max_keys: int
    num_keys: Tensor | None = None
    is_fresh: bool = False


AnyBatch = Batch | DeviceBatch


@dataclass(frozen=True, slots=True, eq=False)
class LayerShape:
    """What of a layer attention must know; layers that attend alike share one object, which may be used as a key.

    scale         factor on the products of queries and keys
    window        keys a query sees, its own included; None sees all before
    softcap       scores become softcap * tanh(score / softcap), after `scale`, before any bias
    slopes        float32 [heads]: slope * (key position - query position) is added to the scores (ALiBi, Press et al.,
                  arXiv 2108.12409)
    bias          float32 [heads, 2 * reach + 1]: what is added by key position - query position, which is clamped to
                  -reach .. reach (T5's relative bias, Raffel et al., arXiv 1910.10683)
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None


class Attention(Protocol):
    """`prepare` is called once per step, `attend` once per layer with what `prepare` returned. With `reads_whole_pages`
    places that no query sees must hold numbers."""

    reads_whole_pages: bool

    def prepare(self, batch: Any, block_size: int) -> Any:
        """Precompute what all layers of the step share. Those for a GPU take a DeviceBatch too."""

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: Any, layer: LayerShape) -> Tensor:
        """Attention of this step's queries over the pages, which hold the step's own keys already: causal, or over
        `num_keys` where the batch says so.

        `q` [t, heads, d], pages [pages, page size, kv heads, page width] of any type that pages may have (see
        `worker.attention.pages`); heads is a multiple of kv heads. Returns [t, heads, d].
        """
