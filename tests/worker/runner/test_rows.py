from __future__ import annotations

import numpy as np
import pytest
import torch

from common.job import SamplingParams
from tests.worker.runner.device_sampling import plan_of
from tests.worker.runner.sampling import Row, state_of
from worker.runner.rows import TokenCounts


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def counts_of(counts: TokenCounts, row: int) -> list[list[int]]:
    return counts.of(ids(row))[0].tolist()


def test_prompt_and_output_are_counted_apart():
    counts = TokenCounts(range(4))
    counts.start(9, ids(1, 1, 2), ids(2, 3))
    assert counts_of(counts, 9) == [[0, 2, 2, 1], [0, 0, 1, 1]]
    counts.add(ids(9), ids(3))
    assert counts_of(counts, 9) == [[0, 2, 2, 2], [0, 0, 1, 2]]


def test_many_rows_get_slots_of_their_own_and_give_them_back():
    counts = TokenCounts(range(8))
    for row in range(11):
        counts.start(row, ids(*[row % 8] * (row + 1)), ids())
    assert len(counts.table) == 16
    assert [counts_of(counts, row)[0][row % 8] for row in range(11)] == list(range(1, 12))
    counts.add(ids(3, 10, 0), ids(7, 7, 7))
    assert counts_of(counts, 3)[1] == counts_of(counts, 10)[1] == [0] * 7 + [1]
    for row in range(11):
        counts.release(row)
    counts.release(4)
    for row in range(20, 36):
        counts.start(row, ids(), ids())
    assert len(counts.table) == 16
    assert int(counts.table.sum()) == 0
    assert isinstance(counts.table, torch.Tensor)


@pytest.mark.parametrize(
    "asked", [dict(do_sample=True), dict(repetition_penalty=1.1), dict(min_tokens=2), dict(num_top_logprobs=1)], ids=str
)
def test_as_long_as_one_row_asks_for_more_than_the_best_all_are_looked_at(asked):
    plain, special = (
        Row(SamplingParams(max_new_tokens=5), [1], []),
        Row(SamplingParams(max_new_tokens=5, **asked), [1], []),
    )
    assert state_of([plain, plain], range(8))[0].want_best_only
    state, places = state_of([plain, special], range(8))
    assert not state.want_best_only
    state.apply(plan_of([], freed=places[:1]))
    assert not state.want_best_only
    state.apply(plan_of([], freed=places[1:]))
    assert state.want_best_only
