"""Every Redis key and channel name, one function each.

All keys of one lane share the hash tag `{lane}`, so that an atomic function may touch them wherever the lane lives.
Names contain only identifiers of ours (lanes, job ids, tenants, worker ids, digests), never text of a client.
"""

from __future__ import annotations

import hashlib
import re

CLASSES = (0, 1, 2)
"""Resume, interactive, batch: `common.job.DispatchClass`."""

LANE = re.compile(r"[a-z2-7]{6}")
JOB_ID = re.compile(r"[a-z2-7]{28}(\.[0-9]{1,3})?")
TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
WORKER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def tag(lane: str) -> str:
    """The prefix of all keys of a lane, which is also what its functions take as their only key."""
    return "{" + lane + "}"


def record(lane: str, job_id: str) -> str:
    return f"{tag(lane)}:j:{job_id}"


def body(lane: str, job_id: str) -> str:
    return f"{tag(lane)}:r:{job_id}"


def log(lane: str, job_id: str) -> str:
    return f"{tag(lane)}:o:{job_id}"


def followers(lane: str, job_id: str) -> str:
    return f"{tag(lane)}:sub:{job_id}"


def followed(lane: str, gateway: str) -> str:
    return f"{tag(lane)}:gj:{gateway}"


def gateways(lane: str) -> str:
    return f"{tag(lane)}:gws"


def erased(lane: str, job_id: str) -> str:
    return f"{tag(lane)}:x:{job_id}"


def dispatch(lane: str, dispatch_class: int) -> str:
    return f"{tag(lane)}:q:{dispatch_class}"


def suspects(lane: str) -> str:
    return f"{tag(lane)}:q:s"


def backlog(lane: str, dispatch_class: int, tenant: str) -> str:
    return f"{tag(lane)}:bk:{dispatch_class}:{tenant}"


def virtual_time(lane: str, dispatch_class: int) -> str:
    return f"{tag(lane)}:vt:{dispatch_class}"


def virtual_floor(lane: str, dispatch_class: int) -> str:
    return f"{tag(lane)}:vf:{dispatch_class}"


def tenant_live(lane: str, tenant: str) -> str:
    return f"{tag(lane)}:tj:{tenant}"


def tenant_index(lane: str, tenant: str) -> str:
    return f"{tag(lane)}:ti:{tenant}"


def idempotency(lane: str, tenant: str, key_digest: str) -> str:
    return f"{tag(lane)}:idem:{tenant}:{key_digest}"


def queued_tokens(lane: str) -> str:
    return f"{tag(lane)}:qtok"


def deadlines(lane: str) -> str:
    return f"{tag(lane)}:dl"


def orphans(lane: str) -> str:
    return f"{tag(lane)}:or"


def expiries(lane: str) -> str:
    return f"{tag(lane)}:xp"


def dead_letters(lane: str) -> str:
    return f"{tag(lane)}:dlq"


def audit(lane: str) -> str:
    return f"{tag(lane)}:ev"


def counters(lane: str) -> str:
    return f"{tag(lane)}:m"


def rate(lane: str) -> str:
    return f"{tag(lane)}:rate"


def bell(lane: str) -> str:
    return f"{tag(lane)}:bell"


def last_life(lane: str) -> str:
    return f"{tag(lane)}:up"


def model(lane: str) -> str:
    return f"{tag(lane)}:model"


def fingerprint(lane: str) -> str:
    return f"{tag(lane)}:fp"


def adapters(lane: str) -> str:
    return f"{tag(lane)}:ad"


def incarnations(lane: str) -> str:
    return f"{tag(lane)}:ws"


def incarnation_counter(lane: str) -> str:
    return f"{tag(lane)}:inc"


def worker(lane: str, worker_id: str) -> str:
    return f"{tag(lane)}:w:{worker_id}"


def owned(lane: str, worker_id: str, incarnation: str) -> str:
    return f"{tag(lane)}:own:{worker_id}.{incarnation}"


def write_ahead(lane: str, worker_id: str, incarnation: str) -> str:
    return f"{tag(lane)}:wal:{worker_id}.{incarnation}"


def control(lane: str, worker_id: str, incarnation: str) -> str:
    return f"{tag(lane)}:ctl:{worker_id}.{incarnation}"


def channel(lane: str, gateway: str) -> str:
    """Pub/sub channel of one gateway in one lane."""
    return f"{tag(lane)}:gw:{gateway}"


LANES = "fleet:lanes"
API_KEYS = "fleet:keys"
WORKERS = "fleet:workers"


def tokenizer(digest: str) -> str:
    return f"fleet:tokenizer:{digest}"


def worker_report(worker_id: str) -> str:
    return f"fleet:worker:{worker_id}"


def digest_of(text: str) -> str:
    """32 hex digits that stand for a client's text in a key name."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def lane_of_job(job_id: str) -> str:
    """A job id begins with its lane, so any process finds its keys without a look-up."""
    return job_id[:6]
