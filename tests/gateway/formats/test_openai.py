"""OpenAI's bodies: what they become, how they are refused, and how answers and streams look, to the field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from common.errors import TemplateError, ValidationError
from common.job import FinishReason, JobState, LogprobKind, PenaltyKind, SamplingParams, TokenColumns
from gateway.formats import body_of, parse_chat, parse_completion, parse_input, renderer_for
from gateway.formats.base import JobDraft, Limits, openai_error
from gateway.formats.completion import completion_body
from tests.gateway.support import BOS, END, EOS, JOB_ID, adapter, card, columns_of, record_of, served, until

SPECIAL = frozenset(card().special_ids)
LIMITS = Limits()
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(model: Any = None, /, **body: Any) -> JobDraft:
    return parse_chat({"messages": MESSAGES, "model": "tgi"} | body, model or served(), LIMITS)


def completion(**body: Any) -> list[JobDraft]:
    return parse_completion({"prompt": "hi", "model": "tgi"} | body, served(), LIMITS)


def error_of(call: Any, **body: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as caught:
        call(**body)
    return openai_error(caught.value)["error"]


def unsupported(param: str, reason: str) -> dict[str, Any]:
    message = f"`{param}` is not supported: {reason}"
    return {"message": message, "type": "invalid_request_error", "param": param, "code": "unsupported_parameter"}


def invalid(param: str, message: str, code: str = "validation") -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def test_a_model_that_is_an_adapter_is_answered_as_such() -> None:
    adapted = replace(served(), adapters={"fr": adapter("fr")}).with_adapter("fr")
    one = chat(adapted, model="fr")
    assert (one.adapter, one.view["model"]) == (adapter("fr").adapter, "fr")
    several = parse_completion({"prompt": ["a", "b"], "model": "fr"}, adapted, LIMITS)
    assert [(draft.adapter, draft.view["model"]) for draft in several] == [(adapter("fr").adapter, "fr")] * 2
    assert chat().adapter is completion()[0].adapter is None


TOOLS = "tool calls are not available"
GUIDED = "guided generation is not available"
UNKNOWN = "no such field is known here"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tools": [{"type": "function"}]}, unsupported("tools", TOOLS)),
        ({"tool_choice": "required"}, unsupported("tool_choice", TOOLS)),
        ({"functions": [{}]}, unsupported("functions", TOOLS)),
        ({"response_format": {"type": "json_object"}}, unsupported("response_format", GUIDED)),
        ({"guided_json": {"type": "object"}}, unsupported("guided_json", GUIDED)),
        ({"guided_regex": "a+"}, unsupported("guided_regex", GUIDED)),
        ({"grammar": "root"}, unsupported("grammar", GUIDED)),
        ({"n": 2}, unsupported("n", "only one choice per prompt is available")),
        ({"best_of": 2}, unsupported("best_of", "several candidates per request are not available")),
        ({"logit_bias": {"5": 1}}, unsupported("logit_bias", "biases on tokens are not available")),
        ({"store": True}, unsupported("store", "answers are not stored beyond the time to live of their job")),
        ({"modalities": ["audio"]}, unsupported("modalities", "only text is available")),
        ({"audio": {"voice": "x"}}, unsupported("audio", "only text is available")),
        ({"frobnicate": 1}, unsupported("frobnicate", UNKNOWN)),
        (
            {"stream_options": {"include_usage": True}},
            invalid("stream_options", "`stream_options` is only allowed with `stream`"),
        ),
        ({"stream": True, "stream_options": {"x": 1}}, unsupported("stream_options.x", UNKNOWN)),
        ({"stream": "yes"}, invalid("stream", "`stream` must be true or false")),
        ({"temperature": -0.1}, invalid("temperature", "`temperature` must be >= 0.0")),
        ({"top_p": 0}, invalid("top_p", "`top_p` must be > 0.0 and <= 1.0")),
        ({"top_p": 1.1}, invalid("top_p", "`top_p` must be > 0.0 and <= 1.0")),
        ({"top_k": -2}, invalid("top_k", "`top_k` must be strictly positive, or 0 or -1 for off")),
        ({"min_p": 2}, invalid("min_p", "`min_p` must be >= 0.0 and <= 1.0")),
        ({"repetition_penalty": 0}, invalid("repetition_penalty", "`repetition_penalty` must be > 0.0")),
        ({"presence_penalty": 2.1}, invalid("presence_penalty", "`presence_penalty` must be >= -2.0 and <= 2.0")),
        ({"frequency_penalty": "x"}, invalid("frequency_penalty", "`frequency_penalty` must be a number")),
        ({"max_tokens": 0}, invalid("max_tokens", "`max_tokens` must be strictly positive")),
        (
            {"max_completion_tokens": -1},
            invalid("max_completion_tokens", "`max_completion_tokens` must be strictly positive"),
        ),
        ({"min_tokens": -1}, invalid("min_tokens", "`min_tokens` must be >= 0")),
        ({"stop": 5}, invalid("stop", "`stop` must be a string or a list of strings")),
        ({"stop": list("abcde")}, invalid("stop", "`stop` supports up to 4 stop sequences. Given: 5")),
        ({"top_logprobs": 2}, invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true")),
        (
            {"logprobs": True, "top_logprobs": 6},
            invalid("top_logprobs", "`top_logprobs` must be >= 0 and <= 5. Given: 6"),
        ),
        ({"logprobs": 3}, invalid("logprobs", "`logprobs` must be true or false")),
        ({"metadata": {str(n): "x" for n in range(17)}}, invalid("metadata", "`metadata` has at most 16 pairs")),
        ({"metadata": {"k" * 65: "x"}}, invalid("metadata", "`metadata` keys have at most 64 characters")),
        ({"metadata": {"k": 5}}, invalid("metadata", "`metadata` values are strings of at most 512 characters")),
        ({"model": 5}, invalid("model", "`model` must be a string")),
        ({"messages": None}, invalid("messages", "missing field `messages`")),
        ({"messages": []}, invalid("messages", "`messages` cannot be empty")),
        ({"messages": "hi"}, invalid("messages", "`messages` must be a list")),
        ({"messages": MESSAGES * 4097}, invalid("messages", "`messages` has more than 4096 items")),
        ({"messages": ["hi"]}, invalid("messages[0]", "`messages[0]` must be an object")),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            invalid("messages[0].role", "`messages[0].role` must be one of system, developer, user, assistant"),
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, unsupported("messages[0].role", TOOLS)),
        (
            {"messages": [{"role": "user", "content": None}]},
            invalid("messages[0].content", "`messages[0].content` must be a string or a list of parts"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            unsupported("messages[0].content[0]", "only text parts are available"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            invalid("messages[0].content[0]", "`messages[0].content[0].text` must be a string"),
        ),
        (
            {"messages": [{"role": "user", "content": [5]}]},
            invalid(
                "messages[0].content[0]", "`messages[0].content[0]` must be an object with a `type` of content parts"
            ),
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            unsupported("messages[0].tool_calls", TOOLS),
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, unsupported("messages[0].mood", UNKNOWN)),
        (
            {"messages": [{"role": "user", "content": "x" * 200}]},
            invalid("messages", "`inputs` must have less than 99 tokens. Given: 204", "context_length_exceeded"),
        ),
        (
            {"max_tokens": 95},
            invalid(
                "messages",
                "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 6 `inputs` tokens and 95 `max_new_tokens`",
                "context_length_exceeded",
            ),
        ),
        (
            {"chat_template_kwargs": {"messages": []}},
            unsupported("chat_template_kwargs.messages", "the gateway sets it"),
        ),
    ],
)
def test_a_bad_chat_is_refused_with_its_body(body: dict, expected: dict) -> None:
    assert error_of(chat, **body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": None}, invalid("prompt", "missing field `prompt`")),
        ({"prompt": ""}, invalid("prompt", "`prompt` cannot be empty")),
        ({"prompt": []}, invalid("prompt", "Empty array detected. Do not use an empty array for the prompt.")),
        ({"prompt": 5}, invalid("prompt", "`prompt` must be a string, token ids, or a list of these")),
        ({"prompt": ["a", 5]}, invalid("prompt", "`prompt` must be a string, token ids, or a list of these")),
        ({"prompt": [[]]}, invalid("prompt", "`prompt` must be a string, token ids, or a list of these")),
        ({"prompt": [True]}, invalid("prompt", "`prompt` must be a string, token ids, or a list of these")),
        ({"prompt": [261]}, invalid("prompt", "token ids must be < 261")),
        (
            {"prompt": ["a"] * 5},
            invalid("prompt", "Number of prompts exceeds the maximum allowed batch size of 4", "batch_size_exceeded"),
        ),
        ({"suffix": "x"}, unsupported("suffix", "it can be achieved by preprocessing the prompt")),
        ({"echo": True, "logprobs": 1}, unsupported("echo", "log-probabilities of the prompt are not available")),
        ({"logprobs": 6}, invalid("logprobs", "`logprobs` must be >= 0 and <= 5. Given: 6")),
        ({"logprobs": True}, invalid("logprobs", "`logprobs` must be an integer")),
        (
            {"max_tokens": 99},
            invalid(
                "prompt",
                "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 2 `inputs` tokens and 99 `max_new_tokens`",
                "context_length_exceeded",
            ),
        ),
        ({"best_of": 2}, unsupported("best_of", "several candidates per request are not available")),
        ({"frobnicate": 1}, unsupported("frobnicate", UNKNOWN)),
    ],
)
def test_a_bad_completion_is_refused_with_its_body(body: dict, expected: dict) -> None:
    assert error_of(completion, **body) == expected


def test_null_and_neutral_values_are_as_good_as_nothing() -> None:
    neutral = {
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "store": False,
        "user": "u",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "stream_options": None,
        "stop": [],
        "logprobs": None,
        "max_tokens": None,
        "temperature": None,
        "top_p": 1,
        "presence_penalty": 0,
        "functions": None,
        "audio": None,
    }
    found, plain = chat(seed=1, **neutral), chat(seed=1)
    assert found.params == plain.params
    assert found.view | {"created": 0} == plain.view | {"created": 0}


def test_all_parameters_reach_the_job() -> None:
    body = {
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.9,
        "typical_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "max_tokens": 20,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop": "end",
        "stop_token_ids": [7],
        "seed": -1,
        "logprobs": True,
        "top_logprobs": 2,
        "include_stop_str_in_output": True,
    }
    assert chat(**body).params == SamplingParams(
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
        penalty_kind=PenaltyKind.OPENAI,
        seed=2**64 - 1,
        stop=("end",),
        include_stop=True,
        stop_token_ids=(7,),
        ignore_eos=True,
        min_tokens=3,
        num_top_logprobs=2,
        logprob_kind=LogprobKind.RAW,
    )


def test_temperature_zero_is_greedy_and_the_default_samples() -> None:
    assert not chat(temperature=0).params.do_sample
    assert chat().params.do_sample and chat().params.temperature == 1.0


def test_what_the_client_leaves_open_comes_from_the_models_generation_config() -> None:
    model = served(default_sampling={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1})
    found = chat(model, top_p=0.5).params
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.6, 0.5, 20, 1.1)
    assert not chat(served(default_sampling={"do_sample": False, "temperature": 0.6})).params.do_sample
    assert chat(served(default_sampling={"do_sample": False}), temperature=0.5).params.do_sample


def test_max_completion_tokens_is_the_newer_name_and_nothing_fills_the_context() -> None:
    assert chat(max_tokens=5).params.max_new_tokens == 5
    assert chat(max_completion_tokens=6, max_tokens=5).params.max_new_tokens == 6
    assert chat().params.max_new_tokens == 94
    assert completion()[0].params.max_new_tokens == 16


def test_the_template_writes_special_tokens_and_none_is_added() -> None:
    assert chat().prompt_ids == [BOS, 258, *b"hi", END, 259]


def test_content_may_be_text_parts_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(messages=[{"role": "user", "content": parts}]).prompt_ids == chat().prompt_ids
    texts = [chat(messages=[{"role": role, "content": "x"}, *MESSAGES]).prompt_ids for role in ("system", "developer")]
    assert texts[0] == texts[1] != chat().prompt_ids


def test_an_unfinished_answer_is_continued() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "well, "}]
    assert chat(messages=messages).prompt_ids[-6:] == list(b"well, ")
    assert chat(messages=messages, continue_final_message=False).prompt_ids[-2:] == [END, 259]


def test_a_model_without_template_cannot_chat() -> None:
    with pytest.raises(TemplateError, match="^Template error: template not found") as caught:
        chat(served(chat_template=""))
    assert openai_error(caught.value)["error"]["code"] == "template_error"


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(TemplateError, match="^Template error: no systems here$"):
        chat(served(chat_template="{{ raise_exception('no systems here') }}"))


def test_prompts_come_as_text_ids_or_lists() -> None:
    assert [draft.prompt_ids for draft in completion(prompt=["a", "b"])] == [[97], [98]]
    assert [draft.prompt_ids for draft in completion(prompt=[97, 98])] == [[97, 98]]
    assert [draft.prompt_ids for draft in completion(prompt=[[97], [98]])] == [[97], [98]]
    assert [draft.view["index"] for draft in completion(prompt=["a", "b"])] == [0, 1]


def stream(draft: JobDraft, columns: TokenColumns, **changes: Any) -> list[Any]:
    record = record_of(draft, num_tokens=columns.end, **changes)
    renderer = renderer_for(record, SPECIAL)
    events = renderer.start() + renderer.tokens(columns) + renderer.end(record)
    assert all(event.event is None for event in events)
    return [(event.id, event.data if event.data == b"[DONE]" else json.loads(event.data)) for event in events]


HEAD = {
    "id": f"chatcmpl-{JOB_ID}",
    "object": "chat.completion.chunk",
    "created": 1_700_000_001,
    "model": "tgi",
    "system_fingerprint": "fp_abcdef",
}


def chunk(delta: dict, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return HEAD | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]} | more


def test_a_chat_stream_to_the_field() -> None:
    assert stream(chat(), columns_of("h一")) == [
        ("0", chunk({"role": "assistant", "content": ""})),
        ("1", chunk({"content": "h"})),
        ("4", chunk({"content": "一"})),
        ("5", chunk({}, "stop")),
        ("5", b"[DONE]"),
    ]


def test_usage_comes_in_a_chunk_of_its_own_when_asked() -> None:
    events = stream(chat(stream=True, stream_options={"include_usage": True}), columns_of("h"))
    usage = {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8}
    assert events == [
        ("0", chunk({"role": "assistant", "content": ""}, usage=None)),
        ("1", chunk({"content": "h"}, usage=None)),
        ("2", chunk({}, "stop", usage=None)),
        ("2", HEAD | {"choices": [], "usage": usage}),
        ("2", b"[DONE]"),
    ]


def test_continuous_usage_counts_with_the_chunks() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(chat(stream=True, stream_options=options), columns_of("h"))
    counts = [data["usage"]["completion_tokens"] for _, data in events[:-1]]
    assert counts == [0, 1, 2, 2]


def test_logprobs_in_a_chat_stream() -> None:
    draft = chat(logprobs=True, top_logprobs=1)
    content = [
        {
            "token": "h",
            "logprob": -0.25,
            "bytes": [104],
            "top_logprobs": [{"token": "a", "logprob": -0.0, "bytes": [97]}],
        }
    ]
    events = stream(draft, columns_of("h", tops=1))
    assert events[1][1]["choices"][0]["logprobs"] == {"content": content, "refusal": None}
    body = body_of(record_of(draft, num_tokens=2), columns_of("h", tops=1), SPECIAL)
    assert body["choices"][0]["logprobs"] == {"content": content, "refusal": None}


@pytest.mark.parametrize(
    ("reason", "word"),
    [(FinishReason.EOS_TOKEN, "stop"), (FinishReason.STOP_SEQUENCE, "stop"), (FinishReason.LENGTH, "length")],
)
def test_finish_reasons_are_openais(reason: FinishReason, word: str) -> None:
    events = stream(chat(), columns_of("h", eos=False), finish_reason=reason)
    assert events[-2][1]["choices"][0]["finish_reason"] == word


def test_a_stream_that_cannot_end_well_ends_with_an_error() -> None:
    events = stream(chat(), columns_of("h", eos=False), state=JobState.CANCELLED, finish_reason=None)
    error = {
        "message": "The request was cancelled",
        "type": "invalid_request_error",
        "param": None,
        "code": "cancelled",
    }
    assert events[2:] == [("1", {"error": error}), ("1", b"[DONE]")]


def test_a_chat_answer_to_the_field() -> None:
    body = body_of(record_of(chat(), num_tokens=3), columns_of("hi"), SPECIAL)
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert body == {
        "id": f"chatcmpl-{JOB_ID}",
        "object": "chat.completion",
        "created": 1_700_000_001,
        "model": "tgi",
        "system_fingerprint": "fp_abcdef",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9},
    }


def test_special_tokens_are_hidden_unless_wanted_and_the_end_always() -> None:
    columns = TokenColumns(0, [258, 104, EOS], ["<|user|>", "h", "</s>"], [0.0] * 3)

    def text(**body: Any) -> str:
        return body_of(record_of(chat(**body), num_tokens=3), columns, SPECIAL)["choices"][0]["message"]["content"]

    assert text() == "h"
    assert text(skip_special_tokens=False) == "<|user|>h"
    assert text(skip_special_tokens=False, ignore_eos=True) == "<|user|>h</s>"
    assert text(stop_token_ids=[104]) == ""
    assert text(stop_token_ids=[104], min_tokens=3) == "h"
    assert text(stop_token_ids=[104], include_stop_str_in_output=True) == "h"


def test_a_completion_stream_to_the_field() -> None:
    [draft] = completion(echo=True)
    head = HEAD | {"id": f"cmpl-{JOB_ID}", "object": "text_completion"}

    def one(text: str, reason: str | None = None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}

    events = stream(draft, columns_of("h"))
    assert events == [("0", one("hi")), ("1", one("h")), ("2", one("", "stop")), ("2", b"[DONE]")]


def test_completion_logprobs_have_offsets_into_the_text() -> None:
    [draft] = completion(logprobs=1)
    columns = columns_of("hé", tops=1)
    body = completion_body([(record_of(draft, num_tokens=4), columns)], SPECIAL)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["h", "", "é"],
        "token_logprobs": [-0.25, -0.5, -0.75],
        "top_logprobs": [{"a": -0.0, "h": -0.25}, {"a": -0.0, "": -0.5}, {"a": -0.0, "é": -0.75}],
        "text_offset": [0, 1, 1],
    }
    streamed = [data["choices"][0]["logprobs"]["text_offset"] for _, data in stream(draft, columns)[:3]]
    assert streamed == [[0], [1], [1]]


def test_several_prompts_are_one_answer_in_their_order() -> None:
    drafts = completion(prompt=["a", "bc"])
    records = [record_of(draft, job_id=f"{JOB_ID}.{index}", num_tokens=2) for index, draft in enumerate(drafts)]
    body = completion_body([(records[0], columns_of("x")), (records[1], columns_of("y"))], SPECIAL)
    assert body["id"] == f"cmpl-{JOB_ID}"
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "x"), (1, "y")]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_the_input_of_a_job_is_told_apart_by_its_fields() -> None:
    assert parse_input({"inputs": "x"}, served(), LIMITS).view["door"] == "generate"
    assert parse_input({"messages": MESSAGES}, served(), LIMITS).view["door"] == "chat"
    assert parse_input({"prompt": "x"}, served(), LIMITS).view["door"] == "completions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"inputs": "x", "prompt": "y"}, "input"),
        ({"inputs": "x", "stream": True}, "input.stream"),
        ({"prompt": ["x", "y"]}, "input.prompt"),
    ],
)
def test_the_input_of_a_job_that_is_none(body: dict, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_input(body, served(), LIMITS)
    assert caught.value.param == param


def test_the_text_so_far_is_the_shown_text() -> None:
    columns = until(columns_of("hi"), 1)
    assert body_of(record_of(chat()), columns, SPECIAL)["choices"][0]["message"]["content"] == "h"
