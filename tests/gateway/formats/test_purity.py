"""Rendering depends on log and record alone: any grouping of tokens and any resumption gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.job import FinishReason, JobRecord, TokenColumns, TopToken
from gateway.formats import body_of, parse_chat, parse_completion, parse_generate, renderer_for
from gateway.formats.base import JobDraft, Limits, Renderer, ServerEvent
from tests.gateway.support import card, parts, record_of, served, until

SPECIAL = frozenset(card().special_ids)
LIMITS = Limits()
USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def generate(**parameters: Any) -> JobDraft:
    return parse_generate({"inputs": "hello", "parameters": parameters}, served(), LIMITS)


def chat(**body: Any) -> JobDraft:
    return parse_chat({"messages": [{"role": "user", "content": "hi"}]} | body, served(), LIMITS)


def complete(**body: Any) -> JobDraft:
    return parse_completion({"prompt": "hi"} | body, served(), LIMITS)[0]


DRAFTS = {
    "generate": generate(details=True, return_full_text=True),
    "generate with stops and tops": generate(stop=["ab", "c"], top_n_tokens=1),
    "generate short": generate(max_new_tokens=3, stop_token_ids=[98]),
    "chat": chat(),
    "chat with logprobs and usage": chat(logprobs=True, top_logprobs=1, **USAGE),
    "chat with special tokens": chat(skip_special_tokens=False, stop_token_ids=[98], min_tokens=2),
    "completion": complete(echo=True),
    "completion with logprobs": complete(logprobs=1, **USAGE),
}
PIECES = st.sampled_from(["", "a", "b", "ab", "c", "é", "日本", " "])


@st.composite
def logs(draw: st.DrawFn) -> TokenColumns:
    pieces = draw(st.lists(PIECES, min_size=1, max_size=12))
    ids = draw(st.lists(st.sampled_from([97, 98, 256, 257]), min_size=len(pieces), max_size=len(pieces)))
    logprobs = [-index / 8 for index in range(len(pieces))]
    return TokenColumns(0, ids, pieces, logprobs, [[TopToken(97, "a", -0.5)] for _ in ids])


def render(record: JobRecord, runs: list[TokenColumns], prefix: TokenColumns | None = None) -> list[ServerEvent]:
    renderer = renderer_for(record, SPECIAL)
    events: list[ServerEvent] = []
    if prefix is None:
        events += renderer.start()
    else:
        renderer.prefix(prefix)
    for run in runs:
        events += renderer.tokens(run)
    return events + renderer.end(record)


def finished(draft: JobDraft, log: TokenColumns) -> JobRecord:
    return record_of(draft, num_tokens=log.end, finish_reason=FinishReason.LENGTH)


@pytest.mark.parametrize("name", DRAFTS)
@given(log=logs(), cuts=st.lists(st.integers(1, 11), max_size=6))
@settings(max_examples=40, deadline=None)
def test_grouping_never_shows(name: str, log: TokenColumns, cuts: list[int]) -> None:
    record = finished(DRAFTS[name], log)
    runs = parts(log, cuts)
    assert sum(len(run.ids) for run in runs) == log.end
    assert render(record, runs) == render(record, [log])


@pytest.mark.parametrize("name", DRAFTS)
@given(log=logs(), cuts=st.lists(st.integers(1, 11), max_size=6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_resumed_stream_sends_what_the_first_one_would_have_sent(
    name: str, log: TokenColumns, cuts: list[int], data: st.DataObject
) -> None:
    record = finished(DRAFTS[name], log)
    start = data.draw(st.integers(1, log.end))
    whole = render(record, [log])
    rest = [run for run in parts(log, [*cuts, start]) if run.start >= start]
    resumed = render(record, rest, prefix=until(log, start))
    assert resumed == whole[len(whole) - len(resumed) :]
    missed = [event for event in whole if event.id is None or int(event.id) > start]
    assert resumed[len(resumed) - len(missed) :] == missed
    assert all(event.id == str(start) for event in resumed[: len(resumed) - len(missed)])


class _ForgetsItsPrefix:
    """A renderer that begins anew when it is resumed: the property above must notice."""

    def __init__(self, inner: Renderer) -> None:
        self.inner = inner
        self.prefix: Callable[[TokenColumns], None] = lambda columns: None
        self.start, self.tokens, self.end = inner.start, inner.tokens, inner.end


def test_the_check_notices_a_renderer_that_forgets_its_prefix() -> None:
    log = TokenColumns(0, [97, 98], ["a", "b"], [0.0, 0.0])
    record = finished(DRAFTS["generate"], log)
    whole = render(record, [log])
    wrong = _ForgetsItsPrefix(renderer_for(record, SPECIAL))
    wrong.prefix(until(log, 1))
    resumed = wrong.tokens(log.slice(1)) + wrong.end(record)
    assert resumed and resumed != whole[len(whole) - len(resumed) :]


@pytest.mark.parametrize("name", DRAFTS)
@given(log=logs())
@settings(max_examples=30, deadline=None)
def test_the_streams_text_is_the_answers_text(name: str, log: TokenColumns) -> None:
    draft = DRAFTS[name]
    record = finished(draft, log)
    body = body_of(record, log, SPECIAL)
    assert _streamed_text(name, render(record, [log])) == _answered_text(name, body)


def _streamed_text(name: str, events: list[ServerEvent]) -> str:
    chunks = [json.loads(event.data) for event in events if event.data != b"[DONE]"]
    if name.startswith("generate"):
        return str(chunks[-1]["generated_text"])
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(choice.get("text", choice.get("delta", {}).get("content", "")) for choice in choices)


def _answered_text(name: str, body: dict[str, Any]) -> str:
    if name.startswith("generate"):
        return str(body["generated_text"])
    choice = body["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])
