"""One `inferfleet up` for all conformance tests: what a stranger starts, on a free port.

It runs in float32, so that greedy text is exactly the reference's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.fleet import ROOT, STRANGERS, free_port, wait_for


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


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("up")
    port, log = free_port(), folder / "up.log"
    options = ["--port", str(port), "--data-dir", str(folder), "--dtype", "float32", "--lease", "3"]
    environment = {name: value for name, value in os.environ.items() if name not in STRANGERS}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ops.cli", "up", "--graceful-termination-timeout", "3", *options],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=environment,
        )
    running = Served(port, log, process)
    try:
        wait_for(lambda: is_healthy(running.url) or process.poll() is not None, "a served model", 90)
        assert process.poll() is None, log.read_text()
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
