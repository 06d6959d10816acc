"""What a run amounts to: throughput, latencies, errors by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ops.loadgen.answer import Answer

PERCENTILES = (50, 90, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks of sorted values, as numpy's default does."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None of no values."""
    values = sorted(1000 * value for value in seconds if value is not None)
    if not values:
        return None
    percentiles = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {"mean": math.fsum(values) / len(values), **percentiles, "max": values[-1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """All answers of a run. It lasted `duration_s` if time ended it, and else until its last answer; what came later
    counts for latencies but not for throughput.

    `cpu_s` is this process' own time: of the load client, or offline of the engine. `most_open` is how many requests
    were unanswered at once.
    """

    answers: list[Answer]
    started: float
    duration_s: float | None
    most_open: int
    cpu_s: float
    is_interrupted: bool = False

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error]

    @property
    def seconds(self) -> float:
        if self.duration_s is not None:
            return self.duration_s
        return max((answer.ended - self.started for answer in self.answers), default=0.0)

    @property
    def errors(self) -> dict[str, int]:
        return dict(Counter(answer.error for answer in self.answers if answer.error).most_common())

    def message_of(self, kind: str) -> str:
        """What was said of the first error of this kind."""
        return next(answer.message for answer in self.answers if answer.error == kind)

    @property
    def input_tokens(self) -> int | None:
        """None where the server does not say how long prompts were."""
        counts = [answer.prompt_tokens for answer in self.good]
        return sum(count for count in counts if count is not None) if None not in counts else None

    @property
    def output_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.good)

    def summary(self) -> dict[str, Any]:
        """Figures of the answers without errors, ready for JSON."""
        good, seconds = self.good, self.seconds
        end = self.started + seconds
        per_s = 1 / seconds if seconds else 0.0
        in_time = [answer for answer in good if answer.began <= end]
        inputs = None if self.input_tokens is None else sum(answer.prompt_tokens or 0 for answer in in_time)
        num_events = sum(answer.num_events for answer in good)
        return {
            "seconds": seconds,
            "num_requests": len(self.answers),
            "num_good": len(good),
            "errors": {kind: {"count": count, "first": self.message_of(kind)} for kind, count in self.errors.items()},
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requests_per_s": per_s * sum(answer.ended <= end for answer in good),
            "input_tokens_per_s": None if inputs is None else per_s * inputs,
            "output_tokens_per_s": per_s * sum(answer.tokens_until(end) for answer in good),
            "ttft_ms": spread_ms(answer.first_token_s for answer in good),
            "tpot_ms": spread_ms(answer.per_token_s for answer in good),
            "itl_ms": spread_ms(gap for answer in good for gap in answer.gaps_s),
            "latency_ms": spread_ms(answer.latency_s for answer in good),
            "sent_late_ms": spread_ms(answer.sent - answer.started for answer in self.answers),
            "most_open": self.most_open,
            "num_short": sum(answer.num_tokens < answer.max_tokens for answer in good),
            "num_unseen": sum(not answer.times for answer in good),
            "counted_by": "usage" if all(answer.output_tokens is not None for answer in good) else "events",
            "tokens_per_event": self.output_tokens / num_events if num_events else None,
            "cpu_us_per_token": 1e6 * self.cpu_s / self.output_tokens if self.output_tokens else None,
        }
