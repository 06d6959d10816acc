"""Ranks as threads of one process: what they say to each other goes through a barrier.

For arithmetic only: threads share everything, so nothing here shows whether processes find or lose each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from worker.parallel.group import Group, RankLost
from worker.parallel.shard import Shard

Result = TypeVar("Result")
MAX_WAIT_S = 60
"""After it a rank that waits for one that hangs gives up."""


class LockstepGroup:
    """Rank `rank` of threads that share `barrier` and `said`, which has a place for each."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[Any]) -> None:
        self.shard, self.exchange = Shard(rank, barrier.parties), None
        self._barrier, self._said = barrier, said
        self.num_calls = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        # summed in the same order by all, so that all get the same bits
        return x.copy_(torch.stack(self._exchange("all_reduce", x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange("all_gather", x))

    def _exchange(self, operation: str, x: Tensor) -> list[Tensor]:
        self.num_calls += 1
        self._said[self.shard.rank] = (operation, self.num_calls, x.clone())
        try:
            self._barrier.wait(MAX_WAIT_S)
            said = list(self._said)
            self._barrier.wait(MAX_WAIT_S)
        except threading.BrokenBarrierError as error:
            raise RankLost("another rank is gone") from error
        assert len({each[:2] for each in said}) == 1, "ranks called different operations"
        return [each[2] for each in said]


def run_ranks(size: int, work: Callable[[Group], Result]) -> list[Result]:
    """What `work` returns on each of `size` ranks, in their order; what went wrong first goes on to the caller."""
    barrier, said = threading.Barrier(size), [None] * size
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(LockstepGroup(rank, barrier, said))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, RankLost)), errors[0])
    return [results[rank] for rank in range(size)]
