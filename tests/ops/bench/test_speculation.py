"""The dry run of `python -m ops.bench.speculation`: both sides run, drafts are right, and another answer would show."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ops.bench.editor import ANSWER_ID, END_ID, Texts, answer, question
from ops.bench.speculation import SHORT, Script, copied, main, never_repeated, of_scripts, repeat_rate
from worker.runner import places

ONE_ROW = replace(SHORT, batches=(1,))


def test_a_dry_run_compares_every_text(tmp_path, capsys):
    assert main(["--short", "--rounds", "1", "--json", str(tmp_path / "found")]) == 0
    found = {(row["name"], row["batch"]): row for row in json.loads((tmp_path / "found").read_text())["workloads"]}
    assert len(found) == 11
    assert all(row["is_same"] and len(row["plain"]) == len(row["guessing"]) == 1 for row in found.values())
    for batch in (1, 3):
        copy, never = found["copy with edits, greedy", batch], found["random tokens, greedy", batch]
        assert copy["num_accepted"] > 0.3 * copy["num_tokens"]
        assert (copy["num_tokens"], never["num_drafts"]) == (batch * SHORT.num_output, 0)
    assert found["trained to edit, greedy", 1]["num_right"] is not None
    assert "| copy with edits, greedy | 1 |" in capsys.readouterr().out


def test_drafts_that_change_an_answer_are_a_miss(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "num_kept", lambda picks, drafts: len(picks))
    result = next(of_scripts(tmp_path, ONE_ROW, 8, 1))
    assert result.num_drafts > result.num_accepted * 0.9 > 0
    assert result.misses[0] == "copy with edits, greedy: drafts changed an answer"


@pytest.mark.parametrize(("output", "rate"), [([9, 1, 2], 1.0), ([9, 2, 3], 1 / 3), ([4, 5, 6], 0.0)])
def test_a_repeat_is_a_token_behind_the_same_two(output: list[int], rate: float):
    assert repeat_rate(Script([7, 8, 9, 1, 2, 3, 7, 8], output)) == pytest.approx(rate)


def test_scripts_copy_with_edits_or_repeat_nothing():
    script = copied(SHORT)
    assert 0.6 < repeat_rate(script) < 0.95
    assert np.isin(script.output, script.prompt).mean() < 1
    assert repeat_rate(never_repeated(SHORT)) == 0.0


def test_the_editor_is_asked_for_the_text_with_two_edits():
    assert question(b"1, b") == [256, *b"1, b", ANSWER_ID]
    assert answer(b"1, b") == [*b"#; b", END_ID]
    texts = Texts(64, 1)
    assert texts.held_out() not in texts._known
