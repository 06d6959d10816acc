"""The servers that can be asked: what a request looks like on each route, and what its events say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import orjson

from common.errors import ConfigurationError
from ops.loadgen.answer import Answer
from ops.loadgen.workload import Ask, Prompt

Api = Literal["completions", "chat", "generate_stream"]
DONE = b"[DONE]"
TEXTS_OF_DELTAS = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server by its base URL and the route that is used there: OpenAI's two or TGI's.

    `extra` are fields that every body gets besides; on TGI's route, parameters.
    """

    url: str
    api: Api = "completions"
    model: str = ""
    api_key: str = ""
    ignore_eos: bool = True
    include_usage: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and self.port > 0
        except ValueError:
            is_usable = False
        if not is_usable or "@" in parts.netloc or parts.query or parts.fragment or not _can_be_sent(self.url):
            raise ConfigurationError(f"{self.url!r} is no URL of a server, such as http://localhost:8080")
        for name, value in (("model", self.model), ("key", self.api_key)):
            if not _can_be_sent(value):
                raise ConfigurationError(f"the {name} has characters that cannot be sent")

    @property
    def is_secure(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        given = urlsplit(self.url).port
        return given if given is not None else 443 if self.is_secure else 80

    @property
    def prefix(self) -> str:
        """The path before the routes; OpenAI's clients count /v1 as part of the base URL."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    def head(self, method: str, path: str, num_bytes: int = 0) -> bytes:
        """The first line and the headers of a request."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {urlsplit(self.url).netloc}"]
        lines += ["Accept: */*", "User-Agent: inferfleet-bench"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        lines += ["Content-Type: application/json", f"Content-Length: {num_bytes}"] if num_bytes else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def request(self, ask: Ask) -> bytes:
        """The whole request as it goes over the wire."""
        route = ROUTES[self.api]
        body = orjson.dumps(route.body(self, ask))
        return self.head("POST", route.path, len(body)) + body

    def without(self, **changes: Any) -> Target:
        return dataclasses.replace(self, **changes)


def _can_be_sent(text: str) -> bool:
    """No line ends, which would begin another header, and no halves of characters."""
    return text.isprintable()


class Route(Protocol):
    path: str

    def body(self, target: Target, ask: Ask) -> dict[str, Any]: ...

    def read(self, data: bytes, answer: Answer) -> bool:
        """Take note of one event; whether it brought text.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is not what this route sends.
        """


class _OpenAI:
    """What completions and chats share: a last event with the usage, then `[DONE]`."""

    path = ""

    def body(self, target: Target, ask: Ask) -> dict[str, Any]:
        body = {"max_tokens": ask.max_tokens, "temperature": 0, "stream": True} | self.prompt(ask.prompt)
        body |= {"model": target.model} if target.model else {}
        body |= {"ignore_eos": True} if target.ignore_eos else {}
        body |= {"stream_options": {"include_usage": True}} if target.include_usage else {}
        return body | dict(target.extra)

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        raise NotImplementedError

    def has_text(self, choice: dict[str, Any]) -> bool:
        raise NotImplementedError

    def read(self, data: bytes, answer: Answer) -> bool:
        if data == DONE:
            answer.is_complete = True
            return False
        event = orjson.loads(data)
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if event.get("error"):
            answer.fail("error event", error_text(event))
            return False
        choices = event["choices"]
        return bool(choices) and self.has_text(choices[0])


class Completions(_OpenAI):
    path = "/v1/completions"

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        return {"prompt": prompt}

    def has_text(self, choice: dict[str, Any]) -> bool:
        return bool(choice["text"])


class Chat(_OpenAI):
    path = "/v1/chat/completions"

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}

    def has_text(self, choice: dict[str, Any]) -> bool:
        delta = choice["delta"]
        return any(delta.get(name) for name in TEXTS_OF_DELTAS)


class GenerateStream:
    """TGI's: an event for each token, of which the last has the whole text and the counts."""

    path = "/generate_stream"

    def body(self, target: Target, ask: Ask) -> dict[str, Any]:
        parameters: dict[str, Any] = {"max_new_tokens": ask.max_tokens, "details": True}
        parameters |= {"ignore_eos": True} if target.ignore_eos else {}
        return {"inputs": ask.prompt, "parameters": parameters | dict(target.extra)}

    def read(self, data: bytes, answer: Answer) -> bool:
        event = orjson.loads(data)
        if event.get("error"):
            answer.fail("error event", error_text(event))
            return False
        if event["generated_text"] is not None:
            details = event.get("details") or {}
            answer.output_tokens = _count(details.get("generated_tokens"))
            answer.prompt_tokens = _count(details.get("input_length"))
            answer.is_complete = True
        return "token" in event


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


ROUTES: dict[Api, Route] = {"completions": Completions(), "chat": Chat(), "generate_stream": GenerateStream()}


def error_text(body: Any) -> str:
    """The sentence in an error of OpenAI's shape, of TGI's or of FastAPI's; else all of it."""
    if not isinstance(body, dict):
        return str(body)
    error = body.get("error", body.get("detail", body))
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
