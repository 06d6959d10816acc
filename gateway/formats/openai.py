"""What chat and text completions share: sampling parameters, ids, usage, finish reasons, errors, the shape of a stream.

OpenAI's published schema rules; TGI's and vLLM's extensions are read besides. What cannot be honoured is refused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common.card import ModelCard
from common.errors import RequestError, ValidationError
from common.job import FinishReason, JobRecord, LogprobKind, PenaltyKind, SamplingParams, TokenColumns, Usage
from gateway.formats.base import MAX_STOP_TOKEN_IDS, Limits, ServerEvent, dump, end_error, openai_error
from gateway.formats.fields import Fields, unsupported
from gateway.formats.prompts import COLDEST, check_metadata, check_stops, choose_seed

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
HARMLESS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "stream")
"""Fields that ask for nothing that could show in an answer."""
DONE = b"[DONE]"
MARK = "\0"

Refusal = tuple[str, Callable[[Any], bool], str]


def is_empty(value: Any) -> bool:
    return value in ([], {}, "", False)


def is_one(value: Any) -> bool:
    return value == 1 and not isinstance(value, bool)


NOT_YET: tuple[Refusal, ...] = (
    ("n", is_one, "only one choice per prompt is available"),
    ("best_of", is_one, "several candidates per request are not available"),
    ("logit_bias", is_empty, "biases on tokens are not available"),
    ("use_beam_search", is_empty, "beam search is not available"),
    ("guided_json", is_empty, "guided generation is not available"),
    ("guided_regex", is_empty, "guided generation is not available"),
    ("guided_choice", is_empty, "guided generation is not available"),
    ("guided_grammar", is_empty, "guided generation is not available"),
    ("structured_outputs", is_empty, "guided generation is not available"),
    ("grammar", is_empty, "guided generation is not available"),
    ("store", is_empty, "answers are not stored beyond the time to live of their job"),
    ("prompt_logprobs", lambda value: False, "log-probabilities of the prompt are not available"),
)
"""(field, which values ask for nothing, why others are refused)."""


def refuse(fields: Fields, refusals: tuple[Refusal, ...]) -> None:
    """Raises ValidationError for the first field with a value that would have to do something."""
    for name, is_neutral, reason in refusals:
        value = fields.raw(name)
        if value is not None and not is_neutral(value):
            raise unsupported(fields.path + name, reason)


def refuse_unread(fields: Fields) -> None:
    for name in fields.unread():
        raise unsupported(fields.path + name, "no such field is known here")


@dataclass(frozen=True, slots=True)
class StreamOptions:
    include_usage: bool = False
    continuous_usage: bool = False


def read_stream_options(fields: Fields, *, is_stream: bool) -> StreamOptions:
    """Raises ValidationError when they come without `stream`, or ask for something unknown."""
    table = fields.table("stream_options")
    if table is None:
        return StreamOptions()
    if not is_stream:
        raise ValidationError("`stream_options` is only allowed with `stream`", param="stream_options")
    options = Fields(table, "stream_options.")
    read = StreamOptions(options.boolean("include_usage"), options.boolean("continuous_usage_stats"))
    if options.boolean("include_obfuscation"):
        raise unsupported("stream_options.include_obfuscation", "streams are not padded")
    refuse_unread(options)
    return read


def read_metadata(fields: Fields) -> dict[str, str]:
    return check_metadata(fields.table("metadata") or {})


def _default(card: ModelCard, name: str, neutral: float) -> float:
    """What the model's generation_config asks for, used where the client is silent, as vLLM does."""
    value = card.default_sampling.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return neutral
    return float(value)


def _default_temperature(card: ModelCard) -> float:
    """A model whose generation_config says `do_sample: false` in so many words is greedy unless the client asks."""
    return 0.0 if card.default_sampling.get("do_sample") is False else _default(card, "temperature", 1.0)


def _in_range(fields: Fields, name: str, default: float, low: float, high: float, *, open_low: bool = False) -> float:
    value = fields.number(name, default)
    assert value is not None
    if not low <= value <= high or (open_low and value == low):
        sign = ">" if open_low else ">="
        upper = "" if high == math.inf else f" and <= {high}"
        raise ValidationError(f"`{name}` must be {sign} {low}{upper}", param=name)
    return value


def read_top_k(fields: Fields, card: ModelCard) -> int:
    """0 and -1 mean off."""
    top_k = fields.integer("top_k", int(_default(card, "top_k", 0)))
    assert top_k is not None
    if top_k < -1:
        raise ValidationError("`top_k` must be strictly positive, or 0 or -1 for off", param="top_k")
    return max(top_k, 0)


def read_count(fields: Fields, name: str) -> int | None:
    value = fields.integer(name)
    if value is not None and value <= 0:
        raise ValidationError(f"`{name}` must be strictly positive", param=name)
    return value


def read_sampling(fields: Fields, card: ModelCard, limits: Limits, num_top_logprobs: int) -> SamplingParams:
    """What the sampling fields say, still without the number of tokens, which depends on the prompt: see `for_tokens`.

    Temperature 0 is greedy; nothing given means what the model's generation_config asks for, else 1.

    Raises:
        ValidationError: a value is out of range.
    """
    temperature = _in_range(fields, "temperature", _default_temperature(card), 0.0, math.inf)
    min_tokens = fields.integer("min_tokens", 0) or 0
    if min_tokens < 0:
        raise ValidationError("`min_tokens` must be >= 0", param="min_tokens")
    return SamplingParams(
        max_new_tokens=1,
        do_sample=temperature >= COLDEST,
        temperature=temperature if temperature >= COLDEST else 1.0,
        top_k=read_top_k(fields, card),
        top_p=_in_range(fields, "top_p", _default(card, "top_p", 1.0), 0.0, 1.0, open_low=True),
        typical_p=_in_range(fields, "typical_p", 1.0, 0.0, 1.0, open_low=True),
        min_p=_in_range(fields, "min_p", _default(card, "min_p", 0.0), 0.0, 1.0),
        repetition_penalty=_in_range(
            fields, "repetition_penalty", _default(card, "repetition_penalty", 1.0), 0.0, math.inf, open_low=True
        ),
        frequency_penalty=_in_range(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=_in_range(fields, "presence_penalty", 0.0, -2.0, 2.0),
        penalty_kind=PenaltyKind.OPENAI,
        seed=choose_seed(fields.integer("seed")),
        stop=check_stops(fields.texts("stop", or_one=True), limits),
        include_stop=fields.boolean("include_stop_str_in_output"),
        stop_token_ids=tuple(fields.integers("stop_token_ids", MAX_STOP_TOKEN_IDS)),
        ignore_eos=fields.boolean("ignore_eos"),
        min_tokens=min_tokens,
        num_top_logprobs=num_top_logprobs,
        logprob_kind=LogprobKind.RAW,
    )


def for_tokens(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    return replace(params, max_new_tokens=max_new_tokens, min_tokens=min(params.min_tokens, max_new_tokens))


def check_top_logprobs(count: int, limits: Limits, param: str) -> int:
    most = limits.max_top_n_tokens
    if not 0 <= count <= most:
        raise ValidationError(f"`{param}` must be >= 0 and <= {most}. Given: {count}", param=param)
    return count


def common_view(
    params: SamplingParams, card: ModelCard, fields: Fields, options: StreamOptions, is_hiding: bool
) -> dict[str, Any]:
    """What all renderers of these routes read. `end_ids`: tokens whose text is never shown, as they end the answer."""
    end_ids = list(params.stop_token_ids) + ([] if params.ignore_eos else list(card.eos_token_ids))
    return {
        "skip_special_tokens": is_hiding,
        "end_ids": [] if params.include_stop else end_ids,
        "min_tokens": params.min_tokens,
        "include_usage": options.include_usage,
        "continuous_usage": options.continuous_usage,
        "metadata": read_metadata(fields),
    }


def usage_body(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def finish_word(record: JobRecord) -> str | None:
    """OpenAI's word for why the answer ended."""
    return None if record.finish_reason is None else FINISH_REASONS[record.finish_reason]


def fingerprint(job_id: str) -> str:
    """The lane: it changes whenever weights, tokenizer, a dtype or the quantisation do."""
    return f"fp_{job_id[:6]}"


def shown_pieces(columns: TokenColumns, view: dict[str, Any], special_ids: frozenset[int]) -> list[str | None]:
    """The visible text of each token; None for a token that is not part of the answer (hidden special, or the end)."""
    end_ids, min_tokens = frozenset(view["end_ids"]), view["min_tokens"]
    hidden = special_ids if view["skip_special_tokens"] else frozenset[int]()
    shown: list[str | None] = []
    for offset, (token_id, piece) in enumerate(zip(columns.ids, columns.pieces, strict=True), start=columns.start + 1):
        is_end = token_id in end_ids and offset >= min_tokens
        shown.append(None if is_end or token_id in hidden else piece)
    return shown


class OpenAIRenderer(ABC):
    """The order of a stream's chunks: start, one per token with visible text, finish, usage if asked for, `[DONE]`.

    A token without visible text gives no chunk unless log-probabilities were asked for and it is part of the answer.
    """

    def __init__(self, record: JobRecord, special_ids: frozenset[int]) -> None:
        self.view, self.job_id, self.prompt_tokens = record.view, record.job_id, record.prompt_tokens
        self.special_ids = special_ids
        self.offset = 0
        self._has_more_than_text = bool(self.view["logprobs"] or self.view["continuous_usage"])
        self._frame: tuple[bytes, bytes] | None = None

    def prefix(self, columns: TokenColumns) -> None:
        self.skip(columns, shown_pieces(columns, self.view, self.special_ids))
        self.offset = columns.end

    def start(self) -> list[ServerEvent]:
        return self.opening() if self.offset == 0 else []

    def tokens(self, columns: TokenColumns) -> list[ServerEvent]:
        shown = shown_pieces(columns, self.view, self.special_ids)
        if not self._has_more_than_text:
            return self._plain_events(columns, shown)
        events = []
        for index, piece in enumerate(shown):
            self.offset = columns.start + index + 1
            if piece is not None and (piece or self.view["logprobs"]):
                events.append(self.event(self.choice(columns, index, piece)))
        return events

    def _plain_events(self, columns: TokenColumns, shown: list[str | None]) -> list[ServerEvent]:
        """Chunks that differ in their text only: what stands before and behind it is made once."""
        before, behind = self._frame = self._frame or self._make_frame(columns)
        self.offset = columns.end
        return [
            ServerEvent(before + dump(piece) + behind, str(offset))
            for offset, piece in enumerate(shown, start=columns.start + 1)
            if piece
        ]

    def _make_frame(self, columns: TokenColumns) -> tuple[bytes, bytes]:
        # nothing behind the text comes from outside, so the last mark is the text's
        before, _, behind = self.event(self.choice(columns, 0, MARK)).data.rpartition(dump(MARK))
        return before, behind

    def end(self, record: JobRecord) -> list[ServerEvent]:
        events = self.finish(record)
        if self.view["include_usage"] and end_error(record) is None:
            events.append(self.usage_event(record.usage))
        return [*events, self.done()]

    def finish(self, record: JobRecord) -> list[ServerEvent]:
        """The chunk with the finish reason, or the error event."""
        error = end_error(record)
        if error is not None:
            return [self.error_event(error)]
        return [self.event(self.last_choice(finish_word(record)))]

    def error(self, error: RequestError) -> list[ServerEvent]:
        return [self.error_event(error), self.done()]

    def error_event(self, error: RequestError) -> ServerEvent:
        return ServerEvent(dump(openai_error(error)), id=str(self.offset))

    def done(self) -> ServerEvent:
        return ServerEvent(DONE, id=str(self.offset))

    def usage_event(self, usage: Usage) -> ServerEvent:
        return ServerEvent(dump(self.envelope() | {"choices": [], "usage": usage_body(usage)}), id=str(self.offset))

    def event(self, choice: dict[str, Any]) -> ServerEvent:
        chunk = self.envelope() | {"choices": [choice]}
        if self.view["continuous_usage"]:
            chunk["usage"] = usage_body(Usage(self.prompt_tokens, self.offset))
        elif self.view["include_usage"]:
            chunk["usage"] = None
        return ServerEvent(dump(chunk), id=str(self.offset))

    @abstractmethod
    def envelope(self) -> dict[str, Any]:
        """Fields that all chunks share."""

    @abstractmethod
    def opening(self) -> list[ServerEvent]:
        """Events before the first token."""

    @abstractmethod
    def skip(self, columns: TokenColumns, shown: list[str | None]) -> None:
        """Take note of tokens that the client already has."""

    @abstractmethod
    def choice(self, columns: TokenColumns, index: int, piece: str) -> dict[str, Any]:
        """The choice of a chunk with the text of one token."""

    @abstractmethod
    def last_choice(self, finish_reason: str | None) -> dict[str, Any]:
        """The choice of the chunk that says why the answer ends."""
