"""The gateway as a process of its own: how much memory many followers cost, slow ones included."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from common.store.connection import Connection
from common.store.jobs import JobStore
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker, text_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 150
NUM_READERS, NUM_DEAF, NUM_PRODUCING = 300, 200, 32


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.fixture()
async def process_url(redis_url: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "gateway", "--port", str(port), "--hostname", "127.0.0.1"],
        cwd=ROOT,
        env={**os.environ, "REDIS_URL": redis_url, "LOG_LEVEL": "error"},
    )
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


async def is_ready(url: str) -> bool:
    async with httpx.AsyncClient() as client:
        try:
            return (await client.get(f"{url}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False


class RawStream:
    """One SSE connection; `deaf` ones take nothing out of their small socket buffer."""

    def __init__(self, port: int, job_id: str) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.address, self.job_id = ("127.0.0.1", port), job_id

    async def begin(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, self.address)
        request = f"GET /v1/jobs/{self.job_id}/stream HTTP/1.1\r\nHost: gateway\r\n\r\n"
        await loop.sock_sendall(self.socket, request.encode())

    async def read_to_done(self) -> str:
        loop, text = asyncio.get_running_loop(), ""
        while "job.done" not in text[-20_000:]:
            part = await loop.sock_recv(self.socket, 65536)
            assert part, "the stream ended without its last event"
            text += part.decode()
        return text


async def test_five_hundred_followers_fit_into_150_mb(
    process_url: tuple[subprocess.Popen[bytes], str], worker: ScriptedWorker, connection: Connection
) -> None:
    process, url = process_url
    await eventually(lambda: is_ready(url), limit_s=20)
    worker.hold_at = 0
    body = {"input": {"inputs": "hello", "parameters": {"max_new_tokens": 200}}}
    async with httpx.AsyncClient(base_url=url, timeout=30) as client, AsyncExitStack() as stack:
        running = [(await client.post("/v1/jobs", json=body)).json()["id"] for _ in range(NUM_PRODUCING)]
        await eventually(lambda: len(worker.running) == NUM_PRODUCING)
        worker.may_take = False
        queued = [(await client.post("/v1/jobs", json=body)).json()["id"] for _ in range(NUM_PRODUCING)]
        port = int(url.rpartition(":")[2])
        streams = [RawStream(port, (running + queued)[index % (2 * NUM_PRODUCING)]) for index in range(NUM_READERS)]
        deaf = [RawStream(port, running[index % NUM_PRODUCING]) for index in range(NUM_DEAF)]
        for stream in [*streams, *deaf]:
            stack.callback(stream.socket.close)
            await stream.begin()
        metrics = f"inferfleet_followers {float(NUM_READERS + NUM_DEAF)}"

        async def all_follow() -> bool:
            return metrics in (await client.get("/metrics")).text

        await eventually(all_follow, limit_s=30, what="500 followers")
        worker.hold_at = 10_000
        readers = [stream for stream in streams if stream.job_id in running]
        texts = await asyncio.gather(*(stream.read_to_done() for stream in readers))
        assert all(f'"output_text":"{text_of(200)}"' in text for text in texts)
        store = JobStore(connection)
        for job_id in running:
            record = await store.record(job_id[4:])
            assert record is not None and record.num_tokens == 200
        used = resident_mb(process.pid)
    assert used < LIMIT_MB, f"{used:.0f} MB"
