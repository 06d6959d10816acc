"""A real fleet for tests: gateways and workers as processes of their own, on a Redis that the test may kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "ops" / "demo_model" / "checkpoint"
START_TIMEOUT_S = 90.0
STRANGERS = ("REDIS_URL", "MODEL_ID", "API_KEY", "PORT", "HOSTNAME")

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value | None], what: str, timeout_s: float = 30.0) -> Value:
    """Poll until `condition` gives something true; fail with `what` when it does not in time."""
    end = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_state(pid: int) -> str:
    """The state letter of /proc: R, S, T (stopped), Z …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children_of(pid: int) -> list[int]:
    """Processes that `pid` started and that have not ended."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


@dataclass
class FleetProcess:
    """One gateway or worker; its output goes to `log`."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    module: str = "ops.cli"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it away."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    @property
    def engine_pid(self) -> int:
        """Of a worker: the process that computes."""
        (pid,) = children_of(self.pid)
        return pid

    def stop(self, timeout_s: float = 15.0) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


@dataclass
class Fleet:
    """`with Fleet(folder, redis_url) as fleet:` serves; the options are environment variables of the processes."""

    folder: Path
    redis_url: str
    num_gateways: int = 1
    num_workers: int = 1
    options: dict[str, str] = field(default_factory=dict)
    gateways: list[FleetProcess] = field(default_factory=list)
    workers: list[FleetProcess] = field(default_factory=list)
    api_key: str = ""

    def __enter__(self) -> Fleet:
        for index in range(self.num_gateways):
            self.add_gateway(f"g{index + 1}")
        for index in range(self.num_workers):
            self.add_worker(f"w{index + 1}")
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.workers:
            if process.process is not None and process.process.poll() is None:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
        for process in [*self.workers, *self.gateways]:
            process.stop()

    def _environment(self, **extra: str) -> dict[str, str]:
        base = {name: value for name, value in os.environ.items() if name not in STRANGERS}
        defaults = {
            "REDIS_URL": self.redis_url,
            "INFERFLEET_GRACEFUL_TERMINATION_TIMEOUT": "3",
            "GRACEFUL_TERMINATION_TIMEOUT": "3",
            "INFERFLEET_THREADS": "1",
            "INFERFLEET_KV_TOKENS": "16384",
        }
        return base | defaults | self.options | extra

    def add_gateway(self, name: str) -> FleetProcess:
        port = free_port()
        environment = self._environment(INFERFLEET_GATEWAY_ID=name, PORT=str(port), HOSTNAME="127.0.0.1")
        gateway = FleetProcess(name, ["gateway"], environment, self.folder / f"{name}.log", port)
        gateway.start()
        self.gateways.append(gateway)
        return gateway

    def add_worker(self, name: str, module: str = "", **options: str) -> FleetProcess:
        """`module` is another program than the worker, with the same options."""
        environment = self._environment(INFERFLEET_WORKER_ID=name, **options)
        worker = FleetProcess(name, [] if module else ["worker"], environment, self.folder / f"{name}.log")
        worker.module = module or worker.module
        worker.start()
        self.workers.append(worker)
        return worker

    def replace_worker(self, name: str, module: str) -> None:
        """Stop the worker, and let another program serve under its name and with its options."""
        old = self.worker(name)
        old.stop()
        self.workers.remove(old)
        worker = FleetProcess(name, [], old.environment, self.folder / f"{name}-{module}.log", module=module)
        worker.start()
        self.workers.append(worker)
        self.wait_until_ready()

    @property
    def url(self) -> str:
        return self.gateways[0].url

    def client(self, index: int = 0) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.gateways[index].url, timeout=60, headers=headers)

    def worker_states(self) -> list[dict[str, Any]]:
        try:
            with self.client() as client:
                response = client.get("/v1/fleet/workers")
        except httpx.TransportError:
            return []
        return list(response.json()["data"]) if response.status_code == httpx.codes.OK else []

    def wait_until_ready(self, num_workers: int | None = None) -> None:
        wanted = len(self.workers) if num_workers is None else num_workers

        def is_ready() -> bool:
            for process in [*self.gateways, *self.workers]:
                assert process.process is not None
                assert process.process.poll() is None, f"{process.name} ended:\n{process.tail()}"
            return sum(worker["state"] == "ready" for worker in self.worker_states()) >= wanted

        def is_up(gateway: FleetProcess) -> bool:
            try:
                return httpx.get(f"{gateway.url}/health/ready").status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

        try:
            wait_for(is_ready, f"{wanted} workers ready", START_TIMEOUT_S)
            for gateway in self.gateways:
                wait_for(lambda gateway=gateway: is_up(gateway), f"{gateway.name} ready", START_TIMEOUT_S)
        except AssertionError as error:
            logs = "\n".join(f"--- {process.name}\n{process.tail()}" for process in [*self.gateways, *self.workers])
            raise AssertionError(f"{error}\n{logs}") from None

    def worker(self, name: str) -> FleetProcess:
        return next(worker for worker in self.workers if worker.name == name)

    def owner(self, job_id: str) -> str:
        """Name of the worker that runs the job, empty when none does."""
        with self.client() as client:
            return str(client.get(f"/v1/fleet/jobs/{job_id}").raise_for_status().json()["worker"] or "")
