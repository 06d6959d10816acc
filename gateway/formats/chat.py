"""/v1/chat/completions: messages -> draft of a job; log -> chunks; job -> completion."""

from __future__ import annotations

import time
from typing import Any

from common.errors import TemplateError, ValidationError
from common.job import Dialect, JobRecord, TokenColumns
from gateway.formats.base import MAX_MESSAGES, JobDraft, Limits, ServerEvent
from gateway.formats.fields import Fields, unsupported
from gateway.formats.openai import (
    HARMLESS,
    NOT_YET,
    OpenAIRenderer,
    Refusal,
    check_top_logprobs,
    common_view,
    fingerprint,
    finish_word,
    for_tokens,
    is_empty,
    read_count,
    read_sampling,
    read_stream_options,
    refuse,
    refuse_unread,
    shown_pieces,
    usage_body,
)
from gateway.formats.prompts import fit_context
from gateway.models import ServedModel

NO_TEMPLATE = (
    "Template error: template not found: the model has no chat template; "
    "use /v1/completions or /generate, or start the worker with --chat-template"
)
TEMPLATE_VARIABLES_KEPT = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


def _is_text(value: Any) -> bool:
    return bool(value == {"type": "text"})


CHAT_NOT_YET: tuple[Refusal, ...] = (
    ("tools", is_empty, "tool calls are not available"),
    ("tool_choice", lambda value: value in ("none", "auto"), "tool calls are not available"),
    ("tool_prompt", is_empty, "tool calls are not available"),
    ("functions", is_empty, "tool calls are not available"),
    ("function_call", lambda value: value in ("none", "auto"), "tool calls are not available"),
    ("parallel_tool_calls", lambda value: isinstance(value, bool), "it must be true or false"),
    ("response_format", _is_text, "guided generation is not available"),
    ("modalities", lambda value: value == ["text"], "only text is available"),
    ("audio", is_empty, "only text is available"),
    ("prediction", is_empty, "predicted outputs are not available"),
    ("echo", is_empty, "the prompt of a chat cannot be repeated"),
)
NEUTRAL_IN_MESSAGES: tuple[Refusal, ...] = (
    ("tool_calls", is_empty, "tool calls are not available"),
    ("function_call", is_empty, "tool calls are not available"),
    ("tool_call_id", is_empty, "tool calls are not available"),
    ("audio", is_empty, "only text is available"),
    ("refusal", lambda value: isinstance(value, str), "it must be a string"),
    ("annotations", is_empty, "annotations are not available"),
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and what the model's template knows them as."""


def _part_text(part: Any, path: str) -> str:
    fields = Fields(part, f"{path}.") if isinstance(part, dict) else None
    if fields is None or fields.raw("type") not in ("text", "image_url", "input_audio", "file", "refusal"):
        raise ValidationError(f"`{path}` must be an object with a `type` of content parts", param=path)
    if fields.raw("type") != "text":
        raise unsupported(path, "only text parts are available")
    text = fields.text("text")
    if text is None:
        raise ValidationError(f"`{path}.text` must be a string", param=path)
    return text


def _content(value: Any, path: str) -> str:
    """The text of a message: a string, or text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValidationError(f"`{path}` must be a string or a list of parts", param=path)
    return "".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(value))


def _message(value: Any, index: int) -> dict[str, str]:
    path = f"messages[{index}]"
    if not isinstance(value, dict):
        raise ValidationError(f"`{path}` must be an object", param=path)
    fields = Fields(value, f"{path}.")
    role = fields.text("role")
    if role in ("tool", "function"):
        raise unsupported(f"{path}.role", "tool calls are not available")
    if role not in ROLES:
        raise ValidationError(f"`{path}.role` must be one of {', '.join(ROLES)}", param=f"{path}.role")
    refuse(fields, NEUTRAL_IN_MESSAGES)
    message = {"role": ROLES[role], "content": _content(fields.raw("content"), f"{path}.content")}
    name = fields.text("name")
    refuse_unread(fields)
    return message | ({} if name is None else {"name": name})


def read_messages(fields: Fields) -> list[dict[str, str]]:
    """The conversation as templates want it.

    Raises:
        ValidationError: no messages, too many, or one that is not text.
    """
    messages = fields.raw("messages")
    if messages is None:
        raise ValidationError("missing field `messages`", param="messages")
    if not isinstance(messages, list):
        raise ValidationError("`messages` must be a list", param="messages")
    if not messages:
        raise ValidationError("`messages` cannot be empty", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise ValidationError(f"`messages` has more than {MAX_MESSAGES} items", param="messages")
    return [_message(message, index) for index, message in enumerate(messages)]


def _template_variables(fields: Fields) -> dict[str, Any]:
    variables = fields.table("chat_template_kwargs") or {}
    for name in TEMPLATE_VARIABLES_KEPT & set(variables):
        raise unsupported(f"chat_template_kwargs.{name}", "the gateway sets it")
    return variables


def _render(messages: list[dict[str, str]], fields: Fields, served: ServedModel) -> str:
    """The conversation as text. An unfinished last message of the assistant is continued, as TGI does."""
    variables = _template_variables(fields)
    wants_prompt = fields.boolean("add_generation_prompt", True)
    continues = fields.boolean("continue_final_message", messages[-1]["role"] == "assistant")
    if served.template is None:
        raise TemplateError(served.template_error or NO_TEMPLATE)
    if continues:
        return served.template.render_continued(messages, **variables)
    return served.template.render(messages, add_generation_prompt=wants_prompt, **variables)


def _read_logprobs(fields: Fields, limits: Limits) -> tuple[bool, int]:
    is_wanted = fields.boolean("logprobs")
    count = fields.integer("top_logprobs")
    if count is not None and not is_wanted:
        raise ValidationError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    return is_wanted, check_top_logprobs(count or 0, limits, "top_logprobs")


def parse_chat(body: dict[str, Any], served: ServedModel, limits: Limits) -> JobDraft:
    """A draft from the body of /v1/chat/completions. May take long for a long prompt: use a thread.

    Raises:
        ValidationError: a field is wrong or cannot be honoured.
        TemplateError: the model has no usable chat template, or it refuses these messages.
    """
    fields = Fields(body)
    for name in (*HARMLESS, "model"):
        fields.raw(name)
    messages = read_messages(fields)
    options = read_stream_options(fields, is_stream=fields.boolean("stream"))
    refuse(fields, NOT_YET + CHAT_NOT_YET)
    wants_logprobs, num_top = _read_logprobs(fields, limits)
    sampling = read_sampling(fields, served.card, limits, num_top)
    older_name, max_tokens = read_count(fields, "max_tokens"), read_count(fields, "max_completion_tokens")
    is_hiding = fields.boolean("skip_special_tokens", True)
    text = _render(messages, fields, served)
    fields.table("metadata")
    refuse_unread(fields)
    prompt_ids = served.encode(text, add_special_tokens=False)
    params = for_tokens(sampling, fit_context(len(prompt_ids), max_tokens or older_name, served.card, param="messages"))
    view = {
        "door": "chat",
        "model": fields.text("model") or served.card.served_name,
        "created": int(time.time()),
        "logprobs": wants_logprobs,
        "prompt_characters": len(text),
    }
    view |= common_view(params, served.card, fields, options, is_hiding)
    return JobDraft(
        lane=served.card.lane,
        dialect=Dialect.CHAT,
        prompt_ids=prompt_ids,
        params=params,
        view=view,
        adapter=served.adapter,
    )


def _alternative(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _logprob_entry(columns: TokenColumns, index: int, piece: str) -> dict[str, Any]:
    tops = columns.top_tokens[index] if columns.top_tokens else []
    entry = _alternative(piece, columns.logprobs[index])
    return entry | {"top_logprobs": [_alternative(top.text, top.logprob) for top in tops]}


class ChatRenderer(OpenAIRenderer):
    """Chunks of a chat: the role, then content, then the finish."""

    def envelope(self) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.job_id}",
            "object": "chat.completion.chunk",
            "created": self.view["created"],
            "model": self.view["model"],
            "system_fingerprint": fingerprint(self.job_id),
        }

    def opening(self) -> list[ServerEvent]:
        return [self.event(_choice({"role": "assistant", "content": ""}, None, None))]

    def skip(self, columns: TokenColumns, shown: list[str | None]) -> None:
        """A chunk depends on its own token only."""

    def choice(self, columns: TokenColumns, index: int, piece: str) -> dict[str, Any]:
        logprobs = None
        if self.view["logprobs"]:
            logprobs = {"content": [_logprob_entry(columns, index, piece)], "refusal": None}
        return _choice({"content": piece}, logprobs, None)

    def last_choice(self, finish_reason: str | None) -> dict[str, Any]:
        return _choice({}, None, finish_reason)


def _choice(delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_body(record: JobRecord, columns: TokenColumns, special_ids: frozenset[int]) -> dict[str, Any]:
    """The answer of a completed chat job."""
    view = record.view
    shown = shown_pieces(columns, view, special_ids)
    logprobs = None
    if view["logprobs"]:
        rows = [_logprob_entry(columns, index, piece) for index, piece in enumerate(shown) if piece is not None]
        logprobs = {"content": rows, "refusal": None}
    message = {"role": "assistant", "content": "".join(piece or "" for piece in shown), "refusal": None}
    return {
        "id": f"chatcmpl-{record.job_id}",
        "object": "chat.completion",
        "created": view["created"],
        "model": view["model"],
        "system_fingerprint": fingerprint(record.job_id),
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_word(record)}],
        "usage": usage_body(record.usage),
    }
