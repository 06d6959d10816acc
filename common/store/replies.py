"""Values that the stores return, and how they are read from raw replies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from common import wire
from common.errors import WireError
from common.job import Adapter, FinishReason, Job, JobState


def string(value: Any) -> str:
    """Text of a reply element: bytes, a number, or nothing."""
    if isinstance(value, bytes):
        return value.decode()
    return "" if value is None else str(value)


def integer(value: Any) -> int:
    """Number of a reply element; nothing and the empty string are 0."""
    if value is None or value in (b"", ""):
        return 0
    return int(float(value))


def stream_entries(reply: Any) -> list[tuple[str, bytes]]:
    """(entry id, value of its only field) of a stream read, whichever shape the client library gave the fields."""
    found = []
    for entry_id, pairs in reply or []:
        values = list(pairs.values()) if isinstance(pairs, dict) else list(pairs or [])[1::2]
        if values:
            found.append((string(entry_id), values[0]))
    return found


def hash_pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """(field, value) of a whole hash, whichever shape the client library gave it."""
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Submission:
    """`is_duplicate`: the id or the idempotency key was known already; `job_id` is then the first one's."""

    job_id: str
    is_duplicate: bool
    state: JobState


@dataclass(frozen=True, slots=True)
class Hello:
    """`incarnation` is "<counter>.<nonce>"; `num_recovered` jobs of this worker's dead predecessors were requeued.

    `last_step` is the last step that Redis has of this incarnation: 0, unless a nonce said hello again. The next call
    carries it as `previous` and a higher number as `step`.
    """

    incarnation: str
    num_recovered: int
    last_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A job that now belongs to the calling incarnation. `num_tokens` is the end of its log: go on from there.

    `attempts` counts workers that died while running it without adding a token; above zero the job is a suspect and
    runs its first step without new company. (How often it was taken is `JobRecord.attempts`.) `job.view` is filled.
    """

    job: Job
    epoch: int
    attempts: int
    num_tokens: int
    gateways: list[str]
    cancel_reason: str
    deadline_ms: int

    @property
    def cancelling(self) -> bool:
        return self.cancel_reason != ""

    @property
    def is_suspect(self) -> bool:
        return self.attempts > 0


@dataclass(frozen=True, slots=True)
class Owned:
    """A job that Redis thinks this incarnation owns. `cancel_reason`: "" | "cancelled" | "expired"."""

    job_id: str
    epoch: int
    cancel_reason: str
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one job for its log; `payload` is `wire.encode_columns` of them."""

    job_id: str
    epoch: int
    start: int
    end: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one job. `tail` is `wire.encode_columns` of tokens [start, end) that no chunk carried, or b"".

    `end` is the total number of tokens. A cancel that Redis knows of turns any `state` into cancelled (or expired).
    """

    job_id: str
    epoch: int
    start: int
    end: int
    tail: bytes = b""
    state: JobState
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCall:
    """Everything one engine step (or several merged ones) has to say, in one call.

    `step` numbers calls of this incarnation from 1, `previous` is the last one that was answered, `min_step` the oldest
    one whose tokens are not all in logs yet: older entries of the write-ahead stream go. `frame` is `wire.encode_frame`
    of all new tokens, b"" for a mere heartbeat; `gateway_frames` holds the part that each following gateway gets.
    """

    step: int
    previous: int
    min_step: int
    frame: bytes = b""
    control_cursor: str = "0-0"
    gateway_frames: dict[str, bytes] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Control:
    """`verb`: "cancel" | "expire" | "attach" | "detach" | "drain" | "adapters"; `gateway` for attach and detach."""

    cursor: str
    verb: str
    job_id: str
    gateway: str


@dataclass(frozen=True, slots=True)
class StepReply:
    """`lost`: jobs that are not (or no longer) this incarnation's: drop them. `dead_gateways` heard nothing.

    `is_duplicate`: Redis had this step already and wrote nothing. `control_cursor` goes into the next call.
    """

    is_duplicate: bool
    controls: list[Control]
    lost: list[str]
    dead_gateways: list[str]
    control_cursor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One worker for people and metrics. `state`: loading | ready | draining. `stats` is what its last step call said.

    While loading, `phase`, `done` and `total` tell how far it is. Sizes of the KV pool are in blocks.
    """

    id: str
    incarnation: str = ""
    lane: str = ""
    pid: int = 0
    host: str = ""
    model: str = ""
    state: str = "ready"
    running: int = 0
    waiting: int = 0
    kv_free: int = 0
    kv_total: int = 0
    tokens: int = 0
    started_ms: int = 0
    phase: str = ""
    done: int = 0
    total: int = 0
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key without its text, which only its creator ever saw. `digest` is the sha256 of the text in hex."""

    key_id: str
    tenant: str
    name: str
    created_ms: int
    digest: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    job_id: str
    failed_ms: int
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFinding:
    """What a worker found of an adapter: `error`, one sentence, or all the rest.

    `place` is its source so precisely that it stays the same: an absolute folder, or a hub id with the commit.
    """

    digest: str = ""
    rank: int = 0
    place: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """One registered adapter of a lane. `state`: loading | ready | failed; `found` is empty while it is loading.

    `token` names the registration, `source` is what the operator wrote.
    """

    name: str
    source: str
    token: str
    state: str
    found: AdapterFinding
    created_ms: int

    @property
    def adapter(self) -> Adapter:
        """As jobs carry it."""
        return Adapter(self.name, self.found.place, self.found.digest)


def decode_adapter(name: str, data: bytes) -> AdapterEntry:
    """An entry as the atomic functions write it.

    Raises:
        WireError: it is something else.
    """
    fields = wire.unpack(data)
    try:
        found = AdapterFinding(**{key: fields[key] for key in ("digest", "rank", "place", "error")})
        own = {key: fields[key] for key in ("source", "token", "state")}
        return AdapterEntry(name=name, **own, found=found, created_ms=fields["created"])
    except (KeyError, TypeError) as error:
        raise WireError(f"not an adapter: {error}") from error


_WORKER_FIELDS = {item.name for item in fields(WorkerInfo)}


def encode_worker(info: WorkerInfo) -> bytes:
    return wire.pack([wire.VERSION, "worker", asdict(info)])


def decode_worker(data: bytes) -> WorkerInfo:
    """Inverse of `encode_worker`; fields that a newer version added are ignored.

    Raises:
        WireError: if it is not a worker record of this version.
    """
    value = wire.unpack(data)
    if not isinstance(value, list) or value[:2] != [wire.VERSION, "worker"]:
        raise WireError("not a worker record of this version")
    return WorkerInfo(**{name: item for name, item in value[2].items() if name in _WORKER_FIELDS})


def stats_of(data: Any) -> dict[str, float]:
    """Counters that a step call carried; empty before the first one."""
    stats: dict[str, float] = wire.unpack(data) if data else {}
    return stats
