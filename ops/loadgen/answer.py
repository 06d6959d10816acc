"""What is written down of one request while it runs, in seconds of one monotonic clock."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field

MAX_MESSAGE = 300


@dataclass(slots=True)
class Answer:
    """`started` is when the request was due, also when it was sent later. `times` are moments at which text arrived;
    events that come in one read are one arrival, and `counts` says how many they were.

    `prompt_tokens` and `output_tokens` are what the server says at the end, None while it has not. `error` is a kind
    that can be counted, "" when the answer is complete; `message` what the server or the system said about it.
    """

    max_tokens: int
    started: float
    sent: float = 0.0
    ended: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("L"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    is_complete: bool = False
    error: str = ""
    message: str = ""

    def note_text(self, now: float, num_events: int) -> None:
        self.times.append(now)
        self.counts.append(num_events)

    def fail(self, kind: str, message: str = "") -> None:
        """The first thing that went wrong is what counts. A message is shown on terminals: nothing steers them."""
        if not self.error:
            line = " ".join(message[: 2 * MAX_MESSAGE].split())[:MAX_MESSAGE]
            self.error, self.message = kind, "".join(one if one.isprintable() else "?" for one in line)

    @property
    def num_events(self) -> int:
        return sum(self.counts)

    @property
    def num_tokens(self) -> int:
        """The server's count; where it gives none, each event with text is a token."""
        return self.num_events if self.output_tokens is None else self.output_tokens

    @property
    def began(self) -> float:
        """When it was seen first; an answer without visible text is seen when it ends."""
        return self.times[0] if self.times else self.ended

    @property
    def first_token_s(self) -> float | None:
        return self.times[0] - self.started if self.times else None

    @property
    def latency_s(self) -> float:
        return self.ended - self.started

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first."""
        if self.num_tokens < 2 or not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """What a reader waits between arrivals."""
        return [after - before for before, after in itertools.pairwise(self.times)]

    def tokens_until(self, moment: float) -> float:
        """Tokens that had arrived by then. Events have equal shares where they are not tokens."""
        if not self.times:
            return self.num_tokens if self.ended <= moment else 0
        if self.times[-1] <= moment:
            return self.num_tokens
        arrived = sum(count for time, count in zip(self.times, self.counts, strict=True) if time <= moment)
        return self.num_tokens * arrived / self.num_events
