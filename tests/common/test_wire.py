"""What travels between processes comes back the same, and what is not ours is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.errors import WireError
from common.job import Adapter, Dialect, Job, Priority, SamplingParams, TokenColumns, TopToken

TEXTS = st.text(max_size=20)
NUMBERS = st.integers(min_value=0, max_value=2**40)
FLOATS = st.floats(allow_nan=False, width=32)

PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=NUMBERS,
    do_sample=st.booleans(),
    temperature=FLOATS,
    top_k=NUMBERS,
    seed=st.integers(min_value=0, max_value=2**64 - 1),
    stop=st.lists(TEXTS, max_size=3).map(tuple),
    stop_token_ids=st.lists(NUMBERS, max_size=3).map(tuple),
)
JOBS = st.builds(
    Job,
    job_id=TEXTS,
    tenant=TEXTS,
    dialect=st.sampled_from(Dialect),
    prompt_ids=st.lists(NUMBERS, max_size=20),
    params=PARAMS,
    cost=NUMBERS,
    priority=st.sampled_from(Priority),
    timeout_s=FLOATS,
    orphan_grace_s=st.none() | FLOATS,
    idempotency_key=TEXTS,
    adapter=st.none() | st.builds(Adapter, TEXTS, TEXTS, TEXTS),
    view=st.just({}),
)
TOPS = st.lists(st.builds(TopToken, NUMBERS, TEXTS, FLOATS), max_size=2)


@st.composite
def token_columns(draw: Any) -> TokenColumns:
    rows = draw(st.lists(st.tuples(NUMBERS, TEXTS, FLOATS, TOPS), max_size=6))
    with_tops = draw(st.booleans())
    return TokenColumns(
        draw(NUMBERS),
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows] if with_tops else None,
    )


@settings(max_examples=50, deadline=None)
@given(JOBS)
def test_a_job_comes_back_the_same(job: Job) -> None:
    assert wire.decode_job(wire.encode_job(job)) == job


def test_workers_that_know_of_no_adapters_read_jobs_without_one() -> None:
    job = Job(
        job_id="j",
        tenant="t",
        dialect=Dialect.CHAT,
        prompt_ids=[1],
        params=SamplingParams(max_new_tokens=1),
        cost=1,
        adapter=Adapter("fr", "/adapters/fr", "0f"),
    )
    assert "adapter" in msgpack.unpackb(wire.encode_job(job))[2]
    assert "adapter" not in msgpack.unpackb(wire.encode_job(replace(job, adapter=None)))[2]


@given(JOBS, st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=2))
@settings(max_examples=10, deadline=None)
def test_the_view_stays_in_the_record(job: Job, view: dict[str, str]) -> None:
    assert wire.encode_job(replace(job, view=view)) == wire.encode_job(job)


@settings(max_examples=50, deadline=None)
@given(token_columns())
def test_columns_come_back_the_same(columns: TokenColumns) -> None:
    assert wire.decode_columns(wire.encode_columns(columns)) == columns


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXTS, token_columns()), max_size=4))
def test_a_frame_comes_back_the_same(runs: list[tuple[str, TokenColumns]]) -> None:
    assert wire.decode_frame(wire.encode_frame(runs)) == runs


def test_columns_of_different_lengths_are_refused() -> None:
    good = [0, [1, 2], ["a", "b"], [0.0, 0.0], None]
    assert wire.columns_from_list(good).end == 2
    for index, short in ((1, [1]), (2, ["a"]), (3, [0.0]), (4, [[]])):
        bad = [*good[:index], short, *good[index + 1 :]]
        with pytest.raises(WireError):
            wire.columns_from_list(bad)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_garbage_raises_only_wire_errors(data: bytes) -> None:
    for decode in (wire.decode_job, wire.decode_columns, wire.decode_frame):
        with pytest.raises(WireError):
            decode(data)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.integers(-5, 5) | TEXTS, lambda inner: st.lists(inner, max_size=5), max_leaves=12))
def test_well_formed_nonsense_raises_only_wire_errors(value: Any) -> None:
    for kind in ("job", "T"):
        for decode in (wire.decode_job, wire.decode_frame):
            try:
                decode(msgpack.packb([wire.VERSION, kind, value]))
            except WireError:
                continue
            assert kind == "T"
            assert value in ([], ""), "only an empty frame is well formed"
    try:
        wire.decode_columns(msgpack.packb(value))
    except WireError:
        return
    assert isinstance(value, list)


def test_another_version_and_another_kind_are_refused() -> None:
    frame = wire.encode_frame([])
    assert wire.decode_frame(frame) == []
    with pytest.raises(WireError, match="version"):
        wire.decode_frame(wire.pack([wire.VERSION + 1, "T", []]))
    with pytest.raises(WireError, match="expected a job"):
        wire.decode_job(frame)


def test_a_message_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wire.pack("x" * 100)
    assert wire.unpack(data) == "x" * 100
    monkeypatch.setattr(wire, "MAX_BYTES", 50)
    with pytest.raises(WireError, match="exceeds the limit"):
        wire.unpack(data)
