"""Bad input, written by hand: what is sent, and the exact status and body that must come back.

A row has either `json` or `content`; `expected` is the whole body. The limits are those of a model with 4,096 tokens of
context, and the gateway has default options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

JSON = {"content-type": "application/json"}
MOST_INPUT, MOST_TOTAL = 4095, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BadInput:
    """One request that must be refused."""

    name: str
    method: str = "POST"
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    status: int
    expected: Any


def _native(name: str, parameters: Any, message: str, *, path: str = "/generate", inputs: Any = "hi") -> BadInput:
    expected = {"error": f"Input validation error: {message}", "error_type": "validation"}
    body = {"inputs": inputs, "parameters": parameters}
    return BadInput(name=name, path=path, json=body, status=422, expected=expected)


def _openai_error(message: str, param: str | None, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _chat(name: str, more: dict[str, Any], message: str, param: str, code: str = "validation") -> BadInput:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | more
    expected = _openai_error(message, param, code)
    return BadInput(name=name, path="/v1/chat/completions", json=body, status=422, expected=expected)


def _completion(name: str, more: dict[str, Any], message: str, param: str, code: str = "validation") -> BadInput:
    body = {"model": "tgi", "prompt": "hi", "max_tokens": 4} | more
    expected = _openai_error(message, param, code)
    return BadInput(name=name, path="/v1/completions", json=body, status=422, expected=expected)


NATIVE: tuple[BadInput, ...] = (
    _native("temperature of zero", {"temperature": 0}, "`temperature` must be strictly positive"),
    _native("top_p above one", {"top_p": 1.2}, "`top_p` must be > 0.0 and < 1.0"),
    _native("top_k of zero", {"top_k": 0}, "`top_k` must be strictly positive"),
    _native("no new tokens", {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    _native("a text as number", {"max_new_tokens": "20"}, "`max_new_tokens` must be an integer"),
    _native("true as number", {"seed": True}, "`seed` must be an integer"),
    _native("parameters that are a list", [], "`parameters` must be an object"),
    _native("five stop strings", {"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    _native("too many top tokens", {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    _native("empty input", {}, "`inputs` cannot be empty", inputs=""),
    _native("input that is a list", {}, "`inputs` must be a string", inputs=["hi"]),
    _native(
        "truncate beyond the limit",
        {"truncate": MOST_TOTAL},
        f"`truncate` must be strictly positive and less than {MOST_INPUT}. Given: {MOST_TOTAL}",
    ),
    _native("watermark", {"watermark": True}, "`watermark` is not supported: watermarks are not available"),
    _native(
        "a grammar",
        {"grammar": {"type": "regex", "value": "a+"}},
        "`grammar` is not supported: guided generation is not available",
    ),
    _native(
        "prompt details in a stream",
        {"decoder_input_details": True},
        "`decoder_input_details` == true is not supported when streaming tokens",
        path="/generate_stream",
    ),
    _native(
        "a misspelt parameter", {"max_tokens": 5}, "`max_tokens` is not supported: no such parameter is known here"
    ),
    BadInput(
        name="no input at all",
        path="/generate",
        json={"parameters": {}},
        status=422,
        expected={"error": "Input validation error: missing field `inputs`", "error_type": "validation"},
    ),
    BadInput(
        name="an unknown adapter",
        path="/generate",
        json={"inputs": "hi", "parameters": {"adapter_id": "nobody"}},
        status=404,
        expected={"error": "unknown adapter 'nobody'; adapters here: none", "error_type": "not_found"},
    ),
    BadInput(
        name="half a JSON object",
        path="/generate",
        headers=JSON,
        content=b'{"inputs": ',
        status=400,
        expected={
            "error": "Failed to parse the request body as JSON: error at line 1 column 12",
            "error_type": "bad_request",
        },
    ),
    BadInput(
        name="bytes that are not UTF-8",
        path="/",
        headers=JSON,
        content=b'{"inputs": "\xff\xfe"}',
        status=400,
        expected={
            "error": "Failed to parse the request body as JSON: error at line 1 column 1",
            "error_type": "bad_request",
        },
    ),
    BadInput(
        name="NaN",
        path="/generate",
        headers=JSON,
        content=b'{"inputs": "hi", "parameters": {"temperature": NaN}}',
        status=400,
        expected={
            "error": "Failed to parse the request body as JSON: error at line 1 column 48",
            "error_type": "bad_request",
        },
    ),
    BadInput(
        name="a form",
        path="/generate",
        headers={"content-type": "application/x-www-form-urlencoded"},
        content=b"inputs=hi",
        status=415,
        expected={
            "error": "Expected request with `Content-Type: application/json`",
            "error_type": "unsupported_media_type",
        },
    ),
    BadInput(
        name="a body beyond the limit",
        path="/generate",
        headers=JSON,
        content=b'{"inputs": "' + b"x" * 2_000_000 + b'"}',
        status=413,
        expected={"error": "the body is longer than 2000000 bytes", "error_type": "payload_too_large"},
    ),
    BadInput(
        name="tokenize without input",
        path="/tokenize",
        json={},
        status=422,
        expected={"error": "Input validation error: missing field `inputs`", "error_type": "validation"},
    ),
)

OPENAI: tuple[BadInput, ...] = (
    _chat("no messages", {"messages": []}, "`messages` cannot be empty", "messages"),
    _chat(
        "an unknown role",
        {"messages": [{"role": "king", "content": "x"}]},
        "`messages[0].role` must be one of system, developer, user, assistant",
        "messages[0].role",
    ),
    _chat(
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
        "`messages[0].content[0]` is not supported: only text parts are available",
        "messages[0].content[0]",
        "unsupported_parameter",
    ),
    _chat("a negative temperature", {"temperature": -1}, "`temperature` must be >= 0.0", "temperature"),
    _chat("top_p of zero", {"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0", "top_p"),
    _chat("a text as temperature", {"temperature": "hot"}, "`temperature` must be a number", "temperature"),
    _chat(
        "a penalty out of range",
        {"presence_penalty": 2.5},
        "`presence_penalty` must be >= -2.0 and <= 2.0",
        "presence_penalty",
    ),
    _chat(
        "two choices",
        {"n": 2},
        "`n` is not supported: only one choice per prompt is available",
        "n",
        "unsupported_parameter",
    ),
    _chat(
        "a tool",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "`tools` is not supported: tool calls are not available",
        "tools",
        "unsupported_parameter",
    ),
    _chat(
        "a format",
        {"response_format": {"type": "json_object"}},
        "`response_format` is not supported: guided generation is not available",
        "response_format",
        "unsupported_parameter",
    ),
    _chat(
        "a bias",
        {"logit_bias": {"50": 10}},
        "`logit_bias` is not supported: biases on tokens are not available",
        "logit_bias",
        "unsupported_parameter",
    ),
    _chat(
        "an unknown field",
        {"frobnicate": True},
        "`frobnicate` is not supported: no such field is known here",
        "frobnicate",
        "unsupported_parameter",
    ),
    _chat(
        "usage without a stream",
        {"stream_options": {"include_usage": True}},
        "`stream_options` is only allowed with `stream`",
        "stream_options",
    ),
    _chat(
        "alternatives without logprobs",
        {"top_logprobs": 2},
        "`top_logprobs` needs `logprobs` to be true",
        "top_logprobs",
    ),
    _chat("no tokens", {"max_tokens": 0, "stream": True}, "`max_tokens` must be strictly positive", "max_tokens"),
    _completion(
        "an empty list of prompts",
        {"prompt": []},
        "Empty array detected. Do not use an empty array for the prompt.",
        "prompt",
    ),
    _completion(
        "five prompts",
        {"prompt": ["a"] * 5},
        "Number of prompts exceeds the maximum allowed batch size of 4",
        "prompt",
        "batch_size_exceeded",
    ),
    _completion(
        "a suffix",
        {"suffix": "!"},
        "`suffix` is not supported: it can be achieved by preprocessing the prompt",
        "suffix",
        "unsupported_parameter",
    ),
    _completion(
        "more than the context holds",
        {"prompt": [5], "max_tokens": MOST_TOTAL},
        f"`inputs` tokens + `max_new_tokens` must be <= {MOST_TOTAL}. "
        f"Given: 1 `inputs` tokens and {MOST_TOTAL} `max_new_tokens`",
        "prompt",
        "context_length_exceeded",
    ),
    _completion(
        "a prompt that is too long",
        {"prompt": [5] * MOST_TOTAL, "max_tokens": None},
        f"`inputs` tokens + `max_new_tokens` must be <= {MOST_TOTAL}. "
        f"Given: {MOST_TOTAL} `inputs` tokens and 16 `max_new_tokens`",
        "prompt",
        "context_length_exceeded",
    ),
    BadInput(
        name="JSON that is a list",
        path="/v1/chat/completions",
        json=[],
        status=422,
        expected=_openai_error("the request body must be a JSON object", None, "validation"),
    ),
    BadInput(
        name="malformed JSON",
        path="/v1/completions",
        headers=JSON,
        content=b"{'prompt': 1}",
        status=400,
        expected=_openai_error(
            "Failed to parse the request body as JSON: error at line 1 column 2", None, "invalid_json"
        ),
    ),
    BadInput(
        name="a bad idempotency key",
        path="/v1/completions",
        headers={"idempotency-key": "x" * 256},
        json={"prompt": "hi"},
        status=422,
        expected=_openai_error(
            "Idempotency-Key must be 1 to 255 printable ASCII characters", "Idempotency-Key", "validation"
        ),
    ),
    BadInput(
        name="a route that is none",
        path="/v1/embeddings",
        json={"input": "x"},
        status=404,
        expected=_openai_error("no route POST /v1/embeddings", None, "route_not_found", "not_found_error"),
    ),
)
