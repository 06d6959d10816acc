"""`inferfleet demo`: the worker that writes an answer is killed in the middle and another goes on."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from common.errors import ConfigurationError

PROMPT = "Count to 100"
KILL_AFTER = 20
START_TIMEOUT_S = 180.0
SHORT_LEASE_S = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen: the two workers, the offsets at which one stopped and the other began, and both texts."""

    killed: str
    killed_at: int
    continued_by: str
    continued_at: int
    text: str
    undisturbed: str

    @property
    def is_equal(self) -> bool:
        return self.text == self.undisturbed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def fleet(
    folder: str, *, num_workers: int = 2, redis_url: str = "", lease_s: float = SHORT_LEASE_S
) -> Iterator[httpx.Client]:
    """A fleet of its own on a free port, gone at the end; yields a client of its gateway."""
    port = free_port()
    options = ["--port", str(port), "--workers", str(num_workers), "--data-dir", folder, "--hostname", "127.0.0.1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "API_KEY", "MODEL_ID")}
    environment |= {"INFERFLEET_LEASE": str(lease_s), "GRACEFUL_TERMINATION_TIMEOUT": "5"}
    environment |= {"REDIS_URL": redis_url} if redis_url else {}
    command = [sys.executable, "-m", "ops.cli", "up", *options]
    with open(os.path.join(folder, "fleet.log"), "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_for_workers(client, process, num_workers)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_workers(client: httpx.Client, process: subprocess.Popen[bytes], num_workers: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            num_ready = sum(worker["state"] == "ready" for worker in workers(client))
            if num_ready == num_workers and client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ConfigurationError("the workers did not start")


def workers(client: httpx.Client) -> list[dict[str, Any]]:
    response = client.get("/v1/fleet/workers")
    return list(response.json()["data"]) if response.status_code == httpx.codes.OK else []


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(f"/v1/fleet/jobs/{job_id}").raise_for_status().json()
    return answer


def submit(client: httpx.Client) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"input": {"messages": messages, "temperature": 0, "max_tokens": 400, "ignore_eos": False}}
    return str(client.post("/v1/jobs", json=body).raise_for_status().json()["id"])


def finished_text(client: httpx.Client, job_id: str) -> str:
    while True:
        answer = client.get(f"/v1/jobs/{job_id}", params={"wait": 60}).raise_for_status().json()
        if answer["finished_at"] is not None:
            return str(answer["output_text"])


def disturb(client: httpx.Client, job_id: str) -> Outcome:
    """Follow the job; kill -9 its worker once KILL_AFTER tokens were seen, and note who goes on from where."""
    killed, continued_by, last, continued_at = "", "", 0, 0
    pieces: list[str] = []
    with client.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
        for line in response.iter_lines():
            event: dict[str, Any] = {"type": ""}
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
            if event["type"] == "job.delta":
                continued_at = continued_at or (event["start"] if continued_by else 0)
                last = last if continued_by else event["end"]
                pieces.append(event["text"])
            elif event["type"] == "job.status" and killed and event["status"] == "in_progress":
                continued_by = job(client, job_id)["worker"]
            if last >= KILL_AFTER and not killed:
                killed = job(client, job_id)["worker"]
                _kill(client, killed)
    return Outcome(killed, last, continued_by, continued_at, "".join(pieces), "")


def _kill(client: httpx.Client, worker_id: str) -> None:
    pid = next(worker["pid"] for worker in workers(client) if worker["id"] == worker_id)
    os.kill(pid, signal.SIGKILL)


def show(client: httpx.Client) -> Outcome:
    undisturbed = finished_text(client, submit(client))
    return replace(disturb(client, submit(client)), undisturbed=undisturbed)


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="inferfleet demo", description=__doc__).parse_args(arguments)
    sys.stdout.write("starting two workers with the demo model …\n")
    with tempfile.TemporaryDirectory(prefix="inferfleet-demo-") as folder, fleet(folder) as client:
        outcome = show(client)
    sys.stdout.write(
        f"worker {outcome.killed} killed at token {outcome.killed_at} · "
        f"{outcome.continued_by} continues at token {outcome.continued_at}\n"
        f"text {'equals' if outcome.is_equal else 'DIFFERS FROM'} the undisturbed one\n"
    )
    return 0 if outcome.is_equal and outcome.continued_by else 1
