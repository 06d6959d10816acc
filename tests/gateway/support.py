"""A served model of byte tokens for tests without Redis, and records and columns of its jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.card import ModelCard
from common.job import FinishReason, JobRecord, JobState, Priority, TokenColumns, TopToken
from common.store.replies import AdapterEntry, AdapterFinding
from common.text.template import ChatTemplate
from common.text.tokenizer import TextTokenizer
from gateway.formats.base import JobDraft
from gateway.models import ServedModel
from tests.support.tiny_model import CHAT_TEMPLATE, byte_tokenizer_json

BOS, EOS, USER, ASSISTANT, END = range(256, 261)
JOB_ID = "abcdef" + "2" * 22
TOKENIZER = TextTokenizer(byte_tokenizer_json())


def card(**changes: Any) -> ModelCard:
    values = ModelCard(
        lane="abcdef",
        served_name="demo",
        aliases=("alias/of-demo",),
        model_id="inferfleet/demo",
        revision="main",
        architecture="LlamaForCausalLM",
        dtype="float32",
        quantize="",
        created=1_700_000_000,
        vocab_size=261,
        max_input_tokens=99,
        max_total_tokens=100,
        max_batch_prefill_tokens=64,
        kv_tokens=1024,
        tokenizer_digest="digest",
        chat_template=CHAT_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        bos_token_id=BOS,
        eos_token_ids=(EOS, END),
        special_ids=(BOS, EOS, USER, ASSISTANT, END),
    )
    return replace(values, **changes)


def served(**changes: Any) -> ServedModel:
    values = card(**changes)
    template = ChatTemplate(values.chat_template, values.bos_token, values.eos_token) if values.chat_template else None
    return ServedModel(values, TOKENIZER, template)


def adapter(name: str = "fr", **changes: Any) -> AdapterEntry:
    """An adapter that is ready."""
    found = AdapterFinding(digest="0f" * 16, rank=8, place=f"/real/{name}")
    values = AdapterEntry(
        name=name, source=f"/adapters/{name}", token="aa", state="ready", found=found, created_ms=1_700_000_000_500
    )
    return replace(values, **changes)


def record_of(draft: JobDraft, **changes: Any) -> JobRecord:
    """A completed job of this draft."""
    values = JobRecord(
        job_id=JOB_ID,
        state=JobState.COMPLETED,
        tenant="default",
        priority=Priority.INTERACTIVE,
        dialect=draft.dialect,
        epoch=1,
        attempts=1,
        worker="w1",
        cancelling=False,
        num_tokens=0,
        prompt_tokens=len(draft.prompt_ids),
        created_ms=1_000,
        started_ms=1_100,
        finished_ms=1_500,
        deadline_ms=0,
        expires_ms=0,
        finish_reason=FinishReason.EOS_TOKEN,
        error_code="",
        error_message="",
        view=draft.view | {"created": 1_700_000_001},
    )
    return replace(values, **changes)


def columns_of(text: str, *, eos: bool = True, tops: int = 0) -> TokenColumns:
    """One token per byte of `text`; a character of several bytes stands in the piece of its last one. Then EOS."""
    ids, pieces = [], []
    for character in text:
        data = character.encode()
        ids += data
        pieces += [""] * (len(data) - 1) + [character]
    if eos:
        ids.append(EOS)
        pieces.append("</s>")
    logprobs = [-(index + 1) / 4 for index in range(len(ids))]
    rows = [[TopToken(97 + n, chr(97 + n), -float(n)) for n in range(tops)] for _ in ids] if tops else None
    return TokenColumns(0, ids, pieces, logprobs, rows)


def parts(columns: TokenColumns, cuts: list[int]) -> list[TokenColumns]:
    """The same columns in several runs, cut at these offsets."""
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < columns.end), columns.end]
    return [until(columns.slice(start), end) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]


def until(columns: TokenColumns, end: int) -> TokenColumns:
    keep = end - columns.start
    tops = None if columns.top_tokens is None else columns.top_tokens[:keep]
    return TokenColumns(columns.start, columns.ids[:keep], columns.pieces[:keep], columns.logprobs[:keep], tops)
