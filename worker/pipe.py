"""The narrow waist between agent and engine process: length-prefixed msgpack over one socket, few verbs, plain values.

agent -> engine                                 engine -> agent
  Submit   start (or go on with) a request        Progress  bytes loaded so far
  Abort    drop these requests                    Ready     the model is loaded, with its limits
  Commit   steps up to here are on Redis          Step      tokens and ends of one engine step, with counters
  CheckAdapter  does it fit the model?            AdapterChecked  its digest, or why it does not
  Stop     leave when told                        Failed    one sentence why the engine cannot go on
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from common import wire
from common.errors import WireError
from common.job import Adapter, SamplingParams

HEADER = struct.Struct("<I")
IDS = "i"
"""Type code of arrays of token ids: 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """`output_ids` are the tokens the job's log already holds; the engine prefills prompt + output and goes on. In an
    encoder-decoder model the encoder reads the prompt, again if need be, and the decoder prefills start + output.

    (request_id, epoch) names one run of a job: a late answer of an older run is told apart by its epoch.
    `is_suspect`: a job that saw a worker die runs its first step without new company. The source of an `adapter` is a
    local folder here. Ids arrive as arrays: those of a long prompt would take longer than all the rest as msgpack's
    integers.
    """

    request_id: str
    epoch: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    params: SamplingParams
    eos_token_ids: list[int]
    cache_salt: str = ""
    is_suspect: bool = False
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class CheckAdapter:
    """Compare what the folder `source` holds with the model. `name` is for the sentence on what is wrong."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class AdapterChecked:
    """`digest` is that of `common.job.Adapter`, `rank` its largest; `error` one sentence, "" when the adapter fits."""

    name: str
    source: str
    digest: str
    rank: int
    error: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Not answered: a run that was under way may still follow, nothing after it."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Commit:
    """Steps up to `step` are durable. The engine pauses when 64 steps or 2 s of work are uncommitted."""

    step: int


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Progress:
    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Sizes are in tokens. `weights_digest` and `dtype` enter the lane; `reasons` explain the chosen limits.

    `decoder_start_id` is the first token of every answer of an encoder-decoder model, whose prompts go to the encoder;
    None for all others. Without `can_speculate` the device takes no drafts.
    """

    vocab_size: int
    dtype: str
    quantize: str
    weights_digest: str
    kv_tokens: int
    block_size: int
    max_num_seqs: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    step_limit_s: float
    reasons: list[str]
    decoder_start_id: int | None = None
    can_speculate: bool = True


@dataclass(slots=True)
class TokenRun:
    """New tokens of one request in one step. `top_tokens`: per token a list of (id, logprob), empty when not asked.

    `finish`: "" | "length" | "eos_token" | "stop_sequence" (a stop token id) | "error"; with "error", `error` says what
    went wrong with this request. The last run of a request may hold no token: a job came back with complete output, or
    it cannot run here.
    """

    request_id: str
    epoch: int
    ids: list[int]
    logprobs: list[float]
    top_tokens: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str = ""
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Step:
    """One engine step, also when it brought no token; only steps with runs wait for their `Commit`.

    `stats` are counters since start: steps, batch_max, preemptions, prefix_hits, prefix_hit_tokens,
    chunked_prompts, prefill_tokens (encoder_tokens among them), decode_tokens, encoder_passes, encoder_tokens,
    draft_tokens, accepted_tokens (those of them that were right), steps_too_large; and of now: running, waiting,
    waiting_for_slot (those among them for whose adapters there is no slot), blocks_free, blocks_total, step_ms. Without
    any they have not been counted again.
    """

    step: int
    runs: list[TokenRun]
    stats: dict[str, float]


@dataclass(frozen=True, slots=True)
class Failed:
    message: str


Message = Submit | Abort | Commit | CheckAdapter | Stop | Progress | Ready | Step | AdapterChecked | Failed
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Submit, Abort, Commit, CheckAdapter, Stop, Progress, Ready, Step, AdapterChecked, Failed)
}


def encode(message: Message) -> bytes:
    """One framed message: 4 bytes of little-endian length, then msgpack [kind, fields]."""
    fields = wire.fields_of(message)
    if isinstance(message, Step):
        # this happens in every engine step, for every request
        fields["runs"] = [_values(run) for run in message.runs]
    elif isinstance(message, Submit):
        fields |= {name: _packed(fields[name]) for name in ("prompt_ids", "output_ids")}
        fields["params"] = wire.fields_of(message.params)
        fields["adapter"] = None if message.adapter is None else wire.fields_of(message.adapter)
    body = wire.pack([type(message).__name__, fields])
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """Inverse of `encode`, without the header.

    Raises:
        WireError: if the body is not a known message.
    """
    try:
        name, fields = wire.unpack(body)
        if name == "Submit":
            fields |= {name: _ids(fields[name]) for name in ("prompt_ids", "output_ids")}
            fields["params"] = wire.params_of(fields["params"])
            fields["adapter"] = wire.adapter_of(fields["adapter"])
        if name == "Step":
            fields["runs"] = [_run(run) for run in fields["runs"]]
        message: Message = KINDS[name](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not an engine message: {error}") from error
    return message


def read_message(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream, None at its end.

    Raises:
        WireError: if what comes is no message or too large to be one.
    """
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    if size > wire.MAX_BYTES:
        raise WireError(f"an engine message of {size} bytes exceeds the limit of {wire.MAX_BYTES}")
    body = stream.read(size)
    return decode(body) if len(body) == size else None


def _packed(ids: Sequence[int]) -> bytes | list[int]:
    """What does not fit goes as it is: the engine has the sentence for it."""
    try:
        return array(IDS, ids).tobytes()
    except (OverflowError, TypeError):
        return list(ids)


def _ids(packed: bytes | list[int]) -> Sequence[int]:
    return array(IDS, packed) if isinstance(packed, bytes) else packed


def _values(run: TokenRun) -> tuple[Any, ...]:
    return run.request_id, run.epoch, run.ids, run.logprobs, run.top_tokens, run.finish, run.error


def _run(values: list[Any]) -> TokenRun:
    run = TokenRun(*values)
    if run.top_tokens:
        run.top_tokens = [[(int(token), float(logprob)) for token, logprob in row] for row in run.top_tokens]
    return run
