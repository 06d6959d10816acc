"""The limit that the pool can keep."""

from __future__ import annotations

import pytest

from tests.worker.engine.harness import limits
from worker.engine.device import fitting_total_tokens


@pytest.mark.parametrize(
    ("wanted", "kv_tokens", "block_size", "expected"),
    [(100, 1000, 16, 100), (1000, 1000, 16, 976), (976, 1000, 16, 976), (64, 64, 16, 48), (10, 16, 16, 0)],
)
def test_the_longest_request_leaves_a_block(wanted: int, kv_tokens: int, block_size: int, expected: int) -> None:
    assert fitting_total_tokens(wanted, kv_tokens, block_size) == expected


def test_an_engine_whose_pool_is_too_small_does_not_start() -> None:
    limits(num_blocks=16, max_total_tokens=60)
    with pytest.raises(ValueError, match="cannot hold"):
        limits(num_blocks=15, max_total_tokens=60)


@pytest.mark.parametrize("changes", [{"max_num_seqs": 0}, {"max_batch_prefill_tokens": 0}])
def test_an_engine_without_room_for_a_token_does_not_start(changes: dict) -> None:
    with pytest.raises(ValueError, match="at least one"):
        limits(**changes)
