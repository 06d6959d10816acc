"""A worker inside the event loop of a test: takes jobs through the real store and writes text that can be foreseen.

One token per step and job. `hold_at` stops every job at an offset until the test moves it, so that a test decides what
has happened when it looks.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from dataclasses import dataclass, field

from common import wire
from common.background import end
from common.card import ModelCard
from common.errors import StoreError
from common.job import FinishReason, JobState, TokenColumns
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.replies import Chunk, Control, Finish, StepCall, Taken
from common.store.workers import WorkerStore
from tests.gateway.support import card
from tests.support.tiny_model import byte_tokenizer_json

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CHUNK = 8
UNTIL_THE_END = 10**9
STATS = {"waiting": 0.0, "decode_tokens": 40.0, "draft_tokens": 30.0, "accepted_tokens": 24.0}


def text_of(num_tokens: int) -> str:
    """What a job has written after this many tokens."""
    return "".join(ALPHABET[position % 26] for position in range(num_tokens))


def token_columns(start: int, end: int) -> TokenColumns:
    letters = [ALPHABET[position % 26] for position in range(start, end)]
    return TokenColumns(start, [ord(letter) for letter in letters], letters, [-0.5] * len(letters))


@dataclass
class Running:
    taken: Taken
    end: int
    flushed: int
    gateways: set[str] = field(default_factory=set)
    is_cancelled: bool = False


class ScriptedWorker:
    """`async with ScriptedWorker(connection) as worker:` serves the model "demo" in lane "abcdef"."""

    def __init__(
        self,
        connection: Connection,
        *,
        worker_id: str = "w1",
        hold_at: int = UNTIL_THE_END,
        card_: ModelCard | None = None,
    ) -> None:
        self.connection, self.hold_at = connection, hold_at
        self.card = card_ or card(max_input_tokens=1000, max_total_tokens=4000)
        self.store = WorkerStore(connection, self.card.lane, worker_id, secrets.token_hex(8))
        self.fleet = FleetStore(connection)
        self.running: dict[str, Running] = {}
        self.may_take = True
        self.is_silent = False
        self.fail_with = ""
        self._step = self._previous = self._request = 0
        self._cursor = "0-0"
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ScriptedWorker:
        await self.fleet.announce(self.card, byte_tokenizer_json())
        await self.store.hello({"pid": 1, "host": "here", "model": self.card.served_name, "started_ms": 1000})
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._task is not None:
            await end(self._task)
        await self.store.close()

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except StoreError:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.002)

    async def _round(self) -> None:
        if self.may_take:
            self._request += 1
            for taken in await self.store.take(64, self._request):
                self.running[taken.job.job_id] = Running(taken, taken.num_tokens, taken.num_tokens, set(taken.gateways))
        await self._commit(self._write())

    def _write(self) -> dict[str, TokenColumns]:
        new: dict[str, TokenColumns] = {}
        for job_id, job in self.running.items():
            if job.end < min(self.hold_at, job.taken.job.params.max_new_tokens) and not job.is_cancelled:
                new[job_id] = token_columns(job.end, job.end + 1)
                job.end += 1
        return new

    async def _commit(self, new: dict[str, TokenColumns]) -> None:
        frames: defaultdict[str, list[tuple[str, TokenColumns]]] = defaultdict(list)
        for job_id, columns in new.items():
            for gateway in self.running[job_id].gateways if not self.is_silent else ():
                frames[gateway].append((job_id, columns))
        self._step += 1
        finishes = [self._finish(job_id, job) for job_id, job in self.running.items() if self._is_over(job)]
        over = {finish.job_id for finish in finishes}
        chunks = [self._chunk(job_id, job) for job_id, job in self.running.items() if self._is_due(job, over, job_id)]
        reply = await self.store.step(
            StepCall(
                step=self._step,
                previous=self._previous,
                min_step=0,
                frame=wire.encode_frame(list(new.items())) if new else b"",
                control_cursor=self._cursor,
                gateway_frames={gateway: wire.encode_frame(runs) for gateway, runs in frames.items()},
                chunks=chunks,
                finishes=finishes,
                stats=STATS,
            )
        )
        self._previous, self._cursor = self._step, reply.control_cursor
        for chunk in chunks:
            self.running[chunk.job_id].flushed = chunk.end
        for job_id in [*over, *reply.lost]:
            self.running.pop(job_id, None)
        await self._obey(reply.controls)

    def _is_over(self, job: Running) -> bool:
        return job.is_cancelled or job.end >= job.taken.job.params.max_new_tokens

    def _is_due(self, job: Running, over: set[str], job_id: str) -> bool:
        return job_id not in over and job.end - job.flushed >= CHUNK

    def _chunk(self, job_id: str, job: Running) -> Chunk:
        payload = wire.encode_columns(token_columns(job.flushed, job.end))
        return Chunk(job_id, job.taken.epoch, job.flushed, job.end, payload)

    def _finish(self, job_id: str, job: Running) -> Finish:
        tail = wire.encode_columns(token_columns(job.flushed, job.end)) if job.end > job.flushed else b""
        state = JobState.CANCELLED if job.is_cancelled else JobState.COMPLETED
        failed = bool(self.fail_with) and not job.is_cancelled
        return Finish(
            job_id=job_id,
            epoch=job.taken.epoch,
            start=job.flushed,
            end=job.end,
            tail=tail,
            state=JobState.FAILED if failed else state,
            finish_reason=None if failed or job.is_cancelled else FinishReason.LENGTH,
            error_code="engine" if failed else "",
            error_message=self.fail_with if failed else "",
        )

    async def _obey(self, controls: list[Control]) -> None:
        again: defaultdict[str, list[tuple[str, TokenColumns]]] = defaultdict(list)
        for control in controls:
            job = self.running.get(control.job_id)
            if job is None:
                continue
            if control.verb in ("cancel", "expire"):
                job.is_cancelled = True
            elif control.verb == "attach":
                job.gateways.add(control.gateway)
                if job.end > job.flushed:
                    again[control.gateway].append((control.job_id, token_columns(job.flushed, job.end)))
            elif control.verb == "detach":
                job.gateways.discard(control.gateway)
        if again:
            self._step += 1
            frames = {gateway: wire.encode_frame(runs) for gateway, runs in again.items()}
            call = StepCall(
                step=self._step,
                previous=self._previous,
                min_step=0,
                control_cursor=self._cursor,
                gateway_frames=frames,
            )
            await self.store.step(call)
            self._previous = self._step
