"""Plans as bytes for the other ranks: msgpack of the fields in their order, arrays as raw bytes. Nothing is left out,
whatever fields a plan gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from common import wire
from common.errors import WireError
from common.job import Adapter, SamplingParams
from worker.engine.device import Flags, Ints, RowInit, StepPlan

Record = TypeVar("Record", StepPlan, RowInit)


def encode_plan(plan: StepPlan) -> bytes:
    return wire.pack(_values(plan))


def decode_plan(data: bytes) -> StepPlan:
    """Inverse of `encode_plan`. The arrays are writable copies, as the scheduler's own are.

    Raises:
        WireError: if these bytes are no plan.
    """
    try:
        return _record(StepPlan, wire.unpack(data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise WireError(f"not a plan: {error}") from error


def _values(record: StepPlan | RowInit) -> list[Any]:
    return [_plain(getattr(record, field.name)) for field in fields(record)]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, SamplingParams | Adapter):
        return asdict(value)
    if isinstance(value, list):
        return [_values(row) for row in value]
    return value


def _record(kind: type[Record], values: list[Any]) -> Record:
    pairs = zip(fields(kind), values, strict=True)
    return kind(**{field.name: READERS[str(field.type)](value) for field, value in pairs})


def _ints(data: bytes) -> Ints:
    return np.frombuffer(data, np.int32).copy()


def _flags(data: bytes) -> Flags:
    return np.frombuffer(data, np.bool_).copy()


def _row_inits(values: list[list[Any]]) -> list[RowInit]:
    return [_record(RowInit, row) for row in values]


READERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "str": str,
    "Ints": _ints,
    "Flags": _flags,
    "SamplingParams": wire.params_of,
    "Adapter | None": wire.adapter_of,
    "list[RowInit]": _row_inits,
}
"""By the annotation of a field."""
