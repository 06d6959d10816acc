"""The arithmetic of a result against numpy, and what counts for it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from ops.loadgen.answer import MAX_MESSAGE, Answer
from ops.loadgen.report import Level, remarks
from ops.loadgen.result import LoadResult, percentile, spread_ms


def nearest_rank(ordered: Sequence[float], percent: float) -> float:
    """The deliberately wrong variant: no value between two ranks."""
    return ordered[round((len(ordered) - 1) * percent / 100)]


def answered(started: float, times: Sequence[float], *, num_tokens: int | None = None, prompt: int = 10) -> Answer:
    answer = Answer(len(times), started, started, times[-1], array("d", times), array("L", [1] * len(times)))
    answer.prompt_tokens, answer.output_tokens, answer.is_complete = prompt, num_tokens or len(times), True
    return answer


def result_of(answers: list[Answer], duration_s: float | None = None) -> LoadResult:
    return LoadResult(answers=answers, started=100.0, duration_s=duration_s, most_open=1, cpu_s=0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_those_of_numpy(size: int) -> None:
    randomness = random.Random(size)
    values = sorted(randomness.expovariate(1.0) for _ in range(size))
    points = [0, 1, 33.3, 50, 90, 99, 99.9, 100]
    expected = np.percentile(values, points)
    assert [percentile(values, point) for point in points] == pytest.approx(expected, rel=1e-12)
    wrong = [nearest_rank(values, point) for point in points]
    assert size == 1 or wrong != pytest.approx(expected, rel=1e-12)


def test_a_spread_is_in_milliseconds_and_leaves_out_what_is_unknown() -> None:
    seconds = [0.3, None, 0.1, 0.2]
    spread = spread_ms(seconds)
    assert spread is not None
    assert list(spread.values()) == pytest.approx([200, 200, 280, 298, 300])
    assert list(spread) == ["mean", "p50", "p90", "p99", "max"]
    assert spread_ms([None]) is None


def test_latencies_of_one_answer() -> None:
    """Asked at 101, three arrivals of six tokens."""
    answer = answered(101.0, [101.5, 101.75, 102.5], num_tokens=6)
    assert (answer.first_token_s, answer.latency_s, answer.gaps_s) == (0.5, 1.5, [0.25, 0.75])
    assert answer.per_token_s == 1.0 / 5
    alone = answered(101.0, [101.5])
    assert (alone.per_token_s, alone.gaps_s) == (None, [])


def test_throughput_is_that_of_the_run_and_of_good_answers() -> None:
    bad = answered(100.0, [101.0, 104.0])
    bad.fail("broken stream", "the server closed it")
    summary = result_of([answered(100.0, [101.0, 102.0]), answered(100.5, [103.0, 104.5, 105.0]), bad]).summary()
    assert summary["seconds"] == 5.0
    assert (summary["num_requests"], summary["num_good"]) == (3, 2)
    assert (summary["output_tokens_per_s"], summary["input_tokens_per_s"]) == (5 / 5, 20 / 5)
    assert summary["requests_per_s"] == 2 / 5
    assert summary["cpu_us_per_token"] == 0.5e6 / 5
    assert summary["errors"] == {"broken stream": {"count": 1, "first": "the server closed it"}}


def test_what_comes_after_the_time_counts_for_latencies_only() -> None:
    """Time ends at 104: of four tokens two have come, and a prompt that is answered later was not read in time."""
    late = [answered(100.0, [101.0, 103.0, 105.0, 107.0]), answered(103.0, [106.0])]
    summary = result_of(late, duration_s=4.0).summary()
    assert (summary["output_tokens"], summary["num_good"]) == (5, 2)
    assert summary["output_tokens_per_s"] == 2 / 4
    assert summary["input_tokens_per_s"] == 10 / 4
    assert summary["requests_per_s"] == 0
    assert summary["latency_ms"]["max"] == 7000


def test_tokens_of_events_that_carry_several_are_shared_out() -> None:
    answer = answered(100.0, [101.0, 103.0], num_tokens=6)
    assert [answer.tokens_until(moment) for moment in (100.5, 101.0, 104.0)] == [0, 3, 6]


def test_an_answer_without_text_counts_when_it_ends_and_has_no_first_token() -> None:
    unseen = answered(100.0, [102.0])
    unseen.times, unseen.counts, unseen.output_tokens = array("d"), array("L"), 3
    assert [unseen.tokens_until(moment) for moment in (101.0, 102.0)] == [0, 3]
    summary = result_of([unseen]).summary()
    assert (summary["num_unseen"], summary["ttft_ms"], summary["tokens_per_event"]) == (1, None, None)
    assert (summary["input_tokens_per_s"], summary["output_tokens_per_s"]) == (10 / 2, 3 / 2)
    (remark,) = remarks(Level(1, None, result_of([unseen])))
    assert remark == "1 of 1 answers have no text: nobody saw their first token"


def test_what_tables_do_not_say_is_remarked() -> None:
    """Three answers of one arrival: with ten tokens in it, sent late, and refused."""
    coalesced, late, refused = (
        answered(100.0, [101.0], num_tokens=10),
        answered(100.0, [101.0]),
        answered(100.0, [101.0]),
    )
    late.sent += 3.0
    refused.fail("HTTP 429", "full")
    assert list(remarks(Level(4, None, result_of([coalesced, late, refused])))) == [
        "failed: 1 x HTTP 429 (full)",
        "an event brings 5.5 tokens: ITL is between events, TPOT of tokens",
        "1 in 100 requests was sent 2940 ms late or more: this machine is too busy for such a load",
    ]
    assert list(remarks(Level(4, None, result_of([answered(100.0, [101.0])])))) == []


def test_an_empty_result_has_no_figures_and_no_division_by_zero() -> None:
    summary = result_of([]).summary()
    assert (summary["seconds"], summary["output_tokens_per_s"], summary["ttft_ms"]) == (0.0, 0.0, None)


def test_messages_of_errors_are_one_bounded_line_and_the_first_error_stays() -> None:
    answer = Answer(1, 0.0)
    answer.fail("HTTP 500", "\x1b[2Ja\n" + "b\n" * 1000)
    answer.fail("timeout", "later")
    assert (answer.error, len(answer.message)) == ("HTTP 500", MAX_MESSAGE)
    assert answer.message.startswith("?[2Ja b b") and "\n" not in answer.message
