"""The exception tree of the project, all of it.

InferfleetError
├── WireError                  bytes from a peer that are not what they should be
├── ConfigurationError         an option or a model that cannot work; one sentence with the fix
├── StoreError
│   ├── StoreUnavailable       Redis is away, loading or timed out; the caller may try again
│   ├── StoreFull              Redis refused a submission for lack of memory
│   ├── StoreUnsupported       the server is too old or lacks what is needed
│   ├── Fenced                 this incarnation is sealed or unknown: drop everything, say hello again
│   ├── UnknownIncarnation     Redis lost its tail: say hello, then adopt
│   └── StepGap                a step or chunk does not continue what Redis has
└── RequestError               refused by us, with HTTP status, error type and code
    ├── BadRequest 400         ├── Unauthorized 401      ├── Forbidden 403        ├── NotFound 404
    ├── Conflict 409           ├── PayloadTooLarge 413   ├── UnsupportedMediaType 415
    │   └── OffsetBeyondEnd
    ├── MethodNotAllowed 405   ├── Rewound 500
    ├── ValidationError 422    ├── GenerationFailed 424  ├── Overloaded 429        ├── Unavailable 503
    │   └── TemplateError      └── GenerationExpired 504
"""

from __future__ import annotations

from typing import ClassVar


class InferfleetError(Exception):
    """Base of everything this project raises on purpose."""


class WireError(InferfleetError):
    """Bytes from a peer are malformed, of another version, or too large."""


class ConfigurationError(InferfleetError):
    """An option, model folder or environment that cannot work. The message is one sentence with the fix."""


class StoreError(InferfleetError):
    """Base of what the queue protocol raises."""


class StoreUnavailable(StoreError):
    """Redis is away, loading, read-only or timed out."""


class StoreFull(StoreError):
    """Redis is at its memory limit and took no new job."""


class StoreUnsupported(StoreError):
    """The server does not offer what the protocol needs; the message names it."""


class Fenced(StoreError):
    """The calling incarnation was sealed or superseded."""


class UnknownIncarnation(StoreError):
    """Redis does not know the calling incarnation: it lost its last writes."""


class StepGap(StoreError):
    """What was sent does not continue what Redis has. `last` is the last step or offset it has."""

    def __init__(self, subject: str, last: int) -> None:
        super().__init__(f"{subject} continues at {last}")
        self.subject, self.last = subject, last


class RequestError(InferfleetError):
    """A refused request. `error_type` is TGI's word, `code` OpenAI's, `param` names the field at fault."""

    status: ClassVar[int] = 500
    default_type: ClassVar[str] = "internal_error"
    openai_type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        error_type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_type = error_type or self.default_type
        self.code, self.param, self.retry_after_s = code or self.error_type, param, retry_after_s


class BadRequest(RequestError):
    status = 400
    default_type = "bad_request"
    openai_type = "invalid_request_error"


class Unauthorized(RequestError):
    status = 401
    default_type = "unauthorized"
    openai_type = "authentication_error"


class Forbidden(RequestError):
    status = 403
    default_type = "forbidden"
    openai_type = "permission_error"


class NotFound(RequestError):
    status = 404
    default_type = "not_found"
    openai_type = "not_found_error"


class MethodNotAllowed(RequestError):
    status = 405
    default_type = "method_not_allowed"
    openai_type = "invalid_request_error"


class Conflict(RequestError):
    status = 409
    default_type = "conflict"
    openai_type = "invalid_request_error"


class OffsetBeyondEnd(Conflict):
    """A stream was asked to go on at an offset that the job has not reached; `num_tokens` is what it has."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the job has {num_tokens} tokens", code="offset_beyond_end")
        self.num_tokens = num_tokens


class PayloadTooLarge(RequestError):
    status = 413
    default_type = "payload_too_large"
    openai_type = "invalid_request_error"


class UnsupportedMediaType(RequestError):
    status = 415
    default_type = "unsupported_media_type"
    openai_type = "invalid_request_error"


class ValidationError(RequestError):
    """422. On TGI's native routes the message carries the prefix "Input validation error: "."""

    status = 422
    default_type = "validation"
    openai_type = "invalid_request_error"


class TemplateError(ValidationError):
    """A chat template is missing, broken or refuses the messages."""

    default_type = "template_error"


class GenerationFailed(RequestError):
    """424, as TGI answers when a request fails after it was accepted."""

    status = 424
    default_type = "generation"


class Overloaded(RequestError):
    status = 429
    default_type = "overloaded"
    openai_type = "rate_limit_error"


class Unavailable(RequestError):
    status = 503
    default_type = "unavailable"
    openai_type = "server_error"


class GenerationExpired(RequestError):
    """504: the deadline of the job passed before its end."""

    status = 504
    default_type = "expired"


class Rewound(RequestError):
    """Tokens that a client has seen are lost; a stream whose format has no word for that can only end."""

    default_type = "rewound"
