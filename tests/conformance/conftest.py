"""One `inferfleet up` for all conformance tests: what a stranger starts, on a free port.

It runs in float32, so that greedy text is exactly the reference's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.fleet import ROOT, STRANGERS, free_port, wait_for

LIMITS = {"GRACEFUL_TERMINATION_TIMEOUT": "2", "INFERFLEET_KV_TOKENS": "16384"}


@dataclass(frozen=True)
class Served:
    """A running `inferfleet up`."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def environment(self) -> dict[str, str]:
        base = {name: value for name, value in os.environ.items() if name not in STRANGERS}
        return base | {"INFERFLEET_URL": self.url, "PYTHONWARNINGS": "default"}


def family(root: int) -> dict[int, str]:
    """A process and all its descendants: pid and start time, which together nobody else ever has."""
    parents, starts = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(stat.parent.name)
        parents[pid], starts[pid] = int(fields[1]), fields[19]

    def is_ours(pid: int) -> bool:
        while pid != root and pid in parents:
            pid = parents[pid]
        return pid == root

    return {pid: start for pid, start in starts.items() if is_ours(pid)}


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextmanager
def up(folder: Path, *options: str, wait: bool = True, **environment: str) -> Iterator[Served]:
    """`inferfleet up` in `folder`, on a free port; yields when it serves, or at once without `wait`."""
    port, log = free_port(), folder / "up.log"
    base = {name: value for name, value in os.environ.items() if name not in STRANGERS}
    command = [sys.executable, "-m", "ops.cli", "up", "--port", str(port), "--data-dir", str(folder), *options]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=base | LIMITS | environment)
    running = Served(port, log, process)
    try:
        if wait:
            wait_for(lambda: is_healthy(running.url) or process.poll() is not None, "a served model", 90)
            assert process.poll() is None, log.read_text()
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with up(tmp_path_factory.mktemp("up"), "--dtype", "float32", "--lease", "3") as running:
        yield running


@pytest.fixture
def unharmed(served: Served) -> Iterator[None]:
    """After the test a good request succeeds and every process of the fleet is still the same one."""
    before = family(served.process.pid)
    assert len(before) >= 4, "launcher, gateway, agent, engine"
    yield
    with served.client() as client:
        answer = client.post("/generate", json={"inputs": "Count to 10", "parameters": {"max_new_tokens": 1}})
    assert (answer.status_code, list(answer.json())) == (200, ["generated_text"])
    assert family(served.process.pid) == before
