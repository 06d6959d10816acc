"""What strangers send and must not, written by hand: each row has the exact status and the exact body of the refusal.

In texts {finished} is the id of a job that has ended with 5 tokens, {running} one that still writes, {nobody} one that
was never made, {long_tokens} the number of tokens of LONG_PROMPT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

JSON = "application/json"
LONG_PROMPT = "Count to 10. " * 2000
PAYLOAD_LIMIT = 2_000_000
TOO_BIG = b'{"inputs": "' + b"a" * PAYLOAD_LIMIT + b'"}'
ANY_OFFSET = f"an integer from 0 to {2**40}"
IDS = list(range(100, 120))


@dataclass(frozen=True, kw_only=True)
class BadRequest:
    """One HTTP request. `body` is sent as JSON, or as it is if it is bytes; `before` is sent first and must succeed."""

    name: str
    path: str
    status: int
    answer: dict[str, Any]
    method: str = "POST"
    body: Any = None
    content_type: str | None = JSON
    headers: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    answer_headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes | None:
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()

    @property
    def answer_bytes(self) -> bytes:
        return json.dumps(self.answer, ensure_ascii=False, separators=(",", ":")).encode()


def native(name: str, body: Any, message: str, **fields: Any) -> BadRequest:
    """A row of TGI's routes; without more the 422 of its validation."""
    is_validation = fields.get("status", 422) == 422
    kind = fields.pop("kind", "validation")
    text = f"Input validation error: {message}" if is_validation else message
    defaults = {"path": "/generate", "status": 422}
    return BadRequest(name=name, body=body, answer={"error": text, "error_type": kind}, **defaults | fields)


def parameters(**values: Any) -> dict[str, Any]:
    return {"inputs": "Count to 10", "parameters": values}


NATIVE = [
    native("no inputs", {}, "missing field `inputs`"),
    native("inputs null", {"inputs": None}, "missing field `inputs`"),
    native("inputs number", {"inputs": 5}, "`inputs` must be a string"),
    native("inputs list", {"inputs": ["a"]}, "`inputs` must be a string"),
    native("inputs empty", {"inputs": ""}, "`inputs` cannot be empty"),
    native("parameters list", {"inputs": "a", "parameters": []}, "`parameters` must be an object"),
    native("body list", [1], "the request body must be a JSON object"),
    native("body null", b"null", "the request body must be a JSON object"),
    native("temperature zero", parameters(temperature=0), "`temperature` must be strictly positive"),
    native("temperature text", parameters(temperature="hot"), "`temperature` must be a number"),
    native("top_p above one", parameters(top_p=1.5), "`top_p` must be > 0.0 and < 1.0"),
    native("typical_p zero", parameters(typical_p=0.0), "`typical_p` must be > 0.0 and < 1.0"),
    native("top_k zero", parameters(top_k=0), "`top_k` must be strictly positive"),
    native("top_k fraction", parameters(top_k=1.5), "`top_k` must be an integer"),
    native("top_k boolean", parameters(top_k=True), "`top_k` must be an integer"),
    native("no new tokens", parameters(max_new_tokens=0), "`max_new_tokens` must be strictly positive"),
    native("seed negative", parameters(seed=-1), "`seed` must be >= 0"),
    native(
        "repetition_penalty zero", parameters(repetition_penalty=0), "`repetition_penalty` must be strictly positive"
    ),
    native(
        "frequency_penalty",
        parameters(frequency_penalty=2.5),
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    native(
        "five stops",
        parameters(stop=["a", "b", "c", "d", "e"]),
        "`stop` supports up to 4 stop sequences. Given: 5",
    ),
    native("stop empty", parameters(stop=[""]), "`stop` sequences must not be empty"),
    native("stop number", parameters(stop=5), "`stop` must be a list of strings"),
    native("top_n_tokens", parameters(top_n_tokens=6), "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    native("best_of three", parameters(best_of=3), "`best_of` must be > 0 and <= 2. Given: 3"),
    native("best_of greedy", parameters(best_of=2), "you must use sampling when `best_of` is > 1"),
    native(
        "best_of seeded",
        parameters(best_of=2, do_sample=True, seed=1),
        "`seed` must not be set when `best_of` > 1",
    ),
    native(
        "truncate zero", parameters(truncate=0), "`truncate` must be strictly positive and less than 4095. Given: 0"
    ),
    native("do_sample text", parameters(do_sample="yes"), "`do_sample` must be true or false"),
    native("unknown parameter", parameters(beams=4), "`beams` is not supported: no such parameter is known here"),
    native(
        "grammar",
        parameters(grammar={"type": "regex", "value": "a"}),
        "`grammar` is not supported: guided generation is not available",
    ),
    native("watermark", parameters(watermark=True), "`watermark` is not supported: watermarks are not available"),
    native(
        "stream prefill details",
        parameters(decoder_input_details=True),
        "`decoder_input_details` == true is not supported when streaming tokens",
        path="/generate_stream",
    ),
    native(
        "stream best_of",
        parameters(best_of=2, do_sample=True),
        "`best_of` != 1 is not supported when streaming tokens",
        path="/generate_stream",
    ),
    native("stream text", {"inputs": "a", "stream": "yes"}, "`stream` must be true or false", path="/"),
    native(
        "prompt too long",
        {"inputs": LONG_PROMPT},
        "`inputs` must have less than 4095 tokens. Given: {long_tokens}",
    ),
    native(
        "too many new tokens",
        parameters(max_new_tokens=10**9) | {"inputs": LONG_PROMPT},
        "`inputs` tokens + `max_new_tokens` must be <= 4096. "
        "Given: {long_tokens} `inputs` tokens and 1000000000 `max_new_tokens`",
    ),
    native("tokenize nothing", {"inputs": ""}, "`inputs` cannot be empty", path="/tokenize"),
    native(
        "malformed JSON",
        b'{"inputs": ',
        "Failed to parse the request body as JSON: error at line 1 column 12",
        status=400,
        kind="bad_request",
    ),
    native(
        "bad UTF-8",
        b'{"inputs": "\xff\xfe"}',
        "Failed to parse the request body as JSON: error at line 1 column 1",
        status=400,
        kind="bad_request",
    ),
    native(
        "empty body",
        b"",
        "Failed to parse the request body as JSON: error at line 1 column 1",
        status=400,
        kind="bad_request",
    ),
    native(
        "NaN",
        b'{"inputs": "a", "parameters": {"temperature": NaN}}',
        "Failed to parse the request body as JSON: error at line 1 column 47",
        status=400,
        kind="bad_request",
    ),
    native(
        "deep nesting",
        b"[" * 100_000,
        "Failed to parse the request body as JSON: error at line 1 column 1026",
        status=400,
        kind="bad_request",
    ),
    native("huge body", TOO_BIG, "the body is longer than 2000000 bytes", status=413, kind="payload_too_large"),
    native(
        "plain text",
        b"Count to 10",
        "Expected request with `Content-Type: application/json`",
        status=415,
        kind="unsupported_media_type",
        content_type="text/plain",
    ),
    native(
        "no content type",
        b'{"inputs": "a"}',
        "Expected request with `Content-Type: application/json`",
        status=415,
        kind="unsupported_media_type",
        content_type=None,
    ),
    native("unknown route", {}, "no route POST /generated", status=404, kind="not_found", path="/generated"),
    native(
        "wrong method",
        None,
        "no route GET /generate",
        status=405,
        kind="method_not_allowed",
        method="GET",
        answer_headers={"allow": "POST"},
    ),
    native(
        "unknown model",
        {"inputs": "a", "model": "gpt-9"},
        "unknown model 'gpt-9'; served here: demo",
        status=404,
        kind="not_found",
    ),
    native(
        "unknown adapter",
        parameters(adapter_id="mine"),
        "unknown adapter 'mine'; adapters here: none",
        status=404,
        kind="not_found",
    ),
]

KINDS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 409: "conflict", 422: "validation"}


def openai(name: str, body: Any, message: str, param: str | None, **fields: Any) -> BadRequest:
    """A row of the routes under /v1; without more the 422 of a wrong field of /v1/chat/completions."""
    status = fields.setdefault("status", 422)
    error = {
        "message": message,
        "type": fields.pop("type", "not_found_error" if status == 404 else "invalid_request_error"),
        "param": param,
        "code": fields.pop("code", None) or KINDS[status],
    }
    fields.setdefault("path", "/v1/chat/completions")
    return BadRequest(name=name, body=body, answer={"error": error | fields.pop("more", {})}, **fields)


def chat(**values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Count to 10"}], **values}


def completion(**values: Any) -> dict[str, Any]:
    return {"prompt": "Count to 10", **values}


UNSUPPORTED = "unsupported_parameter"
TOO_LONG = "context_length_exceeded"
COMPLETIONS = "/v1/completions"

OPENAI = [
    openai("no messages", {}, "missing field `messages`", "messages"),
    openai("messages text", {"messages": "hi"}, "`messages` must be a list", "messages"),
    openai("messages empty", {"messages": []}, "`messages` cannot be empty", "messages"),
    openai("message text", {"messages": ["hi"]}, "`messages[0]` must be an object", "messages[0]"),
    openai(
        "role unknown",
        {"messages": [{"role": "wizard", "content": "hi"}]},
        "`messages[0].role` must be one of system, developer, user, assistant",
        "messages[0].role",
    ),
    openai(
        "content number",
        {"messages": [{"role": "user", "content": 5}]},
        "`messages[0].content` must be a string or a list of parts",
        "messages[0].content",
    ),
    openai(
        "image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "`messages[0].content[0]` is not supported: only text parts are available",
        "messages[0].content[0]",
        code=UNSUPPORTED,
    ),
    openai("temperature negative", chat(temperature=-1), "`temperature` must be >= 0.0", "temperature"),
    openai("temperature text", chat(temperature="0"), "`temperature` must be a number", "temperature"),
    openai("top_p zero", chat(top_p=0), "`top_p` must be > 0.0 and <= 1.0", "top_p"),
    openai(
        "presence_penalty",
        chat(presence_penalty=-3),
        "`presence_penalty` must be >= -2.0 and <= 2.0",
        "presence_penalty",
    ),
    openai("max_tokens zero", chat(max_tokens=0), "`max_tokens` must be strictly positive", "max_tokens"),
    openai("max_tokens text", chat(max_tokens="many"), "`max_tokens` must be an integer", "max_tokens"),
    openai(
        "two choices", chat(n=2), "`n` is not supported: only one choice per prompt is available", "n", code=UNSUPPORTED
    ),
    openai(
        "tools",
        chat(tools=[{"type": "function", "function": {"name": "f"}}]),
        "`tools` is not supported: tool calls are not available",
        "tools",
        code=UNSUPPORTED,
    ),
    openai(
        "response_format",
        chat(response_format={"type": "json_object"}),
        "`response_format` is not supported: guided generation is not available",
        "response_format",
        code=UNSUPPORTED,
    ),
    openai(
        "unknown field",
        chat(beams=4),
        "`beams` is not supported: no such field is known here",
        "beams",
        code=UNSUPPORTED,
    ),
    openai(
        "stream_options alone",
        chat(stream_options={"include_usage": True}),
        "`stream_options` is only allowed with `stream`",
        "stream_options",
    ),
    openai("top_logprobs alone", chat(top_logprobs=2), "`top_logprobs` needs `logprobs` to be true", "top_logprobs"),
    openai(
        "top_logprobs six",
        chat(logprobs=True, top_logprobs=6),
        "`top_logprobs` must be >= 0 and <= 5. Given: 6",
        "top_logprobs",
    ),
    openai("stop object", chat(stop={}), "`stop` must be a string or a list of strings", "stop"),
    openai(
        "metadata number",
        chat(metadata={"a": 1}),
        "`metadata` values are strings of at most 512 characters",
        "metadata",
    ),
    openai(
        "unknown model",
        chat(model="gpt-9"),
        "unknown model 'gpt-9'; served here: demo",
        "model",
        status=404,
        code="model_not_found",
    ),
    openai("model number", chat(model=5), "`model` must be a string", "model"),
    openai(
        "malformed JSON",
        b"{'messages': []}",
        "Failed to parse the request body as JSON: error at line 1 column 2",
        None,
        status=400,
        code="invalid_json",
    ),
    openai(
        "huge body",
        TOO_BIG,
        "the body is longer than 2000000 bytes",
        None,
        status=413,
        code="payload_too_large",
    ),
    openai(
        "form",
        b"messages=hi",
        "Expected request with `Content-Type: application/json`",
        None,
        status=415,
        code="unsupported_media_type",
        content_type="application/x-www-form-urlencoded",
    ),
    openai("no prompt", {}, "missing field `prompt`", "prompt", path=COMPLETIONS),
    openai(
        "prompt number",
        {"prompt": 5},
        "`prompt` must be a string, token ids, or a list of these",
        "prompt",
        path=COMPLETIONS,
    ),
    openai(
        "prompt list empty",
        {"prompt": []},
        "Empty array detected. Do not use an empty array for the prompt.",
        "prompt",
        path=COMPLETIONS,
    ),
    openai(
        "five prompts",
        {"prompt": ["a"] * 5},
        "Number of prompts exceeds the maximum allowed batch size of 4",
        "prompt",
        path=COMPLETIONS,
        code="batch_size_exceeded",
    ),
    openai("ids too large", {"prompt": [3072]}, "token ids must be < 3072", "prompt", path=COMPLETIONS),
    openai(
        "suffix",
        completion(suffix="end"),
        "`suffix` is not supported: it can be achieved by preprocessing the prompt",
        "suffix",
        path=COMPLETIONS,
        code=UNSUPPORTED,
    ),
    openai(
        "prompt too long",
        {"prompt": IDS * 300},
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 6000 `inputs` tokens and 16 `max_new_tokens`",
        "prompt",
        path=COMPLETIONS,
        code=TOO_LONG,
    ),
    openai(
        "unknown model in path",
        None,
        "unknown model 'gpt-9'; served here: demo",
        "model",
        path="/v1/models/gpt-9",
        method="GET",
        status=404,
        code="model_not_found",
    ),
    openai(
        "unknown route",
        {},
        "no route POST /v1/embeddings",
        None,
        path="/v1/embeddings",
        status=404,
        code="route_not_found",
    ),
]


ADAPTERS = {"path": "/v1/fleet/adapters"}
NO_NAME = "an adapter's name is 1 to 96 of [A-Za-z0-9._-], in parts divided by /"

OPENAI += [
    openai("adapter without a name", {"source": "/adapters/fr"}, NO_NAME, "name", **ADAPTERS),
    openai(
        "adapter from a URL",
        {"name": "fr", "source": "http://127.0.0.1/fr"},
        "an adapter's source is no URL but a folder or owner/name[@revision] of a hub",
        "source",
        **ADAPTERS,
    ),
    openai(
        "adapter called like the model",
        {"name": "demo", "source": "/adapters/fr"},
        "'demo' is the name of a model; give the adapter another one",
        "name",
        **ADAPTERS,
    ),
    openai(
        "adapter that is not there",
        {"name": "fr", "source": "/no/such/adapter"},
        "adapter fr: there is no folder /no/such/adapter; check its source",
        "source",
        code="adapter_error",
        **ADAPTERS,
    ),
    openai(
        "unloading no adapter",
        None,
        "no adapter 'fr' of demo; adapters here: none",
        "name",
        path="/v1/fleet/adapters/fr",
        method="DELETE",
        status=404,
        code="adapter_not_found",
    ),
]


def jobs(name: str, body: Any, message: str, param: str | None, **fields: Any) -> BadRequest:
    """A row of the Jobs API; without more the 422 of a wrong field of POST /v1/jobs."""
    return openai(name, body, message, param, **{"path": "/v1/jobs"} | fields)


def look(name: str, path: str, message: str, param: str | None, **fields: Any) -> BadRequest:
    """A row that reads; without more the 400 of a wrong query."""
    defaults = {"status": 400, "code": "invalid_query", "method": "GET"}
    return openai(name, None, message, param, path=path, **defaults | fields)


INPUT = {"inputs": "Count to 10"}
NO_JOB = {"status": 404, "code": "job_not_found"}
WRONG_ID = {
    "code": "invalid_last_event_id",
    "message": "Last-Event-ID must be an offset or `end`",
    "param": "Last-Event-ID",
}
BEYOND = {"status": 409, "code": "offset_beyond_end", "more": {"num_tokens": 5}}

JOBS = [
    jobs("no input", {}, "`input` must be the body of another route, an object", "input"),
    jobs("input text", {"input": "hi"}, "`input` must be the body of another route, an object", "input"),
    jobs("input empty", {"input": {}}, "`input` needs exactly one of `inputs`, `prompt` and `messages`", "input"),
    jobs(
        "two inputs",
        {"input": INPUT | {"prompt": "a"}},
        "`input` needs exactly one of `inputs`, `prompt` and `messages`",
        "input",
    ),
    jobs(
        "stream in input",
        {"input": INPUT | {"stream": True}},
        "`input.stream` must not be true: every job can be streamed",
        "input.stream",
    ),
    jobs(
        "wrong in input",
        {"input": {"inputs": "a", "parameters": {"top_k": 0}}},
        "`top_k` must be strictly positive",
        "top_k",
    ),
    jobs(
        "unknown field",
        {"input": INPUT, "stream": True},
        "`stream` is not supported: no such field is known here",
        "stream",
        code=UNSUPPORTED,
    ),
    jobs(
        "webhook",
        {"input": INPUT, "webhook": "http://localhost/"},
        "`webhook` is not supported: results are not delivered by webhook yet",
        "webhook",
        code=UNSUPPORTED,
    ),
    jobs("priority", {"input": INPUT, "priority": "high"}, "`priority` must be interactive or batch", "priority"),
    jobs("timeout zero", {"input": INPUT, "timeout": 0}, "`timeout` must be from 1 to 86400 seconds", "timeout"),
    jobs("timeout text", {"input": INPUT, "timeout": "1h"}, "`timeout` must be a number", "timeout"),
    jobs(
        "result_ttl short",
        {"input": INPUT, "result_ttl": 59},
        "`result_ttl` must be from 60 to 604800 seconds",
        "result_ttl",
    ),
    jobs("metadata list", {"input": INPUT, "metadata": []}, "`metadata` must be an object of strings", "metadata"),
    jobs(
        "metadata long",
        {"input": INPUT, "metadata": {"a": "b" * 513}},
        "keys of `metadata` have at most 64 and values 512 characters",
        "metadata",
    ),
    jobs(
        "two models",
        {"input": INPUT | {"model": "demo"}, "model": "tgi"},
        "`model` and `input.model` differ",
        "model",
    ),
    jobs(
        "unknown model",
        {"input": INPUT, "model": "gpt-9"},
        "unknown model 'gpt-9'; served here: demo",
        "model",
        status=404,
        code="model_not_found",
    ),
    jobs(
        "several prompts",
        {"input": {"prompt": ["a", "b"]}},
        "`input.prompt` is not supported: a job has one prompt",
        "input.prompt",
        code=UNSUPPORTED,
    ),
    jobs(
        "malformed JSON",
        b"{",
        "Failed to parse the request body as JSON: error at line 1 column 2",
        None,
        status=400,
        code="invalid_json",
    ),
    jobs(
        "key reused",
        {"input": INPUT},
        "this Idempotency-Key was used with another body",
        None,
        headers={"Idempotency-Key": "the same"},
        before={"input": INPUT, "metadata": {"other": "body"}},
        code="idempotency_key_reused",
    ),
    jobs(
        "key too long",
        {"input": INPUT},
        "Idempotency-Key must be 1 to 255 printable ASCII characters",
        "Idempotency-Key",
        headers={"Idempotency-Key": "k" * 256},
    ),
    jobs(
        "wait too long",
        {"input": INPUT},
        "`wait` must be an integer from 0 to 60",
        "wait",
        path="/v1/jobs?wait=61",
        status=400,
        code="invalid_query",
    ),
    look("wait text", "/v1/jobs/{finished}?wait=long", "`wait` must be an integer from 0 to 60", "wait"),
    look("limit zero", "/v1/jobs?limit=0", "`limit` must be an integer from 1 to 100", "limit"),
    look(
        "status unknown",
        "/v1/jobs?status=done",
        "`status` must be one of queued, in_progress, completed, failed, cancelled, expired",
        "status",
    ),
    look("after nothing", "/v1/jobs?after=job_x", "no job 'job_x'", None, **NO_JOB),
    look("unknown job", "/v1/jobs/{nobody}", "no job '{nobody}'", None, **NO_JOB),
    look("malformed id", "/v1/jobs/job_ABC", "no job 'job_ABC'", None, **NO_JOB),
    look("stream unknown job", "/v1/jobs/{nobody}/stream", "no job '{nobody}'", None, **NO_JOB),
    look("cancel unknown job", "/v1/jobs/{nobody}/cancel", "no job '{nobody}'", None, method="POST", **NO_JOB),
    look("erase unknown job", "/v1/jobs/{nobody}", "no job '{nobody}'", None, method="DELETE", **NO_JOB),
    look("from text", "/v1/jobs/{finished}/stream?from=x", f"`from` must be {ANY_OFFSET}", "from"),
    look("from negative", "/v1/jobs/{finished}/stream?from=-1", f"`from` must be {ANY_OFFSET}", "from"),
    look("format unknown", "/v1/jobs/{finished}/stream?format=xml", "`format` must be job or native", "format"),
    look("resume beyond the end", "/v1/jobs/{finished}/stream?from=6", "the job has 5 tokens", None, **BEYOND),
    look(
        "Last-Event-ID beyond the end",
        "/v1/jobs/{finished}/stream?format=native",
        "the job has 5 tokens",
        None,
        headers={"Last-Event-ID": "99"},
        **BEYOND,
    ),
    look("Last-Event-ID text", "/v1/jobs/{finished}/stream", headers={"Last-Event-ID": "abc"}, **WRONG_ID),
    look("Last-Event-ID list", "/v1/jobs/{finished}/stream", headers={"Last-Event-ID": "1.2"}, **WRONG_ID),
]

KEY_WANTED = "a key is needed: Authorization: Bearer …"
KEY_UNKNOWN = "this key is not known here"
NO_KEY = {"status": 401, "code": "invalid_api_key", "answer_headers": {"www-authenticate": "Bearer"}}
WRONG = {"Authorization": "Bearer wrong"}
BASIC = {"Authorization": "Basic c2VjcmV0OnNlY3JldA=="}

KEYS = [
    native("native without key", INPUT, KEY_WANTED, kind="unauthorized", status=401),
    native("native wrong key", INPUT, KEY_UNKNOWN, kind="unauthorized", status=401, headers=WRONG),
    openai("chat without key", chat(), KEY_WANTED, None, type="authentication_error", **NO_KEY),
    openai("chat wrong key", chat(), KEY_UNKNOWN, None, type="authentication_error", headers=WRONG, **NO_KEY),
    openai("chat basic", chat(), KEY_WANTED, None, type="authentication_error", headers=BASIC, **NO_KEY),
    jobs("job wrong key", {"input": INPUT}, KEY_UNKNOWN, None, type="authentication_error", headers=WRONG, **NO_KEY),
    jobs("bad body, wrong key", b"{", KEY_UNKNOWN, None, type="authentication_error", headers=WRONG, **NO_KEY),
    look(
        "fleet wrong key",
        "/v1/fleet/workers",
        KEY_UNKNOWN,
        None,
        **NO_KEY | {"type": "authentication_error"},
        headers=WRONG,
    ),
]


@dataclass(frozen=True, kw_only=True)
class BadSocket:
    """One WebSocket connection: what it sends, the `error` events it gets, the close code and its reason.

    Text and bytes are sent as messages of their kind, `raw` goes into the connection past the protocol.
    """

    name: str
    path: str
    messages: tuple[str | bytes, ...] = ()
    raw: bytes = b""
    errors: tuple[dict[str, Any], ...] = ()
    code: int
    reason: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def socket_error(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"type": "error", "error": error, "job_id": "{running}"}


RUNNING = "/v1/jobs/{running}/ws"
CANCEL = '{"type":"cancel"}'
WRONG_TYPE = socket_error("`type` must be cancel", "validation", "type")
NOT_JSON = socket_error("Failed to parse the request body as JSON: error at line 1 column 1", "invalid_json")
NO_OBJECT = socket_error("the request body must be a JSON object", "validation")
NO_TEXT = socket_error("messages are JSON text", "bad_request")
NO_FIRST_KEY = "the first message must bring a key"

SOCKETS = [
    BadSocket(name="unknown job", path="/v1/jobs/{nobody}/ws", code=4404, reason="no job '{nobody}'"),
    BadSocket(name="malformed id", path="/v1/jobs/job_x/ws", code=4404, reason="no job 'job_x'"),
    BadSocket(name="beyond the end", path="/v1/jobs/{finished}/ws?from=6", code=4409, reason="5"),
    BadSocket(name="from text", path="/v1/jobs/{finished}/ws?from=x", code=4400, reason=f"`from` must be {ANY_OFFSET}"),
    BadSocket(name="from negative", path=RUNNING + "?from=-1", code=4400, reason=f"`from` must be {ANY_OFFSET}"),
    BadSocket(name="not JSON", path=RUNNING, messages=("hello", CANCEL), errors=(NOT_JSON,), code=1000),
    BadSocket(name="list", path=RUNNING, messages=("[]", CANCEL), errors=(NO_OBJECT,), code=1000),
    BadSocket(name="unknown type", path=RUNNING, messages=('{"type":"stop"}', CANCEL), errors=(WRONG_TYPE,), code=1000),
    BadSocket(name="no type", path=RUNNING, messages=("{}", CANCEL), errors=(WRONG_TYPE,), code=1000),
    BadSocket(name="bytes", path=RUNNING, messages=(CANCEL.encode(), CANCEL), errors=(NO_TEXT,), code=1000),
    BadSocket(
        name="ten bad messages",
        path=RUNNING,
        messages=("{}", "x") * 5,
        errors=(WRONG_TYPE, NOT_JSON) * 5,
        code=4400,
        reason="too many bad messages",
    ),
    BadSocket(
        name="huge message",
        path=RUNNING,
        messages=("x" * (PAYLOAD_LIMIT + 1),),
        code=1009,
        reason="frame exceeds limit of 2000000 bytes",
    ),
    BadSocket(name="unmasked frame", path=RUNNING, raw=b"\x81\x02{}", code=1002, reason="incorrect masking"),
    BadSocket(
        name="reserved opcode", path=RUNNING, raw=b"\x83\x80\x00\x00\x00\x00", code=1002, reason="invalid opcode"
    ),
    BadSocket(name="garbage", path=RUNNING, raw=b"\xff" * 64, code=1002, reason="invalid opcode"),
    BadSocket(name="bad UTF-8", path=RUNNING, raw=b"\x81\x82\x00\x00\x00\x00\xff\xfe", code=1007),
]

KEY_SOCKETS = [
    BadSocket(name="wrong key in header", path=RUNNING, headers=WRONG, code=4401, reason=KEY_UNKNOWN),
    BadSocket(
        name="wrong key in message",
        path=RUNNING,
        messages=('{"type":"auth","api_key":"wrong"}',),
        code=4401,
        reason=KEY_UNKNOWN,
    ),
    BadSocket(name="no key in message", path=RUNNING, messages=(CANCEL,), code=4401, reason=NO_FIRST_KEY),
    BadSocket(
        name="key a number", path=RUNNING, messages=('{"type":"auth","api_key":5}',), code=4401, reason=NO_FIRST_KEY
    ),
    BadSocket(name="garbage before the key", path=RUNNING, messages=("hello",), code=4401, reason=NO_FIRST_KEY),
]
