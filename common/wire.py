"""Bytes between processes: msgpack forms of jobs, token columns and frames. Versioned, size-bounded, never pickle."""

from __future__ import annotations

from typing import Any

import msgpack

from common.errors import WireError
from common.job import Adapter, Dialect, Job, LogprobKind, PenaltyKind, Priority, SamplingParams, TokenColumns, TopToken

VERSION = 1
MAX_BYTES = 64 * 1024 * 1024


def pack(value: Any) -> bytes:
    """Encode plain values (no objects) as msgpack."""
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def unpack(data: bytes) -> Any:
    """Decode msgpack from an untrusted peer.

    Raises:
        WireError: if the bytes are not one msgpack value or exceed MAX_BYTES.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"message of {len(data)} bytes exceeds the limit of {MAX_BYTES}")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not a msgpack message: {error}") from error


def _checked(data: bytes, kind: str) -> Any:
    value = unpack(data)
    if not isinstance(value, list) or len(value) != 3 or value[0] != VERSION or value[1] != kind:
        raise WireError(f"expected a {kind} message of version {VERSION}")
    return value[2]


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots. Unlike those of `asdict` they are not copied one by one, ids of prompts
    among them."""
    return {name: getattr(value, name) for name in value.__slots__}


def params_of(fields: dict[str, Any]) -> SamplingParams:
    """Sampling parameters out of their fields as plain values.

    Raises:
        KeyError, TypeError, ValueError: if they are something else.
    """
    return SamplingParams(
        **fields
        | {
            "stop": tuple(fields["stop"]),
            "stop_token_ids": tuple(fields["stop_token_ids"]),
            "penalty_kind": PenaltyKind(fields["penalty_kind"]),
            "logprob_kind": LogprobKind(fields["logprob_kind"]),
        }
    )


def adapter_of(fields: dict[str, Any] | None) -> Adapter | None:
    """An adapter out of its fields as plain values.

    Raises:
        TypeError: if they are something else.
    """
    return None if fields is None else Adapter(**fields)


def encode_job(job: Job) -> bytes:
    """The body a worker reads: everything of the job but its rendering view, which stays in the record.

    Without an adapter it is what workers read that know of none.
    """
    fields = fields_of(job) | {"params": fields_of(job.params)}
    del fields["view"], fields["adapter"]
    if job.adapter is not None:
        fields["adapter"] = fields_of(job.adapter)
    return pack([VERSION, "job", fields])


def decode_job(data: bytes) -> Job:
    """Inverse of `encode_job`; `view` is empty.

    Raises:
        WireError: if it is not a job of this version.
    """
    fields = _checked(data, "job")
    try:
        fields |= {
            "params": params_of(fields["params"]),
            "dialect": Dialect(fields["dialect"]),
            "priority": Priority(fields["priority"]),
            "adapter": adapter_of(fields.get("adapter")),
        }
        return Job(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not a job: {error}") from error


def columns_to_list(columns: TokenColumns) -> list[Any]:
    tops = columns.top_tokens
    packed_tops = None if tops is None else [[[t.token_id, t.text, t.logprob] for t in row] for row in tops]
    return [columns.start, columns.ids, columns.pieces, columns.logprobs, packed_tops]


def columns_from_list(value: list[Any]) -> TokenColumns:
    """Raises WireError if these are not columns of one length."""
    try:
        start, ids, pieces, logprobs, tops = value
        are_lists = isinstance(ids, list) and isinstance(pieces, list) and isinstance(logprobs, list)
        if not isinstance(start, int) or not are_lists:
            raise WireError("not token columns")
        if not len(ids) == len(pieces) == len(logprobs) or (tops is not None and len(tops) != len(ids)):
            raise WireError("token columns differ in length")
        rows = None if tops is None else [[TopToken(*top) for top in row] for row in tops]
    except (TypeError, ValueError) as error:
        raise WireError(f"not token columns: {error}") from error
    return TokenColumns(start, ids, pieces, logprobs, rows)


def encode_columns(columns: TokenColumns) -> bytes:
    """Payload of one entry of a job's log."""
    return pack(columns_to_list(columns))


def decode_columns(data: bytes) -> TokenColumns:
    return columns_from_list(unpack(data))


def encode_frame(runs: list[tuple[str, TokenColumns]]) -> bytes:
    """One engine step's tokens of many jobs: entry of a write-ahead stream, and what a gateway receives."""
    return pack([VERSION, "T", [[job_id, *columns_to_list(columns)] for job_id, columns in runs]])


def decode_frame(data: bytes) -> list[tuple[str, TokenColumns]]:
    """Inverse of `encode_frame`.

    Raises:
        WireError: if it is not a frame of this version.
    """
    return runs_of(_checked(data, "T"))


def runs_of(value: Any) -> list[tuple[str, TokenColumns]]:
    """The runs in the body of a frame.

    Raises:
        WireError: if there is something else.
    """
    try:
        return [(job_id, columns_from_list(run)) for job_id, *run in value]
    except (TypeError, ValueError) as error:
        raise WireError(f"not a frame: {error}") from error
