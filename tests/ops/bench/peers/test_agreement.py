"""Likeliest tokens of two engines side by side: what rounding may do and what it may not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ops.bench.peers.agreement import NUM_POSITIONS, NUM_TOP, difference, tolerance
from ops.bench.peers.checkpoints import SHAPES
from ops.bench.peers.engines import Site, start
from ops.bench.peers.pipe import Request

ONE = [[(4, -1.0), (5, -2.0), (6, -3.0)], [(7, -1.5), (8, -1.75), (9, -4.0)]]
PROMPT = [(37 * place) % 400 + 270 for place in range(20)]


def test_the_largest_difference_counts():
    assert difference(ONE, ONE) == 0.0
    other = [ONE[0], [(7, -1.5), (8, -1.5), (9, -4.0)]]
    assert difference(ONE, other) == difference(other, ONE) == 0.25


def test_behind_a_choice_as_likely_as_the_other_nothing_counts():
    tied = [[(5, -1.5), (4, -1.5), (6, -3.0)], [(1, -9.0), (2, -9.0), (3, -9.0)]]
    assert difference(ONE, tied) == 1.0, "it was twice as likely in one of them"
    assert difference([[(4, -1.0), (5, -1.0)], *ONE[1:]], [[(5, -1.0), (4, -1.0)], *tied[1:]]) == 0.0


def test_a_choice_that_the_other_does_not_know_is_as_far_as_can_be():
    assert difference(ONE, [[(1, -1.0), (5, -2.0), (6, -3.0)], ONE[1]]) == math.inf


def test_an_id_that_only_one_has_is_as_likely_as_the_last_of_the_other():
    assert difference(ONE, [[(4, -1.0), (5, -2.0), (1, -3.0)], ONE[1]]) == 0.0
    assert difference(ONE, [[(4, -1.0), (5, -2.0), (1, -3.5)], ONE[1]]) == 0.5


def test_what_is_allowed_grows_with_the_depth_and_is_far_below_what_bfloat16_does():
    assert 1e-5 < tolerance(SHAPES["125m"]) < tolerance(SHAPES["443m"]) < 2.0**-10


def top_of(folder: Path, dtype: torch.dtype, **changes: Any) -> list[list[tuple[int, float]]]:
    """As transformers computes it, without a cache."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, value in changes.items():
        setattr(model.config, name, value)
    ids, rows = list(PROMPT), []
    for _ in range(NUM_POSITIONS):
        with torch.inference_mode():
            logits = model.float()(torch.tensor([ids])).logits[0, -1]
        best = torch.log_softmax(logits, -1).topk(NUM_TOP)
        rows.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        ids.append(rows[-1][0][0])
    return rows


@pytest.fixture(scope="module")
def ours(small_folder: Path) -> list[list[tuple[int, float]]]:
    """By the engine as the comparison runs it, in a process of its own."""
    child = start("ours", Site("small", "float32", small_folder), {})
    try:
        requests = [Request(PROMPT, 5), Request(PROMPT[:7], 9)]
        assert child.run(requests) > 0.0 and set(child.ask("versions")) == {"inferfleet", "torch"}
        return [[(number, value) for number, value in row] for row in child.ask("top", PROMPT, NUM_POSITIONS, NUM_TOP)]
    finally:
        child.close()


def test_ours_is_as_near_to_another_implementation_as_rounding_lets_it_be(ours, folders: dict[str, Path]):
    assert [len(row) for row in ours] == [NUM_TOP] * NUM_POSITIONS
    allowed = tolerance(SHAPES["small"])
    assert difference(ours, top_of(folders["float32"], torch.float32)) <= allowed
    assert difference(ours, top_of(folders["float32"], torch.bfloat16)) > allowed, "rounded weights are seen"
