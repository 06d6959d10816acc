"""The Jobs API: body of POST /v1/jobs -> what to submit; record and log -> job object; a job's events.

The same JSON object is the data of a server-sent event and a WebSocket message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import GenerationExpired, RequestError, ValidationError
from common.job import JobRecord, JobState, Priority, TokenColumns
from gateway.formats import answer_text, body_of
from gateway.formats.base import (
    MAX_METADATA_KEY,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE,
    ServerEvent,
    dump,
    end_error,
    openai_error,
)
from gateway.formats.fields import Fields, unsupported
from gateway.formats.tgi import token_object

KNOWN_FIELDS = ("input", "model", "priority", "timeout", "result_ttl", "metadata", "webhook")
LONGEST_TIMEOUT_S = 86_400
SHORTEST_TTL_S, LONGEST_TTL_S = 60, 604_800
DEFAULT_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A checked body of POST /v1/jobs. `input` is the body of another route, not looked at yet."""

    input: dict[str, Any]
    model: str | None
    priority: Priority
    timeout_s: float
    result_ttl_s: int
    metadata: dict[str, str]


def parse_job(body: dict[str, Any]) -> JobRequest:
    """Check everything beside `input`.

    Raises:
        ValidationError: naming the field.
    """
    for name in body:
        if name not in KNOWN_FIELDS:
            raise unsupported(name, "no such field is known here")
    fields = Fields(body)
    if fields.has("webhook"):
        raise unsupported("webhook", "results are not delivered by webhook yet")
    given = body.get("input")
    if not isinstance(given, dict):
        raise ValidationError("`input` must be the body of another route, an object", param="input")
    return JobRequest(
        input=given | _model(fields, given),
        model=fields.text("model"),
        priority=_priority(fields),
        timeout_s=_seconds(fields, "timeout", 1, LONGEST_TIMEOUT_S),
        result_ttl_s=int(_seconds(fields, "result_ttl", SHORTEST_TTL_S, LONGEST_TTL_S)),
        metadata=parse_metadata(body.get("metadata")),
    )


def _model(fields: Fields, given: dict[str, Any]) -> dict[str, Any]:
    """The model beside `input` counts where the body inside names none."""
    outer, inner = fields.text("model"), given.get("model")
    if outer is not None and inner is not None and outer != inner:
        raise ValidationError("`model` and `input.model` differ", param="model")
    return {} if outer is None else {"model": outer}


def _priority(fields: Fields) -> Priority:
    value = fields.text("priority")
    if value is None:
        return Priority.INTERACTIVE
    if value not in tuple(Priority):
        raise ValidationError("`priority` must be interactive or batch", param="priority")
    return Priority(value)


def _seconds(fields: Fields, name: str, low: int, high: int) -> float:
    value = fields.number(name)
    if value is None:
        return DEFAULT_S
    if not low <= value <= high:
        raise ValidationError(f"`{name}` must be from {low} to {high} seconds", param=name)
    return value


def parse_metadata(value: Any) -> dict[str, str]:
    """Up to 16 pairs of strings, keys up to 64 and values up to 512 characters."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValidationError("`metadata` must be an object of strings", param="metadata")
    if len(value) > MAX_METADATA_PAIRS:
        raise ValidationError(f"`metadata` has more than {MAX_METADATA_PAIRS} pairs", param="metadata")
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            limits = f"{MAX_METADATA_KEY} and values {MAX_METADATA_VALUE}"
            raise ValidationError(f"keys of `metadata` have at most {limits} characters", param="metadata")
    return value


def status_word(state: JobState, *, cancelling: bool) -> str:
    return "cancelling" if cancelling and not state.is_terminal else state.value


def _seconds_or_none(ms: int) -> int | None:
    return ms // 1000 if ms else None


def job_object(
    record: JobRecord,
    columns: TokenColumns | None,
    special_ids: frozenset[int],
    output: dict[str, Any] | list[Any] | None = None,
) -> dict[str, Any]:
    """The job as clients see it. `columns` None leaves text and output out, as in lists."""
    self_url = f"/v1/jobs/job_{record.job_id}"
    num_tokens = record.num_tokens if columns is None else max(columns.end, record.num_tokens)
    job: dict[str, Any] = {
        "id": f"job_{record.job_id}",
        "object": "job",
        "status": status_word(record.state, cancelling=record.cancelling),
        "model": record.view.get("model", ""),
        "adapter": record.view.get("adapter"),
        "priority": record.priority.value,
        "created_at": record.created_ms // 1000,
        "started_at": _seconds_or_none(record.started_ms),
        "finished_at": _seconds_or_none(record.finished_ms),
        "expires_at": _seconds_or_none(record.expires_ms or record.deadline_ms),
        "attempts": record.attempts,
        "num_tokens": num_tokens,
    }
    if columns is not None:
        job["output_text"] = answer_text(record, columns, special_ids)
        job["output"] = output if record.state is JobState.COMPLETED else None
    return job | {
        "finish_reason": _finish_reason(record, output),
        "error": error_object(record),
        "usage": _usage(record, num_tokens),
        "metadata": record.view.get("metadata", {}),
        "urls": {
            "self": self_url,
            "stream": f"{self_url}/stream",
            "websocket": f"{self_url}/ws",
            "cancel": f"{self_url}/cancel",
        },
    }


def _finish_reason(record: JobRecord, output: dict[str, Any] | list[Any] | None) -> str | None:
    """The word that the job's own route uses."""
    if record.state is not JobState.COMPLETED or record.finish_reason is None:
        return None
    if isinstance(output, dict) and output.get("choices"):
        return str(output["choices"][0]["finish_reason"])
    if record.view.get("door") in ("chat", "completions"):
        return "length" if record.finish_reason == "length" else "stop"
    return record.finish_reason.value


def _usage(record: JobRecord, num_tokens: int) -> dict[str, int] | None:
    if not record.state.is_terminal:
        return None
    prompt = record.prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": num_tokens, "total_tokens": prompt + num_tokens}


def error_object(record: JobRecord) -> dict[str, Any] | None:
    """Why the job failed or expired; a cancelled one did what it was told."""
    if record.state is JobState.EXPIRED:
        body: dict[str, Any] = openai_error(GenerationExpired("the job's timeout passed before its end"))["error"]
        return body
    error = end_error(record) if record.state is JobState.FAILED else None
    return None if error is None else dict(openai_error(error)["error"])


class JobEvents:
    """Renders the events of one connection: job.status, job.delta, job.rewind and job.done."""

    def __init__(self, record: JobRecord, special_ids: frozenset[int]) -> None:
        self._record, self._special_ids = record, special_ids
        view = record.view
        self._has_tokens = bool(view.get("details") or view.get("logprobs"))

    def start(self) -> list[ServerEvent]:
        return []

    def status(self, state: JobState, attempts: int, *, cancelling: bool) -> list[ServerEvent]:
        word = status_word(state, cancelling=cancelling)
        return [self._event("job.status", None, status=word, attempts=attempts)]

    def tokens(self, columns: TokenColumns) -> list[ServerEvent]:
        text = answer_text(self._record, columns, self._special_ids)
        fields: dict[str, Any] = {"start": columns.start, "end": columns.end, "text": text}
        if self._has_tokens:
            fields["tokens"] = [token_object(columns, index, self._special_ids) for index in range(len(columns.ids))]
        return [self._event("job.delta", str(columns.end), **fields)]

    def rewind(self, end: int) -> list[ServerEvent]:
        return [self._event("job.rewind", str(end), end=end)]

    def done(self, record: JobRecord, columns: TokenColumns) -> list[ServerEvent]:
        """The last event; `columns` are all tokens of the job."""
        return [self._event("job.done", "end", job=finished_job(record, columns, self._special_ids))]

    def _event(self, kind: str, event_id: str | None, **fields: Any) -> ServerEvent:
        data = {"type": kind, "job_id": f"job_{self._record.job_id}"} | fields
        return ServerEvent(dump(data), id=event_id, event=kind)


def finished_job(record: JobRecord, columns: TokenColumns, special_ids: frozenset[int]) -> dict[str, Any]:
    """The job with its text, and its output when it is completed."""
    output = body_of(record, columns, special_ids) if record.state is JobState.COMPLETED else None
    return job_object(record, columns, special_ids, output)


def error_event(error: RequestError, **fields: Any) -> bytes:
    """An `error` message about a connection."""
    return dump({"type": "error"} | openai_error(error) | fields)
