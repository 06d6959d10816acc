"""What all formats share: drafts of jobs, server-sent events, the renderer protocol, limits and the two error shapes.

A renderer turns a job's log into the events of the route it came by. It is a pure function of the record's view and the
log: how tokens were grouped into frames never shows, so a stream that is resumed at another gateway continues with the
very bytes that the first one would have sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from common.errors import Conflict, GenerationExpired, GenerationFailed, RequestError, ValidationError
from common.job import Adapter, Dialect, JobRecord, JobState, SamplingParams, TokenColumns
from common.settings import GatewaySettings

Door = Literal["generate", "generate_stream", "compat", "chat", "completions"]
"""Which route a body came by; `view["door"]` keeps it."""

MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_MESSAGES = 4096
MAX_METADATA_PAIRS, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
FIRST_EXPECTED_OUTPUT = 256
"""Tokens that an answer is expected to have before its lane has figures of its own."""


class ServerEvent(NamedTuple):
    """One server-sent event: `data` is JSON or `[DONE]`, `id` the token offset after it."""

    data: bytes
    id: str | None = None
    event: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one request may ask for, as TGI's options name them."""

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4

    @classmethod
    def of(cls, settings: GatewaySettings) -> Limits:
        return cls(
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_client_batch_size=settings.max_client_batch_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDraft:
    """A validated, tokenised request that has no id yet; admission makes a job of it. `cost` is in tokens."""

    lane: str
    dialect: Dialect
    prompt_ids: list[int]
    params: SamplingParams
    view: dict[str, Any]
    adapter: Adapter | None = None

    @property
    def cost(self) -> int:
        return len(self.prompt_ids) + min(self.params.max_new_tokens, FIRST_EXPECTED_OUTPUT)


class Renderer(Protocol):
    """The events of one stream. Calls come in the order prefix, start, tokens (any number), end or error."""

    def prefix(self, columns: TokenColumns) -> None:
        """Feed tokens that the client has already seen: they shape later events and give none themselves."""

    def start(self) -> list[ServerEvent]:
        """Events before the first token; none when a prefix was fed."""

    def tokens(self, columns: TokenColumns) -> list[ServerEvent]:
        """Events of the tokens that follow what was fed so far."""

    def end(self, record: JobRecord) -> list[ServerEvent]:
        """Events that close the stream, for every terminal state."""

    def error(self, error: RequestError) -> list[ServerEvent]:
        """Events that close the stream when it cannot go on."""


def dump(value: Any) -> bytes:
    """Compact JSON. Numbers that JSON cannot express (NaN, infinities) become null."""
    return orjson.dumps(value)


def end_error(record: JobRecord) -> RequestError | None:
    """Why a terminal job has no complete answer; None when it has one."""
    if record.state is JobState.FAILED:
        return GenerationFailed(record.error_message or "the job failed", code=record.error_code or None)
    if record.state is JobState.CANCELLED:
        return Conflict("The request was cancelled", error_type="cancelled")
    if record.state is JobState.EXPIRED:
        return GenerationExpired("The request expired before its answer was complete")
    return None


def native_error(error: RequestError) -> dict[str, Any]:
    """The error body of TGI's native routes."""
    message = error.message
    if isinstance(error, ValidationError) and error.error_type == ValidationError.default_type:
        message = f"Input validation error: {message}"
    if isinstance(error, GenerationFailed):
        message = f"Request failed during generation: Server error: {message}"
    return {"error": message, "error_type": error.error_type}


def openai_error(error: RequestError) -> dict[str, Any]:
    """The error body of routes under /v1."""
    fields = {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code}
    return {"error": fields}


def visible_text(columns: TokenColumns, special_ids: Sequence[int] | frozenset[int], *, hide_special: bool) -> str:
    """The text of a run of tokens, without the text of special ones if they are hidden."""
    if not hide_special:
        return "".join(columns.pieces)
    hidden = frozenset(special_ids)
    return "".join(piece for token_id, piece in zip(columns.ids, columns.pieces, strict=True) if token_id not in hidden)
