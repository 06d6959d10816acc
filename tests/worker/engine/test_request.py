"""States only move forward; the rules that end a request, and their order."""

from __future__ import annotations

from itertools import product

import pytest

from tests.worker.engine.harness import EOS, START, submit
from worker.engine.request import Request, RequestState, request_of


def request(output: list[int], **params: object) -> Request:
    return request_of(submit("r", [1, 2, 3], output=output, **params), 1)


@pytest.mark.parametrize(("before", "after"), list(product(RequestState, RequestState)))
def test_states_never_go_back(before: RequestState, after: RequestState) -> None:
    subject = request([])
    subject.advance(before)
    if after >= before:
        subject.advance(after)
        assert subject.state is after
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            subject.advance(after)
        assert subject.state is before


@pytest.mark.parametrize(
    ("output", "params", "finish"),
    [
        ([4], {}, ""),
        ([4, 5], {"max_new_tokens": 2}, "length"),
        ([4, EOS], {"max_new_tokens": 2}, "length"),
        ([4, EOS], {}, "eos_token"),
        ([4, EOS], {"ignore_eos": True}, ""),
        ([4, EOS], {"stop_token_ids": (EOS,)}, "eos_token"),
        ([4, EOS], {"stop_token_ids": (EOS,), "ignore_eos": True}, "stop_sequence"),
        ([4, 9], {"stop_token_ids": (8, 9)}, "stop_sequence"),
        ([4, EOS], {"min_tokens": 2}, ""),
        ([4, EOS], {"min_tokens": 1}, "eos_token"),
        ([4, 9], {"min_tokens": 2, "stop_token_ids": (9,)}, ""),
        ([4, 9], {"min_tokens": 5, "max_new_tokens": 2}, "length"),
    ],
)
def test_the_last_token_ends_a_request_by_tgis_order(output: list[int], params: dict, finish: str) -> None:
    assert request(output, **params).finish() == finish


def test_tokens_of_the_log_count_as_output() -> None:
    subject = request([4, 5, 6], max_new_tokens=8)
    assert (subject.num_prompt, subject.num_output, subject.num_total) == (3, 3, 6)
    assert subject.num_uncomputed(0) == 6


def test_behind_an_encoder_the_start_token_is_the_prompt() -> None:
    subject = request_of(submit("r", [1, 2, 3], output=[4, EOS]), 1, START)
    assert (subject.num_prompt, subject.num_output, subject.num_input) == (1, 2, 3)
    assert subject.tokens.tolist() == [START, 4, EOS]
    assert subject.encoder_ids.tolist() == [1, 2, 3]
    assert subject.finish() == "eos_token"
    assert not request([4]).encoder_ids


def test_nothing_is_computed_beyond_the_last_token_allowed() -> None:
    subject = request([4, 5], max_new_tokens=4)
    subject.num_in_flight = 1
    assert subject.num_uncomputed(5) == 1
    subject.num_in_flight = 2
    assert subject.num_uncomputed(6) == 0


def test_stop_ids_are_what_min_tokens_forbids() -> None:
    assert request([], stop_token_ids=(9, 3)).stop_ids == [3, EOS, 9]
    assert request([], stop_token_ids=(9,), ignore_eos=True).stop_ids == [9]


@pytest.mark.parametrize(("token", "error"), [(2**31, OverflowError), ("5", TypeError)])
def test_ids_that_are_no_token_ids_are_refused(token: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        request_of(submit("r", [1, token]), 1)
