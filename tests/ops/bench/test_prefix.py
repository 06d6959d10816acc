"""The dry run of `python -m ops.bench.prefix`: turns find their history, and one that does not shows."""

from __future__ import annotations

import json

import pytest

from ops.bench.prefix import BLOCK_SIZE, SHORT, main, misses, rounds_of
from worker.engine.scheduler import Scheduler


def found_by(arguments, folder):
    assert main(["--short", "--json", str(folder / "found"), *arguments]) == 0
    return json.loads((folder / "found").read_text())


def test_a_dry_run_holds_chats_that_find_their_history(tmp_path, capsys):
    found = found_by(["--rounds", "2", "--http"], tmp_path)
    for where in ("in process", "over HTTP"):
        rounds = rounds_of(found, where)
        lengths = [[turn.num_tokens for turn in one.turns] for one in rounds]
        first = SHORT.num_system + SHORT.num_new
        assert lengths == [[first + shift + 12 * turn for turn in range(3)] for shift in (5, 10)]
        assert all(each.num_tokens == SHORT.num_new for one in rounds for each in one.alone)
    rounds = rounds_of(found, "in process")
    for one in rounds:
        assert one.turns[0].num_computed == one.turns[0].num_tokens, "nobody had this system prompt before"
        assert all(SHORT.num_new <= turn.num_computed < SHORT.num_new + BLOCK_SIZE for turn in one.turns[1:])
        assert all(each.num_computed == SHORT.num_new for each in one.alone)
        assert one.equal.num_tokens == one.equal.num_computed == one.turns[-1].num_computed
    out = capsys.readouterr().out
    assert f"| in process: turn 3 | {rounds[0].turns[-1].num_tokens + 2.5:.0f} |" in out
    assert "| over HTTP |" in out and found["search_us"]["with history"] > 0


def test_a_turn_that_computes_its_history_again_is_a_miss(tmp_path, monkeypatch):
    found = found_by(["--rounds", "1"], tmp_path)
    assert not [miss for miss in misses(found, SHORT) if "computed more" in miss]
    monkeypatch.setattr(Scheduler, "_find_prefix", lambda scheduler, request: [])
    with pytest.raises(AssertionError, match="the beginning is found"):
        found_by(["--rounds", "1"], tmp_path)
    monkeypatch.setattr("ops.bench.prefix.search_costs", lambda sizes, repeats: {})
    missed = misses(found_by(["--rounds", "1"], tmp_path), SHORT)
    assert "in process: a turn computed more than 24 tokens" in missed


def test_a_ratio_beyond_the_bar_is_a_miss(tmp_path):
    found = found_by(["--rounds", "1"], tmp_path)
    found["in process"][0]["turns"][-1]["ttft_ms"] = 1.4 * found["in process"][0]["alone"][-1]["ttft_ms"]
    assert misses(found, SHORT) == ["in process: 1.40, bar 1.3"]
