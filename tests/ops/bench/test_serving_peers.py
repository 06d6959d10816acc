"""What the comparison over HTTP makes of its rounds; tests/ops/bench/test_servers.py lets it run."""

from __future__ import annotations

from typing import Any

import pytest

from ops.bench.serving_cost import PARTS
from ops.bench.serving_peers import CLIENTS, Sizes, checked, figures, in_turn, merged, missed, ratio, table
from ops.loadgen.answer import Answer
from ops.loadgen.result import LoadResult


def row(tokens_per_s: float, ttft_ms: float, gap_p99_ms: float, parts: tuple[str, ...] = ("server",)) -> dict[str, Any]:
    latencies = {"ttft_ms": ttft_ms, "gap_ms": gap_p99_ms / 2, "gap_p99_ms": gap_p99_ms, "tpot_ms": gap_p99_ms / 2}
    cpu = {part: 0.1 * number for number, part in enumerate(parts, 1)}
    return {"tokens_per_s": tokens_per_s, **latencies, "tokens_per_arrival": 1.5, "cpu_s": cpu, "client_cpu_s": 0.02}


def measured(day: str) -> dict[str, Any]:
    about = {"date": day, "rounds": 3, "cores": 2, "cpu": "Some CPU", "torch": "2.13.0"}
    return {"about": about, "servers": {"inferfleet": {"version": "0.1"}, "vLLM": {"version": "0.32", "command": "x"}}}


def level(ours: list[tuple[float, float, float]], **peers: list[tuple[float, float, float]]) -> dict[str, Any]:
    rounds = {"inferfleet": [row(*each, PARTS) for each in ours]}
    return measured("2027-01-02") | {
        "rounds": rounds | {name: [row(*each) for each in rows] for name, rows in peers.items()}
    }


FOUND = {
    "levels": {
        "8": level(
            [(600, 90, 20), (300, 180, 40), (600, 90, 20)],
            vLLM=[(500, 90, 22), (250, 180, 44), (500, 100, 22)],
            llama=[(200, 500, 50), (100, 1000, 90), (200, 500, 50)],
        ),
        "1": level([(80, 25, 15)], vLLM=[(79, 26, 16)]),
    }
}


def with_ours(**changes: float) -> dict[str, Any]:
    """FOUND with other figures of ours at 8 clients."""
    found = FOUND["levels"]["8"]["rounds"]
    rounds = found | {"inferfleet": [each | changes for each in found["inferfleet"]]}
    return {"levels": FOUND["levels"] | {"8": {"rounds": rounds}}}


def test_bars_hold_against_every_peer_by_the_median_of_the_rounds_ratios() -> None:
    assert ratio(FOUND["levels"]["8"]["rounds"], "vLLM", "tokens_per_s") == 1.2, "whatever the machine's speed was"
    assert missed(FOUND) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"tokens_per_s": 595.0}, ["8 clients: 1.19 times the tokens/s of vLLM, bar 1.2"]),
        ({"ttft_ms": 110.0}, ["8 clients: 1.10 times the TTFT p50 of vLLM, bar 1.0"]),
        (
            {"gap_p99_ms": 55.0},
            [
                "8 clients: 2.50 times the p99 between arrivals of vLLM, bar 1.0",
                "8 clients: 1.10 times the p99 between arrivals of llama, bar 1.0",
            ],
        ),
    ],
)
def test_each_bar_is_missed_by_a_little_less(changes: dict[str, float], lines: list[str]) -> None:
    assert missed(with_ours(**changes)) == lines


def test_one_client_needs_the_speed_of_the_best_peer_and_more_clients_more() -> None:
    alone = level([(78, 25, 15)], vLLM=[(79, 26, 16)])
    assert missed({"levels": {"1": alone}}) == ["1 clients: 0.99 times the tokens/s of vLLM, bar 1.0"]
    equal = level([(79, 25, 15)], vLLM=[(79, 26, 16)])
    assert missed({"levels": {"1": equal}}) == []
    assert missed({"levels": {"32": equal}}) == ["32 clients: 1.00 times the tokens/s of vLLM, bar 1.2"]


def test_the_tables_have_every_server_and_the_cpu_time_of_every_process() -> None:
    captions, speed, cpu = (part.splitlines() for part in table(FOUND).split("\n\n"))
    described = "2027-01-02; rounds: 3; cores: 2 of Some CPU; torch 2.13.0. Servers: inferfleet 0.1; vLLM 0.32."
    assert captions == [f"- With 8, 1 clients: {described}"]
    assert speed[2:] == [
        "| 1 | inferfleet | 80 (80 to 80) | 25.0 | 7.5 | 15.0 | 1.50 |  |  |  |",
        "| 1 | vLLM | 79 (79 to 79) | 26.0 | 8.0 | 16.0 | 1.50 | 1.01 | 0.96 | 0.94 |",
        "| 8 | inferfleet | 600 (300 to 600) | 90.0 | 10.0 | 20.0 | 1.50 |  |  |  |",
        "| 8 | vLLM | 500 (250 to 500) | 100.0 | 11.0 | 22.0 | 1.50 | 1.20 | 1.00 | 0.91 |",
        "| 8 | llama | 200 (100 to 200) | 500.0 | 25.0 | 50.0 | 1.50 | 3.00 | 0.18 | 0.40 |",
    ]
    assert cpu == [
        "| clients | gateway | redis | agent | engine | inferfleet, all | vLLM | llama | load client |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 1 | 0.100 | 0.200 | 0.300 | 0.400 | 1.000 | 0.100 |  | 0.020 |",
        "| 8 | 0.100 | 0.200 | 0.300 | 0.400 | 1.000 | 0.100 | 0.100 | 0.020 |",
    ]


def test_levels_of_other_days_have_a_line_of_their_own() -> None:
    found = merged(FOUND, 32, FOUND["levels"]["8"] | measured("2027-03-04"))
    first, second = table(found).split("\n\n")[0].splitlines()
    assert first.startswith("- With 1, 8 clients: 2027-01-02;") and second.startswith("- With 32 clients: 2027-03-04;")


def test_a_number_of_clients_replaces_its_own_figures_alone() -> None:
    other: dict[str, Any] = {"rounds": {"inferfleet": []}}
    found = merged(FOUND, 8, other)
    assert found["levels"] == {"1": FOUND["levels"]["1"], "8": other}
    assert list(merged(found, 32, other)["levels"]) == ["1", "8", "32"] and list(merged({}, 1, other)["levels"]) == [
        "1"
    ]


def answer(started: float, times: list[float], counts: list[int], output_tokens: int | None = None) -> Answer:
    found = Answer(sum(counts), started, sent=started, ended=times[-1] if times else started)
    for time, count in zip(times, counts, strict=True):
        found.note_text(time, count)
    found.prompt_tokens, found.output_tokens = 4, sum(counts) if output_tokens is None else output_tokens
    return found


def test_gaps_lie_between_arrivals_however_many_tokens_come_in_one() -> None:
    answers = [answer(0.0, [0.1, 0.2, 0.5], [1, 3, 1]), answer(0.0, [0.3, 0.4, 0.5], [1, 3, 1])]
    result = LoadResult(answers=answers, started=0.0, duration_s=None, most_open=2, cpu_s=0.1)
    found = figures(result)
    assert found["gap_ms"] == pytest.approx(100) and found["gap_p99_ms"] == pytest.approx(300, rel=0.03)
    assert (found["ttft_ms"], found["tokens_per_arrival"]) == (pytest.approx(200), pytest.approx(10 / 6))
    assert found["tokens_per_s"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (answer(0.0, [0.1], [2], output_tokens=1), "an answer has 1 tokens instead of 2"),
        (answer(0.0, [], [], output_tokens=0), "an answer has 0 tokens instead of 0"),
    ],
)
def test_a_short_or_unseen_answer_is_no_figure(wrong: Answer, complaint: str) -> None:
    right = answer(0.0, [0.1], [2])
    assert checked([right]) == [right]
    with pytest.raises(RuntimeError, match=complaint):
        checked([right, wrong])
    wrong.fail("HTTP 429", "full")
    with pytest.raises(RuntimeError, match="no answer: HTTP 429, full"):
        checked([right, wrong])


def test_every_server_is_first_in_some_round() -> None:
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_requests_come_in_whole_waves_of_the_clients() -> None:
    assert [Sizes().num_requests(clients) for clients in CLIENTS] == [12 * 1, 4 * 8, 2 * 32, 2 * 128]
