"""Several jobs behind one answer: the prompts of one /v1/completions request, waited for or streamed together.

Every event of the common stream carries the offsets of all its jobs as SSE id (`a.b.c`); each job can be followed alone
under its own id from its own offset.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common.errors import InferfleetError, Unavailable
from common.job import JobRecord, TokenColumns, Usage
from common.store.jobs import new_job_id
from gateway.dependencies import public_id
from gateway.formats.base import JobDraft, ServerEvent, end_error
from gateway.formats.completion import CompletionRenderer
from gateway.hub import End, Follower, Rewind, Tokens
from gateway.routes.door import Admitted, Call
from gateway.streaming import COMMENT, RETRY_LINE, STREAM_HEADERS, encode_event

log = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 64


async def _admit(call: Call, drafts: Sequence[JobDraft], admitted: list[Admitted]) -> AsyncIterator[Admitted]:
    """Submit one draft after the other, as the children `<id>.<k>` of one id. Whoever iterates must follow each child
    before asking for the next one, or its first tokens pass by."""
    parent = new_job_id(drafts[0].lane)
    for index, draft in enumerate(drafts):
        one = await call.admit(draft, job_id=f"{parent}.{index}", child=index)
        admitted.append(one)
        yield one


async def _cancel(call: Call, admitted: Sequence[Admitted]) -> None:
    """End what this request began; jobs of an earlier one with the same key may have a client. When Redis cannot be
    reached either, they end with their grace."""
    with suppress(InferfleetError):
        for one in admitted:
            if not one.is_replay:
                await call.services.jobs.cancel(one.job_id)


async def results_of_all(
    call: Call, drafts: Sequence[JobDraft]
) -> tuple[list[Admitted], list[tuple[JobRecord, TokenColumns]]]:
    """Submit all drafts and wait for their ends, in order. When one is refused or fails, the others are cancelled.

    Raises:
        RequestError: of the first one that has no complete answer.
    """
    admitted: list[Admitted] = []
    tasks: list[asyncio.Task[tuple[JobRecord, TokenColumns]]] = []
    try:
        async for one in _admit(call, drafts, admitted):
            tasks.append(asyncio.create_task(call.result(one)))
        return admitted, list(await asyncio.gather(*tasks))
    except InferfleetError:
        await _cancel(call, admitted)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Ended:
    """One job is over; without a complete answer `record` is None."""

    record: JobRecord | None


Queue = asyncio.Queue[tuple[int, ServerEvent | _Ended]]


@dataclass(slots=True)
class _Branch:
    """One job of the stream. It ends with exactly one `_Ended` in the queue."""

    index: int
    follower: Follower
    renderer: CompletionRenderer

    async def run(self, queue: Queue) -> None:
        record = None
        try:
            async for event in self._events():
                if isinstance(event, JobRecord):
                    record = event
                else:
                    await queue.put((self.index, event))
        except InferfleetError as error:
            log.warning("a stream of several jobs broke", extra={"job_id": self.follower.job_id, "reason": str(error)})
        broken = Unavailable("the stream was interrupted", code="interrupted")
        for closing in [self.renderer.error_event(broken)] if record is None else self.renderer.finish(record):
            await queue.put((self.index, closing))
        is_complete = record is not None and end_error(record) is None
        await queue.put((self.index, _Ended(record if is_complete else None)))

    async def _events(self) -> AsyncIterator[ServerEvent | JobRecord]:
        """Events up to the last token, then the final record. Without it the stream broke, as after a rewind."""
        for event in self.renderer.start():
            yield event
        async for item in self.follower:
            if isinstance(item, Rewind):
                return
            if isinstance(item, End):
                yield item.record
            for event in self.renderer.tokens(item.columns) if isinstance(item, Tokens) else ():
                yield event


class _ManyStreams(StreamingResponse):
    """Follows its jobs until it is over, also when the client leaves before the first byte."""

    def __init__(
        self, branches: Sequence[_Branch], stack: AsyncExitStack, keep_alive_s: float, headers: dict[str, str]
    ) -> None:
        content = _merged(branches, keep_alive_s)
        super().__init__(content, media_type="text/event-stream", headers={**STREAM_HEADERS, **headers})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def many_streams(call: Call, drafts: Sequence[JobDraft]) -> Response:
    """Submit all drafts and stream their chunks together, told apart by the index of their choice.

    Raises:
        RequestError: one is refused; those before it are cancelled.
    """
    stack, admitted, branches = AsyncExitStack(), list[Admitted](), list[_Branch]()
    special_ids = frozenset(call.special_ids(drafts[0].lane))
    try:
        async for one in _admit(call, drafts, admitted):
            follow = call.services.hub.follow(one.job_id, 0, tenant=call.tenant, submitted=one.submitted)
            follower = await stack.enter_async_context(follow)
            branches.append(_Branch(len(branches), follower, CompletionRenderer(follower.record, special_ids)))
    except BaseException:
        # a client that leaves now cancels this: nobody may stay followed, no prompt may run on
        await stack.aclose()
        await _cancel(call, admitted)
        raise
    return _ManyStreams(branches, stack, call.services.settings.keep_alive, headers_of_all(call, admitted))


def headers_of_all(call: Call, admitted: Sequence[Admitted]) -> dict[str, str]:
    """As of one job, with the ids of all."""
    return call.headers(admitted[0]) | {"x-job-id": ", ".join(public_id(one.job_id) for one in admitted)}


async def _merged(branches: Sequence[_Branch], keep_alive_s: float) -> AsyncIterator[bytes]:
    queue: Queue = asyncio.Queue(MAX_WAITING_EVENTS)
    tasks = [asyncio.create_task(branch.run(queue)) for branch in branches]
    try:
        yield RETRY_LINE
        async for data in _drain(branches, queue, keep_alive_s):
            yield data
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(branches: Sequence[_Branch], queue: Queue, keep_alive_s: float) -> AsyncIterator[bytes]:
    offsets = ["0"] * len(branches)
    ended: list[_Ended] = []
    while len(ended) < len(branches):
        try:
            index, item = await asyncio.wait_for(queue.get(), keep_alive_s)
        except TimeoutError:
            yield COMMENT
            continue
        if isinstance(item, _Ended):
            ended.append(item)
            continue
        offsets[index] = item.id or offsets[index]
        yield encode_event(ServerEvent(item.data, id=".".join(offsets)))
    for event in _closing(branches, ended):
        yield encode_event(ServerEvent(event.data, id=".".join(offsets)))


def _closing(branches: Sequence[_Branch], ended: Sequence[_Ended]) -> list[ServerEvent]:
    """Usage of all together, if asked for and all are complete; then `[DONE]`."""
    renderer = branches[0].renderer
    records = [one.record for one in ended if one.record is not None]
    if not renderer.view["include_usage"] or len(records) < len(branches):
        return [renderer.done()]
    prompt_tokens = sum(record.prompt_tokens for record in records)
    completion_tokens = sum(record.num_tokens for record in records)
    return [renderer.usage_event(Usage(prompt_tokens, completion_tokens)), renderer.done()]
