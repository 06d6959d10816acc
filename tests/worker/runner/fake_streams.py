"""Streams that are as late and as far out of order as a GPU's may be, over tensors of the CPU.

Work waits in a queue for each stream. A seed decides which stream goes on when, and how far the device runs behind the
host: only first in, first out on each stream and waits for events are kept. Whoever synchronises gets the event, and
perhaps not a thing more. So a wait that is missing shows: as numbers of another step, or memory nobody filled.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from worker.runner.streams import Stream, Work

POISON = -559038737
"""What host memory holds that nobody wrote."""

HOST = "host"
ALL_WAITS = {
    (Stream.COPY_IN, Stream.COMPUTE),
    (Stream.COMPUTE, Stream.COPY_OUT),
    (Stream.COPY_OUT, HOST),
}
"""(who is waited for, who waits): those of the chart in worker/runner/gpu_device.py."""


class Stuck(AssertionError):
    """Every stream waits for another one."""


@dataclass(eq=False)
class FakeEvent:
    streams: FakeStreams
    stream: Stream
    is_done: bool = False

    def synchronize(self) -> None:
        if self.streams.heeds((self.stream, HOST)):
            self.streams.run_until(self)


@dataclass
class FakeGraph:
    """Launches the same work over the same memory."""

    work: Work
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.work()


@dataclass
class Loss:
    """Which work of COMPUTE finds no memory, with or without having been launched before that is known: of so many
    steps in a row, at most."""

    rng: random.Random
    share: float
    most_in_a_row: int = 2
    num_lost: int = 0
    _num_in_a_row: int = 0
    _num_good: int = 0

    def strikes(self) -> bool:
        is_lost = self._num_in_a_row < self.most_in_a_row and self.rng.random() < self.share
        self.num_lost += is_lost
        self._num_good = 0 if is_lost else self._num_good + 1
        if self._num_good == 2:
            # forward pass and sampling of a step
            self._num_in_a_row = 0
        self._num_in_a_row += is_lost
        return is_lost


class FakeStreams:
    """`ignored` is a wait that is left out; the work of stream `late` happens when the next one is launched there."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, ignored: tuple | None = None, late: Stream | None = None) -> None:
        self._rng = random.Random(seed)
        self._queues: dict[Stream, deque] = {stream: deque() for stream in Stream}
        self._haste = self._rng.choice([0.0, 0.2, 0.9])
        self._bias = {stream: self._rng.choice([0.05, 1.0]) for stream in Stream}
        self._ignored, self._late, self._held = ignored, late, None
        self.waits: set[tuple] = set()
        self.graphs: list[FakeGraph] = []
        self.loss: Loss | None = None
        self.num_tidied = self.most_queued = 0
        self.is_inside = False
        self.astray: list[str] = []

    # What GpuDevice calls.

    def run(self, stream: Stream, work: Work) -> None:
        assert not self.astray, "of these nobody knows when they happen"
        is_lost = stream is Stream.COMPUTE and self.loss is not None and self.loss.strikes()
        if is_lost and self._rng.random() < 0.5:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate a lot.")
        if stream is self._late:
            work, self._held = self._held, work
        if work is not None:
            self._push(stream, work)
        if is_lost:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate a lot.")

    @contextmanager
    def at_once(self, stream: Stream) -> Iterator[None]:
        before, self.is_inside = self.is_inside, True
        yield
        self.is_inside = before

    def record(self, stream: Stream) -> FakeEvent:
        event = FakeEvent(self, stream)
        self._push(stream, event)
        return event

    def wait(self, stream: Stream, event: FakeEvent) -> None:
        assert event.stream is not stream
        if self.heeds((event.stream, stream)):
            self._push(stream, ("until", event))

    def drain(self) -> None:
        while any(self._queues.values()):
            self._go_on(lazily=None)
        self.astray.clear()

    def tidy(self) -> None:
        assert not any(self._queues.values()), "memory is given back while streams use it"
        self.num_tidied += 1

    def host_buffer(self, num_words: int) -> Tensor:
        return torch.from_numpy(np.full(num_words, POISON, np.int32))

    def capture(self, work: Work, beside: FakeGraph | None) -> FakeGraph:
        assert not self.astray, "of these nobody knows when they happen"
        assert beside is None or beside in self.graphs
        self.drain()
        with self.at_once(Stream.COMPUTE):
            work()
        self.graphs.append(FakeGraph(work))
        return self.graphs[-1]

    # How it goes on.

    def heeds(self, wait: tuple) -> bool:
        self.waits.add(wait)
        return wait != self._ignored

    def run_until(self, event: FakeEvent) -> None:
        while not event.is_done:
            self._go_on(lazily=event.stream)

    def _push(self, stream: Stream, item) -> None:
        self._queues[stream].append(item)
        self.most_queued = max(self.most_queued, sum(map(len, self._queues.values())))
        while self._rng.random() < self._haste and self._ready():
            self._run_head(self._pick())

    def _go_on(self, lazily: Stream | None) -> None:
        """One piece of work, of whichever stream; or of the one that is needed, and those that it waits for."""
        if not self._ready():
            raise Stuck(str(self._queues))
        if lazily is None or self._rng.random() < self._haste:
            self._run_head(self._pick())
            return
        while (awaited := self._awaited(lazily)) is not None:
            lazily = awaited.stream
        self._run_head(lazily)

    def _ready(self) -> list[Stream]:
        return [stream for stream, queue in self._queues.items() if queue and self._awaited(stream) is None]

    def _pick(self) -> Stream:
        ready = self._ready()
        return self._rng.choices(ready, [self._bias[stream] for stream in ready])[0]

    def _awaited(self, stream: Stream) -> FakeEvent | None:
        head = self._queues[stream][0]
        return head[1] if isinstance(head, tuple) and not head[1].is_done else None

    def _run_head(self, stream: Stream) -> None:
        head = self._queues[stream].popleft()
        if isinstance(head, FakeEvent):
            head.is_done = True
        elif not isinstance(head, tuple):
            with self.at_once(stream):
                head()


class DefaultStream(TorchDispatchMode):
    """Notes as `astray` what writes and is given to none of `streams`: until they are drained nobody knows when it
    happens."""

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self._streams.is_inside and not function.is_view and not function.name().startswith("aten::empty"):
            self._streams.astray.append(function.name())
        return function(*args, **(kwargs or {}))
