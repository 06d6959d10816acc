"""Worker processes with fake engines on a real Redis, and a follower that hears what a gateway would hear."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from common.card import ModelCard
from common.job import Dialect, Job, JobRecord, SamplingParams
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import Ended, Frame, Reconnected
from common.store.jobs import JobStore, new_job_id
from tests.support.fake_engine import Answer, Vocabulary, oracle
from tests.support.fleet import ROOT, free_port
from tests.support.protocol import eventually
from tests.support.tiny_model import byte_tokenizer_json, write_tiny_model

LEASE_S = 1.0
START_LIMIT_S = 30.0
END_LIMIT_S = 30.0
GATEWAY = "g1"
VOCABULARY = Vocabulary(byte_tokenizer_json())


@dataclass
class Worker:
    """One agent process. `ports` of its metrics tell what happened inside."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def engine_pid(self) -> int:
        """The pid of its engine child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert len(children) == 1, f"{self.name} has children {children}"
        return int(children[0])

    def metric(self, name: str) -> float:
        """A counter or gauge without labels."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=5).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def stop(self) -> int:
        """Ask it to drain, and wait; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)


@dataclass
class WorkerFleet:
    """Starts and stops worker processes; `redis_url` may lead through a proxy."""

    folder: Path
    redis_url: str
    workers: dict[str, Worker] = field(default_factory=dict)

    def __enter__(self) -> Self:
        write_tiny_model(self.folder / "tiny")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGCONT)
                worker.process.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            worker.stop()

    def start(self, name: str, *, engine: tuple[str, ...] = ("--step-ms", "10"), **options: str) -> Worker:
        port = free_port()
        environment = os.environ | {
            "REDIS_URL": self.redis_url,
            "MODEL_ID": str(self.folder / "tiny"),
            "LOAD_FORMAT": "dummy",
            "INFERFLEET_WORKER_ID": name,
            "INFERFLEET_LEASE": str(LEASE_S),
            "INFERFLEET_METRICS_PORT": str(port),
            "GRACEFUL_TERMINATION_TIMEOUT": "0.3",
            **options,
        }
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            command = [sys.executable, "-m", "tests.support.fake_worker", "--", *engine]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.workers[name] = Worker(name, process, port, log)
        return self.workers[name]

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{w.log.read_text()[-3000:]}" for name, w in self.workers.items())


class Follower:
    """What one gateway heard of every job, checked while it comes: an offset never changes its token."""

    def __init__(self, connection: Connection, lane: str) -> None:
        self.lane = lane
        self.fleet, self.jobs = FleetStore(connection), JobStore(connection)
        self.heard: dict[str, dict[int, int]] = {}
        self.ended: set[str] = set()
        self.num_reconnects = 0

    async def listen(self, ready: asyncio.Event) -> None:
        async with self.jobs.frames(GATEWAY, [self.lane]) as subscription:
            ready.set()
            async for message in subscription:
                if isinstance(message, Frame):
                    self._hear(message)
                elif isinstance(message, Ended):
                    self.ended.add(message.job_id)
                elif isinstance(message, Reconnected):
                    self.num_reconnects += 1
                    for job_id in set(self.heard) - self.ended:
                        await self.jobs.attach(job_id, GATEWAY)

    def _hear(self, frame: Frame) -> None:
        for job_id, columns in frame.runs:
            tokens = self.heard.setdefault(job_id, {})
            for offset, token_id in enumerate(columns.ids, start=columns.start):
                assert tokens.setdefault(offset, token_id) == token_id, f"token {offset} of {job_id} changed"

    def position(self, job_id: str) -> int:
        """Number of tokens heard of a job, all of them in a row from the first."""
        tokens = self.heard.get(job_id, {})
        return next(offset for offset in range(len(tokens) + 1) if offset not in tokens)

    async def submit(
        self, seed: int, num_tokens: int, prompt: str = "Tell me.", *, gateway: str = GATEWAY, **fields: Any
    ) -> Job:
        params = fields.pop("params", None) or SamplingParams(max_new_tokens=num_tokens, seed=seed)
        job = Job(
            job_id=new_job_id(self.lane),
            tenant="default",
            dialect=Dialect.GENERATE,
            prompt_ids=list(prompt.encode()),
            params=params,
            cost=num_tokens,
            **fields,
        )
        await self.jobs.submit(job, gateway=gateway, max_queued_tokens=10**7, tenant_max_jobs=10**4)
        return job

    async def reach(self, job: Job, position: int) -> int:
        """Wait until so many tokens were heard; how many it is then."""
        what = f"token {position} of {job.job_id}"
        await eventually(lambda: self.position(job.job_id) >= position, limit_s=END_LIMIT_S, what=what)
        return self.position(job.job_id)

    async def owner(self, job: Job) -> str:
        async def worker() -> str:
            record = await self.jobs.record(job.job_id)
            return record.worker if record else ""

        return str(await eventually(worker, what="the job has a worker"))

    async def end(self, job: Job) -> JobRecord:
        """Wait for the end of a job; its record."""

        async def ended() -> JobRecord | None:
            record = await self.jobs.record(job.job_id)
            return record if record is not None and record.state.is_terminal else None

        record = await eventually(ended, limit_s=END_LIMIT_S, what=f"the end of {job.job_id}")
        assert isinstance(record, JobRecord)
        return record

    async def assert_exact(self, job: Job, expected: Answer | None = None) -> JobRecord:
        """The log is the undisturbed answer, without a gap or a repeat, and all that was heard is part of it."""
        record = await self.end(job)
        log = await self.jobs.log(job.job_id)
        answer = expected or oracle(VOCABULARY, job.params.seed, job.params.max_new_tokens)
        assert_same(log.ids, "".join(log.pieces), self.heard.get(job.job_id, {}), answer)
        assert record.state == "completed", record
        assert record.finish_reason == answer.finish
        assert record.num_tokens == len(answer.ids)
        return record


def assert_same(ids: list[int], text: str, heard: dict[int, int], answer: Answer) -> None:
    assert ids == answer.ids
    assert text == answer.text
    assert all(answer.ids[offset] == token_id for offset, token_id in heard.items())


async def card_of(connection: Connection) -> ModelCard:
    async def first() -> ModelCard | None:
        cards = await FleetStore(connection).cards()
        return cards[0] if cards else None

    card = await eventually(first, limit_s=START_LIMIT_S, what="a model card")
    assert isinstance(card, ModelCard)
    return card


async def workers_ready(connection: Connection, names: set[str]) -> None:
    async def are_ready() -> bool:
        found = await FleetStore(connection).workers()
        return {info.id for info in found if info.state == "ready"} >= names

    await eventually(are_ready, limit_s=START_LIMIT_S, what=f"workers {names}")


@asynccontextmanager
async def following(redis_url: str) -> AsyncIterator[Follower]:
    """A follower that hears everything from now on."""
    connection = await Connection.open(redis_url)
    try:
        card = await card_of(connection)
        follower, ready = Follower(connection, card.lane), asyncio.Event()
        task = asyncio.create_task(follower.listen(ready))
        await asyncio.wait_for(ready.wait(), START_LIMIT_S)
        yield follower
        if task.done():
            task.result()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    finally:
        await connection.close()
