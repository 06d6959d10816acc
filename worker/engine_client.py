"""The engine as the agent sees it: a child process behind one socket. Starts it, talks to it, ends it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from common import wire
from common.background import News
from common.errors import WireError
from common.settings import WorkerSettings
from worker.pipe import HEADER, Message, decode, encode

REAL_ENGINE = (sys.executable, "-m", "worker.engine_process")
STOP_LIMIT_S = 5.0
NUM_OTHER_PROCESSES = 2


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(threads: int, num_ranks: int) -> int:
    """What each of the ranks on this machine gets of so many threads (0: all cores)."""
    return max(1, (threads or num_cores()) // num_ranks)


ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={32 << 20}",
        f"glibc.malloc.trim_threshold={1 << 30}",
    )
)
"""Memory for what is between two operations stays with the process, in large pages where the system has them: to get it
anew in every step costs more than many an operation."""


def engine_environment(threads: int, num_ranks: int = 1) -> dict[str, str]:
    """Environment for the ranks of an engine that has so many threads (0: all cores) together.

    Threads that spin at OpenMP barriers take the cores that agent, gateway and Redis need; where no core is left over
    they sleep instead. Its C library keeps memory as ALLOCATOR says, unless the environment says otherwise already.
    """
    allocator = os.environ.get("GLIBC_TUNABLES", ALLOCATOR)
    count = threads_per_rank(threads, num_ranks)
    environment = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "GLIBC_TUNABLES": allocator}
    if count * num_ranks + NUM_OTHER_PROCESSES > num_cores():
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    return environment


def settings_json(settings: WorkerSettings, model_folder: str) -> str:
    """What the engine must know. The address of Redis, which may hold a password, is not among it."""
    fields = settings.model_dump(mode="json", exclude={"redis_url"}, exclude_unset=True)
    return json.dumps(fields | {"model_id": model_folder})


class Pipe(asyncio.Protocol):
    """Our end of the socket: cuts what comes into messages. One that is none ends it, as does the engine's end."""

    def __init__(self) -> None:
        self.bodies: deque[bytes] = deque()
        self.error: WireError | None = None
        self.is_over = False
        self.gone = asyncio.Event()
        self.news = News()
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # not every event loop's transports are instances of it
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        data, start = self._rest + data, 0
        while len(data) - start >= HEADER.size:
            (size,) = HEADER.unpack_from(data, start)
            if size > wire.MAX_BYTES:
                self.error = WireError(f"an engine message of {size} bytes exceeds the limit of {wire.MAX_BYTES}")
                self.transport.abort()
                return
            end = start + HEADER.size + size
            if end > len(data):
                break
            self.bodies.append(data[start + HEADER.size : end])
            start = end
        self._rest = data[start:]
        self.news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_over = True
        self.news.set()
        self.gone.set()


class EngineProcess:
    """A running engine. `receive` ends with None when it is gone."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: Pipe) -> None:
        self._process, self._pipe = process, pipe

    @classmethod
    async def start(cls, command: Sequence[str], settings: str, environment: dict[str, str]) -> EngineProcess:
        """Start `command --fd N --settings JSON` with one end of a socket pair.

        Nothing of ours runs between fork and exec, where it could wait for ever for what threads of a download hold:
        the engine itself sees to it that it does not outlive the agent.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                "--settings",
                settings,
                pass_fds=[theirs.fileno()],
                env=os.environ | environment,
                stdin=asyncio.subprocess.DEVNULL,
            )
        _, pipe = await asyncio.get_running_loop().create_unix_connection(Pipe, sock=ours)
        return cls(process, pipe)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Queue a message; one to an engine that died is lost, as its death says itself through `receive`."""
        if not self._pipe.transport.is_closing():
            self._pipe.transport.write(encode(message))

    async def receive(self) -> Message | None:
        """The next message, None at the end of the pipe.

        Raises:
            WireError: if the engine sends what is no message.
        """
        pipe = self._pipe
        while not pipe.bodies:
            if pipe.error is not None:
                raise pipe.error
            if pipe.is_over:
                return None
            pipe.news.clear()
            await pipe.news.within(None)
        return decode(pipe.bodies.popleft())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> int:
        """Close the pipe, give the process a moment to leave by itself, and reap it; its exit status."""
        self._pipe.transport.close()
        await self._pipe.gone.wait()
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            self.kill()
            return await self._process.wait()
