"""Streams, events and graphs of a device, as little of them as `GpuDevice` needs.

What runs on one stream runs in order; between streams only events order anything. The host runs ahead of all of them,
and waits for an event where it must read. Tests have another implementation, which delays and reorders whatever these
rules allow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], object]


class Stream(Enum):
    COPY_IN = "copy in"
    COMPUTE = "compute"
    COPY_OUT = "copy out"


class Event(Protocol):
    def synchronize(self) -> None:
        """The host sleeps until everything is done that was launched on the event's stream before it."""


class Graph(Protocol):
    def replay(self) -> None:
        """Launch once more what was captured. Part of some work on COMPUTE."""


class Streams(Protocol):
    @property
    def device(self) -> torch.device: ...

    def run(self, stream: Stream, work: Work) -> None:
        """Launch `work`. It may only depend on what the host knows now.

        Raises:
            torch.OutOfMemoryError: some of it may have been launched.
        """

    def at_once(self, stream: Stream) -> AbstractContextManager[None]:
        """What is launched inside belongs to `stream`, and the host needs to know how it went."""

    def record(self, stream: Stream) -> Event: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What is launched on `stream` from now on runs after `event`, which is of another stream."""

    def drain(self) -> None:
        """Wait until all streams are at rest."""

    def tidy(self) -> None:
        """Give back memory that is kept in case somebody wants it again. When all streams are at rest."""

    def host_buffer(self, num_words: int) -> Tensor:
        """int32 [num_words] of the host's memory that copies need not wait for."""

    def capture(self, work: Work, beside: Graph | None) -> Graph:
        """What `work` launches on COMPUTE, to be launched again as a whole, over the same memory. It runs at least
        once. The graph has memory in common with `beside`, if any: they never run at the same time."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of torch's allocator, of CUDA where others ask it for memory, or of cuBLAS."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED")
    )


class CudaStreams:
    """Those of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {stream: torch.cuda.Stream(device) for stream in Stream}  # type: ignore[no-untyped-call]

    def run(self, stream: Stream, work: Work) -> None:
        with self.at_once(stream):
            work()

    def at_once(self, stream: Stream) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._streams[stream])

    def record(self, stream: Stream) -> Event:
        # blocking: whoever waits for it sleeps, and leaves the core to the agent
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._streams[stream])
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._streams[stream].wait_event(event)

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        torch.cuda.empty_cache()

    def host_buffer(self, num_words: int) -> Tensor:
        return torch.empty(num_words, dtype=torch.int32, pin_memory=True)

    def capture(self, work: Work, beside: Graph | None) -> Graph:
        # once without: kernels are compiled and libraries take their memory when they are first used
        self.run(Stream.COMPUTE, work)
        self.drain()
        assert beside is None or isinstance(beside, torch.cuda.CUDAGraph)
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph, which collects garbage before each of what may be a hundred graphs
        with self.at_once(Stream.COMPUTE):
            graph.capture_begin(pool=None if beside is None else beside.pool())
            try:
                work()
            except BaseException:
                # what it says of a capture that failed is not why
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph
