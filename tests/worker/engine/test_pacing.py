"""The prompt budget of a step by time."""

from __future__ import annotations

from typing import Any

import pytest

from worker.engine.pacing import (
    CHUNK,
    PARTS_OF_CHUNK,
    RECENT_STEPS,
    SHARE_OF_PROMPTS,
    SMALLEST_CHUNK,
    STEPS_UNTIL_LOOK,
    PrefillPacer,
)


def paced(max_tokens: int = 4096, limit_s: float = 0.1, decode_s: float = 0.0) -> PrefillPacer:
    """A pacer that has seen prompts cost a millisecond per token, and steps of four decodes take `decode_s`."""
    pacer = PrefillPacer(max_tokens, limit_s)
    for _ in range(50):
        pacer.note(1000, 0, 1.0)
        if decode_s:
            pacer.note(0, 4, decode_s)
    return pacer


def just_below(room: float) -> Any:
    """As many chunks as have room."""
    return pytest.approx(room - CHUNK / 2, abs=CHUNK / 2)


def test_mixed_steps_are_cut_to_the_limit_while_nothing_is_known_of_decoding() -> None:
    assert paced().budget(4, has_seniors=True) == just_below(100)


def test_prompts_lengthen_a_step_by_a_share_of_what_it_takes_without_them() -> None:
    assert paced(decode_s=0.05, limit_s=1.0).budget(4, has_seniors=True) == just_below(1000 * SHARE_OF_PROMPTS * 0.05)
    assert paced(decode_s=0.05, limit_s=0.06).budget(4, has_seniors=True) == SMALLEST_CHUNK
    assert paced(decode_s=0.5, limit_s=0.1).budget(4, has_seniors=True) == SMALLEST_CHUNK, "streams alone take longer"
    assert paced(decode_s=0.5, limit_s=0.6).budget(4, has_seniors=True) == just_below(100)


def test_what_a_step_takes_goes_by_how_many_decode() -> None:
    pacer = paced(decode_s=0.05, limit_s=10.0)
    for _ in range(50):
        pacer.note(0, 40, 0.2)
    few, many = (1000 * SHARE_OF_PROMPTS * seconds for seconds in (0.05, 0.2))
    assert (
        pacer.budget(4, has_seniors=True)
        == pacer.budget(7, has_seniors=True)
        == pacer.budget(31, has_seniors=True)
        == just_below(few)
    )
    assert pacer.budget(32, has_seniors=True) == pacer.budget(200, has_seniors=True) == just_below(many)
    assert pacer.budget(1, has_seniors=True) == 4096, "what fewer take is not known, and the limit is far"


def test_steps_of_fewer_around_which_requests_come_and_go_are_no_measure_of_what_streams_wait() -> None:
    pacer = paced(limit_s=10.0)
    for _ in range(50):
        for _ in range(8):
            pacer.note(0, 8, 0.1)
        pacer.note(0, 7, 0.16)
    assert pacer.budget(8, has_seniors=True) == just_below(1000 * SHARE_OF_PROMPTS * 0.1)
    assert pacer.budget(7, has_seniors=True) == pacer.budget(8, has_seniors=True)
    for _ in range(RECENT_STEPS):
        pacer.note(0, 7, 0.16)
    assert pacer.budget(7, has_seniors=True) == just_below(1000 * SHARE_OF_PROMPTS * 0.16), "what 8 take is long ago"


def test_beside_streams_of_the_same_burst_prompts_are_held_to_the_limit_alone() -> None:
    pacer = paced(decode_s=0.05, limit_s=1.0)
    assert pacer.budget(4, has_seniors=False) == just_below(950)
    assert pacer.budget(4, has_seniors=True) < 50


def test_the_cost_of_prompts_is_what_mixed_steps_take_beyond_decoding() -> None:
    pacer = PrefillPacer(4096, 10.0)
    for _ in range(50):
        pacer.note(0, 4, 0.05)
        pacer.note(100, 4, 0.15)
    assert pacer.budget(4, has_seniors=True) == just_below(1000 * SHARE_OF_PROMPTS * 0.05)


def test_few_tokens_may_cost_less_than_half_of_twice_as_many() -> None:
    pacer = PrefillPacer(4096, 10.0)
    seconds = {16: 0.014, 32: 0.04}
    for _ in range(200):
        pacer.note(0, 4, 0.05)
        pacer.note(16, 4, 0.05 + seconds[16])
        pacer.note(32, 4, 0.05 + seconds[32])
    assert SHARE_OF_PROMPTS * 0.05 / (seconds[16] / 16) > 32 > SHARE_OF_PROMPTS * 0.05 / (seconds[32] / 32)
    assert pacer.budget(4, has_seniors=True) == 24, "the price of 16 tokens would have allowed 32"


def test_a_size_that_looked_too_dear_is_tried_again() -> None:
    pacer = paced(decode_s=0.1, limit_s=10.0)
    pacer.note(32, 4, 0.132)
    for _ in range(5):
        pacer.note(64, 4, 1.0)
    assert pacer.budget(4, has_seniors=True) == 32
    tried = []
    for _ in range(10 * 64):
        pacer.note(0, 4, 0.1)
        tried.append(pacer.budget(4, has_seniors=True))
        pacer.note(tried[-1], 4, 0.1 + tried[-1] / 1000)
    assert tried[:20] == [32] * 20 and tried[-20:] == [64] * 20


def test_a_mixed_step_faster_than_decoding_does_not_open_the_gates() -> None:
    pacer = paced(decode_s=0.05, limit_s=1.0)
    pacer.note(100, 4, 0.04)
    assert pacer.budget(4, has_seniors=True) <= 96


def test_alone_prompts_get_the_whole_budget() -> None:
    assert paced().budget(0, has_seniors=True) == 4096


@pytest.mark.parametrize("pacer", [PrefillPacer(4096, 0.1), paced(limit_s=0.0, decode_s=0.05)])
def test_without_knowledge_or_switched_off_nothing_is_cut(pacer: PrefillPacer) -> None:
    assert pacer.budget(4, has_seniors=True) == 4096


def test_a_chunk_is_never_uselessly_small_nor_above_the_limit() -> None:
    assert paced(limit_s=1e-6).budget(4, has_seniors=True) == SMALLEST_CHUNK
    assert paced(max_tokens=8, limit_s=1e-6).budget(4, has_seniors=True) == 8
    assert paced(max_tokens=16).budget(4, has_seniors=True) == 16


def test_it_follows_a_device_that_gets_slower() -> None:
    pacer = paced()
    for _ in range(50):
        pacer.note(1000, 0, 1.4)
    assert pacer.budget(4, has_seniors=True) == just_below(71)


def test_steps_with_hardly_any_prompt_teach_nothing() -> None:
    pacer = paced()
    pacer.note(SMALLEST_CHUNK - 1, 0, 100.0)
    assert pacer.budget(4, has_seniors=True) == just_below(100)


def test_a_step_that_took_no_time_by_the_clock_teaches_nothing() -> None:
    pacer = PrefillPacer(4096, 0.1)
    pacer.note(100, 4, 0.0)
    assert pacer.budget(4, has_seniors=True) == 4096


def test_budgets_are_multiples_of_a_chunk_or_parts_of_one_or_the_least() -> None:
    budgets = [paced(limit_s=number / 1000).budget(4, has_seniors=True) for number in range(1, 400, 7)]
    assert len(set(budgets)) > 10
    assert budgets[0] == SMALLEST_CHUNK < min(PARTS_OF_CHUNK)
    assert all(budget % CHUNK == 0 for budget in budgets if budget not in (SMALLEST_CHUNK, *PARTS_OF_CHUNK))
    limits = (0.015, 0.017, 0.025, 0.033, 0.063)
    assert [paced(limit_s=limit_s).budget(4, has_seniors=True) for limit_s in limits] == [12, 16, 24, 32, 32]


def test_now_and_then_a_step_goes_without_prompts_and_growing_streams_are_no_cost_of_theirs() -> None:
    pacer, decode_s = paced(decode_s=0.1, limit_s=10.0), 0.1
    expected, num_without = 1000 * SHARE_OF_PROMPTS * 0.1, 0
    for _ in range(20 * STEPS_UNTIL_LOOK):
        decode_s += 0.0005
        budget = pacer.budget(4, has_seniors=True)
        num_without += budget == 0
        pacer.note(budget, 4, decode_s + budget / 1000)
    assert 10 < num_without < 20
    assert decode_s > 0.25
    assert pacer.budget(4, has_seniors=True) > expected + CHUNK


def test_beside_streams_of_the_same_burst_no_step_goes_without() -> None:
    pacer = paced(decode_s=0.05, limit_s=1.0)
    for _ in range(2 * STEPS_UNTIL_LOOK):
        assert pacer.budget(4, has_seniors=False) > 0
        pacer.note(100, 4, 0.15)
