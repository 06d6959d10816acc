"""How long people wait for a start: a gateway until it lives, and a second `inferfleet up` until its first token.

python -m ops.bench.start [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ops.cli.demo import free_port
from ops.redis_server import start_embedded

MAX_LIVE_S, MAX_FIRST_TOKEN_S = 2.0, 5.0
LONGEST_S = 600.0
POLL_S = 0.01
STRANGERS = ("REDIS_URL", "API_KEY", "MODEL_ID", "PORT", "HOSTNAME")
BODY = {"inputs": "Count to 10", "parameters": {"max_new_tokens": 5}}


@contextmanager
def process(folder: Path, command: str, *arguments: str, **environment: str) -> Iterator[None]:
    base = {key: value for key, value in os.environ.items() if key not in STRANGERS}
    words = [sys.executable, "-m", "ops.cli", command, *arguments]
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen(words, stdout=log, stderr=log, env=base | environment)
    try:
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait()


def seconds_until(url: str, path: str, process: subprocess.Popen[bytes] | None = None) -> float:
    """Seconds from now until a GET of `path` is answered with 200.

    Raises:
        TimeoutError, RuntimeError: it is not in LONGEST_S; `process`, which was to answer, has ended.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < LONGEST_S:
        try:
            if httpx.get(f"{url}{path}").status_code == httpx.codes.OK:
                return time.perf_counter() - start
        except httpx.TransportError:
            pass
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the process for {url} ended with status {process.returncode}")
        time.sleep(POLL_S)
    raise TimeoutError(f"{url}{path} did not answer")


def live_s(folder: Path, redis_url: str) -> float:
    """Seconds from the start of a gateway's process to its first answer."""
    port = str(free_port())
    with process(folder, "gateway", "--port", port, REDIS_URL=redis_url):
        return seconds_until(f"http://127.0.0.1:{port}", "/health/live")


def first_token_s(folder: Path) -> float:
    """Seconds from the start of `inferfleet up` to the first event of a stream."""
    port, start = free_port(), time.perf_counter()
    url = f"http://127.0.0.1:{port}"
    options = ("--port", str(port), "--data-dir", str(folder))
    with process(folder, "up", *options, GRACEFUL_TERMINATION_TIMEOUT="1"):
        seconds_until(url, "/health")
        with httpx.stream("POST", f"{url}/generate_stream", json=BODY, timeout=LONGEST_S) as response:
            next(line for line in response.iter_lines() if line.startswith("data:"))
            return time.perf_counter() - start


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        folder = Path(name)
        server = start_embedded(folder)
        try:
            live = [live_s(folder, server.url) for _ in range(options.rounds)]
        finally:
            server.stop()
        first = [first_token_s(folder) for _ in range(options.rounds + 1)]
    rows = [
        ("gateway start to /health/live, s", live, MAX_LIVE_S),
        ("second `inferfleet up` to the first token, s", first[1:], MAX_FIRST_TOKEN_S),
    ]
    sys.stdout.write("| measure | median (best to worst) | bar |\n|---|---|---|\n")
    for label, values, bar in rows:
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        sys.stdout.write(f"| {label} | {spread} | {bar:g} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
