"""The dry run of `python -m ops.bench.scaling`, and that a cliff would show."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from ops.bench.about import about
from ops.bench.roofline import Machine, decode_work
from ops.bench.scaling import FULL, SHORT, cliffs, main, plot, sweeps_of, table

MACHINE = Machine(30e9, 1e12)


def found_with(step_seconds):
    """What a run would find on a machine whose step takes so long."""
    points = [
        {"ranks": ranks, "batch": batch, "context": context, "step_s": [step_seconds(batch, context)] * 3}
        for ranks in (1, 2)
        for batch, context in FULL.points
    ]
    sweeps = [asdict(sweep) for sweep in FULL.sweeps]
    return {"about": about(3), "config": FULL.config, "machine": asdict(MACHINE), "sweeps": sweeps, "points": points}


def both_parts(batch, context):
    """Seconds of a step that computes when it has read, and overlaps nothing."""
    work = decode_work(FULL.config, batch, context)
    return (work.weight_bytes + work.kv_bytes) / MACHINE.read_bytes_per_s + (
        work.product_flops + work.attention_flops
    ) / MACHINE.flops_per_s


def test_a_dry_run_measures_every_point_on_one_rank_and_on_two(tmp_path, capsys):
    files = ["--json", str(tmp_path / "found"), "--plots", str(tmp_path / "plots")]
    assert main(["--short", "--rounds", "2", *files]) == 0
    found = json.loads((tmp_path / "found").read_text())
    seen = {(point["ranks"], point["batch"], point["context"]): point["step_s"] for point in found["points"]}
    assert set(seen) == {(ranks, *point) for ranks in (1, 2) for point in SHORT.points}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in seen.values())
    assert min(found["machine"].values()) > 0 and found["about"]["cores"] > 0
    for name in ("batch", "context"):
        drawn = (tmp_path / "plots" / f"scaling-{name}.svg").read_text()
        assert ElementTree.fromstring(drawn).tag.endswith("svg") and drawn == plot(found, name)
        assert all(curve in drawn for curve in ("1 rank", "2 ranks", "roofline"))
    assert table(found) in capsys.readouterr().out


def test_a_step_that_overlaps_nothing_is_no_cliff():
    found = found_with(both_parts)
    excess = [
        own / least
        for _, curves in sweeps_of(found)
        for own, least in zip(curves[0].growth, curves[-1].growth, strict=True)
    ]
    assert 1.1 < max(excess) <= 4 / 3, "reading and computing are about equal somewhere"
    assert cliffs(found) == []


@pytest.mark.parametrize(
    ("name", "first", "step"), [("batch", 64, "batch 32 to 64"), ("context", 4096, "context 2048 to 4096")]
)
def test_a_step_that_suddenly_takes_twice_as_long_is_a_cliff(name, first, step):
    found = found_with(both_parts)
    steep = copy.deepcopy(found)
    for point in steep["points"]:
        if point["ranks"] == 2 and point[name] >= first:
            point["step_s"] = [2 * seconds for seconds in point["step_s"]]
    (said,) = cliffs(steep)
    assert said.startswith(f"{step} on 2 ranks: ")
    assert table(steep) != table(found)


def test_the_full_run_doubles_from_1_to_256_and_from_128_to_8192():
    batches, contexts = FULL.sweeps
    assert batches.points[0] == (1, 128) and batches.points[-1] == (256, 128)
    assert contexts.points[0] == (8, 128) and contexts.points[-1] == (8, 8192)
    assert all(after == 2 * before for each in FULL.sweeps for before, after in zip(each.values, each.values[1:]))
