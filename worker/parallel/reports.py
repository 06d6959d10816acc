"""What a rank tells rank 0: messages of the engine's pipe behind the rank's number, so that a node can pass them on."""

from __future__ import annotations

import socket
import struct
import threading
from typing import BinaryIO

from worker.pipe import Message, encode, read_message

RANK = struct.Struct("<I")


class Reporter:
    """The way to rank 0; several threads may use it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, rank: int, message: Message) -> None:
        """Raises OSError when nobody is there to hear it."""
        with self._lock:
            self._connection.sendall(RANK.pack(rank) + encode(message))


def read_report(stream: BinaryIO) -> tuple[int, Message] | None:
    """The next report of a blocking stream, None at its end.

    Raises:
        OSError: if the connection broke.
        WireError: if what comes is no report.
    """
    header = stream.read(RANK.size)
    message = read_message(stream) if len(header) == RANK.size else None
    return None if message is None else (RANK.unpack(header)[0], message)
