"""A job's events as server-sent events, and waiting for its end; both notice when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.background import end
from common.errors import Rewound
from common.job import Job, JobRecord, TokenColumns
from gateway.dependencies import AccessEntry, Services, access_entry, public_id
from gateway.formats.base import Renderer, ServerEvent
from gateway.formats.jobs import JobEvents
from gateway.hub import End, Event, Follower, Rewind, Status, Stopped, Tokens, stopping

# no blank line after either: OpenAI's client would take it for an event without data
RETRY_LINE = b"retry: 1000\n"
COMMENT = b":\n"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

RendererFactory = Callable[[JobRecord], Renderer | JobEvents]
Value = TypeVar("Value")


def encode_event(event: ServerEvent) -> bytes:
    """One event as it goes over the wire."""
    data, event_id, kind = event
    lines = "" if event_id is None else f"id: {event_id}\n"
    lines += "" if kind is None else f"event: {kind}\n"
    return b"%bdata: %b\n\n" % (lines.encode(), data)


async def render(renderer: Renderer | JobEvents, follower: Follower, event: Event) -> list[ServerEvent]:
    """What a renderer makes of one event of the hub."""
    match event:
        case Tokens(columns):
            return renderer.tokens(columns)
        case End(record):
            if isinstance(renderer, JobEvents):
                return renderer.done(record, await follower.columns())
            return renderer.end(record)
        case Status(state, attempts, cancelling) if isinstance(renderer, JobEvents):
            return renderer.status(state, attempts, cancelling=cancelling)
        case Rewind(end):
            if isinstance(renderer, JobEvents):
                return renderer.rewind(end)
            return renderer.error(Rewound(f"tokens from offset {end} on were lost", code="rewound"))
    return []


def is_last(renderer: Renderer | JobEvents, event: Event) -> bool:
    """Whether the stream ends with this event."""
    return isinstance(event, End | Stopped) or (isinstance(event, Rewind) and not isinstance(renderer, JobEvents))


async def sse_response(
    request: Request,
    services: Services,
    job_id: str,
    renderer_factory: RendererFactory,
    *,
    start: int = 0,
    tenant: str | None = None,
    submitted: Job | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """A response that streams the events of a job from offset `start` until its end, the client's, or ours.

    The job is followed before this returns, so that a refusal has its real status. `submitted`: the job itself when
    this gateway has just submitted it with itself as follower (and it is no duplicate): saves asking Redis for it.

    Raises:
        NotFound, OffsetBeyondEnd, StoreUnavailable: as `Hub.follow`.
    """
    stack = AsyncExitStack()
    try:
        following = services.hub.follow(job_id, start, tenant=tenant, submitted=submitted)
        follower = await stack.enter_async_context(following)
        renderer = renderer_factory(follower.record)
        if start and not isinstance(renderer, JobEvents):
            renderer.prefix(await _first(follower, start))
    except BaseException:
        # until the stream exists nobody else lets go of the job, also when the client leaves meanwhile
        await stack.aclose()
        raise
    stream = EventStream(
        follower, renderer, stack, access_entry(request), services.settings.keep_alive, is_new=not start
    )
    stream.headers["x-job-id"] = public_id(job_id)
    stream.headers["x-inferfleet-gateway"] = services.gateway_id
    stream.headers.update(headers or {})
    return stream


async def _first(follower: Follower, end: int) -> TokenColumns:
    """Tokens [0, end), which the client has already."""
    columns = await follower.columns()
    tops = None if columns.top_tokens is None else columns.top_tokens[:end]
    return TokenColumns(0, columns.ids[:end], columns.pieces[:end], columns.logprobs[:end], tops)


class EventStream(Response):
    """The body is written as events come; all that are ready at one moment go out in one write."""

    media_type = "text/event-stream"

    def __init__(
        self,
        follower: Follower,
        renderer: Renderer | JobEvents,
        stack: AsyncExitStack,
        entry: AccessEntry,
        keep_alive_s: float,
        *,
        is_new: bool,
    ) -> None:
        self.follower, self.renderer, self.stack, self.entry = follower, renderer, stack, entry
        self.keep_alive_s, self.is_new = keep_alive_s, is_new
        self.status_code = 200
        self.background = None
        self.init_headers({**STREAM_HEADERS, "content-type": "text/event-stream; charset=utf-8"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stack:
            try:
                await _unless_disconnected(receive, self._pump(send))
            except ClientDisconnect:
                self.entry.error = "client disconnected"
            finally:
                note_job(self.entry, self.follower)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        opening = self.renderer.start() if self.is_new else []
        await _write(send, RETRY_LINE + b"".join(map(encode_event, opening)))
        is_over = False
        while not is_over:
            event = await self.follower.next(self.keep_alive_s)
            data, is_over = (COMMENT, False) if event is None else await self._encode(event)
            if data or is_over:
                await _write(send, data, more=not is_over)

    async def _encode(self, first: Event) -> tuple[bytes, bool]:
        """This event and all that are ready behind it, and whether the stream ends with them."""
        parts: list[bytes] = []
        for event in (first, *self.follower.ready()):
            if isinstance(event, Tokens):
                parts += map(encode_event, self.renderer.tokens(event.columns))
                continue
            parts += map(encode_event, await render(self.renderer, self.follower, event))
            if is_last(self.renderer, event):
                return b"".join(parts), True
        return b"".join(parts), False


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working, watch = asyncio.create_task(work), asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait({working, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await end(working, watch)


async def wait_for_result(
    request: Request,
    services: Services,
    job_id: str,
    *,
    timeout_s: float | None = None,
    tenant: str | None = None,
    submitted: Job | None = None,
) -> tuple[JobRecord, TokenColumns]:
    """Wait for the end of a job, at most `timeout_s` seconds; its record and all its tokens as they are then.

    A job without a grace left is cancelled by its worker once this client is gone. `submitted` as in `sse_response`.

    Raises:
        NotFound, StoreUnavailable: as `Hub.follow`.
        ClientDisconnect: the client went away.
        Unavailable: this gateway stops.
    """
    async with services.hub.follow(job_id, tenant=tenant, submitted=submitted) as follower:
        try:
            await _unless_disconnected(request.receive, follower.ended(timeout_s))
            if services.hub.is_stopping and not follower.record.state.is_terminal:
                raise stopping()
            return follower.record, await follower.columns()
        finally:
            note_job(access_entry(request), follower)


def note_job(entry: AccessEntry, follower: Follower) -> None:
    """Tell the access log how far the job was when its client was served."""
    entry.record, entry.num_tokens = follower.record, follower.num_tokens
    entry.first_token_ms = follower.first_token_ms
