"""The text stage: which end counts, what is held back, and that a job taken over midway gives the same columns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.job import FinishReason, SamplingParams, TokenColumns
from common.text.tokenizer import TextTokenizer
from tests.support.metaspace import EOS, EXTRA, metaspace_tokenizer_json, word_id
from tests.support.tiny_model import byte_tokenizer_json
from worker.pipe import TokenRun
from worker.text import Released, TextStage, TopTexts

TOKENIZER = TextTokenizer(byte_tokenizer_json())
PROMPT = [65]


def stage(logged: TokenColumns | None = None, **params: Any) -> TextStage:
    fields = {"max_new_tokens": 100} | params
    return TextStage(TOKENIZER, TopTexts(TOKENIZER), PROMPT, SamplingParams(**fields), logged)


def run(ids: list[int], finish: str = "", **fields: Any) -> TokenRun:
    return TokenRun(request_id="r", epoch=1, ids=ids, logprobs=[-0.5] * len(ids), finish=finish, **fields)


def feed(text_stage: TextStage, ids: list[int], finish: str = "", step: int = 1) -> Released:
    """Push the tokens `step` at a time; everything that was released, and the end."""
    merged = TokenColumns(text_stage.num_released, [], [], [])
    reason = None
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        released = text_stage.push(run(part, finish if start + step >= len(ids) else ""))
        merged.extend(released.columns)
        reason = released.finish_reason
        if reason is not None:
            break
    return Released(merged, reason)


def test_incomplete_characters_are_held_back_until_they_are_whole() -> None:
    text_stage = stage()
    ids = list("日".encode())
    assert text_stage.push(run(ids[:2])).columns.ids == []
    released = text_stage.push(run(ids[2:])).columns
    assert (released.start, released.ids, released.pieces) == (0, ids, ["", "", "日"])


def test_an_unfinished_character_comes_out_with_the_end() -> None:
    ids = list("a日".encode())[:-1]
    text_stage = stage()
    assert text_stage.push(run(ids[:-1])).columns.ids == ids[:1]
    released = text_stage.push(run(ids[-1:], "length"))
    assert released.columns.pieces == ["", "\ufffd"]
    assert released.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("finish", ["length", "eos_token", "stop_sequence"])
def test_the_engine_wins_over_a_stop_string_at_the_same_token(finish: str) -> None:
    assert feed(stage(stop=("b",)), list(b"ab")).finish_reason is FinishReason.STOP_SEQUENCE
    released = feed(stage(stop=("b",)), list(b"ab"), finish)
    assert released.finish_reason == finish
    assert "".join(released.columns.pieces) == "ab"


def test_a_stop_string_before_the_end_wins_and_later_tokens_never_leave() -> None:
    text_stage = stage(stop=("b",))
    released = text_stage.push(run(list(b"abcd"), "length"))
    assert released.finish_reason is FinishReason.STOP_SEQUENCE
    assert released.columns.ids == list(b"ab"), "usage counts up to the token that ends the stop"
    assert text_stage.is_finished


def test_cut_stop_strings_leave_no_text_but_their_tokens_count() -> None:
    text_stage = stage(stop=("bcd",), include_stop=False)
    assert text_stage.push(run(list(b"ab"))).columns.pieces == ["a"], "b may begin the stop"
    assert text_stage.push(run(list(b"c"))).columns.ids == []
    released = text_stage.push(run(list(b"de")))
    assert released.columns.ids == list(b"bcd")
    assert released.columns.pieces == ["", "", ""]
    assert released.finish_reason is FinishReason.STOP_SEQUENCE


def test_a_held_back_beginning_is_shown_when_the_job_ends_otherwise() -> None:
    text_stage = stage(stop=("bcd",), include_stop=False)
    text_stage.push(run(list(b"ab")))
    released = text_stage.push(run([257], "eos_token"))
    assert released.columns.pieces == ["b", "</s>"]
    assert released.finish_reason is FinishReason.EOS_TOKEN


def test_stops_before_the_minimum_do_not_count() -> None:
    assert feed(stage(stop=("b",)), list(b"abab")).columns.ids == list(b"ab")
    assert feed(stage(stop=("b",), min_tokens=3), list(b"abab")).columns.ids == list(b"abab")


def test_alternatives_carry_their_own_text() -> None:
    text_stage = stage(num_top_logprobs=2)
    released = text_stage.push(run([97], top_tokens=[[(97, -0.5), (98, -1.5)]]))
    assert released.columns.top_tokens is not None
    assert [(top.token_id, top.text, top.logprob) for top in released.columns.top_tokens[0]] == [
        (97, "a", -0.5),
        (98, "b", -1.5),
    ]
    assert stage().push(run([97])).columns.top_tokens is None


def test_a_run_without_tokens_ends_the_job() -> None:
    text_stage = stage(stop=("bc",), include_stop=False)
    text_stage.push(run(list(b"ab")))
    released = text_stage.push(run([], "length"))
    assert (released.columns.pieces, released.finish_reason) == (["b"], FinishReason.LENGTH)


def test_an_error_gives_out_what_is_there() -> None:
    text_stage = stage()
    ids = list("日".encode())[:2]
    released = text_stage.push(run(ids, "error", error="no memory"))
    assert released.columns.ids == ids
    assert released.finish_reason is None
    assert text_stage.is_finished


def test_a_log_that_ends_with_a_stop_is_complete() -> None:
    logged = TokenColumns(0, list(b"ab"), ["a", "b"], [0.0, 0.0])
    assert stage(logged, stop=("b",)).log_ends_with_stop
    assert not stage(logged, stop=("a",)).log_ends_with_stop
    assert not stage(logged, stop=("b",), min_tokens=2).log_ends_with_stop


TEXTS = st.text("ab日é ", min_size=1, max_size=30)
STOPS = st.lists(st.text("ab日 ", min_size=1, max_size=3), max_size=2)


@given(TEXTS, STOPS, st.booleans(), st.data())
@settings(max_examples=300)
def test_taken_over_anywhere_a_job_gives_the_same_columns(
    text: str, stops: list[str], include_stop: bool, data: st.DataObject
) -> None:
    ids = list(text.encode())
    params = {"stop": tuple(stops), "include_stop": include_stop}
    whole = feed(stage(**params), ids, "length")
    first = stage(**params)
    position = data.draw(st.integers(0, len(ids) - 1))
    shown = feed(first, ids[:position]).columns
    if not first.is_finished:
        rest = feed(stage(shown, **params), ids[shown.end :], "length", step=data.draw(st.integers(1, 5)))
        assert (shown.pieces + rest.columns.pieces, rest.finish_reason) == (whole.columns.pieces, whole.finish_reason)
        assert shown.ids + rest.columns.ids == whole.columns.ids
    else:
        assert shown.pieces == whole.columns.pieces


def test_a_stage_that_forgets_the_log_gives_other_columns() -> None:
    ids = list(b"xab")
    whole = feed(stage(stop=("ab",)), [*ids, 97, 98], "length")
    shown = feed(stage(stop=("ab",)), ids[:2]).columns
    forgetful = TokenColumns(2, [], [], [])
    assert feed(stage(shown, stop=("ab",)), [98, 97, 98], "length").finish_reason is FinishReason.STOP_SEQUENCE
    wrong = feed(stage(forgetful, stop=("ab",)), [98, 97, 98], "length")
    assert shown.ids + wrong.columns.ids != whole.columns.ids


METASPACE = TextTokenizer(metaspace_tokenizer_json())
ANSWER = [EXTRA, word_id("▁Hello"), word_id("▁world"), EXTRA, word_id("▁日"), word_id("本"), EOS]


def answer_stage(context: list[int], logged: TokenColumns | None = None, **params: Any) -> TextStage:
    return TextStage(METASPACE, TopTexts(METASPACE), context, SamplingParams(max_new_tokens=100, **params), logged)


def test_an_answer_that_continues_nothing_begins_without_a_space() -> None:
    pieces = feed(answer_stage([]), ANSWER, "eos_token").columns.pieces
    assert pieces == ["<extra_id_0>", "Hello", " world", "<extra_id_0>", " 日", "本", "</s>"]
    wrong = feed(answer_stage([word_id("▁world")]), ANSWER, "eos_token").columns.pieces
    assert wrong[1] == " Hello"


@pytest.mark.parametrize("num_logged", range(len(ANSWER)))
def test_an_answer_taken_over_anywhere_gives_the_same_pieces(num_logged: int) -> None:
    whole = feed(answer_stage([]), ANSWER, "eos_token").columns
    logged = TokenColumns(0, whole.ids[:num_logged], whole.pieces[:num_logged], whole.logprobs[:num_logged])
    rest = feed(answer_stage([], logged), ANSWER[num_logged:], "eos_token").columns
    assert (rest.start, logged.pieces + rest.pieces) == (num_logged, whole.pieces)


def test_a_stop_string_that_an_answer_begins_with_is_found() -> None:
    assert feed(answer_stage([], stop=("Hello",)), ANSWER).finish_reason is FinishReason.STOP_SEQUENCE
    assert feed(answer_stage([], stop=(" Hello",)), ANSWER).finish_reason is None
