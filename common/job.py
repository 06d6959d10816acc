"""The job as every process sees it: what was asked, how it stands, which tokens it has. Plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any


class JobState(StrEnum):
    """States of the Jobs API; the record on Redis stores these words."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.IN_PROGRESS)


class FinishReason(StrEnum):
    """Why generation ended, in TGI's words; OpenAI's routes translate them."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


class Priority(StrEnum):
    INTERACTIVE = "interactive"
    BATCH = "batch"


class DispatchClass(IntEnum):
    """Order in which workers take jobs. RESUME holds only migrated jobs that somebody follows."""

    RESUME = 0
    INTERACTIVE = 1
    BATCH = 2


class Dialect(StrEnum):
    """The route family whose body the job came with and whose events it is rendered in."""

    GENERATE = "generate"
    CHAT = "chat"
    COMPLETION = "completion"


class LogprobKind(StrEnum):
    """TGI reports log-probabilities after all processors, OpenAI and vLLM before them."""

    PROCESSED = "processed"
    RAW = "raw"


class PenaltyKind(StrEnum):
    """TGI divides the count of a token, prompt included, by the length; OpenAI uses the count in the output."""

    TGI = "tgi"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick tokens. Neutral values switch a processor off; `do_sample=False` is greedy whatever else is set.

    `seed` is always drawn at submission, so that a job continues identically on another worker. `max_new_tokens` counts
    from the first token of the job, also after a migration. `num_top_logprobs` is TGI's `top_n_tokens`.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_kind: PenaltyKind = PenaltyKind.TGI
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = True
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_top_logprobs: int = 0
    logprob_kind: LogprobKind = LogprobKind.PROCESSED


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as jobs carry it, so that any worker can go on with them.

    `name` is what clients say; `source` a folder or `owner/name[@revision]` of a hub; `digest` 32 hex digits that stand
    for its configuration and weights.
    """

    name: str
    source: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted generation request. `view` holds whatever the gateway's formats need to render its answer again.

    `cost` is in tokens (prompt + expected output). `orphan_grace_s` is how long the job lives without a follower;
    None means for ever. `body_hash` is of the client's body before defaults and backs the idempotency key.
    """

    job_id: str
    tenant: str
    dialect: Dialect
    prompt_ids: list[int]
    params: SamplingParams
    cost: int
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float = 3600.0
    result_ttl_s: int = 3600
    orphan_grace_s: float | None = None
    idempotency_key: str = ""
    body_hash: str = ""
    cache_salt: str = ""
    adapter: Adapter | None = None
    view: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TopToken:
    """One alternative of a position: token id, its text and its log-probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(slots=True)
class TokenColumns:
    """A contiguous run of output tokens as parallel columns; offset `start` counts tokens from the job's first.

    `pieces` are the texts that each token released (special tokens with their text). `top_tokens` is None unless the
    job asked for alternatives.
    """

    start: int
    ids: list[int]
    pieces: list[str]
    logprobs: list[float]
    top_tokens: list[list[TopToken]] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def slice(self, start: int) -> TokenColumns:
        """The part from absolute offset `start` on; empty when there is none."""
        skip = min(max(start - self.start, 0), len(self.ids))
        tops = None if self.top_tokens is None else self.top_tokens[skip:]
        return TokenColumns(self.start + skip, self.ids[skip:], self.pieces[skip:], self.logprobs[skip:], tops)

    def extend(self, other: TokenColumns) -> None:
        """Append the run that begins where this one ends.

        Raises:
            ValueError: if `other` does not begin at `end`.
        """
        if other.start != self.end:
            raise ValueError(f"columns start at {other.start}, expected {self.end}")
        self.ids += other.ids
        self.pieces += other.pieces
        self.logprobs += other.logprobs
        if other.top_tokens is not None:
            self.top_tokens = (self.top_tokens or []) + other.top_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What Redis says of a job, without prompt and tokens. Times are Unix milliseconds, 0 when not reached yet.

    `num_tokens` is the last durable offset of its log. `cancelling` is set between an accepted cancel and the end.
    """

    job_id: str
    state: JobState
    tenant: str
    priority: Priority
    dialect: Dialect
    epoch: int
    attempts: int
    worker: str
    cancelling: bool
    num_tokens: int
    prompt_tokens: int
    created_ms: int
    started_ms: int
    finished_ms: int
    deadline_ms: int
    expires_ms: int
    finish_reason: FinishReason | None
    error_code: str
    error_message: str
    view: dict[str, Any]

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.num_tokens)
