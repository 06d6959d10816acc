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
    """

    num_queries: Integers
    starts: Integers
    block_tables: Integers
    slots: Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What of a layer attention must know. `window`: keys a query sees, its own included; None sees all before."""

    scale: float
    window: int | None


class Attention(Protocol):
    """`prepare` is called once per step, `attend` once per layer with what `prepare` returned."""

    def prepare(self, batch: Batch, block_size: int) -> Any:
        """Precompute what all layers of the step share."""

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: Any, layer: LayerShape) -> Tensor:
        """Causal attention of this step's queries over the pages, which hold the step's own keys already.

        `q` [t, heads, d], pages [pages, page size, kv heads, d]; heads is a multiple of kv
        heads. Returns [t, heads, d].
        """


def write_pages(pages: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put `values` [t, kv heads, d] at `slots` [t] of `pages` [pages, page size, kv heads, d]."""
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, values)
