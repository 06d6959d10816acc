"""TGI's native bodies: what they become, how they are refused, and how answers and streams look, to the field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from common.errors import NotFound, ValidationError
from common.job import FinishReason, JobState, LogprobKind, PenaltyKind, SamplingParams
from gateway.formats.base import Limits, native_error
from gateway.formats.tgi import GenerateRenderer, generate_body, parse_generate, read_inputs, tokenize_body
from tests.gateway.support import BOS, EOS, adapter, card, columns_of, record_of, served

SPECIAL = frozenset(card().special_ids)
LIMITS = Limits()
NAN = float("nan")


def parse(parameters: Any = None, inputs: Any = "hello", **kwargs: Any) -> Any:
    body = {"inputs": inputs} | ({} if parameters is None else {"parameters": parameters})
    return parse_generate(body, served(), LIMITS, **kwargs)


def params(**parameters: Any) -> SamplingParams:
    return parse(parameters).params


def refusal(parameters: Any = None, inputs: Any = "hello", **kwargs: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        parse(parameters, inputs, **kwargs)
    body = native_error(caught.value)
    assert body["error_type"] == "validation"
    return str(body["error"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        (
            {"best_of": 2, "do_sample": True},
            "`best_of` is not supported: several candidates per request are not available",
        ),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -0.5}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": -1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` sequences must not be empty"),
        ({"stop": ["x" * 1025]}, "`stop` sequences have at most 1024 characters"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 99. Given: 0"),
        ({"truncate": 100}, "`truncate` must be strictly positive and less than 99. Given: 100"),
        (
            {"max_new_tokens": 96},
            "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 5 `inputs` tokens and 96 `max_new_tokens`",
        ),
        ({"watermark": True}, "`watermark` is not supported: watermarks are not available"),
        ({"grammar": {"type": "json", "value": {}}}, "`grammar` is not supported: guided generation is not available"),
        ({"temperatur": 1.0}, "`temperatur` is not supported: no such parameter is known here"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be an integer"),
        ({"max_new_tokens": "20"}, "`max_new_tokens` must be an integer"),
        ({"max_new_tokens": 1.5}, "`max_new_tokens` must be an integer"),
        ({"temperature": NAN}, "`temperature` must be a number"),
        ({"do_sample": "yes"}, "`do_sample` must be true or false"),
        ({"stop": "plain"}, "`stop` must be a list of strings"),
        ({"stop_token_ids": [-1]}, "`stop_token_ids` must be a list of token ids"),
        ({"stop_token_ids": [1] * 129}, "`stop_token_ids` has more than 128 items"),
        ({"presence_penalty": 3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
        ({"min_tokens": -1}, "`min_tokens` must be >= 0"),
        ({"seed": -1}, "`seed` must be >= 0"),
        ({"seed": 2**64}, "`seed` must be an integer"),
        ("text", "`parameters` must be an object"),
    ],
)
def test_a_bad_parameter_is_refused_with_its_text(parameters: Any, message: str) -> None:
    assert refusal(parameters) == f"Input validation error: {message}"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"best_of": 9}, {"temperature": 0}),
        ({"temperature": 0}, {"repetition_penalty": 0}),
        ({"repetition_penalty": 0}, {"frequency_penalty": 9}),
        ({"frequency_penalty": 9}, {"top_p": 9}),
        ({"top_p": 9}, {"typical_p": 9}),
        ({"typical_p": 9}, {"top_k": 0}),
        ({"top_k": 0}, {"max_new_tokens": 0}),
        ({"max_new_tokens": 0}, {"stop": ["x"] * 9}),
        ({"stop": ["x"] * 9}, {"top_n_tokens": 9}),
        ({"top_n_tokens": 9}, {"truncate": 0}),
        ({"truncate": 0}, {"watermark": True}),
    ],
)
def test_of_two_mistakes_the_one_that_tgi_finds_first_is_told(earlier: dict, later: dict) -> None:
    alone, other = refusal(earlier), refusal(later)
    assert alone != other
    assert refusal(later | earlier) == alone


def test_inputs_are_checked_after_parameters_and_before_the_context() -> None:
    assert refusal({}, "") == "Input validation error: `inputs` cannot be empty"
    assert refusal({"temperature": 0}, "") == "Input validation error: `temperature` must be strictly positive"
    assert refusal({"max_new_tokens": 999}, "") == "Input validation error: `inputs` cannot be empty"
    assert refusal({}, None) == "Input validation error: missing field `inputs`"
    assert refusal({}, 5) == "Input validation error: `inputs` must be a string"
    assert refusal({}, "x" * 100) == "Input validation error: `inputs` must have less than 99 tokens. Given: 100"
    with pytest.raises(ValidationError, match="missing field"):
        read_inputs({})


def test_what_cannot_be_streamed() -> None:
    assert parse({"decoder_input_details": True}).view["details"] is True
    text = refusal({"decoder_input_details": True}, is_stream=True)
    assert text == "Input validation error: `decoder_input_details` == true is not supported when streaming tokens"
    text = refusal({"best_of": 2}, is_stream=True)
    assert text == "Input validation error: `best_of` != 1 is not supported when streaming tokens"


def test_a_field_beside_parameters_is_not_ignored() -> None:
    with pytest.raises(ValidationError) as caught:
        parse_generate({"inputs": "x", "max_new_tokens": 3}, served(), LIMITS)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "max_new_tokens")


def test_an_unknown_adapter_is_not_the_base_model() -> None:
    with pytest.raises(NotFound, match="unknown adapter 'x'; adapters here: none"):
        parse({"adapter_id": "x"})
    with pytest.raises(NotFound, match="unknown adapter 'x'; adapters here: n0, n1, .*, n49 and 3 more$"):
        adapted({"adapter_id": "x"}, adapters={f"n{i}": adapter(f"n{i}") for i in range(53)})


def adapted(parameters: Any, **changes: Any) -> Any:
    known = {"adapters": {"fr": adapter("fr"), "sql": adapter("sql")}} | changes
    return parse_generate({"inputs": "x", "parameters": parameters}, replace(served(), **known), LIMITS).adapter


def test_an_adapter_is_chosen_by_its_id_or_by_the_model() -> None:
    assert adapted({"adapter_id": "fr"}) == adapter("fr").adapter
    assert adapted({"adapter_id": ""}) is None
    by_model = {"adapter": adapter("fr").adapter}
    assert adapted({}, **by_model) == adapted({"adapter_id": "fr"}, **by_model) == adapter("fr").adapter
    with pytest.raises(ValidationError, match="`model` and `adapter_id` name different adapters"):
        adapted({"adapter_id": "sql"}, **by_model)


def test_absent_parameters_mean_sampling_and_empty_ones_greedy() -> None:
    assert parse(None).params.do_sample
    assert not parse({}).params.do_sample


@pytest.mark.parametrize(
    ("parameters", "is_sampling"),
    [
        ({"temperature": 1.0}, False),
        ({"temperature": 0.7}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"seed": 3}, False),
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 1e-9}, False),
    ],
)
def test_when_tokens_are_sampled(parameters: dict, is_sampling: bool) -> None:
    assert params(**parameters).do_sample is is_sampling


def test_all_parameters_reach_the_job() -> None:
    found = params(
        temperature=0.5,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        top_k=10,
        top_p=0.9,
        typical_p=0.8,
        min_p=0.05,
        max_new_tokens=20,
        min_tokens=3,
        ignore_eos=True,
        stop=["a", "bc"],
        stop_token_ids=[7],
        seed=2**64 - 1,
        top_n_tokens=2,
    )
    assert found == SamplingParams(
        max_new_tokens=20,
        do_sample=True,
        temperature=0.5,
        top_k=10,
        top_p=0.9,
        typical_p=0.8,
        min_p=0.05,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        penalty_kind=PenaltyKind.TGI,
        seed=2**64 - 1,
        stop=("a", "bc"),
        include_stop=True,
        stop_token_ids=(7,),
        ignore_eos=True,
        min_tokens=3,
        num_top_logprobs=2,
        logprob_kind=LogprobKind.PROCESSED,
    )


def test_null_means_unset_for_every_parameter() -> None:
    names = (
        "best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample max_new_tokens "
        "return_full_text stop truncate watermark details decoder_input_details seed top_n_tokens grammar adapter_id"
    )
    found = parse(dict.fromkeys(names.split()))
    assert found.params == SamplingParams(max_new_tokens=95, seed=found.params.seed)


def test_top_p_of_one_is_off_though_tgi_refuses_it() -> None:
    assert params(top_p=1.0, typical_p=1.0).top_p == 1.0


def test_truncate_keeps_the_last_tokens() -> None:
    assert parse({}, "abcdef").prompt_ids == list(b"abcdef")
    assert parse({"truncate": 2}, "abcdef").prompt_ids == list(b"ef")


def test_without_max_new_tokens_the_context_is_filled() -> None:
    assert parse({}, "abcde").params.max_new_tokens == 95
    assert parse({"max_new_tokens": 95}, "abcde").params.max_new_tokens == 95


def test_the_cost_is_prompt_and_expected_output() -> None:
    assert parse({"max_new_tokens": 7}, "abcde").cost == 12


def test_full_text_is_the_default_of_the_compat_route_only() -> None:
    assert "prompt_text" not in parse({}).view
    assert parse({}, door="compat").view["prompt_text"] == "hello"
    assert "prompt_text" not in parse({"return_full_text": False}, door="compat").view
    assert parse({"return_full_text": True}).view["prompt_text"] == "hello"


def test_the_answer_has_details_only_when_asked() -> None:
    columns = columns_of("hi")
    record = record_of(parse({}), num_tokens=3)
    assert generate_body(record, columns, SPECIAL) == {"generated_text": "hi"}


def test_details_to_the_field() -> None:
    draft = parse({"details": True, "top_n_tokens": 1, "do_sample": True, "seed": 9, "return_full_text": True})
    body = generate_body(record_of(draft, num_tokens=2), columns_of("h", tops=1), SPECIAL)
    token = {"id": 104, "text": "h", "logprob": -0.25, "special": False}
    end = {"id": EOS, "text": "</s>", "logprob": -0.5, "special": True}
    top = {"id": 97, "text": "a", "logprob": -0.0, "special": False}
    assert body == {
        "generated_text": "helloh",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 2,
            "seed": 9,
            "prefill": [],
            "tokens": [token, end],
            "top_tokens": [[top], [top]],
        },
    }
    assert list(body["details"]) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]


def test_a_greedy_answer_has_no_seed() -> None:
    draft = parse({"details": True, "seed": 9})
    assert generate_body(record_of(draft), columns_of("h"), SPECIAL)["details"]["seed"] is None


def stream(draft: Any, columns: Any, **changes: Any) -> list[dict[str, Any]]:
    record = record_of(draft, num_tokens=columns.end, **changes)
    renderer = GenerateRenderer(record, SPECIAL)
    events = renderer.start() + renderer.tokens(columns) + renderer.end(record)
    assert [event.id for event in events[: columns.end]] == [str(n + 1) for n in range(columns.end)]
    assert all(event.event is None for event in events)
    return [json.loads(event.data) for event in events]


def test_the_stream_has_one_event_per_token_and_the_text_in_the_last() -> None:
    events = stream(parse({"details": True, "stop": ["x"]}), columns_of("hi"))
    assert events == [
        {
            "index": 1,
            "token": {"id": 104, "text": "h", "logprob": -0.25, "special": False},
            "generated_text": None,
            "details": None,
        },
        {
            "index": 2,
            "token": {"id": 105, "text": "i", "logprob": -0.5, "special": False},
            "generated_text": None,
            "details": None,
        },
        {
            "index": 3,
            "token": {"id": EOS, "text": "</s>", "logprob": -0.75, "special": True},
            "generated_text": "hi",
            "details": {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None, "input_length": 5},
        },
    ]
    assert list(events[0]) == ["index", "token", "generated_text", "details"]


def test_stream_details_need_asking_and_tops_come_before_the_text() -> None:
    events = stream(parse({"top_n_tokens": 1}), columns_of("h", tops=1))
    assert events[-1]["details"] is None and events[-1]["generated_text"] == "h"
    assert list(events[0]) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert events[0]["top_tokens"] == [{"id": 97, "text": "a", "logprob": -0.0, "special": False}]


@pytest.mark.parametrize(
    ("parameters", "text", "reason"),
    [
        ({"max_new_tokens": 2}, "hi", FinishReason.LENGTH),
        ({"stop": ["!?"]}, "so!?", FinishReason.STOP_SEQUENCE),
        ({"stop_token_ids": [ord("i")]}, "hi", FinishReason.STOP_SEQUENCE),
        ({}, "一", FinishReason.EOS_TOKEN),
    ],
)
def test_only_the_token_that_may_be_the_last_waits_for_the_end(
    parameters: dict, text: str, reason: FinishReason
) -> None:
    columns = columns_of(text, eos=reason is FinishReason.EOS_TOKEN)
    record = record_of(parse(parameters), num_tokens=columns.end, finish_reason=reason)
    renderer = GenerateRenderer(record, SPECIAL)
    assert len(renderer.tokens(columns)) == columns.end - 1
    last = renderer.end(record)
    assert [json.loads(event.data)["generated_text"] for event in last] == [text]


def test_a_token_that_looked_like_the_end_is_told_when_the_text_goes_on() -> None:
    columns = columns_of("a!b", eos=False)
    renderer = GenerateRenderer(record_of(parse({"stop": ["!"]})), SPECIAL)
    assert [event.id for event in renderer.tokens(columns)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("state", "changes", "error", "error_type"),
    [
        (
            JobState.FAILED,
            {"error_code": "poison", "error_message": "it kills its workers"},
            "Request failed during generation: Server error: it kills its workers",
            "generation",
        ),
        (JobState.CANCELLED, {}, "The request was cancelled", "cancelled"),
        (JobState.EXPIRED, {}, "The request expired before its answer was complete", "expired"),
    ],
)
def test_a_stream_that_cannot_end_well_ends_with_an_error(
    state: JobState, changes: dict, error: str, error_type: str
) -> None:
    events = stream(parse({}), columns_of("hi"), state=state, finish_reason=None, **changes)
    assert [event["token"]["text"] for event in events[:3]] == ["h", "i", "</s>"]
    assert events[3:] == [{"error": error, "error_type": error_type}]


def test_non_finite_logprobs_are_null() -> None:
    columns = columns_of("h", eos=False)
    columns.logprobs[0] = float("-inf")
    draft = parse({"max_new_tokens": 1})
    assert stream(draft, columns, finish_reason=FinishReason.LENGTH)[0]["token"]["logprob"] is None


def test_tokenize_tells_bytes_of_the_input() -> None:
    assert tokenize_body("aé", served()) == [
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 0xC3, "text": "é", "start": 1, "stop": 3},
        {"id": 0xA9, "text": "é", "start": 1, "stop": 3},
    ]
    assert tokenize_body("<s>", served()) == [{"id": BOS, "text": "<s>", "start": 0, "stop": 3}]
