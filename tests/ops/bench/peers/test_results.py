"""Figures of a comparison: merged by what they are of, held against their bars, shown as tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from ops.bench.peers import results
from ops.bench.peers.engines import CANDIDATES, Site
from ops.bench.peers.results import Found, best_peer, best_settings, merge, misses, rate, ratios, share, table

MACHINE = {"processor": "Some CPU", "cores": 2, "flags": ["avx2", "amx_bf16"]}
ORIGIN = {"date": "2030-01-02", "machine": MACHINE}
SITE = Site("125m", "bfloat16", Path("unused"))


def run_of(workload: str, seconds: dict[str, list[float]], dtype: str = "bfloat16", **memory: int) -> dict[str, Any]:
    """Three rounds of 100, 200 and 100 tokens; the roofline takes 0.5, 1 and 0.5 s."""
    return {
        **ORIGIN,
        "shape": "125m",
        "dtype": dtype,
        "workload": workload,
        "seconds": seconds,
        "num_output": [100, 200, 100],
        "least_seconds": [0.5, 1.0, 0.5],
        "memory": {engine: {"peak": peak, "held": peak // 2} for engine, peak in memory.items()},
        "versions": {engine: {engine: "1.2"} for engine in seconds},
    }


DECODE = run_of(
    "decode",
    {"ours": [1.0, 2.0, 1.0], "vllm": [1.4, 2.6, 1.5], "llama.cpp": [2.0, 4.0, 2.0], "transformers": [1.0, 1.0, 1.0]},
    ours=300_000_000,
    vllm=1_000_000_000,
)


def found_of(**kinds: Any) -> Found:
    return {kind: kinds.get(kind, []) for kind in results.KEYS}


def test_figures_are_those_of_each_round():
    assert rate(DECODE, "ours") == 100.0 and rate(DECODE, "llama.cpp") == 50.0
    assert ratios(DECODE, "vllm") == [1.4, 1.3, 1.5]
    assert share(DECODE, "ours") == 0.5
    assert best_peer(DECODE, results.NEEDED) == "vllm"
    assert best_peer(DECODE, ["nobody"]) == ""


def test_a_bar_is_for_the_median_of_ratios_with_the_best_peer_that_it_names():
    assert misses(found_of(runs=[DECODE])) == []
    slower = DECODE | {"seconds": DECODE["seconds"] | {"vllm": [1.2, 2.4, 1.9]}}
    assert misses(found_of(runs=[slower])) == ["125m bfloat16 decode: 1.20 times as fast as vllm, bar 1.3"]
    assert misses(found_of(runs=[slower | {"dtype": "float32"}])) == [], "there the bar is 1"
    single = slower | {"workload": "single", "seconds": {"ours": [1.0] * 3, "vllm": [0.5] * 3, "llama.cpp": [1.1] * 3}}
    assert misses(found_of(runs=[single])) == [], "a single stream is held against llama.cpp alone"
    assert misses(found_of(runs=[single | {"dtype": "float32"}])) == [
        "125m float32 single: 0.50 times as fast as vllm, bar 1.0"
    ]


def test_a_run_without_a_peer_that_a_bar_names_misses_it():
    alone = DECODE | {"seconds": {"ours": [1.0] * 3, "vllm": [2.0] * 3}}
    assert misses(found_of(runs=[alone])) == ["125m bfloat16 decode: no figures of llama.cpp"]


def test_memory_starts_and_agreement_have_bars_too():
    heavy = DECODE | {"memory": DECODE["memory"] | {"ours": {"peak": 400_000_000, "held": 1}}}
    where = {"shape": "125m", "dtype": "float32", **ORIGIN}
    late = {**where, "seconds": {"ours": [2.0, 4.0, 3.5], "vllm": [40.0]}}
    far = {**where, "tolerance": 1e-4, "differences": {"vllm": 1e-5, "llama.cpp": 2e-4, "other": math.nan}}
    assert misses(found_of(runs=[DECODE, heavy | {"workload": "mixed"}], starts=[late], agreements=[far])) == [
        "125m bfloat16: 0.40 of the peak memory of vllm, bar 0.33",
        "125m float32: first token after 3.5 s, bar 3 s",
        "125m float32: log-probabilities 2.0e-04 from those of llama.cpp, bar 1.0e-04",
        "125m float32: log-probabilities nan from those of other, bar 1.0e-04",
    ]


def test_an_entry_replaces_the_one_of_the_same_names_only(tmp_path: Path):
    file = tmp_path / "peers.json"
    found = results.read(file)
    assert found == found_of()
    for entry in (DECODE, DECODE | {"workload": "mixed"}, DECODE | {"dtype": "float32"}):
        merge(found, "runs", entry)
    merge(found, "runs", DECODE | {"date": "2030-02-03"})
    results.write(found, file)
    again = results.read(file)
    dates = [(run["dtype"], run["workload"], run["date"]) for run in again["runs"]]
    assert dates == [
        ("bfloat16", "decode", "2030-02-03"),
        ("bfloat16", "mixed", "2030-01-02"),
        ("float32", "decode", "2030-01-02"),
    ]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(ConfigurationError, match="has no figures of peers"):
        results.read(tmp_path / "peers.json")


def test_settings_are_the_best_of_the_sweep_of_that_workload_else_the_first():
    names = {"shape": "125m", "dtype": "bfloat16", "workload": "decode", "engine": "vllm"}
    found = found_of(sweeps=[{**names, "best": {"large_pages": False}}])
    assert best_settings(found, SITE, "decode", "vllm") == {"large_pages": False}
    assert best_settings(found, SITE, "mixed", "vllm") == CANDIDATES["vllm"][0]
    assert best_settings(found, SITE, "decode", "ours") == {}


def test_the_table_shows_every_engine_that_was_measured_and_where():
    where = {"shape": "125m", "dtype": "float32", **ORIGIN}
    found = found_of(
        runs=[DECODE, run_of("single", {"ours": [1.0, 1.0, 1.0]})],
        starts=[{**where, "seconds": {"ours": [2.0, 1.0, 1.5], "vllm": [40.0]}}],
        agreements=[{**where, "tolerance": 1e-4, "differences": {"vllm": 1e-5}}],
    )
    assert json.loads(json.dumps(found)) == found
    text = table(found)
    for line in (
        "| shape | type | output tokens/s | ours | vllm | llama.cpp | transformers | roofline | ours of roofline "
        "| times as fast (range) | bar |",
        "| 125m | bfloat16 | decode 32 x 64/128 | 100 | 71 | 50 | 100 | 200 | 0.50 "
        "| 1.40 of vllm (1.30 to 1.50) | 1.3 |",
        "| 125m | bfloat16 | single 1 x 64/128 | 100 |  |  |  | 200 |  |  | 1.0 |",
        "| 125m | bfloat16 | 300 (150) | 1000 (500) |",
        "| 125m | float32 | 1.5 | 40.0 |",
        "| 125m | float32 | vllm | 1.0e-05 | 1.0e-04 |",
        "Measured on 2030-01-02: Some CPU, 2 cores (avx2, amx_bf16).",
        "Versions: llama.cpp 1.2, ours 1.2, transformers 1.2, vllm 1.2.",
    ):
        assert line in text.splitlines()
    assert table(found_of()) == ""
