"""A process that prints the digests of the plans it reads.

`python -m tests.worker.parallel.plan_reader FD MEMORY_FD READER`
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys

from worker.parallel.plans import PlanMemory, PlanReader


def main(fd: int, memory_fd: int, reader: int) -> None:
    stream = socket.socket(fileno=fd).makefile("rb")
    os.write(1, b"here\n")
    plans = PlanReader(stream, PlanMemory(memory_fd), reader)
    while (plan := plans.next()) is not None:
        os.write(1, hashlib.sha256(plan).hexdigest().encode() + b"\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
