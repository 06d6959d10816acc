"""The protocol as a worker's agent uses it: one incarnation that takes jobs, commits steps and gives jobs back."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import redis

from common import keys, wire
from common.errors import ConfigurationError, StepGap, StoreError, UnknownIncarnation
from common.job import Job, TokenColumns
from common.store.connection import AWAY, Connection
from common.store.fleet import FleetStore
from common.store.jobs import CLASSES, PROTOCOL, protocol_of
from common.store.link import Link
from common.store.reaper import MAX_ATTEMPTS, recover, tails_of
from common.store.replies import (
    AdapterEntry,
    AdapterFinding,
    Control,
    Hello,
    Owned,
    StepCall,
    StepReply,
    Taken,
    decode_adapter,
    integer,
    string,
)

MAX_CODE, MAX_MESSAGE = 64, 1000
"""Characters of an error that a record keeps."""

logger = logging.getLogger(__name__)


class WorkerStore:
    """One worker id in one lane. `nonce` is 64 random bits in hex, drawn once per process.

    All methods but `hello` raise Fenced when the incarnation was sealed or superseded, and UnknownIncarnation when
    Redis lost its last writes or was replaced: then hello, mine and adopt come before the next step.
    """

    def __init__(self, connection: Connection, lane: str, worker_id: str, nonce: str) -> None:
        if not keys.WORKER_ID.fullmatch(worker_id):
            raise ConfigurationError(f"a worker id is 1 to 64 of [A-Za-z0-9_-], not {worker_id!r}")
        self.connection, self.lane, self.worker_id, self.nonce = connection, lane, worker_id, nonce
        self.incarnation = ""
        self._generation = -1
        self._last_step = 0
        self._views: dict[str, bytes] = {}
        self._views_nonce = nonce
        self._bell: Link | None = None

    async def hello(self, info: dict[str, Any]) -> Hello:
        """Begin an incarnation and requeue what dead predecessors of this worker id held.

        `info` describes the process: `pid`, `host`, `model`, `started_ms` and its limits `max_input_tokens`,
        `max_total_tokens`. The same nonce again gets the same incarnation while that one lives.
        """
        if self._views_nonce != self.nonce:
            # a process that begins anew holds no job of before
            self._views.clear()
            self._views_nonce = self.nonce
        generation = self.connection.generation
        reply = await self.connection.call("hello", self.lane, self.worker_id, self.nonce, wire.pack(info))
        self.incarnation, self._generation, self._last_step = string(reply[0]), generation, integer(reply[2])
        num_recovered = 0
        for name in map(string, reply[1]):
            worker_id, _, incarnation = name.partition(".")
            num_recovered += await recover(self.connection, self.lane, worker_id, incarnation)
        await FleetStore(self.connection).unreport(self.worker_id)
        return Hello(self.incarnation, num_recovered, self._last_step)

    async def drain(self) -> None:
        """Say that this worker leaves: `take` gives it nothing more, and lists show it as draining."""
        await self._call("drain")

    async def bye(self) -> None:
        """Seal this incarnation ourselves: nothing is accepted from it any more, and nobody waits for its lease."""
        await self.connection.call("seal", self.lane, self.worker_id, self.incarnation, -1)
        await recover(self.connection, self.lane, self.worker_id, self.incarnation)

    async def close(self) -> None:
        """Close the connection that `wait_for_work` keeps."""
        if self._bell is not None:
            await self._bell.close()
            self._bell = None

    async def take(self, max_jobs: int, request: int, *, max_suspects: int = 1) -> list[Taken]:
        """Up to `max_jobs` queued jobs become this incarnation's. The same `request` number repeats its last answer.

        `max_suspects`: how many suspects this worker may hold in all.
        """
        rows = await self._call("take", max_jobs, request, max_suspects, PROTOCOL)
        return [self._taken(row) for row in rows]

    async def step(self, call: StepCall) -> StepReply:
        """Commit: write-ahead entry, frames, due chunks, finishes, heartbeat, in one atomic call.

        Raises:
            StepGap: `subject` "step": Redis' last step is `last`, not `call.previous`; else `subject` is a job whose
                log ends at `last`, before the chunk's start. Nothing was written: send again from there.
        """
        if call.step <= self._last_step:
            raise StepGap("step", self._last_step)
        reply = await self._call("step", *_step_args(call))
        for finish in call.finishes:
            self._views.pop(finish.job_id, None)
        controls = [Control(string(c[0]), string(c[1]), string(c[2]), string(c[3])) for c in reply[1]]
        cursor = controls[-1].cursor if controls else call.control_cursor
        lost, dead = [string(item) for item in reply[2]], [string(item) for item in reply[3]]
        for job_id in lost:
            self._views.pop(job_id, None)
        return StepReply(bool(reply[0]), controls, lost, dead, cursor)

    async def mine(self) -> list[Owned]:
        """Everything Redis thinks this incarnation owns, for comparison after a lost reply and every few seconds."""
        rows = await self._call("mine")
        return [Owned(string(row[0]), integer(row[1]), string(row[2]), integer(row[3])) for row in rows]

    async def body(self, job_id: str) -> Taken | None:
        """The whole of an owned job, for one that `mine` lists and this process never heard of."""
        row = await self._call("body", job_id)
        return None if row is None else self._taken(row)

    async def adopt(self, job_id: str, epoch: int, body: bytes, columns: TokenColumns) -> bool:
        """Re-assert a job after Redis lost its tail. `columns` are all its committed tokens from offset 0.

        True if the record was missing, or queued with nothing newer than this, or ours already; else drop the job.
        """
        job = wire.decode_job(body)
        view = self._views.get(job_id) or wire.pack(job.view)
        fields = (
            job.tenant,
            int(CLASSES[job.priority]),
            job.dialect.value,
            max(job.cost, 1),
            round(job.timeout_s * 1000),
        )
        grace = -1 if job.orphan_grace_s is None else round(job.orphan_grace_s * 1000)
        payload = wire.encode_columns(columns) if columns.ids else b""
        idempotency = (keys.digest_of(job.idempotency_key) if job.idempotency_key else "", job.body_hash or "-")
        args = (*fields, job.result_ttl_s, grace, len(job.prompt_ids), *idempotency, protocol_of(job), view, body)
        return bool(await self._call("adopt", job_id, epoch, columns.start, columns.end, payload, *args))

    async def release(
        self, jobs: list[tuple[str, int]], *, count_attempt: bool, max_attempts: int = MAX_ATTEMPTS
    ) -> None:
        """Give jobs back to the queue: at a drain without, after a death of the engine with the attempt counted.

        What the write-ahead stream holds of them goes to their logs first, so nothing that was shown is forgotten.
        """
        tails = await tails_of(self.connection, self.lane, self.worker_id, self.incarnation, [job for job, _ in jobs])
        for job_id, epoch in jobs:
            start, end, payload = tails[job_id]
            await self._call("release", job_id, epoch, start, end, payload, int(count_attempt), max_attempts)
            self._views.pop(job_id, None)

    async def settle_adapter(self, name: str, token: str, found: AdapterFinding) -> AdapterEntry | None:
        """Say what was found of registration `token`; the first worker's word counts.

        Returns what stands now, None when the registration was dropped or replaced.
        """
        error = found.error[:MAX_MESSAGE]
        packed = await self._call("adapter_settle", name, token, found.digest, found.rank, found.place, error)
        return None if packed is None else decode_adapter(name, packed)

    async def wait_for_work(self, timeout_s: float) -> bool:
        """Sleep until the doorbell of the lane rings; False after `timeout_s` or when Redis is away.

        A lost ring costs one time-out: workers also look by themselves.
        """
        try:
            if self._bell is None or self._bell.loss is not None:
                self._bell = await self.connection.open_link()
            limit_s = timeout_s + self.connection.timeout_s
            return await self._bell.call("BLPOP", keys.bell(self.lane), timeout_s, timeout_s=limit_s) is not None
        except (redis.RedisError, *AWAY) as error:
            logger.debug("no doorbell: %s", error)
            await asyncio.sleep(min(timeout_s, 0.2))
            return False

    async def _call(self, function: str, *args: bytes | str | int | float) -> Any:
        if not self.incarnation:
            raise UnknownIncarnation("say hello first")
        identity = (self.worker_id, self.incarnation)
        return await self.connection.call(function, self.lane, *identity, *args, generation=self._generation)

    def _taken(self, row: list[Any]) -> Taken:
        job_id, epoch, attempts, num_tokens, cancel, deadline, body, view, gateways = row
        if not isinstance(body, bytes):
            raise StoreError(f"job {string(job_id)} has no body")
        self._views[string(job_id)] = view
        job: Job = dataclasses.replace(wire.decode_job(body), view=wire.unpack(view) if view else {})
        return Taken(
            job=job,
            epoch=integer(epoch),
            attempts=integer(attempts),
            num_tokens=integer(num_tokens),
            gateways=[string(gateway) for gateway in gateways],
            cancel_reason=string(cancel),
            deadline_ms=integer(deadline),
        )


def _step_args(call: StepCall) -> list[bytes | str | int]:
    stats = wire.pack(call.stats) if call.stats else b""
    args: list[bytes | str | int] = [call.step, call.previous, call.min_step, call.frame, call.control_cursor, stats]
    args.append(len(call.gateway_frames))
    for gateway, frame in call.gateway_frames.items():
        args += [gateway, frame]
    args.append(len(call.chunks))
    for chunk in call.chunks:
        args += [chunk.job_id, chunk.epoch, chunk.start, chunk.end, chunk.payload]
    args.append(len(call.finishes))
    for finish in call.finishes:
        args += [finish.job_id, finish.epoch, finish.start, finish.end, finish.tail, finish.state.value]
        reason = finish.finish_reason.value if finish.finish_reason else ""
        args += [reason, finish.error_code[:MAX_CODE], finish.error_message[:MAX_MESSAGE]]
    return args
