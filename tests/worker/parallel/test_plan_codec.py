"""Plans survive the way to another rank, whatever is in them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import WireError
from common.job import Adapter, LogprobKind, PenaltyKind, SamplingParams
from worker.engine.device import NO_IDS, RowInit, StepPlan
from worker.parallel.plan_codec import decode_plan, encode_plan

NUMBERS = st.integers(0, 1 << 30)
RATES = st.floats(allow_nan=False)
INTS = st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=20).map(lambda ids: np.array(ids, np.int32))
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=NUMBERS,
    do_sample=st.booleans(),
    temperature=RATES,
    top_k=NUMBERS,
    top_p=RATES,
    typical_p=RATES,
    min_p=RATES,
    repetition_penalty=RATES,
    frequency_penalty=RATES,
    presence_penalty=RATES,
    penalty_kind=st.sampled_from(PenaltyKind),
    seed=st.integers(0, (1 << 64) - 1),
    stop=st.lists(st.text(), max_size=3).map(tuple),
    include_stop=st.booleans(),
    stop_token_ids=st.lists(NUMBERS, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=NUMBERS,
    num_top_logprobs=NUMBERS,
    logprob_kind=st.sampled_from(LogprobKind),
)
BY_ANNOTATION: dict[str, Any] = {
    "int": NUMBERS,
    "str": st.text(),
    "Ints": INTS,
    "Flags": st.lists(st.booleans(), max_size=20).map(lambda flags: np.array(flags, np.bool_)),
    "SamplingParams": PARAMS,
    "Adapter | None": st.none() | st.builds(Adapter, st.text(), st.text(), st.text()),
}


def records(kind: type[StepPlan] | type[RowInit]) -> st.SearchStrategy[Any]:
    """Any values in every field, also in those that will be added."""
    return st.builds(kind, **{field.name: BY_ANNOTATION[field.type] for field in fields(kind)})


BY_ANNOTATION["list[RowInit]"] = st.lists(records(RowInit), max_size=3)
PLANS = records(StepPlan)


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, StepPlan | RowInit):
        return all(is_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return bool(one == other) and type(one) is type(other)


def changed(value: Any) -> Any:
    """Something else of the same kind."""
    if isinstance(value, np.ndarray):
        return np.append(value, value.dtype.type(1))
    if isinstance(value, SamplingParams):
        return replace(value, seed=value.seed + 1)
    if value is None or isinstance(value, Adapter):
        return Adapter("other", "", "") if value is None else None
    return value + value[:1] if isinstance(value, list) else value + type(value)(1)


@given(PLANS)
def test_a_plan_arrives_as_it_was_sent(plan: StepPlan) -> None:
    assert is_equal(decode_plan(encode_plan(plan)), plan)


@given(PLANS, st.data())
def test_a_plan_that_changed_on_the_way_would_be_noticed(plan: StepPlan, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([field.name for field in fields(StepPlan)]))
    if plan.new_rows and data.draw(st.booleans()):
        row_field = data.draw(st.sampled_from([field.name for field in fields(RowInit)]))
        row = replace(plan.new_rows[-1], **{row_field: changed(getattr(plan.new_rows[-1], row_field))})
        wrong = replace(plan, new_rows=[*plan.new_rows[:-1], row])
    elif name == "new_rows" and not plan.new_rows:
        wrong = replace(plan, step=plan.step + 1)
    else:
        wrong = replace(plan, **{name: changed(getattr(plan, name))})
    assert not is_equal(decode_plan(encode_plan(wrong)), plan)


def test_arrays_may_be_written_like_those_of_the_scheduler() -> None:
    plan = decode_plan(encode_plan(empty_plan()))
    assert all(getattr(plan, field.name).flags.writeable for field in fields(plan) if field.type == "Ints")


def empty_plan() -> StepPlan:
    nothing = {field.name: NO_IDS for field in fields(StepPlan) if field.type == "Ints"}
    return StepPlan(step=1, samples=np.zeros(0, np.bool_), new_rows=[], **nothing)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        {"step": 1},
        [1] * len(fields(StepPlan)),
        [1, *[b"123"] * (len(fields(StepPlan)) - 1)],
        [*msgpack.unpackb(encode_plan(empty_plan())), b""],
    ],
)
def test_what_is_no_plan_is_an_error(value: Any) -> None:
    with pytest.raises(WireError):
        decode_plan(msgpack.packb(value))


def test_bytes_that_are_no_message_are_an_error() -> None:
    with pytest.raises(WireError):
        decode_plan(b"\xc1")
