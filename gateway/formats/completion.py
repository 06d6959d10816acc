"""/v1/completions: one prompt or a list of them -> drafts of jobs; log -> chunks; jobs -> completion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from common.errors import ValidationError
from common.job import Dialect, JobRecord, SamplingParams, TokenColumns, Usage
from gateway.formats.base import JobDraft, Limits, ServerEvent
from gateway.formats.fields import Fields, is_token_id, unsupported
from gateway.formats.openai import (
    HARMLESS,
    NOT_YET,
    OpenAIRenderer,
    StreamOptions,
    check_top_logprobs,
    common_view,
    fingerprint,
    finish_word,
    for_tokens,
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

DEFAULT_MAX_TOKENS = 16
"""OpenAI's published default of this route."""

Prompt = str | list[int]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_token_id(item) for item in value)


def read_prompts(fields: Fields, limits: Limits) -> list[Prompt]:
    """One or several prompts, each a text or token ids.

    Raises:
        ValidationError: none, too many, or something else.
    """
    value = fields.raw("prompt")
    if value is None:
        raise ValidationError("missing field `prompt`", param="prompt")
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list):
        raise ValidationError("`prompt` must be a string, token ids, or a list of these", param="prompt")
    if not prompts:
        message = "Empty array detected. Do not use an empty array for the prompt."
        raise ValidationError(message, param="prompt")
    if not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts):
        raise ValidationError("`prompt` must be a string, token ids, or a list of these", param="prompt")
    if len(prompts) > limits.max_client_batch_size:
        most = limits.max_client_batch_size
        message = f"Number of prompts exceeds the maximum allowed batch size of {most}"
        raise ValidationError(message, code="batch_size_exceeded", param="prompt")
    return prompts


def _encode(prompt: Prompt, served: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValidationError("`prompt` cannot be empty", param="prompt")
        return served.encode(prompt, add_special_tokens=True)
    if max(prompt) >= served.card.vocab_size:
        raise ValidationError(f"token ids must be < {served.card.vocab_size}", param="prompt")
    return prompt


def _read_logprobs(fields: Fields, limits: Limits) -> int | None:
    """How many alternatives are wanted; None when no log-probabilities are."""
    count = fields.integer("logprobs")
    return None if count is None else check_top_logprobs(count, limits, "logprobs")


def parse_completion(body: dict[str, Any], served: ServedModel, limits: Limits) -> list[JobDraft]:
    """One draft for each prompt, in the prompts' order. May take long for long prompts: use a thread.

    Raises:
        ValidationError: a field is wrong or cannot be honoured.
    """
    fields = Fields(body)
    for name in (*HARMLESS, "model"):
        fields.raw(name)
    prompts = read_prompts(fields, limits)
    if fields.raw("suffix"):
        raise unsupported("suffix", "it can be achieved by preprocessing the prompt")
    options = read_stream_options(fields, is_stream=fields.boolean("stream"))
    refuse(fields, NOT_YET)
    num_top = _read_logprobs(fields, limits)
    echo = fields.boolean("echo")
    if echo and num_top is not None:
        raise unsupported("echo", "log-probabilities of the prompt are not available")
    sampling = read_sampling(fields, served.card, limits, num_top or 0)
    max_tokens = read_count(fields, "max_tokens") or DEFAULT_MAX_TOKENS
    is_hiding = fields.boolean("skip_special_tokens", True)
    fields.table("metadata")
    refuse_unread(fields)
    drafts = [_draft(prompt, sampling, max_tokens, fields, served, options, is_hiding) for prompt in prompts]
    for index, (draft, prompt) in enumerate(zip(drafts, prompts, strict=True)):
        draft.view.update(index=index, num_choices=len(drafts), logprobs=num_top is not None)
        if echo:
            draft.view["prompt_text"] = (
                prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt, is_hiding)
            )
    return drafts


def _draft(
    prompt: Prompt,
    sampling: SamplingParams,
    max_tokens: int,
    fields: Fields,
    served: ServedModel,
    options: StreamOptions,
    is_hiding: bool,
) -> JobDraft:
    prompt_ids = _encode(prompt, served)
    params = for_tokens(sampling, fit_context(len(prompt_ids), max_tokens, served.card, param="prompt"))
    view = {
        "door": "completions",
        "model": fields.text("model") or served.card.served_name,
        "created": int(time.time()),
        "prompt_characters": len(prompt) if isinstance(prompt, str) else 0,
    }
    view |= common_view(params, served.card, fields, options, is_hiding)
    return JobDraft(
        lane=served.card.lane,
        dialect=Dialect.COMPLETION,
        prompt_ids=prompt_ids,
        params=params,
        view=view,
        adapter=served.adapter,
    )


def completion_id(job_id: str) -> str:
    """Children `<id>.<k>` of one request share the id of its answer."""
    return f"cmpl-{job_id.partition('.')[0]}"


def _logprobs(
    columns: TokenColumns, indices: Sequence[int], shown: Sequence[str | None], offset: int
) -> dict[str, list[Any]]:
    """OpenAI's columns for tokens that are part of the answer; `offset` is where the first one's text begins."""
    tokens = [shown[index] or "" for index in indices]
    chosen = [columns.logprobs[index] for index in indices]
    offsets = list(accumulate((len(token) for token in tokens[:-1]), initial=offset)) if tokens else []
    tops = []
    for index, token, logprob in zip(indices, tokens, chosen, strict=True):
        row = columns.top_tokens[index] if columns.top_tokens else []
        tops.append({top.text: top.logprob for top in row} | {token: logprob})
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


class CompletionRenderer(OpenAIRenderer):
    """Chunks of one prompt's text; with `echo` the prompt comes first."""

    def __init__(self, record: JobRecord, special_ids: frozenset[int]) -> None:
        super().__init__(record, special_ids)
        self._position = 0

    def envelope(self) -> dict[str, Any]:
        return {
            "id": completion_id(self.job_id),
            "object": "text_completion",
            "created": self.view["created"],
            "model": self.view["model"],
            "system_fingerprint": fingerprint(self.job_id),
        }

    def opening(self) -> list[ServerEvent]:
        prompt = self.view.get("prompt_text")
        return [] if prompt is None else [self.event(self._choice(prompt, None, None))]

    def skip(self, columns: TokenColumns, shown: list[str | None]) -> None:
        self._position += sum(len(piece or "") for piece in shown)

    def choice(self, columns: TokenColumns, index: int, piece: str) -> dict[str, Any]:
        logprobs = None
        if self.view["logprobs"]:
            logprobs = _logprobs(columns.slice(columns.start + index), [0], [piece], self._position)
        self._position += len(piece)
        return self._choice(piece, logprobs, None)

    def last_choice(self, finish_reason: str | None) -> dict[str, Any]:
        return self._choice("", None, finish_reason)

    def _choice(self, text: str, logprobs: dict[str, list[Any]] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self.view["index"], "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _body_choice(record: JobRecord, columns: TokenColumns, special_ids: frozenset[int]) -> dict[str, Any]:
    view = record.view
    shown = shown_pieces(columns, view, special_ids)
    indices = [index for index, piece in enumerate(shown) if piece is not None]
    text = view.get("prompt_text", "") + "".join(piece or "" for piece in shown)
    logprobs = _logprobs(columns, indices, shown, 0) if view["logprobs"] else None
    return {"index": view["index"], "text": text, "logprobs": logprobs, "finish_reason": finish_word(record)}


def completion_body(answers: Sequence[tuple[JobRecord, TokenColumns]], special_ids: frozenset[int]) -> dict[str, Any]:
    """The answer of one request: its prompts' jobs, in the prompts' order. Usage is the sum."""
    record = answers[0][0]
    usage = Usage(sum(record.prompt_tokens for record, _ in answers), sum(record.num_tokens for record, _ in answers))
    return {
        "id": completion_id(record.job_id),
        "object": "text_completion",
        "created": record.view["created"],
        "model": record.view["model"],
        "system_fingerprint": fingerprint(record.job_id),
        "choices": [_body_choice(record, columns, special_ids) for record, columns in answers],
        "usage": usage_body(usage),
    }
