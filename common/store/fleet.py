"""The fleet as operators and gateways see it: models, workers, queues, dead letters and API keys."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from typing import Any

from common import keys, wire
from common.adapters import MAX_ADAPTERS
from common.card import ModelCard, decode_card, encode_card
from common.errors import Conflict, StoreError, ValidationError
from common.store.connection import Connection
from common.store.reaper import TOKENIZER_TTL_S, recover
from common.store.replies import (
    AdapterEntry,
    AdapterFinding,
    ApiKey,
    DeadLetter,
    WorkerInfo,
    decode_adapter,
    decode_worker,
    encode_worker,
    hash_pairs,
    integer,
    stats_of,
    string,
)

REPORT_TTL_S = 60
KEY_PREFIX = "if-"
MAX_DEAD_LETTERS = 1000
LIMITS = ("max_input_tokens", "max_total_tokens")
NOT_LOOKED_AT = AdapterFinding()


async def loading_workers(connection: Connection) -> list[WorkerInfo]:
    """Workers that load their weights and have no lane yet, as they last reported themselves."""
    ids = [string(member) for member in await connection.run("SMEMBERS", keys.WORKERS)]
    if not ids:
        return []
    reports = await connection.run("MGET", *[keys.worker_report(worker_id) for worker_id in ids])
    gone = [worker_id for worker_id, report in zip(ids, reports, strict=True) if report is None]
    if gone:
        await connection.run("SREM", keys.WORKERS, *gone)
    infos = [decode_worker(report) for report in reports if report is not None]
    return [info for info in infos if info.state == "loading"]


def new_token() -> str:
    """A name for one registration of an adapter."""
    return secrets.token_hex(8)


def digest_of_key(text: str) -> str:
    """What of an API key is kept: the sha256 of its text in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


class FleetStore:
    """`connection` is shared with the other stores of the process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def announce(self, card: ModelCard, tokenizer_json: bytes) -> None:
        """Make a model known to all gateways. Its card goes when no live worker was seen for an hour.

        Raises:
            StoreError: the lane belongs to another model that live workers serve.
        """
        await self.connection.write(keys.tokenizer(card.tokenizer_digest), "SET", tokenizer_json, "EX", TOKENIZER_TTL_S)
        identity = (card.served_name, card.tokenizer_digest, card.dtype, card.quantize, str(card.vocab_size))
        fingerprint = keys.digest_of("\0".join(identity))
        await self.connection.call("announce", card.lane, encode_card(card), fingerprint)
        await self.connection.write(keys.LANES, "SADD", card.lane)

    async def is_announced(self, lane: str) -> bool:
        return bool(integer(await self.connection.run("EXISTS", keys.model(lane))))

    async def retire(self, lane: str) -> None:
        """Forget the model of a lane: gateways stop offering it. Its jobs stay."""
        await self.connection.call("retire", lane)

    async def lanes(self) -> list[str]:
        return sorted(string(lane) for lane in await self.connection.run("SMEMBERS", keys.LANES))

    async def cards(self) -> list[ModelCard]:
        """All announced models; the limits of each are the smallest of its live workers."""
        cards = []
        for lane in await self.lanes():
            data = await self.connection.run("GET", keys.model(lane))
            if data is not None:
                cards.append(await self._with_live_limits(decode_card(data)))
        return cards

    async def adapters(self, lane: str) -> list[AdapterEntry]:
        """All registered adapters of a lane, by name."""
        pairs = hash_pairs(await self.connection.run("HGETALL", keys.adapters(lane)))
        return sorted((decode_adapter(string(name), data) for name, data in pairs), key=lambda entry: entry.name)

    async def adapter(self, lane: str, name: str) -> AdapterEntry | None:
        data = await self.connection.run("HGET", keys.adapters(lane), name)
        return None if data is None else decode_adapter(name, data)

    async def put_adapter(
        self,
        lane: str,
        name: str,
        source: str,
        *,
        token: str = "",
        worker_id: str = "",
        found: AdapterFinding = NOT_LOOKED_AT,
    ) -> AdapterEntry:
        """Register an adapter for a worker to look at, or as ready when `worker_id` has `found` it to fit.

        The registration that there is already stays if it means the same: see its `token`.

        Raises:
            Conflict: `adapter_exists`, the name stands for another one, for `worker_id` only while others serve it.
            ValidationError: `too_many_adapters`.
        """
        args = (name, source, token or new_token(), worker_id, found.digest, found.rank, found.place)
        verdict, packed = await self.connection.call("adapter_put", lane, *args)
        if string(verdict) == "FULL":
            message = f"this model has {MAX_ADAPTERS} adapters; unload one first"
            raise ValidationError(message, code="too_many_adapters", param="name")
        entry = decode_adapter(name, packed)
        if string(verdict) == "TAKEN":
            message = f"adapter {name!r} is registered from {entry.source!r}; unload it first"
            raise Conflict(message, code="adapter_exists", param="name")
        return entry

    async def drop_adapter(self, lane: str, entry: AdapterEntry) -> bool:
        """Remove a registration: jobs that have it go on. False if another one has the name by now."""
        return bool(integer(await self.connection.call("adapter_drop", lane, entry.name, entry.token)))

    async def tokenizer(self, digest: str) -> bytes | None:
        """The bytes of tokenizer.json, None when no worker announced it lately."""
        data: bytes | None = await self.connection.run("GET", keys.tokenizer(digest))
        return data

    async def report(self, info: WorkerInfo) -> None:
        """A worker that still loads makes itself visible; to be repeated at least every minute until it says hello."""
        await self.connection.write(keys.worker_report(info.id), "SET", encode_worker(info), "EX", REPORT_TTL_S)
        await self.connection.write(keys.WORKERS, "SADD", info.id)

    async def unreport(self, worker_id: str) -> None:
        """Loading is over: the worker is now known by its hello."""
        await self.connection.run("DEL", keys.worker_report(worker_id))
        await self.connection.run("SREM", keys.WORKERS, worker_id)

    async def workers(self, lane: str | None = None) -> list[WorkerInfo]:
        """Living workers of one lane, or of all lanes together with those that still load."""
        lanes = await self.lanes() if lane is None else [lane]
        found = [worker_of(name, row) for name in lanes for row in await self.connection.call("workers", name)]
        if lane is None:
            known = {info.id for info in found}
            found += [info for info in await loading_workers(self.connection) if info.id not in known]
        return sorted(found, key=lambda info: info.id)

    async def drain(self, worker_id: str) -> bool:
        """Ask a worker to take no more jobs, give back what it has and leave. False if no such worker lives."""
        found = [info for info in await self.workers() if info.id == worker_id and info.lane]
        for info in found:
            await self.connection.call("drain", info.lane, worker_id, info.incarnation)
        return bool(found)

    async def seal_worker(self, worker_id: str) -> int:
        """Declare a worker dead whose process its parent has reaped: no lease to wait for. Returns jobs recovered."""
        await self.unreport(worker_id)
        num_recovered = 0
        for info in await self.workers():
            if info.id == worker_id and info.lane:
                await self.connection.call("seal", info.lane, worker_id, info.incarnation, -1)
                num_recovered += await recover(self.connection, info.lane, worker_id, info.incarnation)
        return num_recovered

    async def queue(self, lane: str) -> dict[str, int]:
        """Gauges (queued, queued_tokens, running, workers, dead_letters) and counters since the beginning."""
        reply = await self.connection.call("queue", lane)
        names, numbers = reply[::2], reply[1::2]
        return {string(name): integer(number) for name, number in zip(names, numbers, strict=True)}

    async def dead_letters(self, lane: str) -> list[DeadLetter]:
        """Failed jobs that can still be redriven, newest first."""
        rows = await self.connection.call("dead_letters", lane, MAX_DEAD_LETTERS)
        return [DeadLetter(string(row[0]), integer(row[1]), string(row[2]), string(row[3])) for row in rows]

    async def redrive(self, lane: str, job_id: str | None = None) -> int:
        """Queue one dead letter, or all of the lane, again from where its log ends. Returns how many."""
        ids = [letter.job_id for letter in await self.dead_letters(lane)] if job_id is None else [job_id]
        token = secrets.token_hex(8)
        return sum([integer(await self.connection.call("redrive", lane, one, token)) for one in ids])

    async def count_unfinished(self) -> int:
        """Queued and running jobs of all lanes."""
        return sum([integer(await self.connection.run("ZCARD", keys.deadlines(lane))) for lane in await self.lanes()])

    async def drop_unfinished(self) -> int:
        """Erase every queued and running job of all lanes. Returns how many."""
        num_dropped, token = 0, secrets.token_hex(8)
        for lane in await self.lanes():
            for member in await self.connection.run("ZRANGE", keys.deadlines(lane), 0, -1):
                num_dropped += integer(await self.connection.call("erase", lane, string(member), "", token))
        return num_dropped

    async def create_key(self, tenant: str, *, name: str = "") -> str:
        """A new API key of `tenant`. Its text is returned here and never again."""
        if not keys.TENANT.fullmatch(tenant):
            raise StoreError("a tenant's name is 1 to 64 of [A-Za-z0-9_-]")
        text = KEY_PREFIX + secrets.token_urlsafe(32)
        fields = {"key_id": secrets.token_hex(4), "tenant": tenant, "name": name, "created_ms": int(time.time() * 1000)}
        await self.connection.write(keys.API_KEYS, "HSET", digest_of_key(text), wire.pack(fields))
        return text

    async def keys(self) -> list[ApiKey]:
        """All API keys, oldest first."""
        pairs = hash_pairs(await self.connection.run("HGETALL", keys.API_KEYS))
        found = [ApiKey(digest=string(digest), **wire.unpack(data)) for digest, data in pairs]
        return sorted(found, key=lambda key: (key.created_ms, key.key_id))

    async def revoke_key(self, key_id: str) -> bool:
        """False if there is no such key."""
        digests = [key.digest for key in await self.keys() if key.key_id == key_id]
        if digests:
            await self.connection.run("HDEL", keys.API_KEYS, *digests)
        return bool(digests)

    async def tenant_of(self, digest: str) -> str | None:
        """The tenant whose key has this sha256, None if none has."""
        data = await self.connection.run("HGET", keys.API_KEYS, digest)
        return None if data is None else str(wire.unpack(data)["tenant"])

    async def _with_live_limits(self, card: ModelCard) -> ModelCard:
        rows = await self.connection.call("workers", card.lane)
        infos = [wire.unpack(row[4]) for row in rows]
        smallest = {
            name: min([info[name] for info in infos if info.get(name)] + [getattr(card, name)]) for name in LIMITS
        }
        return dataclasses.replace(card, **smallest)


def worker_of(lane: str, row: list[Any]) -> WorkerInfo:
    """A worker from one row of the function `workers`: id, incarnation, draining, jobs owned, info, stats."""
    info, stats = wire.unpack(row[4]), stats_of(row[5])
    return WorkerInfo(
        id=string(row[0]),
        incarnation=string(row[1]),
        lane=lane,
        pid=int(info.get("pid", 0)),
        host=str(info.get("host", "")),
        model=str(info.get("model", "")),
        state="draining" if integer(row[2]) else "ready",
        running=integer(row[3]),
        waiting=int(stats.get("waiting", 0)),
        kv_free=int(stats.get("blocks_free", 0)),
        kv_total=int(stats.get("blocks_total", 0)),
        tokens=int(stats.get("tokens", 0)),
        started_ms=int(info.get("started_ms", 0)),
        stats=stats,
    )
