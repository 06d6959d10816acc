"""`inferfleet up`: Redis, gateways and workers as children of one terminal process, started again when they die.

The launcher knows nothing of jobs but two facts: when it has reaped a worker with waitpid that incarnation is dead for
certain, so its jobs go to others at once instead of after the lease; and how many jobs the last run left behind.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from common.errors import ConfigurationError, StoreError
from common.settings import GatewaySettings, UpSettings, WorkerSettings, environment_of, gpus
from common.store.connection import Connection
from common.store.fleet import FleetStore
from ops.cli.gateway import listen
from ops.cli.main import BAD_USAGE
from ops.cli.worker import default_model
from ops.redis_server import RedisServer, start_embedded

PR_SET_PDEATHSIG = 1
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
HEALTHY_AFTER_S = 60.0


def die_with_parent() -> None:
    """Runs in the child before exec: the kernel kills it when the launcher is gone, however that happened."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def say(text: str) -> None:
    """One line for people; when nobody reads any more (`| head`), the fleet serves on in silence."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(slots=True)
class Child:
    """One process of the fleet. `on_death` runs each time it was reaped, before it is started again."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    on_death: Callable[[], Awaitable[None]] | None = None
    process: asyncio.subprocess.Process | None = None
    back_off_s: float = FIRST_BACK_OFF_S
    last_line: str = ""

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ops.cli",
            *self.arguments,
            env=os.environ | self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=die_with_parent,
            start_new_session=True,
            limit=1 << 20,
        )

    async def print_output(self) -> None:
        """Copy the child's lines to the terminal behind its name until it closes them."""
        assert self.process is not None and self.process.stdout is not None
        async for line in self.process.stdout:
            self.last_line = line.decode(errors="replace").rstrip()
            say(f"{self.name:<4}| {self.last_line}")

    def send(self, signal_number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal_number)


@dataclass(slots=True)
class Launcher:
    settings: UpSettings
    redis: RedisServer | None = None
    children: list[Child] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""
    num_signals: int = 0
    connection: Connection | None = None

    @property
    def url(self) -> str:
        host = self.settings.hostname
        return f"http://{'localhost' if host in ('0.0.0.0', '::', '127.0.0.1') else host}:{self.settings.port}"

    async def run(self) -> int:
        """Start everything, wait for a signal, stop everything; the exit status."""
        self._check_ports()
        redis_url = await self._start_redis()
        try:
            self.connection = await Connection.open(redis_url)
        except StoreError as error:
            raise ConfigurationError(str(error)) from error
        try:
            await self._last_run(FleetStore(self.connection))
            self._plan_children(redis_url)
            self._catch_signals()
            self.tasks = [asyncio.create_task(self._keep_alive(child)) for child in self.children]
            announcer = asyncio.create_task(self._announce())
            await self.stopping.wait()
            announcer.cancel()
            await self._stop_children()
        finally:
            await self.connection.close()
            if self.redis is not None:
                self.redis.stop()
        if self.failure:
            raise ConfigurationError(self.failure)
        return 0

    def _check_ports(self) -> None:
        for index in range(self.settings.gateways):
            listen(self.settings.hostname, self.settings.port + index).close()

    async def _start_redis(self) -> str:
        if self.settings.redis_url is not None:
            return self.settings.redis_url.get_secret_value()
        self.redis = await asyncio.to_thread(
            start_embedded,
            Path(self.settings.data_dir),
            ephemeral=self.settings.ephemeral,
            maxmemory=self.settings.redis_maxmemory,
        )
        return self.redis.url

    async def _last_run(self, fleet: FleetStore) -> None:
        if self.settings.fresh:
            num_jobs = await fleet.drop_unfinished()
            if num_jobs:
                say(f"{num_jobs} jobs of the last run dropped")
            return
        num_jobs = await fleet.count_unfinished()
        if num_jobs:
            say(f"{num_jobs} jobs of the last run: resumed (`--fresh` drops them)")

    def _plan_children(self, redis_url: str) -> None:
        model_id, names = default_model(self.settings.model_id, self.settings.served_model_name)
        shared = {"REDIS_URL": redis_url, "PYTHONUNBUFFERED": "1"}
        gateway = environment_of(self.settings, GatewaySettings) | shared
        worker = environment_of(self.settings, WorkerSettings) | shared
        worker |= {"MODEL_ID": model_id, "SERVED_MODEL_NAME": ",".join(names)}
        worker["INFERFLEET_THREADS"] = str(self._threads_per_worker())
        for index in range(self.settings.gateways):
            port = {"PORT": str(self.settings.port + index)}
            self.children.append(Child(f"g{index + 1}", ["gateway"], gateway | port))
        for index in range(self.settings.workers):
            self._plan_worker(index, worker)

    def _plan_worker(self, index: int, environment: dict[str, str]) -> None:
        # beside other hosts on one Redis the bare number would not be unique
        host = re.sub("[^A-Za-z0-9_-]", "-", os.uname().nodename)[:40]
        prefix = "" if self.redis is not None else f"{host}-"
        name = f"w{index + 1}"
        worker_id = self.settings.worker_id or f"{prefix}{name}"
        port = self.settings.metrics_port + index if self.settings.metrics_port else 0
        environment = environment | {"INFERFLEET_WORKER_ID": worker_id, "INFERFLEET_METRICS_PORT": str(port)}
        environment |= self._gpus_of(index)
        self.children.append(Child(name, ["worker"], environment, lambda: self._seal(worker_id)))

    def _gpus_of(self, index: int) -> dict[str, str]:
        """Of several workers each has GPUs of its own for its ranks, or begins anew with the first where all have some.
        Where one alone needs more than there are, it says so itself."""
        names, own = gpus(), self.settings.ranks_per_node
        if self.settings.workers == 1 or self.settings.device == "cpu" or own > len(names):
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[(index * own + rank) % len(names)] for rank in range(own))}

    def _threads_per_worker(self) -> int:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.settings.threads or max(1, num_cores // max(1, self.settings.workers))

    async def _seal(self, worker_id: str) -> None:
        if self.connection is not None:
            await FleetStore(self.connection).seal_worker(worker_id)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self.num_signals += 1
        if self.num_signals == 1:
            say("stopping; running answers get time to finish, Ctrl-C again to stop now")
            self.stopping.set()
            return
        for child in self.children:
            child.send(signal.SIGKILL)

    async def _keep_alive(self, child: Child) -> None:
        """Start the child again whenever it dies, later each time; give up on what starting again cannot cure."""
        while not self.stopping.is_set():
            started = time.monotonic()
            await child.start()
            await child.print_output()
            assert child.process is not None
            status = await child.process.wait()
            if child.on_death is not None:
                await child.on_death()
            if self.stopping.is_set():
                return
            if status == BAD_USAGE:
                self.failure = child.last_line.split(": ", 1)[-1]
                self.stopping.set()
                return
            await self._back_off(child, status, time.monotonic() - started)

    async def _back_off(self, child: Child, status: int, lived_s: float) -> None:
        if lived_s > HEALTHY_AFTER_S:
            child.back_off_s = FIRST_BACK_OFF_S
        how = f"signal {-status}" if status < 0 else f"status {status}"
        say(f"{child.name} ended with {how}; starting it again in {child.back_off_s:g} s")
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), child.back_off_s)
        child.back_off_s = min(2 * child.back_off_s, LONGEST_BACK_OFF_S)

    async def _stop_children(self) -> None:
        """Workers first, so that gateways still carry the last tokens; each gets its own graceful time."""
        workers = [task for child, task in zip(self.children, self.tasks, strict=True) if child.on_death]
        gateways = [task for child, task in zip(self.children, self.tasks, strict=True) if not child.on_death]
        for tasks, grace_s in ((workers, self.settings.graceful_termination_timeout + 5), (gateways, 15.0)):
            for child, task in zip(self.children, self.tasks, strict=True):
                if task in tasks:
                    child.send(signal.SIGTERM)
            if tasks:
                await asyncio.wait(tasks, timeout=grace_s)
        for child in self.children:
            child.send(signal.SIGKILL)
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _announce(self) -> None:
        """Print where the fleet is as soon as it serves."""
        key = self.settings.api_key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=5) as client:
            while True:
                with suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == httpx.codes.OK:
                        break
                await asyncio.sleep(0.1)
            with suppress(httpx.HTTPError, KeyError, IndexError):
                model = (await client.get("/v1/models")).json()["data"][0]["id"]
                self._banner(model)

    def _banner(self, model: str) -> None:
        authorization = " -H 'Authorization: Bearer …'" if self.settings.api_key else ""
        say(
            f"\n  {model} is served at {self.url}  (open it in a browser for a page to try it)\n\n"
            f"  curl {self.url}/generate -H 'Content-Type: application/json'{authorization} \\\n"
            '    -d \'{"inputs": "What is deep learning?", "parameters": {"max_new_tokens": 64}}\'\n'
        )
