"""Messages of the waist survive the way; what is no message is an error, never a surprise."""

from __future__ import annotations

import io
from array import array
from dataclasses import replace

import pytest

from common import wire
from common.errors import WireError
from common.job import Adapter, LogprobKind, PenaltyKind, SamplingParams
from worker.pipe import (
    HEADER,
    KINDS,
    Abort,
    AdapterChecked,
    CheckAdapter,
    Commit,
    Failed,
    Progress,
    Ready,
    Step,
    Stop,
    Submit,
    TokenRun,
    decode,
    encode,
    read_message,
)

PARAMS = SamplingParams(
    max_new_tokens=5,
    do_sample=True,
    temperature=0.7,
    stop=("a", "日本"),
    stop_token_ids=(3, 4),
    penalty_kind=PenaltyKind.OPENAI,
    logprob_kind=LogprobKind.RAW,
    seed=2**63,
)
MESSAGES = [
    Submit(
        request_id="r",
        epoch=3,
        prompt_ids=array("i", [1, 2**31 - 1]),
        output_ids=array("i", [3]),
        params=PARAMS,
        eos_token_ids=[7],
        cache_salt="t",
        is_suspect=True,
        adapter=Adapter("a", "/adapters/a", "0f" * 16),
    ),
    CheckAdapter("a", "/adapters/a"),
    AdapterChecked("a", "/adapters/a", "0f" * 16, 8, ""),
    Abort(["a", "b"]),
    Commit(12),
    Stop(),
    Progress("weights", 5, 10),
    Ready(
        vocab_size=50,
        dtype="float32",
        quantize="",
        weights_digest="d",
        kv_tokens=64,
        block_size=4,
        max_num_seqs=6,
        max_input_tokens=50,
        max_total_tokens=60,
        max_batch_prefill_tokens=16,
        step_limit_s=60.0,
        reasons=["because"],
        decoder_start_id=0,
    ),
    Step(
        step=4,
        runs=[
            TokenRun(request_id="r", epoch=3, ids=[1], logprobs=[-0.5], top_tokens=[[(1, -0.5), (2, -1.5)]]),
            TokenRun(request_id="s", epoch=1, ids=[], logprobs=[], finish="error", error="too long"),
        ],
        stats={"steps": 4, "step_ms": 1.5},
    ),
    Failed("out of memory"),
]


def test_every_kind_is_covered() -> None:
    assert {type(message).__name__ for message in MESSAGES} == set(KINDS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_way(message) -> None:
    framed = encode(message)
    (size,) = HEADER.unpack(framed[: HEADER.size])
    assert size == len(framed) - HEADER.size
    received = decode(framed[HEADER.size :])
    assert received == message
    assert type(received) is type(message)


@pytest.mark.parametrize("ids", [[], [5, 2**31 - 1, -1], [2**31], [2**63, 1], [1, "word"], [1.5]])
def test_ids_arrive_as_they_were_sent_also_those_that_are_none(ids) -> None:
    submit = replace(MESSAGES[0], prompt_ids=ids)
    received = decode(encode(submit)[HEADER.size :])
    assert list(received.prompt_ids) == ids
    assert list(received.output_ids) == [3]


def test_half_an_id_is_a_wire_error() -> None:
    _, fields = wire.unpack(encode(MESSAGES[0])[HEADER.size :])
    assert decode(wire.pack(["Submit", dict(fields)])) == MESSAGES[0]
    with pytest.raises(WireError):
        decode(wire.pack(["Submit", fields | {"prompt_ids": b"123"}]))


def test_a_stream_gives_one_message_after_the_other_and_then_none() -> None:
    stream = io.BytesIO(b"".join(map(encode, MESSAGES)))
    assert [read_message(stream) for _ in MESSAGES] == MESSAGES
    assert read_message(stream) is None


@pytest.mark.parametrize("num_bytes", [0, 1, 3, 4, 9])
def test_a_stream_that_breaks_off_is_at_its_end(num_bytes: int) -> None:
    framed = encode(Commit(12))
    assert len(framed) > num_bytes
    assert read_message(io.BytesIO(framed[:num_bytes])) is None


def test_a_message_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="exceeds the limit"):
        read_message(io.BytesIO(HEADER.pack(wire.MAX_BYTES + 1)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        wire.pack(5),
        wire.pack([]),
        wire.pack(["Commit"]),
        wire.pack(["Explode", {}]),
        wire.pack([["Commit"], {}]),
        wire.pack(["Commit", 5]),
        wire.pack(["Commit", {}]),
        wire.pack(["Commit", {"step": 1, "more": 2}]),
        wire.pack(["Submit", {}]),
        wire.pack(["Submit", {"params": {}}]),
        wire.pack(["Submit", {"params": None}]),
        wire.pack(["Step", {"step": 1, "stats": {}, "runs": [5]}]),
        wire.pack(["Step", {"step": 1, "stats": {}, "runs": [{"top_tokens": [[5]]}]}]),
        encode(Commit(1))[HEADER.size :] + b"\x00",
    ],
)
def test_what_is_no_message_is_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        decode(body)
