"""Pages of keys and values that the system provides before a step writes them."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress

from torch import Tensor

from worker.engine.device import Ints

LEAD_BYTES = 2 << 30
"""Of a model of 443 million parameters 43,000 tokens: prompts of more than a minute, during which no core is idle."""
BYTES_AT_ONCE = 2 << 20
"""Of each layer, a large page of the system."""

MADV_POPULATE_WRITE = 23
"""Since Linux 5.14 (madvise(2)); before, it is refused."""


class Provided:
    """Memory that nobody wrote to yet costs whoever does so first: the system finds it and makes it zero. The layers
    of `pages` [layers, 2, blocks, ...] come to a new large page in the same step, which then lasted 50 ms longer for a
    model of 125 million parameters on a virtual machine. So a thread has the next LEAD_BYTES provided when no core has
    anything else to do, and not all: what nobody fills of a large pool takes no memory.
    """

    def __init__(self, pages: Tensor) -> None:
        # the thread has no business with torch, in whose C++ a process that ends meanwhile would be aborted: it goes by
        # addresses, of pages that are kept as long
        self._kept, self._num_blocks = pages, pages.shape[2]
        self._areas = [area.data_ptr() for area in pages.flatten(0, 1)]
        self._block_bytes = pages.stride(2) * pages.itemsize
        self._lead = -(-LEAD_BYTES // (len(self._areas) * self._block_bytes))
        self._at_once = max(BYTES_AT_ONCE // self._block_bytes, 1)
        self._num_used, self._num_provided = 0, 0 if sys.platform == "linux" else self._num_blocks
        self._thread: threading.Thread | None = None
        self._follow()

    def use(self, blocks: Ints) -> None:
        """Those [n] are written now or soon; blocks are first used in the order of their numbers."""
        if len(blocks) and (end := int(blocks.max()) + 1) > self._num_used:
            self._num_used = end
            self._follow()

    def wait(self) -> None:
        """Until what is ahead is there."""
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        wanted = min(self._num_used + self._lead, self._num_blocks)
        if self._num_provided < wanted and not (self._thread is not None and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._provide, args=(wanted,), name="pages", daemon=True)
            self._thread.start()

    def _provide(self, end: int) -> None:
        if hasattr(os, "SCHED_IDLE"):
            # a sandbox may refuse it; then this thread is as any other
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while self._num_provided < end:
            until = min(max(self._num_provided, self._num_used) + self._at_once, end)
            are_provided = all(self._populate(area, until) for area in self._areas)
            # what is refused comes with the first write, as ever
            self._num_provided = until if are_provided else self._num_blocks

    def _populate(self, area: int, until: int) -> bool:
        first, end = (area + block * self._block_bytes for block in (self._num_provided, until))
        first -= first % os.sysconf("SC_PAGE_SIZE")
        size = ctypes.c_size_t(end - first)
        return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(first), size, MADV_POPULATE_WRITE) == 0)
