"""Jobs as gateways use them: submit, follow, read, cancel, list, erase. A method is one call of an atomic function."""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
from typing import Any

from common import keys, wire
from common.card import decode_card
from common.errors import NotFound, Overloaded, Unavailable, ValidationError, WireError
from common.job import Dialect, DispatchClass, FinishReason, Job, JobRecord, JobState, Priority, TokenColumns
from common.store.connection import Connection
from common.store.fleet import loading_workers
from common.store.frames import Subscription
from common.store.replies import Submission, integer, stream_entries, string

NUM_RANDOM_CHARACTERS, NUM_RANDOM_BYTES = 22, 14
PROTOCOL, WITHOUT_ADAPTERS = 2, 1
"""Version of the worker protocol that our workers speak, and the one before."""
MAX_LOG_ENTRIES = 4096
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
NO_WORKER_RETRY_S = 5.0
CLASSES = {Priority.INTERACTIVE: DispatchClass.INTERACTIVE, Priority.BATCH: DispatchClass.BATCH}


def new_job_id(lane: str) -> str:
    """lane + 22 random characters of [a-z2-7] (110 bits)."""
    return lane + base64.b32encode(secrets.token_bytes(NUM_RANDOM_BYTES)).decode().lower()[:NUM_RANDOM_CHARACTERS]


lane_of_job = keys.lane_of_job


def protocol_of(job: Job) -> int:
    """Lowest version of the worker protocol that can run `job`; older workers leave it in the queue."""
    return WITHOUT_ADAPTERS if job.adapter is None else PROTOCOL


class JobStore:
    """`connection` is shared with the other stores of the process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def submit(
        self,
        job: Job,
        *,
        gateway: str | None,
        max_queued_tokens: int,
        tenant_max_jobs: int,
        scale_from_zero: bool = False,
    ) -> Submission:
        """Make `job` durable and queue it; the same id or the same idempotency key never makes a second job.

        `gateway` follows the job from the start. `scale_from_zero`: queue even when no worker serves the lane.

        Raises:
            ValidationError: `idempotency_key_reused`, the key came with another body before.
            Overloaded: `overloaded`, more than `max_queued_tokens` would wait in the lane; `quota_exceeded`, the tenant
                has `tenant_max_jobs` unfinished jobs.
            Unavailable: `no_worker`, a job with a grace (its client waits) and no live worker for 30 s.
            StoreFull: Redis uses 80 % of its memory limit.
        """
        args = _submission_args(job, gateway, max_queued_tokens, tenant_max_jobs)
        reply = await self.connection.call("submit", keys.lane_of_job(job.job_id), *args, int(not scale_from_zero))
        if string(reply[0]) == "NOWORKER" and await self._is_loading(keys.lane_of_job(job.job_id)):
            reply = await self.connection.call("submit", keys.lane_of_job(job.job_id), *args, 0)
        return _submission(reply, job)

    async def cancel(self, job_id: str) -> JobRecord | None:
        """End a queued job at once; ask the worker of a running one to stop. None if there is no such job."""
        return _record_or_none(job_id, await self._call("cancel", job_id))

    async def erase(self, job_id: str, tenant: str) -> bool:
        """Cancel if needed, then remove record, body and log for good. False if the tenant has no such job."""
        return bool(await self._call("erase", job_id, tenant, secrets.token_hex(8)))

    async def attach(self, job_id: str, gateway: str) -> JobRecord | None:
        """Have frames and status changes of the job sent to `gateway` from now on. Safe to repeat."""
        return _record_or_none(job_id, await self._call("attach", job_id, gateway))

    async def detach(self, job_id: str, gateway: str) -> None:
        """`gateway` has no follower of the job left. The last gateway to go starts the job's orphan grace."""
        await self._call("detach", job_id, gateway)

    async def record(self, job_id: str) -> JobRecord | None:
        return _record_or_none(job_id, await self._call("record", job_id))

    async def states(self, lane: str, job_ids: list[str]) -> dict[str, tuple[JobState, int, int]]:
        """(state, times taken by a worker, durable tokens) of each job that exists, in one call."""
        if not job_ids:
            return {}
        rows = await self.connection.call("states", lane, *job_ids)
        found = zip(job_ids, rows, strict=True)
        return {job_id: (JobState(string(row[0])), integer(row[1]), integer(row[2])) for job_id, row in found if row}

    async def log(self, job_id: str, start: int = 0, *, max_entries: int = MAX_LOG_ENTRIES) -> TokenColumns:
        """Durable tokens from offset `start` on, at most `max_entries` log entries; empty when there are none."""
        key = keys.log(keys.lane_of_job(job_id), job_id)
        entries = await self.connection.run("XRANGE", key, f"({start}", "+", "COUNT", max_entries)
        return merge_log([payload for _, payload in stream_entries(entries)], start)

    async def list_jobs(
        self,
        lanes: list[str],
        tenant: str,
        *,
        status: JobState | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> tuple[list[JobRecord], bool]:
        """The tenant's jobs in `lanes`, newest first, those older than job `after`; and whether there are more.

        Raises:
            NotFound: there is no job `after`.
        """
        created = 0 if after is None else await self._created(after, tenant)
        calls = [
            self.connection.call("list", lane, tenant, status or "", limit + 1, created, after or "")
            for lane in dict.fromkeys(lanes)
        ]
        rows = [row for lane_rows in await asyncio.gather(*calls) for row in lane_rows]
        records = [record_of(string(row[0]), row[1]) for row in rows]
        records.sort(key=lambda record: (record.created_ms, record.job_id), reverse=True)
        return records[:limit], len(records) > limit

    def frames(self, gateway: str, lanes: list[str]) -> Subscription:
        """What workers and functions publish to `gateway`: an async context manager and async iterator."""
        return Subscription(self.connection, gateway, lanes)

    async def _call(self, function: str, job_id: str, *args: bytes | str | int | float) -> Any:
        if not keys.JOB_ID.fullmatch(job_id):
            return None
        return await self.connection.call(function, keys.lane_of_job(job_id), job_id, *args)

    async def _created(self, job_id: str, tenant: str) -> int:
        record = await self.record(job_id)
        if record is None or record.tenant != tenant:
            raise NotFound(f"no job {job_id!r}", param="after")
        return record.created_ms

    async def _is_loading(self, lane: str) -> bool:
        """Whether a worker that will serve this lane is loading its weights: then the job may wait for it."""
        card = await self.connection.run("GET", keys.model(lane))
        if card is None:
            return False
        name = decode_card(card).served_name
        return any(info.model == name for info in await loading_workers(self.connection))


def _submission_args(
    job: Job, gateway: str | None, max_queued_tokens: int, tenant_max_jobs: int
) -> tuple[bytes | str | int, ...]:
    if not keys.TENANT.fullmatch(job.tenant):
        raise ValidationError("a tenant's name is 1 to 64 of [A-Za-z0-9_-]", param="tenant")
    return (
        job.job_id,
        job.tenant,
        int(CLASSES[job.priority]),
        job.dialect.value,
        max(job.cost, 1),
        round(job.timeout_s * 1000),
        job.result_ttl_s,
        -1 if job.orphan_grace_s is None else round(job.orphan_grace_s * 1000),
        len(job.prompt_ids),
        keys.digest_of(job.idempotency_key) if job.idempotency_key else "",
        job.body_hash or "-",
        gateway or "",
        max_queued_tokens,
        tenant_max_jobs,
        protocol_of(job),
        wire.pack(job.view),
        wire.encode_job(job),
        secrets.token_hex(8),
    )


def _submission(reply: list[Any], job: Job) -> Submission:
    verdict = string(reply[0])
    if verdict in ("OK", "DUP"):
        return Submission(string(reply[1]), verdict == "DUP", JobState(string(reply[2])))
    if verdict == "CONFLICT":
        raise ValidationError("this Idempotency-Key was used with another body", code="idempotency_key_reused")
    if verdict == "BUSY":
        wait = min(max(integer(reply[1]) / 1000, SHORTEST_RETRY_S), LONGEST_RETRY_S)
        raise Overloaded("Model is overloaded", code="overloaded", retry_after_s=_jittered(wait))
    if verdict == "QUOTA":
        message = f"tenant {job.tenant} has too many unfinished jobs"
        raise Overloaded(message, code="quota_exceeded", retry_after_s=_jittered(SHORTEST_RETRY_S))
    message = "no worker serves this model at the moment"
    raise Unavailable(message, code="no_worker", retry_after_s=_jittered(NO_WORKER_RETRY_S))


def _jittered(seconds: float) -> float:
    """Clients that were refused together should not come back together."""
    return seconds * random.uniform(1.0, 1.5)


def merge_log(payloads: list[bytes], start: int) -> TokenColumns:
    """Columns of consecutive log entries, cut to `start`; entries may overlap what came before them."""
    merged: TokenColumns | None = None
    for payload in payloads:
        columns = wire.decode_columns(payload)
        columns = columns.slice(start if merged is None else merged.end)
        if merged is None:
            if columns.start != start:
                raise WireError(f"log begins at {columns.start}, expected {start}")
            merged = columns
        else:
            merged.extend(columns)
    return merged or TokenColumns(start, [], [], [])


def _record_or_none(job_id: str, reply: Any) -> JobRecord | None:
    return None if reply is None else record_of(job_id, reply)


def record_of(job_id: str, row: list[bytes | int]) -> JobRecord:
    """A record from the reply of any function that returns one (`job_row` in the Lua prelude fixes the order)."""
    state, tenant, priority, dialect, epoch, taken, owner, cancel, prompt = map(string, row[:9])
    created, started, finished, deadline, expires = map(integer, row[9:14])
    reason, code, message = map(string, row[14:17])
    view = row[17]
    return JobRecord(
        job_id=job_id,
        state=JobState(state),
        tenant=tenant,
        priority=Priority.BATCH if int(priority) == DispatchClass.BATCH else Priority.INTERACTIVE,
        dialect=Dialect(dialect),
        epoch=int(epoch),
        attempts=int(taken),
        worker=owner.partition(".")[0],
        cancelling=cancel != "" and not JobState(state).is_terminal,
        num_tokens=integer(row[18]),
        prompt_tokens=int(prompt),
        created_ms=created,
        started_ms=started,
        finished_ms=finished,
        deadline_ms=deadline,
        expires_ms=expires,
        finish_reason=FinishReason(reason) if reason else None,
        error_code=code,
        error_message=message,
        view=wire.unpack(view) if isinstance(view, bytes) and view else {},
    )
