"""The prompt budget of a step by time."""

from __future__ import annotations

import pytest

from worker.engine.pacing import SMALLEST_CHUNK, PrefillPacer


def paced(max_tokens: int = 4096, target_s: float = 0.1) -> PrefillPacer:
    """A pacer that has seen prompts cost a millisecond per token."""
    pacer = PrefillPacer(max_tokens, target_s)
    for _ in range(50):
        pacer.note(1000, 1.0)
    return pacer


def test_mixed_steps_are_cut_to_the_target() -> None:
    assert paced().budget(anyone_decodes=True) == pytest.approx(100, abs=1)


def test_alone_prompts_get_the_whole_budget() -> None:
    assert paced().budget(anyone_decodes=False) == 4096


@pytest.mark.parametrize("pacer", [PrefillPacer(4096, 0.1), paced(target_s=0.0)])
def test_without_knowledge_or_switched_off_nothing_is_cut(pacer: PrefillPacer) -> None:
    assert pacer.budget(anyone_decodes=True) == 4096


def test_a_chunk_is_never_uselessly_small_nor_above_the_limit() -> None:
    assert paced(target_s=1e-6).budget(anyone_decodes=True) == SMALLEST_CHUNK
    assert paced(max_tokens=16, target_s=1e-6).budget(anyone_decodes=True) == 16
    assert paced(max_tokens=16).budget(anyone_decodes=True) == 16


def test_it_follows_a_device_that_gets_slower() -> None:
    pacer = paced()
    for _ in range(50):
        pacer.note(1000, 1.4)
    assert pacer.budget(anyone_decodes=True) == pytest.approx(71, abs=1)


def test_steps_with_hardly_any_prompt_teach_nothing() -> None:
    pacer = paced()
    pacer.note(SMALLEST_CHUNK - 1, 100.0)
    assert pacer.budget(anyone_decodes=True) == pytest.approx(100, abs=1)
