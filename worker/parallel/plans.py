"""How plans reach the ranks of one machine: written once into shared memory, announced over a socket to each rank.

Plan n goes into slot n % 4, of which the announcement says only the size. Every rank counts the plans it has copied
out, in a cell of its own. The writer takes a slot again only when all have copied what was in it:

    shared memory │ num_copied: rank 1: 6, rank 2: 4 │ slot 0: plan 4 │ slot 1: 5 │ slot 2: 6 │ slot 3: 3 │

    plan 7 goes into slot 3: all have copied plan 3 (plans 0 to 3 are 4 copies). Plan 8 would go into slot 0, whose
    plan 4 rank 2 has not copied: 4 copies are too few, so plan 8 travels through the sockets.

So no plan is ever lost or changed under a reader, however far a rank is behind and whatever the model computes. Ranks
that compute together are at most two plans apart (at depth 1); the sockets are for plans that are too large for a
slot, for a rank that was stopped, and for other machines.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
from enum import IntEnum
from typing import BinaryIO

import numpy as np

from common import wire
from common.errors import WireError
from worker.parallel.group import RankLost

NUM_SLOTS = 4
SLOT_BYTES = 1 << 20
"""Room for 250,000 token ids: new prompts travel whole. The system provides the memory when it is first written."""
CELL_BYTES = 8
ANNOUNCEMENT = struct.Struct("<II")


class Way(IntEnum):
    """What follows an announcement."""

    SHARED = 0
    INLINE = 1
    STOP = 2


class PlanMemory:
    """The memory that one writer and some readers share. It is gone when nobody has it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, 0)
        self._first_slot = len(self._memory) - NUM_SLOTS * SLOT_BYTES
        self._num_copied = np.frombuffer(self._memory, np.int64, self._first_slot // CELL_BYTES)
        self._num_written = 0

    @classmethod
    def create(cls, num_readers: int) -> PlanMemory:
        """Memory for at least one reader."""
        fd = anonymous_file("plans")
        os.truncate(fd, num_readers * CELL_BYTES + NUM_SLOTS * SLOT_BYTES)
        return cls(fd)

    def close(self) -> None:
        """Nobody else can be given `fd` any more."""
        os.close(self.fd)

    def write(self, data: bytes) -> bool:
        """Count a plan, and put it into its slot; False if it is too large for that, or a reader is too far behind."""
        number, self._num_written = self._num_written, self._num_written + 1
        if len(data) > SLOT_BYTES or not self._is_free(number):
            return False
        start = self._start_of(number)
        self._memory[start : start + len(data)] = data
        return True

    def read(self, reader: int, size: int) -> bytes:
        """Copy the next plan out of its slot.

        Raises:
            WireError: if no plan can have that size.
        """
        if size > SLOT_BYTES:
            raise WireError(f"a plan of {size} bytes is larger than a slot of {SLOT_BYTES}")
        start = self._start_of(int(self._num_copied[reader]))
        data = self._memory[start : start + size]
        self.skip(reader)
        return data

    def skip(self, reader: int) -> None:
        """Count a plan that came another way."""
        self._num_copied[reader] += 1

    def _is_free(self, number: int) -> bool:
        """Whether everybody has copied what the slot of plan `number` held before."""
        return int(self._num_copied.min()) > number - NUM_SLOTS

    def _start_of(self, number: int) -> int:
        return self._first_slot + number % NUM_SLOTS * SLOT_BYTES


def anonymous_file(name: str) -> int:
    """The descriptor of a file in memory that is gone when nobody has it any more."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def send_plan(connection: socket.socket, data: bytes, *, is_shared: bool) -> None:
    """Announce a plan; one that is not in shared memory follows.

    Raises:
        RankLost: if nobody is there to hear it.
    """
    way, body = (Way.SHARED, b"") if is_shared else (Way.INLINE, data)
    _send(connection, ANNOUNCEMENT.pack(way, len(data)) + body)


def send_stop(connection: socket.socket) -> None:
    """Announce that no plan will come any more. Raises RankLost as `send_plan` does."""
    _send(connection, ANNOUNCEMENT.pack(Way.STOP, 0))


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError as error:
        raise RankLost(f"the connection to another rank broke: {error}") from error


class PlanReader:
    """The plans that come over `stream`, or through `memory` where the other side shares it as reader `reader`."""

    def __init__(self, stream: BinaryIO, memory: PlanMemory | None = None, reader: int = 0) -> None:
        self._stream, self._memory, self._reader = stream, memory, reader

    def next(self) -> bytes | None:
        """Wait for the next plan; None when told that there will be none.

        Raises:
            RankLost: if the other side is gone without a word.
            WireError: if what comes is no announcement, or of a plan too large to be one.
        """
        way, size = ANNOUNCEMENT.unpack(self._receive(ANNOUNCEMENT.size))
        if way == Way.STOP:
            return None
        if way == Way.SHARED and self._memory is not None:
            return self._memory.read(self._reader, size)
        if way != Way.INLINE or size > wire.MAX_BYTES:
            raise WireError(f"not a plan: announced as {way} with {size} bytes")
        if self._memory is not None:
            self._memory.skip(self._reader)
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise RankLost(f"the connection to rank 0 broke: {error}") from error
        if len(data) < size:
            raise RankLost("the connection to rank 0 ended")
        return data
