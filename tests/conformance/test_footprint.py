"""What a gateway weighs: no model libraries in its process, and little memory however many clients follow or sleep."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import Served, family, up
from tests.support.fleet import ROOT

HEAVY = ("torch", "transformers", "celery")
LIMIT_KB = 150 * 1024
NUM_FOLLOWERS, NUM_SILENT = 500, 200
NUM_RUNNING, NUM_QUEUED = 32, 32
NUM_MORE_TOKENS = 64
SAMPLE_S = 0.05
LONGEST_S = 90.0
BODY = {"inputs": "Count to 100", "parameters": {"max_new_tokens": 2000, "ignore_eos": True, "details": True}}


def heavy_modules(names: list[str]) -> list[str]:
    return [name for name in names if name.partition(".")[0] in HEAVY]


def heavy_files(pid: int) -> set[str]:
    """Libraries of model frameworks that are mapped into a process."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {path for path in paths if any(f"/{name}/" in path or f"lib{name}" in path for name in HEAVY)}


def pid_of(served: Served, word: str) -> int:
    """The one process of the fleet with this word in its command line."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in family(served.process.pid)}
    found = [pid for pid, words in lines.items() if word.encode() in words]
    assert len(found) == 1, lines
    return found[0]


def memory_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_importing_the_gateway_brings_no_model_library() -> None:
    code = (
        "import sys; import ops.cli.gateway, uvicorn; from gateway.app import create_app; "
        "from common.settings import GatewaySettings; create_app(GatewaySettings()); print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert {"gateway.app", "gateway.hub", "fastapi", "tokenizers"} <= set(names)
    assert heavy_modules(names) == []
    assert heavy_modules([*names, "torch.nn"]) == ["torch.nn"]


def test_a_serving_gateway_has_no_model_library_mapped(served: Served) -> None:
    with served.client() as client:
        assert client.post("/generate", json={"inputs": "Count to 10"}).status_code == httpx.codes.OK
    assert heavy_files(pid_of(served, "gateway")) == set()
    assert heavy_files(pid_of(served, "worker.engine_process")) != set()


@dataclass
class Crowd:
    """Followers of jobs over raw sockets: some read all they get, the others never read at all."""

    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    silent: list[socket.socket] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    async def follow(self, job_id: str, *, reads: bool) -> None:
        connection = self.stack.enter_context(socket.socket())
        connection.setblocking(False)
        if not reads:
            # small segments and a small window: the kernels hold little, the rest is the gateway's problem
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self.port))
        line = f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nhost: localhost\r\n\r\n"
        await loop.sock_sendall(connection, line.encode())
        if reads:
            reader, writer = await asyncio.open_connection(sock=connection)
            self.writers.append(writer)
            self.num_bytes.append(0)
            self.tasks.append(asyncio.create_task(self._read(len(self.num_bytes) - 1, reader)))
        else:
            self.silent.append(connection)

    async def _read(self, index: int, reader: asyncio.StreamReader) -> None:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        while data := await reader.read(65536):
            self.num_bytes[index] += len(data)

    @property
    def is_served(self) -> bool:
        """Whether every reader has had an answer; fails when one was sent away."""
        assert not [task for task in self.tasks if task.done()]
        return all(self.num_bytes)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in self.writers:
            writer.close()
        self.stack.close()


def unsent_bytes(port: int) -> list[int]:
    """For each TCP connection that a client holds to a local port: bytes that it has not taken yet."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return [int(row[4].partition(":")[0], 16) for row in ours]


async def until(condition: Any, what: str, samples: list[int], pid: int) -> None:
    """Poll, and note the memory of the gateway at every look."""
    end = time.monotonic() + LONGEST_S
    while not await condition():
        assert time.monotonic() < end, f"not within {LONGEST_S:g} s: {what}"
        samples.append(memory_kb(pid))
        await asyncio.sleep(SAMPLE_S)


async def tokens_of(client: httpx.AsyncClient) -> dict[str, int]:
    """Tokens of each running job."""
    rows = (await client.get("/v1/fleet/jobs?limit=100")).raise_for_status().json()["data"]
    return {row["id"]: row["num_tokens"] for row in rows if row["status"] == "in_progress"}


async def crowd_memory_kb(served: Served, pid: int) -> list[int]:
    """Samples of the gateway's memory while the crowd follows and every running job writes on."""
    samples: list[int] = []
    crowd = Crowd(served.port)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        ids = []
        for _ in range(NUM_RUNNING + NUM_QUEUED):
            ids.append((await client.post("/v1/jobs", json={"input": BODY})).raise_for_status().json()["id"])

        async def all_run() -> bool:
            return len(await tokens_of(client)) == NUM_RUNNING

        try:
            await until(all_run, "32 running jobs", samples, pid)
            for index in range(NUM_FOLLOWERS):
                is_silent = index < NUM_SILENT
                await crowd.follow(ids[index % (NUM_RUNNING if is_silent else len(ids))], reads=not is_silent)

            async def is_served() -> bool:
                return crowd.is_served and len(unsent_bytes(served.port)) >= NUM_FOLLOWERS

            await until(is_served, "500 open streams", samples, pid)
            before = await tokens_of(client)
            assert len(before) == NUM_RUNNING

            async def have_grown() -> bool:
                now = await tokens_of(client)
                return all(now[job_id] >= count + NUM_MORE_TOKENS for job_id, count in before.items())

            await until(have_grown, "all running jobs write", samples, pid)
            assert await is_served()
            assert sum(count > 0 for count in unsent_bytes(served.port)) >= NUM_SILENT
            assert len(crowd.silent) == NUM_SILENT
            assert len(crowd.writers) == NUM_FOLLOWERS - NUM_SILENT
        finally:
            await crowd.close()
    return samples


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("crowd")
    options = ("--max-num-seqs", str(NUM_RUNNING), "--fresh")
    with up(folder, *options, INFERFLEET_KV_TOKENS="81920", GRACEFUL_TERMINATION_TIMEOUT="0") as running:
        yield running


def is_light(samples: list[int]) -> bool:
    return max(samples) < LIMIT_KB


async def test_memory_with_a_crowd(crowded: Served) -> None:
    """500 followers on queued and running jobs, 32 of them writing, 200 clients that never read."""
    samples = await crowd_memory_kb(crowded, pid_of(crowded, "gateway"))
    assert len(samples) > 10
    assert is_light(samples), f"{max(samples) // 1024} MB"
    assert not is_light([*samples, memory_kb(pid_of(crowded, "worker.engine_process"))])
