"""Around every request: its id, one line in the access log, metrics, and the limit on its body. Plain ASGI."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import PayloadTooLarge
from gateway.dependencies import AccessEntry
from gateway.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
QUIET = ("/health", "/metrics", "/ping")
MAX_PATH = 200

logger = logging.getLogger("gateway.access")


def _header(scope: Scope, name: bytes) -> bytes:
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found


def request_id_of(scope: Scope) -> str:
    """The client's `x-request-id` if it is a sensible one, else a new one."""
    given = _header(scope, b"x-request-id")
    return given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class AccessLog:
    """Gives each request an AccessEntry at `scope["access_entry"]`; logs and counts it when its answer is out."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        entry = AccessEntry(request_id_of(scope), scope.get("method", "WS"), scope["path"])
        scope["access_entry"] = entry

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", entry.request_id.encode())]
            elif message["type"] == "websocket.close":
                entry.status = message.get("code", 1000)
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            self._finish(entry)

    def _finish(self, entry: AccessEntry) -> None:
        entry.status = entry.status or 500
        self.metrics.observe(entry)
        level = logging.DEBUG if entry.path.startswith(QUIET) else logging.INFO
        path = quote(entry.path[:MAX_PATH])
        logger.log(level, "%s %s %d", entry.method, path, entry.status, extra=access_fields(entry))


def access_fields(entry: AccessEntry) -> dict[str, Any]:
    """What the line says beside method, path and status: times in milliseconds, unknown ones left out."""
    fields: dict[str, Any] = {
        "request_id": entry.request_id,
        "duration_ms": round((time.monotonic() - entry.started) * 1000),
    }
    fields |= {"error": entry.error} if entry.error else {}
    fields |= {"tenant": entry.tenant} if entry.tenant else {}
    record = entry.record
    if record is None:
        return fields
    fields |= {"job_id": record.job_id, "tokens": entry.num_tokens, "prompt_tokens": record.prompt_tokens}
    if record.started_ms:
        fields["queue_ms"] = max(record.started_ms - record.created_ms, 0)
    if record.started_ms and entry.first_token_ms:
        fields["prefill_ms"] = max(entry.first_token_ms - record.started_ms, 0)
    if record.finished_ms and entry.first_token_ms:
        fields["decode_ms"] = max(record.finished_ms - entry.first_token_ms, 0)
    return fields | ({"finish_reason": record.finish_reason.value} if record.finish_reason else {})


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, by their declared length or, without one, while they come."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = _header(scope, b"content-length")
        is_too_long = declared.isdigit() and int(declared) > self.limit
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            if is_too_long:
                raise self._refusal()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.limit:
                raise self._refusal()
            return message

        await self.app(scope, limited, send)

    def _refusal(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is longer than {self.limit} bytes")
