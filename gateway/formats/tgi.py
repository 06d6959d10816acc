"""TGI's native routes: body of /generate -> draft of a job; log -> its stream events; job -> its answer.

Field order, null rules and the order of checks and their texts are TGI's, so that its clients notice no difference.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from common.errors import NotFound, RequestError, ValidationError
from common.job import Adapter, Dialect, JobRecord, LogprobKind, PenaltyKind, SamplingParams, TokenColumns, TopToken
from gateway.formats.base import (
    MAX_STOP_TOKEN_IDS,
    Door,
    JobDraft,
    Limits,
    ServerEvent,
    dump,
    end_error,
    native_error,
    visible_text,
)
from gateway.formats.fields import Fields, unsupported
from gateway.formats.prompts import COLDEST, check_stops, choose_seed, fit_context
from gateway.models import ServedModel, listed

IGNORED_AT_TOP = frozenset({"stream", "model", "options"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """The `parameters` object with its types checked. None is what the client left unset."""

    best_of: int
    temperature: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    top_k: int | None
    top_p: float | None
    typical_p: float | None
    min_p: float | None
    do_sample: bool
    max_new_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    return_full_text: bool | None
    stop: list[str]
    stop_token_ids: list[int]
    truncate: int | None
    watermark: bool
    details: bool
    decoder_input_details: bool
    seed: int | None
    top_n_tokens: int
    grammar: Any
    adapter_id: str | None

    @property
    def is_sampling(self) -> bool:
        """Whether a field asks for sampling. TGI counts a temperature of 1 as such only together with `best_of`."""
        chosen = (self.top_k, self.top_p, self.typical_p, self.min_p)
        has_heat = self.temperature is not None and self.temperature != 1.0
        return self.do_sample or has_heat or any(value is not None for value in chosen)


def _read_wish(parameters: dict[str, Any] | None) -> _Wish:
    fields = Fields(parameters or {})
    stops = fields.texts("stop") + fields.texts("stop_sequences")
    wish = _Wish(
        best_of=_or(fields.integer("best_of"), 1),
        temperature=fields.number("temperature"),
        repetition_penalty=fields.number("repetition_penalty"),
        frequency_penalty=fields.number("frequency_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        top_k=fields.integer("top_k"),
        top_p=fields.number("top_p"),
        typical_p=fields.number("typical_p"),
        min_p=fields.number("min_p"),
        do_sample=fields.boolean("do_sample", parameters is None),
        max_new_tokens=fields.integer("max_new_tokens"),
        min_tokens=_or(fields.integer("min_tokens"), 0),
        ignore_eos=fields.boolean("ignore_eos"),
        return_full_text=fields.boolean("return_full_text") if fields.has("return_full_text") else None,
        stop=stops,
        stop_token_ids=fields.integers("stop_token_ids", MAX_STOP_TOKEN_IDS),
        truncate=fields.integer("truncate"),
        watermark=fields.boolean("watermark"),
        details=fields.boolean("details"),
        decoder_input_details=fields.boolean("decoder_input_details"),
        seed=fields.integer("seed"),
        top_n_tokens=_or(fields.integer("top_n_tokens"), 0),
        grammar=fields.raw("grammar"),
        adapter_id=fields.text("adapter_id"),
    )
    _refuse_unread(fields)
    return wish


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _refuse_unread(fields: Fields) -> None:
    for name in fields.unread():
        raise unsupported(name, "no such parameter is known here")


def _check_numbers(wish: _Wish, limits: Limits) -> None:
    """TGI's checks in TGI's order, then those of our own parameters."""
    asks_for_sampling = wish.is_sampling or wish.temperature is not None
    checks = [
        (
            wish.best_of > limits.max_best_of or wish.best_of < 0,
            "best_of",
            f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {wish.best_of}",
        ),
        (wish.best_of > 1 and not asks_for_sampling, "best_of", "you must use sampling when `best_of` is > 1"),
        (_below(wish.temperature), "temperature", "`temperature` must be strictly positive"),
        (_below(wish.repetition_penalty), "repetition_penalty", "`repetition_penalty` must be strictly positive"),
        (
            abs(wish.frequency_penalty or 0.0) > 2.0,
            "frequency_penalty",
            "`frequency_penalty` must be >= -2.0 and <= 2.0",
        ),
        (_not_a_share(wish.top_p), "top_p", "`top_p` must be > 0.0 and < 1.0"),
        (_not_a_share(wish.typical_p), "typical_p", "`typical_p` must be > 0.0 and < 1.0"),
        (_below(wish.top_k), "top_k", "`top_k` must be strictly positive"),
        (_below(wish.max_new_tokens), "max_new_tokens", "`max_new_tokens` must be strictly positive"),
    ]
    _raise_first(checks)
    check_stops(wish.stop, limits)
    most = limits.max_top_n_tokens
    _raise_first(
        [
            (wish.seed is not None and wish.best_of > 1, "seed", "`seed` must not be set when `best_of` > 1"),
            (
                not 0 <= wish.top_n_tokens <= most,
                "top_n_tokens",
                f"`top_n_tokens` must be >= 0 and <= {most}. Given: {wish.top_n_tokens}",
            ),
            (
                abs(wish.presence_penalty or 0.0) > 2.0,
                "presence_penalty",
                "`presence_penalty` must be >= -2.0 and <= 2.0",
            ),
            (not 0.0 <= (wish.min_p or 0.0) <= 1.0, "min_p", "`min_p` must be >= 0.0 and <= 1.0"),
            (wish.min_tokens < 0, "min_tokens", "`min_tokens` must be >= 0"),
            (wish.seed is not None and wish.seed < 0, "seed", "`seed` must be >= 0"),
        ]
    )


def _raise_first(checks: list[tuple[bool, str, str]]) -> None:
    for is_wrong, param, message in checks:
        if is_wrong:
            raise ValidationError(message, param=param)


def _below(value: float | None) -> bool:
    return value is not None and value <= 0


def _not_a_share(value: float | None) -> bool:
    """1.0 passes, meaning off: TGI refuses it, but clients that send all defaults rely on it."""
    return value is not None and not 0.0 < value <= 1.0


def adapter_id_of(body: dict[str, Any]) -> str | None:
    """The adapter that a body asks for, before anything of it is checked."""
    parameters = body.get("parameters")
    name = parameters.get("adapter_id") if isinstance(parameters, dict) else None
    return name if isinstance(name, str) else None


def _adapter(wish: _Wish, served: ServedModel) -> Adapter | None:
    """What `adapter_id` names; without it what `model` does, which may be an adapter's name too."""
    if not wish.adapter_id:
        return served.adapter
    if served.adapter is not None and served.adapter.name != wish.adapter_id:
        raise ValidationError("`model` and `adapter_id` name different adapters", param="adapter_id")
    if wish.adapter_id not in served.adapters:
        message = f"unknown adapter {wish.adapter_id!r}; adapters here: {listed(served.adapters)}"
        raise NotFound(message, code="adapter_not_found", param="adapter_id")
    return served.adapters[wish.adapter_id].adapter


def _refuse_what_is_missing(wish: _Wish) -> None:
    if wish.best_of > 1:
        raise unsupported("best_of", "several candidates per request are not available")
    if wish.watermark:
        raise unsupported("watermark", "watermarks are not available")
    if wish.grammar is not None:
        raise unsupported("grammar", "guided generation is not available")


def _check_streaming(wish: _Wish) -> None:
    if wish.best_of != 1:
        raise ValidationError("`best_of` != 1 is not supported when streaming tokens", param="best_of")
    if wish.decoder_input_details:
        message = "`decoder_input_details` == true is not supported when streaming tokens"
        raise ValidationError(message, param="decoder_input_details")


def read_inputs(body: dict[str, Any]) -> str:
    """The field `inputs`.

    Raises:
        ValidationError: it is missing, not a string or empty.
    """
    if body.get("inputs") is None:
        raise ValidationError("missing field `inputs`", param="inputs")
    inputs = Fields(body).text("inputs") or ""
    if not inputs:
        raise ValidationError("`inputs` cannot be empty", param="inputs")
    return inputs


def _encode(inputs: str, wish: _Wish, served: ServedModel) -> list[int]:
    """Prompt ids; `truncate` keeps the last ones."""
    most = served.card.max_input_tokens
    if wish.truncate is not None and not 0 < wish.truncate <= most:
        message = f"`truncate` must be strictly positive and less than {most}. Given: {wish.truncate}"
        raise ValidationError(message, param="truncate")
    ids = served.encode(inputs, add_special_tokens=True)
    return ids if wish.truncate is None else ids[-wish.truncate :]


def _params(wish: _Wish, max_new_tokens: int) -> SamplingParams:
    temperature = 1.0 if wish.temperature is None else wish.temperature
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        do_sample=wish.is_sampling and temperature >= COLDEST,
        temperature=temperature,
        top_k=wish.top_k or 0,
        top_p=wish.top_p or 1.0,
        typical_p=wish.typical_p or 1.0,
        min_p=wish.min_p or 0.0,
        repetition_penalty=wish.repetition_penalty or 1.0,
        frequency_penalty=wish.frequency_penalty or 0.0,
        presence_penalty=wish.presence_penalty or 0.0,
        penalty_kind=PenaltyKind.TGI,
        seed=choose_seed(wish.seed),
        stop=tuple(wish.stop),
        include_stop=True,
        stop_token_ids=tuple(wish.stop_token_ids),
        ignore_eos=wish.ignore_eos,
        min_tokens=min(wish.min_tokens, max_new_tokens),
        num_top_logprobs=wish.top_n_tokens,
        logprob_kind=LogprobKind.PROCESSED,
    )


def parse_generate(
    body: dict[str, Any], served: ServedModel, limits: Limits, *, door: Door = "generate", is_stream: bool = False
) -> JobDraft:
    """A draft from the body of /generate, /generate_stream or /. May take long for a long prompt: use a thread.

    Raises:
        ValidationError: with TGI's text, the first one in TGI's order.
        NotFound: unknown adapter.
    """
    top = Fields(body)
    top.raw("inputs")
    for name in top.unread():
        if name not in IGNORED_AT_TOP | {"parameters"}:
            raise unsupported(name, "no such field is known here")
    wish = _read_wish(top.table("parameters"))
    if is_stream:
        _check_streaming(wish)
    _check_numbers(wish, limits)
    inputs = read_inputs(body)
    prompt_ids = _encode(inputs, wish, served)
    max_new_tokens = fit_context(len(prompt_ids), wish.max_new_tokens, served.card, param="inputs")
    _refuse_what_is_missing(wish)
    params = _params(wish, max_new_tokens)
    return JobDraft(
        lane=served.card.lane,
        dialect=Dialect.GENERATE,
        prompt_ids=prompt_ids,
        params=params,
        view=_view(wish, params, served, inputs, door),
        adapter=_adapter(wish, served),
    )


def _view(wish: _Wish, params: SamplingParams, served: ServedModel, inputs: str, door: Door) -> dict[str, Any]:
    has_prompt = wish.return_full_text
    if has_prompt is None:
        # as TGI decides for models of the task text-generation and for others
        has_prompt = door == "compat" and not served.card.is_encoder_decoder
    view: dict[str, Any] = {
        "door": door,
        "model": served.card.served_name,
        "created": int(time.time()),
        "skip_special_tokens": True,
        "details": wish.details or wish.decoder_input_details,
        "seed": params.seed if params.do_sample else None,
        "top_tokens": wish.top_n_tokens > 0,
        "max_new_tokens": params.max_new_tokens,
        "end_ids": list(params.stop_token_ids) + ([] if wish.ignore_eos else list(served.card.eos_token_ids)),
        "stop": list(params.stop),
        "prompt_characters": len(inputs),
    }
    return view | ({"prompt_text": inputs} if has_prompt else {})


def token_object(columns: TokenColumns, index: int, special_ids: frozenset[int]) -> dict[str, Any]:
    """TGI's token: id, text (special tokens with theirs), logprob, special."""
    token_id = columns.ids[index]
    return {
        "id": token_id,
        "text": columns.pieces[index],
        "logprob": columns.logprobs[index],
        "special": token_id in special_ids,
    }


def _top_objects(tops: list[TopToken], special_ids: frozenset[int]) -> list[dict[str, Any]]:
    return [
        {"id": top.token_id, "text": top.text, "logprob": top.logprob, "special": top.token_id in special_ids}
        for top in tops
    ]


class GenerateRenderer:
    """Stream events of /generate_stream and of / with `stream`: one per token.

    Only the last one has `generated_text`, so a token with which the text may end is held until it is known whether it
    does. What may end a text is decided from the view and the log alone.
    """

    def __init__(self, record: JobRecord, special_ids: frozenset[int]) -> None:
        self._view = record.view
        self._special_ids = special_ids
        self._end_ids = frozenset(self._view["end_ids"])
        self._longest_stop = max((len(stop) for stop in self._view["stop"]), default=0)
        self._offset = 0
        self._text: list[str] = []
        self._tail = ""
        self._last: TokenColumns | None = None
        self._is_held = False

    def prefix(self, columns: TokenColumns) -> None:
        """A resumed client has seen these tokens; the very last event of a stream is sent again."""
        self._advance(columns)
        self._is_held = False

    def start(self) -> list[ServerEvent]:
        return []

    def tokens(self, columns: TokenColumns) -> list[ServerEvent]:
        events: list[ServerEvent] = []
        for index in range(len(columns.ids)):
            events += self._flush()
            self._advance(_one(columns, index))
            if not self._may_be_last():
                events += self._flush()
        return events

    def _advance(self, columns: TokenColumns) -> None:
        if not columns.ids:
            return
        self._text.append(visible_text(columns, self._special_ids, hide_special=True))
        reach = max(self._longest_stop - 1, 0) + len(columns.pieces[-1])
        self._tail = (self._tail + "".join(columns.pieces))[-reach:] if reach else ""
        self._offset = columns.end
        self._last, self._is_held = columns.slice(columns.end - 1), True

    def _may_be_last(self) -> bool:
        if self._last is None or self._offset >= self._view["max_new_tokens"] or self._last.ids[0] in self._end_ids:
            return True
        return any(stop in self._tail for stop in self._view["stop"])

    def _flush(self) -> list[ServerEvent]:
        if not self._is_held or self._last is None:
            return []
        self._is_held = False
        return [self._event(self._last, None, None)]

    def _event(self, token: TokenColumns, text: str | None, details: dict[str, Any] | None) -> ServerEvent:
        value: dict[str, Any] = {"index": token.end, "token": token_object(token, 0, self._special_ids)}
        if self._view["top_tokens"] and token.top_tokens and token.top_tokens[0]:
            value["top_tokens"] = _top_objects(token.top_tokens[0], self._special_ids)
        value |= {"generated_text": text, "details": details}
        return ServerEvent(dump(value), id=str(token.end))

    def end(self, record: JobRecord) -> list[ServerEvent]:
        error = end_error(record)
        if error is not None:
            return self._flush() + self.error(error)
        if self._last is None:
            return []
        details = None
        if self._view["details"]:
            details = _stream_details(record)
        text = self._view.get("prompt_text", "") + "".join(self._text)
        return [self._event(self._last, text, details)]

    def error(self, error: RequestError) -> list[ServerEvent]:
        return [ServerEvent(dump(native_error(error)), id=str(self._offset) if self._offset else None)]


def _one(columns: TokenColumns, index: int) -> TokenColumns:
    tops = None if columns.top_tokens is None else [columns.top_tokens[index]]
    start = columns.start + index
    return TokenColumns(start, [columns.ids[index]], [columns.pieces[index]], [columns.logprobs[index]], tops)


def _stream_details(record: JobRecord) -> dict[str, Any]:
    return {
        "finish_reason": record.finish_reason,
        "generated_tokens": record.num_tokens,
        "seed": record.view["seed"],
        "input_length": record.prompt_tokens,
    }


def generate_body(record: JobRecord, columns: TokenColumns, special_ids: frozenset[int]) -> dict[str, Any]:
    """The answer of /generate. The route / puts it into a list."""
    view = record.view
    text = view.get("prompt_text", "") + visible_text(columns, special_ids, hide_special=True)
    body: dict[str, Any] = {"generated_text": text}
    if view["details"]:
        body["details"] = _details(record, columns, special_ids)
    return body


def _details(record: JobRecord, columns: TokenColumns, special_ids: frozenset[int]) -> dict[str, Any]:
    """`prefill` is empty, as on a TGI server without --enable-prefill-logprobs."""
    details: dict[str, Any] = {
        "finish_reason": record.finish_reason,
        "generated_tokens": record.num_tokens,
        "seed": record.view["seed"],
        "prefill": [],
        "tokens": [token_object(columns, index, special_ids) for index in range(len(columns.ids))],
    }
    if record.view["top_tokens"] and columns.top_tokens:
        details["top_tokens"] = [_top_objects(tops, special_ids) for tops in columns.top_tokens]
    return details


def tokenize_body(inputs: str, served: ServedModel) -> list[dict[str, Any]]:
    """The answer of /tokenize: the tokens of a prompt with the bytes they stand for."""
    spans = served.tokenizer.encode_with_offsets(inputs, add_special_tokens=True)
    return [{"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans]
