"""Puts a workload to a server and takes down what came back when."""

from __future__ import annotations

import asyncio
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import orjson
import uvloop

from ops.loadgen.answer import Answer
from ops.loadgen.http import Connection, EventReader, ExchangeError, Pool
from ops.loadgen.result import LoadResult
from ops.loadgen.target import ROUTES, Route, Target, error_text
from ops.loadgen.workload import Ask, Supply, Workload, arrival_times

OK = 200
EVENT_STREAM = b"text/event-stream"
MAX_REFUSAL_BYTES = 1 << 16
PAUSE_AFTER_FAILURE_S = 0.1
"""A client that was refused would otherwise come back at once and be measured as load."""
SHOW_EVERY_S = 0.5


class Running(ABC):
    """A run of a workload: its answers so far, those outstanding, and since when it is measured."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.answers: list[Answer] = []
        self.most_open = 0
        self.started = 0.0
        self._supply = Supply(workload)

    @property
    @abstractmethod
    def num_open(self) -> int: ...

    def _begin(self) -> None:
        self.answers.clear()
        self.most_open = 0
        self.started, self._cpu_s = time.perf_counter(), time.process_time()

    def _result(self, is_interrupted: bool) -> LoadResult:
        if not self.started:
            # interrupted while it warmed up
            self._begin()
        duration_s = self.workload.duration_s if self._supply.is_out_of_time else None
        return LoadResult(
            answers=self.answers,
            started=self.started,
            duration_s=time.perf_counter() - self.started if is_interrupted else duration_s,
            most_open=self.most_open,
            cpu_s=time.process_time() - self._cpu_s,
            is_interrupted=is_interrupted,
        )


OnProgress = Callable[[Running], None]


class _Listener:
    """Reads the body of one response into an answer, or keeps the beginning of what is no stream of events."""

    def __init__(self, route: Route, answer: Answer, connection: Connection) -> None:
        self._route, self._answer, self._connection = route, answer, connection
        self._events = EventReader()
        self.refusal = b""

    @functools.cached_property
    def is_stream(self) -> bool:
        """Asked when the head of the response is there."""
        connection = self._connection
        return connection.status == OK and connection.headers.get(b"content-type", b"").startswith(EVENT_STREAM)

    @property
    def has_begun(self) -> bool:
        return self._connection.has_answered

    def __call__(self, body: bytes, now: float) -> None:
        answer, num_texts = self._answer, 0
        answer.ended = now
        if not self.is_stream:
            self.refusal += body[: MAX_REFUSAL_BYTES - len(self.refusal)]
            return
        for data in self._events.feed(body):
            try:
                num_texts += self._route.read(data, answer)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ExchangeError("unknown event", data.decode(errors="replace")) from None
        if num_texts:
            answer.note_text(now, num_texts)

    def judge(self) -> None:
        """What an exchange that has ended in good order says of the answer."""
        text = self.refusal.decode(errors="replace")
        if self._connection.status != OK:
            self._answer.fail(f"HTTP {self._connection.status}", _sentence(text))
        elif not self.is_stream:
            self._answer.fail("not an event stream", text)
        elif not self._answer.is_complete:
            self._answer.fail("broken stream", "the answer stopped without its end")


def _sentence(text: str) -> str:
    try:
        return error_text(orjson.loads(text))
    except ValueError:
        return text


class Client:
    """Asks one server, on as many connections as are needed at once."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._route = ROUTES[target.api]
        self._pool = Pool(target.host, target.port, is_secure=target.is_secure)

    async def ask(self, ask: Ask, due: float) -> Answer:
        """The answer, whatever became of it. `due` is when it was to be asked."""
        return await self.fill(Answer(ask.max_tokens, due), ask)

    async def fill(self, answer: Answer, ask: Ask) -> Answer:
        """As `ask`, with an answer that others may look at while it comes."""
        request, listeners = self.target.request(ask), []

        def listen(connection: Connection) -> _Listener:
            listeners.append(_Listener(self._route, answer, connection))
            return listeners[-1]

        answer.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._pool.exchange(request, listen)
            listeners[-1].judge()
        except ExchangeError as error:
            is_broken = error.kind == "connection lost" and bool(listeners) and listeners[-1].has_begun
            answer.fail("broken stream" if is_broken else error.kind, str(error))
        except TimeoutError:
            answer.fail("timeout", f"no end after {self.timeout_s:g} s")
        if answer.error:
            answer.ended = time.perf_counter()
        return answer

    def close(self) -> None:
        self._pool.close()


class Load(Running):
    """`answers` are those that have ended."""

    def __init__(self, target: Target, workload: Workload) -> None:
        super().__init__(workload)
        self._num_open = 0
        self._client = Client(target, workload.timeout_s)

    @property
    def num_open(self) -> int:
        return self._num_open

    async def run(self, on_progress: OnProgress | None = None) -> LoadResult:
        """Warm up, then measure. When it is cancelled, what came so far is the result."""
        is_interrupted = False
        try:
            await self._closed(functools.partial(next, iter(self.workload.warmup), None))
            self._begin()
            async with asyncio.TaskGroup() as group:
                showing = group.create_task(_show(self, on_progress))
                await self._measured()
                showing.cancel()
        except asyncio.CancelledError:
            is_interrupted = True
        finally:
            self._client.close()
        return self._result(is_interrupted)

    async def _measured(self) -> None:
        if self.workload.rate is None:
            await self._closed(self._next)
        else:
            await self._open(self.workload.rate)

    def _next(self) -> Ask | None:
        return self._supply.next(time.perf_counter() - self.started)

    async def _closed(self, next_ask: Callable[[], Ask | None]) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.workload.clients):
                group.create_task(self._one_client(next_ask))

    async def _one_client(self, next_ask: Callable[[], Ask | None]) -> None:
        while (ask := next_ask()) is not None:
            answer = await self._ask(ask, time.perf_counter())
            if answer.error:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _open(self, rate: float) -> None:
        async with asyncio.TaskGroup() as group:
            for offset in arrival_times(rate, self.workload.seed):
                if (ask := self._supply.next(offset)) is None:
                    return
                due = self.started + offset
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(self._ask(ask, due))

    async def _ask(self, ask: Ask, due: float) -> Answer:
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        try:
            answer = await self._client.ask(ask, due)
        finally:
            self._num_open -= 1
        self.answers.append(answer)
        return answer


async def _show(load: Load, on_progress: OnProgress | None) -> None:
    while on_progress is not None:
        on_progress(load)
        await asyncio.sleep(SHOW_EVERY_S)


def run_load(target: Target, workload: Workload, on_progress: OnProgress | None = None) -> LoadResult:
    """Put the workload to the server and wait for its end; call it where no event loop runs.

    Failures of single requests are in the result, whatever they are; Ctrl-C ends the run early.
    """
    return uvloop.run(Load(target, workload).run(on_progress))
