"""The whole comparison, with engines that compute nothing: who runs when and with what, and what is kept of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from ops.bench.peers import compare, engines, workloads
from ops.bench.peers.__main__ import main
from ops.bench.peers.children import Child, group_members
from ops.bench.peers.environments import Environment
from ops.bench.peers.pipe import Request

Run = Callable[..., int]


@pytest.fixture
def settings(monkeypatch) -> dict[str, list[dict[str, Any]]]:
    """What is tried for each engine."""
    tried: dict[str, list[dict[str, Any]]] = {name: [{}] for name in engines.MODULES}
    monkeypatch.setattr(engines, "CANDIDATES", tried)
    monkeypatch.setattr("ops.bench.peers.compare.CANDIDATES", tried)
    monkeypatch.setattr("ops.bench.peers.results.CANDIDATES", tried)
    return tried


@pytest.fixture
def run(settings: Any, small_folder: Path, tmp_path: Path, monkeypatch) -> Run:
    """The command, on short workloads; its file is tmp_path/peers.json."""
    monkeypatch.setattr(engines, "MODULES", dict.fromkeys(engines.MODULES, "tests.support.fake_peer"))
    monkeypatch.setattr(engines, "environment", lambda peer, folder: Environment(Path(sys.executable), {}, None))
    monkeypatch.setattr(engines, "gguf_of", lambda checkpoint, environment: checkpoint / "model.gguf")
    monkeypatch.setattr(compare, "EXACT", {})
    monkeypatch.setattr(compare, "REST_S", 0.0)
    sizes = {"decode": (3, 4, 5), "single": (1, 4, 6), "prefill": (2, 8, 1)}
    short = {name: workloads._equal(*each) for name, each in sizes.items()}
    monkeypatch.setattr(workloads, "WORKLOADS", workloads.WORKLOADS | short)

    def command(*words: str) -> int:
        shown = ["--shapes", "small", "--environments", str(small_folder), "--json", str(tmp_path / "peers.json")]
        return main([*shown, *words])

    return command


def kept(folder: Path) -> Any:
    return json.loads((folder / "peers.json").read_text())


def test_engines_run_in_turn_on_the_same_prompts_and_parts_are_merged(run: Run, settings: Any, tmp_path: Path, capsys):
    names = ["ours", "vllm", "llama.cpp"]
    for name in names:
        settings[name] = [{"log": str(tmp_path / name)}]
    words = ["--dtypes", "bfloat16", "--engines", ",".join(names), "--repeats", "3"]
    run(*words, "--workloads", "decode")
    seen = {name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names}
    assert [len(prompts) for prompts in seen["ours"]] == [4, 3] * 3, "each has a short run before"
    assert seen["ours"] == seen["vllm"] == seen["llama.cpp"]
    assert len({tuple(prompt) for prompts in seen["ours"] for prompt in prompts}) == 3 * (4 + 3)
    order = [line.split()[4] for line in capsys.readouterr().err.splitlines() if " decode " in line]
    assert order == [*names, "vllm", "llama.cpp", "ours", "llama.cpp", "ours", "vllm"]

    (entry,) = kept(tmp_path)["runs"]
    assert entry["num_output"] == [15] * 3 and set(entry["seconds"]) == set(names) == set(entry["memory"])
    assert entry["rates"] == [{"read_bytes_per_s": 1e10, "flops_per_s": 1e12}] * 3
    assert len(entry["least_seconds"]) == 3 and entry["least_seconds"][0] > 0
    assert entry["versions"]["vllm"] == {"fake": "1.0"} and entry["settings"]["vllm"] == settings["vllm"][0]
    run(*words, "--workloads", "single")
    assert [each["workload"] for each in kept(tmp_path)["runs"]] == ["decode", "single"]
    assert "| small | bfloat16 | single 1 x 64/128 |" in capsys.readouterr().out


def test_a_sweep_keeps_the_fastest_settings_that_work_and_later_runs_take_them(
    run: Run, settings: Any, tmp_path: Path, monkeypatch
):
    settings["vllm"] = [{"says": "not with these"}, {"large_pages": False}, {"large_pages": True}]
    pages: dict[int, Any] = {}

    def timed(child: Child, requests: list[Request], seed: str) -> float:
        child.resume()
        pages[child.pid] = child.ask("large_pages")
        return 1.0 if pages[child.pid] else 2.0

    monkeypatch.setattr(compare, "timed", timed)
    words = ["--dtypes", "bfloat16", "--workloads", "decode,single", "--engines", "ours,vllm"]
    assert run("--sweep", *words) == 0
    first, second = kept(tmp_path)["sweeps"]
    assert [first["workload"], second["workload"], first["engine"]] == ["decode", "single", "vllm"]
    assert "not with these" in first["tried"][0]["error"]
    assert [row.get("tokens_per_s") for row in first["tried"]] == [None, 7.5, 15.0]
    assert sorted(pages.values(), key=str) == ["1", None]
    run(*words, "--repeats", "1")
    assert {entry["settings"]["vllm"]["large_pages"] for entry in kept(tmp_path)["runs"]} == {True}


def test_a_peer_of_which_no_settings_work_is_a_sentence(run: Run, settings: Any, capsys):
    settings["vllm"] = [{"says": "not here"}]
    assert run("--sweep", "--dtypes", "bfloat16", "--workloads", "single", "--engines", "vllm") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vllm gave no answer; the last it said: not here"


def test_in_float32_log_probabilities_are_compared_and_one_that_is_off_is_told(
    run: Run, settings: Any, tmp_path: Path, capsys
):
    settings["llama.cpp"] = [{"shift": 1e-3}]
    words = ["--dtypes", "float32,bfloat16", "--workloads", "single", "--repeats", "1"]
    assert run(*words, "--engines", "ours,vllm,llama.cpp") == 1
    (entry,) = kept(tmp_path)["agreements"]
    assert (entry["dtype"], entry["differences"]["vllm"]) == ("float32", 0.0)
    said = [line for line in capsys.readouterr().out.splitlines() if "log-probabilities 1.0e-03 from those of" in line]
    assert len(said) == 1 and said[0].startswith("small float32: ") and "of llama.cpp" in said[0]


def test_starts_are_measured_with_nothing_else_loaded(run: Run, tmp_path: Path, monkeypatch):
    begin, alive = compare.start, []

    def start(*arguments: Any) -> Child:
        assert not any(list(group_members(pid)) for pid in alive)
        child = begin(*arguments)
        alive.append(child.pid)
        return child

    monkeypatch.setattr(compare, "start", start)
    assert run("--start", "--dtypes", "float32", "--engines", "ours,vllm") == 0
    (entry,) = kept(tmp_path)["starts"]
    assert len(alive) == 6 and {engine: len(row) for engine, row in entry["seconds"].items()} == {"ours": 3, "vllm": 3}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_engine_is_left_behind_when_the_bench_is_ended(run: Run, monkeypatch, request, number: signal.Signals):
    alive: list[int] = []

    def timed(child: Child, requests: list[Request], seed: str) -> float:
        alive.append(child.pid)
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came before this")

    monkeypatch.setattr(compare, "timed", timed)
    # a process that a shell began behind its back ignores Ctrl-C from the start
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    before = signal.getsignal(signal.SIGTERM)
    assert run("--dtypes", "bfloat16", "--workloads", "single", "--engines", "ours,vllm") == 130
    assert alive and not list(group_members(alive[0]))
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_cannot_be_had_is_a_sentence(run: Run, monkeypatch, capsys):
    def fail(peer: str, folder: Path) -> Environment:
        raise ConfigurationError("vllm cannot be installed: no disk")

    monkeypatch.setattr(engines, "environment", fail)
    assert run("--dtypes", "bfloat16", "--workloads", "single", "--engines", "vllm") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vllm cannot be installed: no disk"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engines", "ours,tgi"], "must be some of ours,vllm,llama.cpp,transformers"),
        (["--workloads", ""], "must be some of decode,mixed,prefill,shared,single"),
        (["--repeats", "0"], "must be from 1 to 1000"),
        (["--sweep", "--start"], "not allowed with argument"),
    ],
)
def test_options_that_mean_nothing_are_refused(run: Run, words: list[str], sentence: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert sentence in capsys.readouterr().err
