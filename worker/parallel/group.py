"""What the ranks of one model say to each other while they compute."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import InferfleetError
from worker.parallel.shard import WHOLE, Shard

if TYPE_CHECKING:
    # processes that only start ranks or pass plans on must not wait for torch
    from torch import Tensor

    from worker.parallel.exchange import Exchange


LAST_WORDS_S = 5.0
"""How long a process that lost a rank waits to hear why, before it says just that."""


class RankLost(InferfleetError):
    """Another rank is gone. Nobody can go on, and whoever started that rank knows why."""


class Group(Protocol):
    """Collective operations: every rank calls the same ones in the same order, and all get the same values.

    An operation raises RankLost when another rank is gone.
    """

    @property
    def shard(self) -> Shard: ...

    @property
    def exchange(self) -> Exchange | None:
        """What kernels add up with by themselves, as part of the same order of operations; None: they cannot."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, written into `x`, which is returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in the order of ranks; `x` has the same shape on each."""


class Alone:
    """The group of a model on one rank: nothing to say."""

    shard, exchange = WHOLE, None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the rank of `shard` finds the others: rank 0 keeps a store at `host`:`port`, on its socket `listener`. All
    share the memory of file `exchange_fd` where they are on one machine."""

    shard: Shard = WHOLE
    host: str = ""
    port: int = 0
    listener: socket.socket | None = None
    exchange_fd: int | None = None


def agree_on_minimum(group: Group, value: int) -> int:
    """The smallest `value` that any rank has, on all of them."""
    import torch

    return int(group.all_gather(torch.tensor([value])).min())
