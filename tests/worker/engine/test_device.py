"""The limit that the pool can keep."""

from __future__ import annotations

import pytest

from tests.worker.engine.harness import encoder_limits, limits
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


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_an_encoders_input_and_the_output_behind_a_start_token_leave_a_block(block_size: int) -> None:
    num_blocks = 9
    limit = fitting_total_tokens(1000, num_blocks * block_size, block_size, has_encoder=True)
    assert limit == 7 * block_size

    def most_blocks(total: int) -> int:
        return max(-(-size // block_size) - (-(1 + total - size) // block_size) for size in range(1, total))

    assert most_blocks(limit) == num_blocks - 1
    without = fitting_total_tokens(1000, num_blocks * block_size, block_size)
    assert most_blocks(without) == num_blocks, "one spare block is not enough"


def test_an_encoder_needs_another_block_and_shares_no_prefixes() -> None:
    encoder_limits(num_blocks=17, max_total_tokens=60)
    with pytest.raises(ValueError, match="cannot hold"):
        encoder_limits(num_blocks=16, max_total_tokens=60)
    with pytest.raises(ValueError, match="no prefixes to share"):
        encoder_limits(prefix_caching=True)


@pytest.mark.parametrize("changes", [{"max_num_seqs": 0}, {"max_batch_prefill_tokens": 0}])
def test_an_engine_without_room_for_a_token_does_not_start(changes: dict) -> None:
    with pytest.raises(ValueError, match="at least one"):
        limits(**changes)
