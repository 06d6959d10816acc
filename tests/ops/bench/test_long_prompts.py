"""What the bench of long prompts makes of the moments it saw; tests/ops/bench/test_servers.py lets it run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ops.bench.long_prompts import (
    Gap,
    figures,
    gap_p99_ms,
    gaps_of,
    missed,
    table,
    token_p99_ms,
    touching,
    within,
)
from ops.loadgen.answer import Answer


def answer(started: float, times: list[float], counts: list[int], output_tokens: int | None = None) -> Answer:
    found = Answer(sum(counts), started, sent=started, ended=times[-1])
    for time, count in zip(times, counts, strict=True):
        found.note_text(time, count)
    found.output_tokens = output_tokens
    return found


def test_a_gap_has_the_tokens_that_came_with_its_end() -> None:
    assert gaps_of(answer(0.0, [1.0, 1.5, 3.0], [5, 1, 2])) == [Gap(1.0, 1.5, 1.0), Gap(1.5, 3.0, 2.0)]
    assert gaps_of(answer(0.0, [1.0, 2.0], [1, 3], output_tokens=8)) == [Gap(1.0, 2.0, 6.0)], "two tokens an event"


def test_a_gap_over_an_edge_is_disturbed_and_not_undisturbed() -> None:
    gaps = [Gap(0, 1, 1), Gap(1, 3, 1), Gap(3, 5, 1), Gap(5, 6, 1)]
    assert within(gaps, 0, 2) == gaps[:1]
    assert touching(gaps, 2, 4) == gaps[1:3]
    assert touching(gaps, 1, 3) == gaps[1:2], "what only meets the edge is outside"


def test_percentiles_are_of_gaps_or_of_tokens() -> None:
    gaps = [Gap(0.0, 0.01 * number, number) for number in range(1, 100)] + [Gap(0.0, 3.0, 2)]
    assert gap_p99_ms(gaps) == pytest.approx(np.percentile([1000 * gap.seconds for gap in gaps], 99))
    per_token = [1000 * gap.seconds / gap.num_tokens for gap in gaps for _ in range(int(gap.num_tokens))]
    assert token_p99_ms(gaps) == pytest.approx(np.percentile(per_token, 99)) == pytest.approx(10)
    assert gap_p99_ms(gaps) > 900, "the two are not the same"


def streams(disturbed_gap: float, last: float) -> list[Answer]:
    """Two that write ten times a second from 1.0 and 1.05 on until the prompts come at 3.0, then more slowly."""
    found = []
    for first in (1.0, 1.05):
        times = list(np.arange(first, 3.0, 0.1)) + list(np.arange(3.0 + disturbed_gap, last, disturbed_gap))
        found.append(answer(0.9, [float(time) for time in times], [1] * len(times)))
    return found


def prompts(sent: float, waits: list[float]) -> list[Answer]:
    return [answer(sent, [sent + wait, sent + wait + 5], [1, 1]) for wait in waits]


def test_streams_are_judged_until_the_last_prompt_has_its_first_token() -> None:
    found = figures(streams(0.15, 5.0), prompts(0.0, [0.2, 0.4, 0.6]), prompts(3.0, [0.5, 1.0, 1.5]), 5)
    assert found["disturbed_s"] == pytest.approx(1.5)
    assert (found["calm_gap_p99_ms"], found["gap_p99_ms"]) == (pytest.approx(100), pytest.approx(200, abs=50))
    assert found["num_calm_gaps"] == 13 + 14 and found["num_disturbed_gaps"] == 2 * 11
    assert found["calm_token_p99_ms"] == pytest.approx(100)
    assert (found["ttft_alone_ms"], found["last_ttft_alone_ms"]) == (pytest.approx(400), pytest.approx(600))
    assert (found["ttft_beside_ms"], found["last_ttft_beside_ms"]) == (pytest.approx(1000), pytest.approx(1500))


def test_a_long_silence_in_the_disturbed_time_shows() -> None:
    """The deliberately wrong server: it writes nothing while prompts are computed."""
    silent = figures(streams(1.6, 8.0), prompts(0.0, [0.5]), prompts(3.0, [1.5]), 5)
    assert silent["gap_p99_ms"] > 15 * silent["calm_gap_p99_ms"]
    assert [line.split(":")[0] for line in missed({"rounds": {"inferfleet": [silent]}})][0] == (
        "p99 between arrivals, by undisturbed"
    )


def test_a_stream_that_does_not_outlast_the_prompts_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="a stream ended before the last prompt had its first token"):
        figures(streams(0.15, 4.0), prompts(0.0, [0.2]), prompts(3.0, [1.5]), 5)


def row(calm: float, disturbed: float, alone: float, beside: float) -> dict[str, Any]:
    gaps = {"calm_gap_p99_ms": calm, "gap_p99_ms": disturbed, "gap_max_ms": 2 * disturbed}
    tokens = {"calm_token_p99_ms": calm / 2, "token_p99_ms": disturbed / 2}
    waits = {"ttft_alone_ms": alone, "ttft_beside_ms": beside}
    return gaps | tokens | waits | {f"last_{name}": 2 * value for name, value in waits.items()}


OURS, VLLM = [row(10, 20, 800, 2000), row(20, 40, 1600, 4000)], [row(10, 300, 900, 1000), row(20, 500, 1800, 2100)]


def test_bars_are_for_ours_in_its_own_round_and_beside_every_peer() -> None:
    assert missed({"rounds": {"inferfleet": OURS, "vLLM": VLLM}}) == []
    assert missed({"rounds": {"inferfleet": OURS, "vLLM": OURS}}) == [
        "p99 between arrivals while prompts come: 1.00 times that of vLLM, bar 1.0"
    ]
    slower = [row(10, 21, 800, 2080), row(20, 42, 1600, 4160)]
    assert missed({"rounds": {"inferfleet": slower}}) == [
        "p99 between arrivals, by undisturbed: 2.10, bar 2.0",
        "p99 of the time of a token, by undisturbed: 2.10, bar 2.0",
        "TTFT of the prompts, median, by alone: 2.60, bar 2.5",
        "TTFT of the last prompt, by alone: 2.60, bar 2.5",
    ]


def test_the_tables_have_streams_and_prompts_of_every_server() -> None:
    about = {"date": "2027-01-02", "rounds": 2, "cores": 2, "cpu": "Some CPU", "torch": "2.13.0"}
    versions = {"inferfleet": {"version": "0.1"}, "vLLM": {"version": "0.32"}}
    found = {"about": about, "servers": versions, "rounds": {"inferfleet": OURS, "vLLM": VLLM}}
    found_caption, found_streams, found_prompts = table(found).split("\n\n")
    assert found_caption.startswith("2027-01-02;") and found_caption.endswith(" Servers: inferfleet 0.1; vLLM 0.32.")
    assert found_streams.splitlines()[2:] == [
        "| inferfleet | 15.0 | 30.0 | 2.00 | 60.0 | 7.5 | 15.0 | 2.00 |  |",
        "| vLLM | 15.0 | 400.0 | 27.50 | 800.0 | 7.5 | 200.0 | 27.50 | 0.07 |",
    ]
    assert found_prompts.splitlines()[2:] == [
        "| inferfleet | 1200 | 2400 | 3000 | 6000 | 2.50 | 2.50 |",
        "| vLLM | 1350 | 2700 | 1550 | 3100 | 1.14 | 1.14 |",
    ]
