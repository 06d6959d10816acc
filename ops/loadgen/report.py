"""What a reader gets of a run or of several under growing load: a table and a JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table

from ops.loadgen.answer import Answer
from ops.loadgen.result import LoadResult

LATENCIES = {
    "ttft_ms": "first token (TTFT)",
    "tpot_ms": "per token (TPOT)",
    "itl_ms": "between arrivals (ITL)",
    "latency_ms": "whole answer",
}
SHORT_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "latency_ms": "answer"}
THROUGHPUT = (
    ("answers", "num_good", "requests_per_s"),
    ("input tokens", "input_tokens", "input_tokens_per_s"),
    ("output tokens", "output_tokens", "output_tokens_per_s"),
)
MAX_LATE_MS = 50.0
MANY_TOKENS = 1.5
POINTS = ("mean", "p50", "p90", "p99", "max")


@dataclass(frozen=True, slots=True)
class Level:
    """A run at one load: `clients` of a closed loop or the `rate` of an open one."""

    clients: int | None
    rate: float | None
    result: LoadResult

    @property
    def load(self) -> float:
        return self.rate if self.rate is not None else float(self.clients or 0)

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s"
        return "1 client" if self.clients == 1 else f"{self.clients} clients"

    def figures(self) -> dict[str, Any]:
        """Ready for JSON, with one entry for each request."""
        requests = [_request(answer, self.result.started) for answer in self.result.answers]
        return {"clients": self.clients, "rate": self.rate, **self.result.summary(), "requests": requests}


def _request(answer: Answer, started: float) -> dict[str, Any]:
    first_s = answer.first_token_s
    return {
        "due_s": round(answer.started - started, 6),
        "ttft_ms": None if first_s is None else round(1000 * first_s, 3),
        "latency_ms": round(1000 * answer.latency_s, 3),
        "input_tokens": answer.prompt_tokens,
        "output_tokens": answer.num_tokens,
        "error": answer.error,
    }


def tables(levels: Sequence[Level]) -> list[Table]:
    """Of one run throughput and latencies by their percentiles; of several a column for each."""
    return [_throughput(levels[0]), _latencies(levels[0])] if len(levels) == 1 else [_side_by_side(levels)]


def _throughput(level: Level) -> Table:
    summary = level.result.summary()
    title = f"{level.name}, {summary['seconds']:.1f} s"
    shown = Table(title, Column("in all", justify="right"), Column("per second", justify="right"))
    for label, total, rate in THROUGHPUT:
        shown.add_row(label, _number(summary[total], 0), _number(summary[rate]))
    return shown


def _latencies(level: Level) -> Table:
    summary = level.result.summary()
    shown = Table("milliseconds", *(Column(point, justify="right") for point in POINTS))
    for name, label in LATENCIES.items():
        spread = summary[name] or {}
        shown.add_row(label, *(_number(spread.get(point)) for point in POINTS))
    return shown


def _side_by_side(levels: Sequence[Level]) -> Table:
    """Labels are short, so that six loads fit on a narrow terminal."""
    summaries = [level.result.summary() for level in levels]
    loads = (Column(f"{level.load:g}", justify="right", no_wrap=True) for level in levels)
    shown = Table(Column("clients" if levels[0].rate is None else "requests/s sent", no_wrap=True), *loads)
    for label, _, rate in THROUGHPUT:
        shown.add_row(f"{label}/s", *(_number(summary[rate]) for summary in summaries))
    for name, label in SHORT_LATENCIES.items():
        shown.add_section()
        for point in ("p50", "p99"):
            values = (_number((summary[name] or {}).get(point)) for summary in summaries)
            shown.add_row(f"{label} {point}, ms", *values)
    shown.add_section()
    shown.add_row("failed", *(str(sum(level.result.errors.values())) for level in levels))
    return shown


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def remarks(level: Level) -> Iterator[str]:
    """What the tables do not say: errors by kind, answers that are not as they should be, a client too slow."""
    result, summary = level.result, level.result.summary()
    for kind, count in result.errors.items():
        yield f"failed: {count} x {kind} ({result.message_of(kind)})"
    if summary["num_short"]:
        yield f"{summary['num_short']} of {summary['num_good']} answers are shorter than asked for"
    if summary["num_unseen"]:
        yield f"{summary['num_unseen']} of {summary['num_good']} answers have no text: nobody saw their first token"
    if (summary["tokens_per_event"] or 0) > MANY_TOKENS:
        yield f"an event brings {summary['tokens_per_event']:.1f} tokens: ITL is between events, TPOT of tokens"
    late = summary["sent_late_ms"]
    if late and late["p99"] > MAX_LATE_MS:
        yield f"1 in 100 requests was sent {late['p99']:.0f} ms late or more: this machine is too busy for such a load"
    if result.is_interrupted:
        yield "interrupted: requests that were under way are left out"
