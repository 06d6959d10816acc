"""Sums and collections over the ranks of one machine, through memory that they share (kernels/source/exchange.cpp)."""

from __future__ import annotations

import ctypes

from torch import Tensor

from worker.kernels.products import INTEGER, POINTER, SUFFIXES, function_of
from worker.parallel.group import RankLost
from worker.parallel.shard import Shard


class Exchange:
    """Every rank calls the same in the same order. Who waits for a rank that has ended raises RankLost; for one that
    lives and does not come it waits, until those who watch processes end both.

    `address` is what other kernels take to add up themselves.
    """

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.address = address
        arguments = [POINTER, POINTER, POINTER, POINTER, INTEGER]
        self._add_up = {dtype: function_of(library, "add_up", dtype, arguments, ctypes.c_bool) for dtype in SUFFIXES}
        self._gather = library.inferfleet_gather
        self._gather.argtypes, self._gather.restype = [POINTER, POINTER, INTEGER, POINTER], ctypes.c_bool

    def can_add(self, x: Tensor) -> bool:
        return x.dtype in SUFFIXES

    def add_up(self, x: Tensor) -> None:
        """Write the sum of `x`, contiguous and of a type that it `can_add`, over all ranks into `x`. It is added in
        float32 in the order of ranks, and rounded once."""
        require(self._add_up[x.dtype](self.address, x.data_ptr(), None, x.data_ptr(), x.numel()))

    def gather(self, x: Tensor, out: Tensor) -> None:
        """The contiguous `x` of every rank into `out` [size, *x.shape]."""
        require(self._gather(self.address, x.data_ptr(), x.nbytes, out.data_ptr()))


def require(are_all_there: bool) -> None:
    """Raises RankLost with what an exchange answers where they are not."""
    if not are_all_there:
        raise RankLost("another rank of this machine has ended")


def open_exchange(library: ctypes.CDLL, fd: int, shard: Shard) -> Exchange | None:
    """This rank's side of an exchange over the memory of file `fd`, which stays open until the process ends; None where
    the system does not have what it takes."""
    open_ = library.inferfleet_open_exchange
    open_.argtypes, open_.restype = [INTEGER, INTEGER, INTEGER], POINTER
    address = open_(fd, shard.rank, shard.size)
    return Exchange(library, address) if address else None
