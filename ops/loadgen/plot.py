"""What is drawn of runs: throughput and latency against load, or how one run went."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ops.loadgen.answer import Answer
from ops.loadgen.report import Level
from ops.loadgen.svg import Chart, Series, draw

MAX_POINTS = 400


def plot(levels: Sequence[Level]) -> str:
    """An SVG document."""
    return draw(_of_one(levels[0]) if len(levels) == 1 else _against_load(levels))


def _against_load(levels: Sequence[Level]) -> list[Chart]:
    ordered = sorted(levels, key=lambda level: level.load)
    summaries, loads = [level.result.summary() for level in ordered], [level.load for level in ordered]
    x_label = "clients" if ordered[0].rate is None else "requests per second"
    rates = Series("", loads, [summary["output_tokens_per_s"] for summary in summaries])
    latencies = [
        _where_known(f"{short} {point}", loads, [(summary[name] or {}).get(point) for summary in summaries])
        for short, name in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"))
        for point in ("p50", "p99")
    ]
    return [
        Chart(title="Throughput", x_label=x_label, y_label="output tokens per second", series=[rates], x_ticks=loads),
        Chart(title="Latency", x_label=x_label, y_label="milliseconds", series=latencies, x_ticks=loads, log_y=True),
    ]


def _where_known(name: str, xs: Sequence[float], ys: Sequence[float | None]) -> Series:
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return Series(name, [x for x, _ in known], [y for _, y in known])


def _of_one(level: Level) -> list[Chart]:
    good = level.result.good
    seconds, rates = tokens_by_second(good, level.result.started)
    per_second = Series("", seconds, rates)
    shares = [
        _distribution("TTFT", [answer.first_token_s for answer in good]),
        _distribution("TPOT", [answer.per_token_s for answer in good]),
        _distribution("whole answer", [answer.latency_s for answer in good]),
    ]
    return [
        Chart(
            title=f"Throughput, {level.name}",
            x_label="seconds",
            y_label="output tokens per second",
            series=[per_second],
            has_points=False,
        ),
        Chart(
            title="Share of answers within a time",
            x_label="milliseconds",
            y_label="percent",
            series=shares,
            log_x=True,
            has_points=False,
        ),
    ]


def tokens_by_second(answers: Sequence[Answer], started: float) -> tuple[list[float], list[float]]:
    """The middles of the seconds of a run, and the tokens that arrived in each."""
    end = max((answer.ended for answer in answers), default=started)
    num_bins = max(math.ceil(end - started), 1)
    bins = [0.0] * num_bins
    for answer in answers:
        weight = answer.num_tokens / answer.num_events if answer.num_events else 0.0
        for time, count in zip(answer.times, answer.counts, strict=True):
            bins[min(int(time - started), num_bins - 1)] += count * weight
    return [number + 0.5 for number in range(num_bins)], bins


def _distribution(name: str, seconds: Sequence[float | None]) -> Series:
    ordered = sorted(1000 * value for value in seconds if value is not None)
    stride = max(len(ordered) // MAX_POINTS, 1)
    places = [*range(0, len(ordered), stride), len(ordered) - 1] if ordered else []
    return Series(name, [ordered[place] for place in places], [100 * (place + 1) / len(ordered) for place in places])
