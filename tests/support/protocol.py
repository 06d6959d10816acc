"""What protocol tests say often: a job, its tokens, a worker that behaves as agents do, and waiting for a condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis

from common import wire
from common.card import ModelCard
from common.job import Dialect, FinishReason, Job, JobState, SamplingParams, TokenColumns
from common.store.connection import Connection
from common.store.jobs import JobStore, new_job_id
from common.store.replies import Chunk, Finish, StepCall, StepReply, Submission, Taken
from common.store.workers import WorkerStore

LANE = "abcdef"


def make_job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "job_id": new_job_id(LANE),
        "tenant": "default",
        "dialect": Dialect.CHAT,
        "prompt_ids": [1, 2, 3],
        "params": SamplingParams(max_new_tokens=64),
        "cost": 10,
        "view": {"door": "chat", "model": "demo"},
    }
    return Job(**fields | changes)


def make_card(**changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "lane": LANE,
        "served_name": "demo",
        "aliases": (),
        "model_id": "org/demo",
        "revision": "",
        "architecture": "llama",
        "dtype": "float32",
        "quantize": "",
        "created": 1,
        "vocab_size": 100,
        "max_input_tokens": 500,
        "max_total_tokens": 600,
        "max_batch_prefill_tokens": 512,
        "kv_tokens": 4096,
        "tokenizer_digest": "d1",
        "chat_template": "",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "special_ids": (1, 2),
    }
    return ModelCard(**fields | changes)


def token(position: int) -> int:
    """The reference engine: a token is a function of its position."""
    return (position * 7 + 3) % 1000


def columns(start: int, end: int) -> TokenColumns:
    ids = [token(position) for position in range(start, end)]
    return TokenColumns(start, ids, [f"<{i}>" for i in ids], [-i / 1000 for i in ids])


def payload(start: int, end: int) -> bytes:
    return wire.encode_columns(columns(start, end))


async def submit(jobs: JobStore, job: Job, *, gateway: str | None = None, **limits: Any) -> Submission:
    fields = {"max_queued_tokens": 1_000_000, "tenant_max_jobs": 10_000, "scale_from_zero": True} | limits
    return await jobs.submit(job, gateway=gateway, **fields)


async def eventually(
    condition: Callable[[], Awaitable[Any]] | Callable[[], Any], *, limit_s: float = 5.0, what: str = "condition"
) -> Any:
    """Poll until the condition is true; its value."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {limit_s} s"
        await asyncio.sleep(0.005)


def snapshot(client: redis.Redis) -> dict[bytes, Any]:
    """Every key with its value and whether it expires: two equal snapshots mean that nothing was written."""
    return {key: (_value(client, key), client.ttl(key) >= 0) for key in sorted(client.scan_iter(count=1000))}


def _value(client: redis.Redis, key: bytes) -> Any:
    """Hashes and sets have no order, so their serialised form may change without a write."""
    kind = client.type(key)
    if kind == b"hash":
        return client.hgetall(key)
    return client.smembers(key) if kind == b"set" else client.dump(key)


class FakeAgent:
    """A worker without an engine. `ends` are the tokens produced per job, `flushed` those that reached logs."""

    def __init__(self, connection: Connection, worker_id: str = "w1", nonce: str = "aaaaaaaaaaaaaaaa") -> None:
        self.store = WorkerStore(connection, LANE, worker_id, nonce)
        self.num_steps, self.num_requests, self.cursor = 0, 0, "0-0"
        self.held: dict[str, Taken] = {}
        self.ends: dict[str, int] = {}
        self.flushed: dict[str, int] = {}

    async def start(self) -> FakeAgent:
        hello = await self.store.hello({"pid": 1, "host": "here", "model": "demo"})
        self.num_steps = hello.last_step
        return self

    async def take(self, max_jobs: int = 8, **options: Any) -> list[Taken]:
        self.num_requests += 1
        taken = await self.store.take(max_jobs, self.num_requests, **options)
        for item in taken:
            self.held[item.job.job_id] = item
            self.ends[item.job.job_id] = self.flushed[item.job.job_id] = item.num_tokens
        return taken

    async def step(
        self,
        num_tokens: dict[str, int] | None = None,
        *,
        flush: list[str] | None = None,
        finishes: list[Finish] | None = None,
        gateways: list[str] | None = None,
        **fields: Any,
    ) -> StepReply:
        """Produce tokens, write them ahead, send them to `gateways`, and flush the jobs named to their logs."""
        runs = []
        for job_id, count in (num_tokens or {}).items():
            runs.append((job_id, columns(self.ends[job_id], self.ends[job_id] + count)))
            self.ends[job_id] += count
        chunks = [self._chunk(job_id) for job_id in flush or []]
        frame = wire.encode_frame(runs) if runs else b""
        call = StepCall(
            **{
                "step": self.num_steps + 1,
                "previous": self.num_steps,
                "min_step": 0,
                "frame": frame,
                "control_cursor": self.cursor,
                "gateway_frames": {gateway: frame for gateway in gateways or []},
                "chunks": chunks,
                "finishes": finishes or [],
            }
            | fields
        )
        reply = await self.store.step(call)
        self.num_steps, self.cursor = call.step, reply.control_cursor
        for chunk in chunks:
            self.flushed[chunk.job_id] = chunk.end
        return reply

    def _chunk(self, job_id: str) -> Chunk:
        start, end = self.flushed[job_id], self.ends[job_id]
        return Chunk(job_id, self.held[job_id].epoch, start, end, payload(start, end))

    def finish_of(self, job_id: str, state: JobState = JobState.COMPLETED, **fields: Any) -> Finish:
        start, end = self.flushed[job_id], self.ends[job_id]
        reason = FinishReason.LENGTH if state is JobState.COMPLETED else None
        return Finish(
            job_id=job_id,
            epoch=self.held[job_id].epoch,
            start=start,
            end=end,
            tail=payload(start, end) if end > start else b"",
            state=state,
            finish_reason=reason,
            **fields,
        )

    async def finish(self, job_id: str, state: JobState = JobState.COMPLETED, **fields: Any) -> StepReply:
        return await self.step(finishes=[self.finish_of(job_id, state, **fields)])
