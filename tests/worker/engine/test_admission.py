"""Expected lengths and the predicted peak, against a simulation that lets everyone grow."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.admission import FIRST_EXPECTATION, NUM_REMEMBERED, OutputForecast, peak_blocks

BLOCK_SIZE = 4
LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=8)


def simulated_peak(pairs: list[tuple[int, int]]) -> int:
    """Blocks held at the worst moment, everyone growing a token per step and leaving at its end."""
    peak = 0
    for step in range(max(remaining for _, remaining in pairs) + 1):
        alive = [(length, remaining) for length, remaining in pairs if remaining >= step]
        peak = max(peak, sum(-(-(length + step) // BLOCK_SIZE) for length, _ in alive))
    return peak


def predicted(pairs: list[tuple[int, int]]) -> int:
    lengths, remaining = (np.array(column, np.int32) for column in zip(*pairs))
    return peak_blocks(lengths, remaining, BLOCK_SIZE)


@given(LENGTHS)
def test_the_predicted_peak_is_never_below_the_real_one_and_never_far_above(pairs: list[tuple[int, int]]) -> None:
    assert simulated_peak(pairs) <= predicted(pairs) <= simulated_peak(pairs) + len(pairs)


@given(LENGTHS, st.data())
def test_blocks_of_a_second_table_that_does_not_grow_count_as_full_ones(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    crosses = [data.draw(st.integers(0, 8)) for _ in pairs]
    longer = [(length + cross * BLOCK_SIZE, rest) for (length, rest), cross in zip(pairs, crosses)]
    peak = 0
    for step in range(max(rest for _, rest in pairs) + 1):
        alive = [(length, cross) for (length, rest), cross in zip(pairs, crosses) if rest >= step]
        peak = max(peak, sum(-(-(length + step) // BLOCK_SIZE) + cross for length, cross in alive))
    assert peak <= predicted(longer) <= peak + len(pairs)


@given(LENGTHS)
def test_the_order_of_requests_does_not_matter(pairs: list[tuple[int, int]]) -> None:
    assert predicted(pairs) == predicted(sorted(pairs))


def test_short_ones_that_leave_early_make_room() -> None:
    pairs = [(4, 40), (40, 4)]
    everyone_at_full_length = sum(length + remaining for length, remaining in pairs)
    assert predicted(pairs) * BLOCK_SIZE < everyone_at_full_length


def test_the_forecast_begins_with_256_and_follows_what_it_sees() -> None:
    forecast = OutputForecast()
    assert forecast.remaining(0, 10_000) == FIRST_EXPECTATION
    assert forecast.remaining(0, 20) == 20
    for length in [10] * 85 + [50] * 15:
        forecast.note(length)
    assert forecast.remaining(0, 10_000) == 50
    assert forecast.remaining(20, 10_000) == 30


def test_old_outputs_are_forgotten() -> None:
    forecast = OutputForecast()
    for length in [900] * NUM_REMEMBERED + [10] * NUM_REMEMBERED:
        forecast.note(length)
    assert forecast.remaining(0, 10_000) == 10


def test_one_that_outlives_the_expectation_is_expected_to_go_on() -> None:
    forecast = OutputForecast()
    assert forecast.remaining(1000, 10_000) == 501
    assert forecast.remaining(1000, 1010) == 10
    assert forecast.remaining(1000, 1000) == 0
