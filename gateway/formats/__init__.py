"""Request body -> draft of a job; log -> events; job -> body. Pure functions for every route, stream and poll."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.errors import ValidationError
from common.job import Dialect, JobRecord, TokenColumns
from gateway.formats.base import JobDraft, Limits, Renderer
from gateway.formats.chat import ChatRenderer, chat_body, parse_chat
from gateway.formats.completion import CompletionRenderer, completion_body, parse_completion
from gateway.formats.fields import unsupported
from gateway.formats.openai import shown_pieces
from gateway.formats.tgi import GenerateRenderer, adapter_id_of, generate_body, parse_generate
from gateway.models import ServedModel

__all__ = [
    "adapter_id_of",
    "answer_text",
    "body_of",
    "parse_chat",
    "parse_completion",
    "parse_generate",
    "parse_input",
    "renderer_for",
]


def parse_input(body: dict[str, Any], served: ServedModel, limits: Limits) -> JobDraft:
    """A draft from a body of any generating route, told apart by `inputs`, `prompt` or `messages`.

    Raises:
        ValidationError: none or several of them are there, `stream` is set, there are several prompts, or as the parser
            of the route says.
    """
    kinds = [name for name in ("inputs", "prompt", "messages") if body.get(name) is not None]
    if len(kinds) != 1:
        raise ValidationError("`input` needs exactly one of `inputs`, `prompt` and `messages`", param="input")
    if body.get("stream"):
        raise ValidationError("`input.stream` must not be true: every job can be streamed", param="input.stream")
    if kinds == ["inputs"]:
        return parse_generate(body, served, limits)
    if kinds == ["messages"]:
        return parse_chat(body, served, limits)
    drafts = parse_completion(body, served, limits)
    if len(drafts) > 1:
        raise unsupported("input.prompt", "a job has one prompt")
    return drafts[0]


def renderer_for(record: JobRecord, special_ids: Iterable[int]) -> Renderer:
    """The renderer of the route that the job came by. `special_ids` are those of its model's card."""
    hidden = frozenset(special_ids)
    if record.dialect is Dialect.GENERATE:
        return GenerateRenderer(record, hidden)
    return ChatRenderer(record, hidden) if record.dialect is Dialect.CHAT else CompletionRenderer(record, hidden)


def body_of(record: JobRecord, columns: TokenColumns, special_ids: Iterable[int]) -> dict[str, Any]:
    """What the job's route answers without `stream`. `columns` are all tokens of the log."""
    hidden = frozenset(special_ids)
    if record.dialect is Dialect.GENERATE:
        return generate_body(record, columns, hidden)
    if record.dialect is Dialect.CHAT:
        return chat_body(record, columns, hidden)
    return completion_body([(record, columns)], hidden)


def answer_text(record: JobRecord, columns: TokenColumns, special_ids: Iterable[int]) -> str:
    """The visible text of these tokens: what the route's answer would show of them (without a prompt)."""
    if record.dialect is Dialect.GENERATE:
        hidden = frozenset(special_ids)
        rows = zip(columns.ids, columns.pieces, strict=True)
        return "".join(piece for token_id, piece in rows if token_id not in hidden)
    return "".join(piece or "" for piece in shown_pieces(columns, record.view, frozenset(special_ids)))
