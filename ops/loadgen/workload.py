"""What is asked of a server, and when: requests of given sizes, by clients that take turns or at random moments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or the messages of a chat."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its prompt and how many tokens are wanted."""

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`ask_of` gives the request of a number from 0 on. The run ends with `num_requests` or after `duration_s`,
    whichever is first; one of them must be given.

    Closed loop: each of `clients` sends its next request when it has the last answer. Open loop, with a `rate` in
    requests per second: requests come as a Poisson process of this `seed`, however many are still unanswered.

    `warmup` is asked before by as many clients, and nothing of it is counted. A request without its end after
    `timeout_s` has failed.
    """

    ask_of: Callable[[int], Ask]
    num_requests: int | None = None
    duration_s: float | None = None
    clients: int = 1
    rate: float | None = None
    seed: int = 0
    warmup: Sequence[Ask] = ()
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("a workload needs num_requests or duration_s, or it would never end")

    @classmethod
    def of(
        cls,
        asks: Sequence[Ask],
        *,
        clients: int = 1,
        rate: float | None = None,
        seed: int = 0,
        warmup: Sequence[Ask] = (),
        timeout_s: float = 600.0,
    ) -> Workload:
        """Each of these once, in their order."""
        return cls(
            ask_of=asks.__getitem__,
            num_requests=len(asks),
            clients=clients,
            rate=rate,
            seed=seed,
            warmup=warmup,
            timeout_s=timeout_s,
        )


class Supply:
    """The requests of a run one after another, until all are given out or its time is over."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._number = workload, 0
        self.is_out_of_time = False

    def next(self, elapsed_s: float) -> Ask | None:
        """The request that is sent so many seconds after the start; None: there is no further one."""
        if self._number == self._workload.num_requests:
            return None
        if self._workload.duration_s is not None and elapsed_s >= self._workload.duration_s:
            self.is_out_of_time = True
            return None
        ask = self._workload.ask_of(self._number)
        self._number += 1
        return ask


def arrival_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which the requests of a Poisson process come, without end.

    The pauses between them are exponential with a mean of 1 / rate, and independent of anything the server does.
    """
    randomness, moment = random.Random(seed), 0.0
    while True:
        moment += randomness.expovariate(rate)
        yield moment
