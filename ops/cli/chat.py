"""`inferfleet chat`: a conversation in the terminal. An answer that is cut off goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from common.errors import ConfigurationError

MAX_RECONNECTS = 30


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the connection to a gateway."""

    client: httpx.Client
    model: str
    max_tokens: int | None
    temperature: float | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Iterator[str]:
        """Send one user message; yields the pieces of the answer and remembers both."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        for piece in self._stream():
            pieces.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _stream(self) -> Iterator[str]:
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        body |= {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        body |= {} if self.temperature is None else {"temperature": self.temperature}
        position = _Position()
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                yield from position.read(response)
        except httpx.TransportError:
            if not position.job_id:
                raise
        for _ in range(MAX_RECONNECTS):
            if position.is_done:
                return
            try:
                yield from self._resume(position)
            except httpx.TransportError:
                time.sleep(0.5)
        raise ConfigurationError("the gateway did not come back")

    def _resume(self, position: _Position) -> Iterator[str]:
        headers = {"Last-Event-ID": position.last_id} if position.last_id else {}
        url = f"/v1/jobs/{position.job_id}/stream?format=native"
        with self.client.stream("GET", url, headers=headers) as response:
            yield from position.read(response)


@dataclass(slots=True)
class _Position:
    """How far a stream was read: enough to go on elsewhere."""

    job_id: str = ""
    last_id: str = ""
    is_done: bool = False

    def read(self, response: httpx.Response) -> Iterator[str]:
        if response.status_code != httpx.codes.OK:
            raise ConfigurationError(_error_of(response))
        self.job_id = self.job_id or response.headers.get("x-job-id", "")
        event_id = ""
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif name == "data":
                yield from self._data(value)
                self.last_id = event_id or self.last_id

    def _data(self, value: str) -> Iterator[str]:
        if value == "[DONE]":
            self.is_done = True
            return
        event = json.loads(value)
        if "error" in event:
            raise ConfigurationError(event["error"]["message"])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                yield piece


def _error_of(response: httpx.Response) -> str:
    response.read()
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the gateway answered {response.status_code}"


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="inferfleet chat", description=__doc__)
    parser.add_argument("message", nargs="*", help="ask this once and leave; none: a conversation")
    parser.add_argument("--url", default=os.environ.get("INFERFLEET_URL", "http://localhost:8080"))
    parser.add_argument("--api-key", default=os.environ.get("INFERFLEET_API_KEY", ""), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help="a served name; none: the only one")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(60, read=None)
    with httpx.Client(base_url=options.url, headers=headers, timeout=timeout) as client:
        conversation = Conversation(client, options.model, options.max_tokens, options.temperature)
        if options.system:
            conversation.messages.append({"role": "system", "content": options.system})
        try:
            return _talk(conversation, " ".join(options.message))
        except httpx.ConnectError:
            raise ConfigurationError(f"no gateway at {options.url}; --url or INFERFLEET_URL names another") from None


def _talk(conversation: Conversation, once: str) -> int:
    try:
        while True:
            text = once or input("> ")
            if text.strip():
                for piece in conversation.ask(text):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                sys.stdout.write("\n")
            if once:
                return 0
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        return 0
