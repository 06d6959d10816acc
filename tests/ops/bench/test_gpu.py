from __future__ import annotations

import json

import pytest

from ops.bench import gpu
from ops.bench.gpu import as_row, measured, plot, table, wanted
from ops.bench.gpu_rows import (
    ROWS,
    Bench,
    Figure,
    Found,
    Spans,
    counts_of,
    covered,
    grouped,
    limits_us,
    prompts_of,
    same_share,
    workload,
)
from ops.bench.gpu_shapes import LLAMA_8B, SHAPES
from ops.bench.roofline import Machine, decode_work
from worker.model.families import read_spec

WHERE = {"date": "2030-01-02", "hardware": "Stand-in", "torch": "2"}


def row_of(*figures: Figure, **curves) -> dict:
    return as_row(Found(list(figures), curves)) | {"about": WHERE, "seconds": 3.0}


def test_a_figure_is_met_at_its_bar_and_one_that_is_missing_is_not() -> None:
    assert [Figure("", value, bar=2.0).met for value in (1.9, 2.0, 2.1, None)] == [False, True, True, False]
    assert [Figure("", value, bar=2.0, is_most=True).met for value in (1.9, 2.0, 2.1)] == [True, True, False]
    assert Figure("", None).met
    assert [row_of(Figure("", 1.0, bar=bar), Figure("", 3.0))["met"] for bar in (1.0, 2.0)] == [True, False]


def test_rows_go_on_where_they_were_stopped() -> None:
    ended, broken = row_of(Figure("x", 1.0, bar=2.0)), row_of(Figure("the row ends", None, bar=1.0))
    known = {"a": ended, "b": broken, "c": ended | {"about": WHERE | {"hardware": "another"}}}
    assert wanted("abcd", known, "Stand-in", again=False) == ["b", "c", "d"]
    assert wanted("abcd", known, "Stand-in", again=True) == ["a", "b", "c", "d"]


def test_the_table_has_every_figure_with_its_bar() -> None:
    rows = {
        "i": row_of(Figure("jobs", 3, bar=4)),
        "b": row_of(Figure("step", 1.25, "ms"), Figure("added", 2.0, "ms", bar=5, is_most=True)),
        "e": row_of(Figure("peer", None, note="it\nbroke")),
    }
    lines = table(rows).splitlines()
    assert lines[2] == f"| **b** | **{ROWS['b'][0]}** | 2030-01-02, Stand-in, 3 s | | yes |"
    assert lines[3:5] == ["| b | step | 1.25 ms |  |  |", "| b | added | 2 ms | at most 5 | yes |"]
    assert lines[6] == "| e | peer | it broke |  |  |"
    assert lines[8] == "| i | jobs | 3 | at least 4 | no |"


def test_a_row_that_fails_is_one_that_is_missed_and_says_why() -> None:
    found = measured("no-such-row", is_dry=True)
    (figure,) = found["figures"]
    assert not found["met"] and "no-such-row" in figure["note"]


def test_busy_is_the_time_in_which_anything_runs() -> None:
    assert covered(Spans([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)], {})) == 4.0
    assert covered(Spans([], {})) == 0.0


def test_pytest_says_how_many_tests_came_to_what() -> None:
    assert counts_of("...\n3 failed, 12 passed, 1 error in 2.0s") == {"failed": 3, "passed": 12, "error": 1}
    assert counts_of("no tests ran in 0.1s") == counts_of("") == {}


def test_kernels_are_put_together_by_what_they_are_for() -> None:
    names = {
        "attention_kernel": 2.0,
        "combine_kernel": 1.0,
        "nvjet_tst_128": 8.0,
        "finish": 0.5,
        "normalise": 0.25,
    }
    assert grouped(names) == {"attention": 3.0, "products": 8.0, "sampling": 0.5, "other": 0.25}


def test_limits_of_attention_and_products_are_those_of_the_roofline() -> None:
    work, limits = decode_work(LLAMA_8B, 64, 1000), limits_us(LLAMA_8B, 64, 1000, Machine(1e12, 1.0))
    assert limits["attention"] + limits["products"] == pytest.approx(1e-6 * (work.kv_bytes + work.weight_bytes))
    assert work.weight_bytes == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.001), "the embedding is not read"
    assert limits["other"] < 0.1 * limits["products"]


def test_answers_are_compared_one_by_one() -> None:
    assert same_share({"a": [1, 2], "b": [3]}, {"a": [1, 2], "b": [4]}) == 0.5


def test_the_workload_is_the_same_at_every_run(tmp_path) -> None:
    bench = Bench(tmp_path, is_dry=False)
    first, second = workload(bench, 1000), workload(bench, 1000)
    assert first == second and len(first) == 256
    assert all(100 <= len(each.prompt_ids) <= 1024 and 100 <= each.params.max_new_tokens <= 1024 for each in first)
    assert prompts_of(1000, [3], seed=1) != prompts_of(1000, [3], seed=2)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model_of_ours(name) -> None:
    full, tiny = (read_spec(dict(config))[0] for config in SHAPES[name])
    assert full.hidden_size > tiny.hidden_size == 64


def test_the_limit_of_a_plot_lies_beside_what_was_measured() -> None:
    row = row_of(batch=[1, 64], step_ms=[2.0, 4.0], least_ms=[1.0, 3.0])
    drawn = plot(row)
    assert drawn is not None and "Stand-in" in drawn and ">limit<" in drawn
    assert plot(row_of()) is None


@pytest.mark.parametrize("name", ["b", "i"])
def test_rows_run_dry(name, tmp_path) -> None:
    found = ROWS[name][1](Bench(tmp_path, is_dry=True))
    bars = {figure.name: figure for figure in found.figures if figure.bar is not None}
    assert bars and all(figure.value is not None for figure in found.figures)
    if name == "i":
        assert found.figures[0].value == 2 and as_row(found)["met"], "steps without memory cost no job"


def test_a_file_of_results_grows_row_by_row(tmp_path, monkeypatch, capsys) -> None:
    path, asked = tmp_path / "found.json", []

    def measure(name: str, *, is_dry: bool) -> dict:
        asked.append(name)
        return as_row(Found([Figure("x", 1.0, bar=1.0)])) | {"seconds": 1.0}

    monkeypatch.setattr(gpu, "measured", measure)
    assert gpu.main(["--dry-run", "--rows", "a,b", "--json", str(path)]) == 0
    assert gpu.main(["--dry-run", "--rows", "a,b,c", "--json", str(path)]) == 0
    assert asked == ["a", "b", "c"] and list(json.loads(path.read_text())["rows"]) == asked
    assert capsys.readouterr().out.count("| x | 1 | at least 1 | yes |") == 5
    with pytest.raises(SystemExit):
        gpu.main(["--rows", "z"])
    assert "--rows has z; there are a, b" in capsys.readouterr().err
