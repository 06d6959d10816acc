"""What routes share: the services of this process, reading of bodies and ids, and what the access log learns."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection, Request

from common.errors import BadRequest, ValidationError
from common.job import JobRecord
from common.settings import GatewaySettings
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from gateway.formats.fields import parse_json
from gateway.hub import Hub, unknown_job
from gateway.models import ModelRegistry

if TYPE_CHECKING:
    from gateway.admission import Admission
    from gateway.auth import KeyRing
    from gateway.metrics import Metrics

PREFIXES = ("chatcmpl-", "cmpl-", "job_", "resp_")
JOB_ID = re.compile(r"[a-z2-7]{28}(\.[0-9]{1,3})?")
IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(slots=True)
class Services:
    """Everything a route may use; `app.state.services` holds the one of this process."""

    settings: GatewaySettings
    gateway_id: str
    connection: Connection
    jobs: JobStore
    fleet: FleetStore
    hub: Hub
    registry: ModelRegistry
    admission: Admission
    keys: KeyRing
    metrics: Metrics


@dataclass(slots=True)
class AccessEntry:
    """What the access log says of one request. Routes and streams fill in the job."""

    request_id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    tenant: str = ""
    error: str = ""
    record: JobRecord | None = None
    num_tokens: int = 0
    first_token_ms: int = 0


async def services(connection: HTTPConnection) -> Services:
    """Dependency of HTTP and WebSocket routes; async, because FastAPI runs others in a thread each time."""
    found: Services = connection.app.state.services
    return found


def access_entry(connection: HTTPConnection) -> AccessEntry:
    """The access log's entry of this request."""
    entry: AccessEntry = connection.scope["access_entry"]
    return entry


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Dependency of routes that take one.

    Raises:
        UnsupportedMediaType, BadRequest, ValidationError: as `parse_json`.
        PayloadTooLarge: more than `--payload-limit` bytes came.
    """
    return parse_json(await request.body(), request.headers.get("content-type"))


def bare_id(text: str) -> str:
    """The id of a job as it is on Redis, from any of its public forms.

    Raises:
        NotFound: it cannot be one.
    """
    found = text
    for prefix in PREFIXES:
        if text.startswith(prefix):
            found = text.removeprefix(prefix)
            break
    if not JOB_ID.fullmatch(found):
        raise unknown_job(text)
    return found


def public_id(job_id: str) -> str:
    return f"job_{job_id}"


def idempotency_key(request: Request) -> str:
    """The header `Idempotency-Key`, empty without one.

    Raises:
        ValidationError: it is not 1 to 255 printable ASCII characters.
    """
    value = request.headers.get("idempotency-key")
    if value is None:
        return ""
    if not IDEMPOTENCY_KEY.fullmatch(value):
        raise ValidationError("Idempotency-Key must be 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return value


def query_integer(connection: HTTPConnection, name: str, default: int, *, low: int = 0, high: int = 2**40) -> int:
    """An integer of the query.

    Raises:
        BadRequest: it is none, or out of [low, high].
    """
    text = connection.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,13}", text) or not low <= int(text) <= high:
        raise BadRequest(f"`{name}` must be an integer from {low} to {high}", code="invalid_query", param=name)
    return int(text)
