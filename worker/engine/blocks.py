"""The pool of KV blocks and the prefix cache that lives in its free list.

A block is in use (reference count above zero) or free. A free block may still be remembered under the digest of what it
holds: the freed blocks are the cache, there is no other. Block 0 is the null block and never handed out.

Attention reads the blocks of a request from memory one behind the other, a fifth faster where they lie so. Blocks of
one request therefore come out of a group of neighbours as long as there is one free, and go back group by group.

Digests are chained, so that one digest stands for a whole prefix (as in nano-vllm and vLLM): 128 bits of blake2b
over the digest of the block before and the token ids. The chain starts from a secret of this process, the tenant's
salt and the adapter: prefixes of one tenant are neither shared with another one nor to be guessed by timing, and keys
and values that one adapter made are found by no other.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby

DIGEST_BYTES = 16

SPAN_BLOCKS = 16
MAX_SPANS = 4096
"""Remembered at a time; a kilobyte each."""

GROUP_BLOCKS = 8
"""Neighbours that one request gets if it can. More bring hardly anything (docs/performance.md)."""


class BlockDigests:
    """Computes the digests of full blocks; each token is hashed once in the life of its request.

    Most of a long prompt was there before. A span of blocks is known again by one digest of them all, for a fraction of
    the time that one for each of them takes.
    """

    def __init__(self, block_size: int, max_spans: int = MAX_SPANS) -> None:
        self.block_size, self._max_spans = block_size, max_spans
        self._secret = os.urandom(DIGEST_BYTES)
        self._block_bytes = block_size * array("i").itemsize
        self._spans: dict[bytes, list[bytes]] = {}

    def extend(
        self, digests: list[bytes], tokens: array[int], salt: str, num_blocks: int, adapter_digest: str = ""
    ) -> None:
        """Append to `digests` until it has the first `num_blocks` full blocks of `tokens`."""
        while (num_missing := num_blocks - len(digests)) > 0:
            parent = digests[-1] if digests else self._root(salt, adapter_digest)
            first, count = len(digests), min(num_missing, SPAN_BLOCKS)
            content = tokens[first * self.block_size : (first + count) * self.block_size].tobytes()
            digests += self._span(parent, content) if count == SPAN_BLOCKS else self._chain(parent, content)

    def _span(self, parent: bytes, content: bytes) -> list[bytes]:
        whole = _digest(parent + content)
        known = self._spans.get(whole)
        if known is None:
            known = self._spans[whole] = self._chain(parent, content)
            if len(self._spans) > self._max_spans:
                del self._spans[next(iter(self._spans))]
        return known

    def _chain(self, parent: bytes, content: bytes) -> list[bytes]:
        digests = [parent]
        for start in range(0, len(content), self._block_bytes):
            digests.append(_digest(digests[-1] + content[start : start + self._block_bytes]))
        return digests[1:]

    def _root(self, salt: str, adapter_digest: str) -> bytes:
        # with its length before it, no digest and salt together look like another pair
        content = f"{len(adapter_digest)}:{adapter_digest}{salt}".encode()
        return hashlib.blake2b(content, key=self._secret, digest_size=DIGEST_BYTES).digest()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """Blocks 1 .. num_blocks. Tables are append-only: a block equal to a remembered one is kept beside it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders = [0] * (num_blocks + 1)
        self._digest_of: list[bytes | None] = [None] * (num_blocks + 1)
        self._block_of: dict[bytes, int] = {}
        self._released = [0] * (num_blocks + 1)
        """When each block was given back last: blocks of one table at once, those that wait for a table never."""
        self._num_releases = 0
        self._forgotten: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._remembered: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, remembered ones included."""
        return len(self._forgotten) + len(self._remembered)

    @property
    def num_cached(self) -> int:
        """Free blocks that are still remembered."""
        return len(self._remembered)

    def lookup(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest remembered prefix of `digests`. Changes nothing."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_in_use(self, blocks: Iterable[int]) -> int:
        return sum(self._num_holders[block] > 0 for block in blocks)

    def can_hold(self, hits: Sequence[int], num_new: int) -> bool:
        """Whether `share(hits)` leaves `num_new` blocks to allocate."""
        return self.num_free - (len(hits) - self.num_in_use(hits)) >= num_new

    def share(self, blocks: Iterable[int]) -> None:
        """One holder more for each block; a free one is taken out of the free list, content and all."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free_like(block)[block]
            self._num_holders[block] += 1

    def allocate(self, num_blocks: int, behind: int = 0) -> list[int]:
        """Blocks to follow block `behind` of a table: the rest of its group, then groups that were free the longest. No
        remembered one while there are others; what they held is forgotten.

        Raises:
            ValueError: if fewer are free.
        """
        if num_blocks > self.num_free:
            raise ValueError(f"{num_blocks} blocks wanted, {self.num_free} are free")
        blocks = [behind]
        for _ in range(num_blocks):
            blocks.append(self._take_behind(blocks[-1]))
        return blocks[1:]

    def register(self, block: int, digest: bytes) -> None:
        """Remember a full block whose keys and values are written. An equal block known already stays the known one."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Never find these blocks again: what they hold turned out to be unusable. Their holders keep them."""
        for block in blocks:
            digest = self._digest_of[block]
            if digest is not None:
                if self._num_holders[block] == 0:
                    del self._remembered[block]
                    self._forgotten[block] = None
                del self._block_of[digest]
                self._digest_of[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a table.

        The last group first, so that of one sequence the tail is forgotten before its head. Blocks nobody can find
        again are the first to be reused.

        Raises:
            ValueError: if a block has no holder.
        """
        self._num_releases += 1
        freed = [block for group in reversed(_groups(blocks)) for block in group if self._let_go(block)]
        for block in freed:
            self._released[block] = self._num_releases
            self._free_like(block)[block] = None
        for block in reversed(freed):
            if self._digest_of[block] is None:
                self._forgotten.move_to_end(block, last=False)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with the block tables of everyone who holds blocks.

        Raises:
            ValueError: naming the first thing that does not add up.
        """
        expected = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                expected[block] += 1
        if expected != self._num_holders:
            raise ValueError(f"holders are {self._num_holders}, tables say {expected}")
        free = [*self._forgotten, *self._remembered]
        if expected[0] or 0 in free:
            raise ValueError("the null block was handed out")
        num_used = sum(count > 0 for count in expected)
        if num_used + len(free) != self.num_blocks or any(expected[block] for block in free):
            raise ValueError(f"{num_used} used and {len(free)} free of {self.num_blocks} blocks")
        if any(block not in self._free_like(block) for block in free):
            raise ValueError("a free block is remembered among those forgotten, or the other way round")
        remembered = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        if remembered != self._block_of:
            raise ValueError("the map of digests and the blocks disagree")

    def _let_go(self, block: int) -> bool:
        """One holder less; whether that was the last."""
        if self._num_holders[block] <= 0:
            raise ValueError(f"block {block} is released without a holder")
        self._num_holders[block] -= 1
        return self._num_holders[block] == 0

    def _take_behind(self, behind: int) -> int:
        free, block = self._forgotten or self._remembered, behind + 1
        if _group_of(block) != _group_of(behind) or not self._is_due(block, free):
            block = self._begin_group(free)
        self.forget([block])
        del self._forgotten[block]
        self._num_holders[block] = 1
        return block

    def _begin_group(self, free: OrderedDict[int, None]) -> int:
        """The block that was free the longest. Those behind it are left to whoever takes it while there are others."""
        first = next(iter(free))
        for block in range(first + 1, (_group_of(first) + 1) * GROUP_BLOCKS + 1):
            if self._is_due(block, free):
                free.move_to_end(block)
                self._released[block] = 0
        return first

    def _is_due(self, block: int, free: OrderedDict[int, None]) -> bool:
        """Whether the block may be the next to go: what was used after the first in line is not forgotten before it,
        neighbour or not."""
        return block in free and (free is self._forgotten or self._released[block] <= self._released[next(iter(free))])

    def _free_like(self, block: int) -> OrderedDict[int, None]:
        """Where the block is while it is free."""
        return self._forgotten if self._digest_of[block] is None else self._remembered


def _group_of(block: int) -> int:
    return (block - 1) // GROUP_BLOCKS


def _groups(blocks: Sequence[int]) -> list[list[int]]:
    return [list(members) for _, members in groupby(blocks, _group_of)]
