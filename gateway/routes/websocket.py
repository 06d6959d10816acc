"""WS /v1/jobs/{id}/ws: the events of one job as JSON text messages.

The handshake is always accepted and a refusal is a close code, because a browser cannot see the status of a refused
handshake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.websockets import WebSocket, WebSocketDisconnect

from common.background import end
from common.errors import (
    BadRequest,
    NotFound,
    OffsetBeyondEnd,
    RequestError,
    StoreError,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from gateway.auth import bearer
from gateway.dependencies import Services, access_entry, bare_id, query_integer, services
from gateway.formats.fields import parse_json
from gateway.formats.jobs import JobEvents, error_event
from gateway.hub import End, Follower, Stopped
from gateway.routes.jobs import special_ids_of
from gateway.streaming import note_job, render

router = APIRouter()
AUTH_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
MAX_BAD_MESSAGES = 10


@dataclass(frozen=True, slots=True)
class Close:
    """How a connection ends. The reason is at most 123 bytes by the protocol."""

    code: int
    reason: str = ""


DONE = Close(1000)
GONE = Close(1005)
OUR_FAULT = Close(1011, "the queue is not available at the moment")
RESTARTING = Close(1012, "this gateway stops: reconnect with from")
BAD_MESSAGES = Close(4400, "too many bad messages")
TOO_SLOW = Close(4408, "nothing was accepted for too long")


def refusal(error: RequestError | StoreError) -> Close:
    """The close code for what would be an HTTP status elsewhere."""
    match error:
        case StoreError():
            return OUR_FAULT
        case Unavailable():
            return RESTARTING
        case OffsetBeyondEnd(num_tokens=num_tokens):
            return Close(4409, str(num_tokens))
        case Unauthorized(message=message):
            return Close(4401, message)
        case NotFound(message=message):
            return Close(4404, message)
    return Close(4400, error.message)


@router.websocket("/v1/jobs/{job_id}/ws")
async def one_job(socket: WebSocket, job_id: str, services: Annotated[Services, Depends(services)]) -> None:
    await socket.accept()
    try:
        close = await _OneJob(socket, services, job_id).run()
    except (RequestError, StoreError) as error:
        close = refusal(error)
    except WebSocketDisconnect:
        close = GONE
    except TimeoutError:
        close = TOO_SLOW
    await _close(socket, close)


async def _close(socket: WebSocket, close: Close) -> None:
    access_entry(socket).status = close.code
    if close is GONE:
        return
    # a client that reads nothing does not get this either; the connection then just ends
    with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await socket.close(close.code, close.reason.encode()[:120].decode(errors="ignore"))


async def _first_of(*works: Coroutine[Any, Any, Close]) -> Close:
    """The result of whichever ends first; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        await end(*tasks)


class _OneJob:
    """One connection. Nothing is buffered for it but what the socket holds: a follower is an offset."""

    def __init__(self, socket: WebSocket, services: Services, job_id: str) -> None:
        self.socket, self.services, self.job_id = socket, services, job_id
        self.num_bad = 0

    async def run(self) -> Close:
        tenant = await self._authenticate()
        access_entry(self.socket).tenant = tenant
        start = query_integer(self.socket, "from", 0)
        async with self.services.hub.follow(bare_id(self.job_id), start, tenant=tenant) as follower:
            try:
                return await _first_of(self._send_events(follower), self._receive(follower.job_id))
            finally:
                note_job(access_entry(self.socket), follower)

    async def _authenticate(self) -> str:
        """By the header of the handshake, or by the first message where a key is needed and no header came.

        Raises:
            Unauthorized: neither is good, or no message came in time.
        """
        keys, text = self.services.keys, bearer(self.socket)
        if text is not None or await keys.is_open():
            return await keys.tenant_of(text)
        try:
            async with asyncio.timeout(AUTH_TIMEOUT_S):
                message = _parse(await self.socket.receive())
        except TimeoutError:
            raise Unauthorized("no key came in time") from None
        except (BadRequest, ValidationError):
            raise Unauthorized("the first message must bring a key") from None
        key = message.get("api_key")
        if message.get("type") != "auth" or not isinstance(key, str):
            raise Unauthorized("the first message must bring a key")
        return await keys.tenant_of(key)

    async def _send_events(self, follower: Follower) -> Close:
        renderer = JobEvents(follower.record, special_ids_of(self.services, follower.job_id))
        async for event in follower:
            for item in await render(renderer, follower, event):
                await self._send(item.data)
            if isinstance(event, Stopped):
                return RESTARTING
            if isinstance(event, End):
                return DONE
        return DONE

    async def _send(self, data: bytes) -> None:
        """Raises TimeoutError when the client takes nothing for a minute."""
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await self.socket.send_text(data.decode())

    async def _receive(self, job_id: str) -> Close:
        while self.num_bad < MAX_BAD_MESSAGES:
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                return GONE
            try:
                await self._obey(_parse(received), job_id)
                self.num_bad = 0
            except RequestError as error:
                self.num_bad += 1
                await self._send(error_event(error, job_id=f"job_{job_id}"))
        return BAD_MESSAGES

    async def _obey(self, message: dict[str, Any], job_id: str) -> None:
        match message.get("type"):
            case "cancel":
                record = await self.services.jobs.cancel(job_id)
                if record is not None:
                    self.services.hub.note(record)
            case "auth":
                pass
            case _:
                raise ValidationError("`type` must be cancel", param="type")


def _parse(received: Any) -> dict[str, Any]:
    """A JSON object from one message.

    Raises:
        WebSocketDisconnect: it is the end of the connection.
        BadRequest, ValidationError: it is no text, or no JSON object.
    """
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code") or GONE.code)
    if received.get("text") is None:
        raise BadRequest("messages are JSON text")
    return parse_json(received["text"].encode())
