from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ops.bench import gpu, gpu_rows
from ops.bench.gpu import as_row, child_main, measured, output_of, plot, table, wanted
from ops.bench.gpu_rows import (
    ROWS,
    Bench,
    Figure,
    Found,
    Spans,
    add_tests,
    add_transformers,
    counts_of,
    covered,
    flags_of,
    grouped,
    limits_us,
    profiled,
    prompts_of,
    same_share,
    taken,
    workload,
)
from ops.bench.gpu_shapes import LLAMA_8B, SHAPES
from ops.bench.peers.children import group_members
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
    ended = row_of(Figure("x", 1.0, bar=2.0), Figure("not there", None))
    broken, without_peer = (row_of(Figure("x", 1.0), Figure(name, None, bar=1.0)) for name in ("the row ends", "peer"))
    known = {"a": ended, "b": broken, "c": ended | {"about": WHERE | {"hardware": "another"}}, "e": without_peer}
    assert wanted("abcde", known, "Stand-in", again=False) == ["b", "c", "d", "e"]
    assert wanted("abcde", known, "Stand-in", again=True) == ["a", "b", "c", "d", "e"]


def test_the_table_has_every_figure_with_its_bar() -> None:
    rows = {
        "i": row_of(Figure("jobs", 3, bar=4)),
        "b": row_of(Figure("step", 1.25, "ms"), Figure("added", 2.0, "ms", bar=5, is_most=True)),
        "e": row_of(Figure("peer", None, note="it\nbroke")),
        "a": row_of(Figure("failed", 1, bar=0, is_most=True, note="FAILED x")),
    }
    lines = table(rows).splitlines()
    assert lines[3] == "| a | failed | 1  FAILED x | at most 0 | no |"
    del lines[2:4]
    assert lines[2] == f"| **b** | **{ROWS['b'][0]}** | 2030-01-02, Stand-in, 3 s | | yes |"
    assert lines[3:5] == ["| b | step | 1.25 ms |  |  |", "| b | added | 2 ms | at most 5 | yes |"]
    assert lines[6] == "| e | peer | it broke |  |  |"
    assert lines[8] == "| i | jobs | 3 | at least 4 | no |"


def test_a_row_that_fails_is_one_that_is_missed_and_says_why() -> None:
    found = measured("no-such-row", is_dry=True)
    (figure,) = found["figures"]
    assert not found["met"] and "no-such-row" in figure["note"]


def test_a_row_that_takes_too_long_keeps_what_it_had_found_and_is_missed(monkeypatch, capsys) -> None:
    def broken(bench: Bench) -> Found:
        bench.found.add("first", 1.0, bar=0.5)
        bench.found.add("second", 2.0)
        raise KeyError("the third")

    monkeypatch.setitem(ROWS, "b", ("broken", broken))
    with pytest.raises(KeyError):
        child_main("b", is_dry=True)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2
    monkeypatch.setattr(gpu, "output_of", lambda words, limit_s: (said, "it took longer than 240 s"))
    row = measured("b", is_dry=True)
    assert [figure["name"] for figure in row["figures"]] == ["first", "second", "the row ends"]
    assert not row["met"] and row["figures"][-1]["note"] == "it took longer than 240 s"
    monkeypatch.setattr(gpu, "output_of", lambda words, limit_s: (said, ""))
    assert measured("b", is_dry=True)["met"], "one that came to its end is met"


@pytest.mark.parametrize("reason", [subprocess.TimeoutExpired("row", 9.0), KeyboardInterrupt()])
def test_nothing_that_a_row_started_outlives_it(reason, tmp_path, monkeypatch) -> None:
    started, wait, groups = tmp_path / "started", subprocess.Popen.wait, list[int]()
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '900']); print('result {}', flush=True);"
    code += "open(sys.argv[1], 'w').close(); time.sleep(900)"

    def too_long(process, timeout=None):
        if timeout is not None:
            groups.append(process.pid)
            until(started.exists)
            assert len(list(group_members(process.pid))) == 2
            raise reason
        return wait(process)

    monkeypatch.setattr(subprocess.Popen, "wait", too_long)
    words = [sys.executable, "-c", code, str(started)]
    if isinstance(reason, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            output_of(words, 9.0)
    else:
        assert output_of(words, 9.0) == ("result {}\n", "it took longer than 9 s")
    until(lambda: not list(group_members(groups[0])))


def until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_that_dies_without_a_word_is_one_that_failed() -> None:
    assert output_of([sys.executable, "-c", "print(1)"], 60.0) == ("1\n", "")
    assert output_of([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == ("", "it ended with status 3")


def test_without_a_gpu_the_rows_are_refused_in_a_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--rows", "b"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("torch sees no GPU") and captured.err.count("\n") == 1 and not captured.out


def test_tests_that_did_not_run_are_no_row() -> None:
    found = Found()
    for said in ("", "no tests ran in 0.1s", "ERROR tests/x.py\n!!! Interrupted: 1 error !!!\n1 error in 0.2s"):
        with pytest.raises(RuntimeError, match=r"no test has run: [^$]*No module named pytest"):
            add_tests(found, said, "No module named pytest")
    assert not found.figures
    add_tests(found, "..F\nFAILED tests/x.py::test_y - it is wrong\n1 failed, 2 passed in 0.2s", "")
    assert [figure.value for figure in found.figures] == [2, 1]
    assert found.figures[1].note == "FAILED tests/x.py::test_y - it is wrong"


def test_a_peer_that_fails_leaves_the_bar_unmet(tmp_path, monkeypatch) -> None:
    bench = Bench(tmp_path, is_dry=True)
    monkeypatch.setattr(gpu_rows, "transformers_rate", lambda *_: 1 / 0)
    add_transformers(bench, {}, [], 3.0)
    (ratio,) = (figure for figure in bench.found.figures if figure.bar is not None)
    assert ratio.value is None and not ratio.met and ratio.note == "ZeroDivisionError: division by zero"


def test_the_full_stack_has_the_options_of_the_engine_alone(tmp_path) -> None:
    flags = " ".join(flags_of(Bench(tmp_path, is_dry=True).options({"max_num_seqs": 3})))
    assert flags == "--load-format dummy --dtype bfloat16 --device cpu --prefill-step 0 --max-num-seqs 3"


@pytest.mark.parametrize("is_short", [False, True])
def test_a_gpu_s_time_is_that_between_two_events(is_short, tmp_path, monkeypatch) -> None:
    launched, recorded = list[float](), list[int]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = sum(launched)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

        def synchronize(self) -> None:
            pass

    class Graph:
        def __enter__(self) -> None:
            self.begin = len(launched)

        def __exit__(self, *_: object) -> None:
            self.launches = launched[self.begin :]
            del launched[self.begin :]

        def replay(self) -> None:
            recorded.append(len(self.launches))
            launched.extend(self.launches)

    cuda = SimpleNamespace(Event=Event, CUDAGraph=Graph, graph=lambda graph: graph, synchronize=lambda: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    # the host takes no part in it
    monkeypatch.setattr(gpu_rows, "time", None)
    assert Bench(tmp_path, is_dry=False).seconds(lambda: launched.append(2.0), is_short=is_short) == 0.002
    assert set(recorded) == ({gpu_rows.NUM_LAUNCHES} if is_short else set())


def test_the_first_turns_of_a_profile_do_not_count(tmp_path) -> None:
    turns, bench = list[int](), Bench(tmp_path, is_dry=True)

    def turn() -> None:
        turns.append(len(turns))
        (torch.sin if len(turns) == 1 else torch.cos)(torch.ones(1))

    spans = profiled(bench, turn, 2)
    assert len(turns) == 3 and {"aten::cos", "aten::ones"} <= set(spans.by_name)
    assert not {"aten::sin", "ProfilerStep#1"} & set(spans.by_name)


def test_memory_that_is_not_all_there_is_taken_but_for_more() -> None:
    def allocate(size: int, most: int) -> int:
        if size > most:
            raise torch.OutOfMemoryError
        return size

    free = 1 << 30
    assert [taken(lambda size: allocate(size, most), free) for most in (free, free - (100 << 20))] == [
        free - (64 << 20),
        free - (256 << 20),
    ]
    with pytest.raises(RuntimeError, match=r"not all but 536870912 could be taken"):
        taken(lambda size: allocate(size, 0), free)


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
