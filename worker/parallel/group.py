"""What the ranks of one model say to each other while they compute."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from worker.parallel.shard import WHOLE, Shard


class Group(Protocol):
    """Collective operations: every rank calls the same ones in the same order, and all get the same values.

    An operation raises RuntimeError when another rank is gone; nobody can go on after that.
    """

    @property
    def shard(self) -> Shard: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, written into `x`, which is returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in the order of ranks; `x` has the same shape on each."""


class Alone:
    """The group of a model on one rank: nothing to say."""

    shard = WHOLE

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]
