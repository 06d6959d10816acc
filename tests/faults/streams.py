"""Streams of the whole stack for fault tests: what is asked, what a client saw, and what an undisturbed run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.fleet import Fleet

NUM_TOKENS = 200

GREEDY = {
    "messages": [{"role": "user", "content": "Count to 100"}],
    "temperature": 0,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
}
SEEDED = {
    "messages": [{"role": "user", "content": "What is a transformer?"}],
    "temperature": 0.9,
    "seed": 1234,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "stop": ["never said here", "\n\n\n\n"],
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
}
JAPANESE = {
    "messages": [{"role": "user", "content": "ディープラーニングについて詳しく説明してください"}],
    "temperature": 0.7,
    "seed": 99,
    "frequency_penalty": 0.2,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
}
BODIES: dict[str, dict[str, Any]] = {"greedy": GREEDY, "seeded": SEEDED, "japanese": JAPANESE}


@dataclass
class Seen:
    """What one client received over its connections."""

    job_id: str = ""
    text: str = ""
    offsets: list[int] = field(default_factory=list)
    last_id: str = ""
    is_done: bool = False

    def read(self, response: httpx.Response, on_token: Callable[[int], None] = lambda _: None) -> None:
        """Read chat events until the connection ends; `on_token` gets the offset after each one."""
        assert response.status_code == httpx.codes.OK, response.read()
        self.job_id = self.job_id or response.headers["x-job-id"]
        event_id = ""
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value == "[DONE]":
                self.is_done = True
            elif name == "data":
                self._event(json.loads(value), event_id, on_token)

    def _event(self, event: dict[str, Any], event_id: str, on_token: Callable[[int], None]) -> None:
        assert "error" not in event, event
        self.last_id = event_id
        piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
        if piece:
            self.text += piece
            self.offsets.append(int(event_id))
            on_token(int(event_id))


def undisturbed(fleet: Fleet, body: dict[str, Any]) -> str:
    with fleet.client() as client:
        job = client.post("/v1/jobs?wait=60", json={"input": body}).raise_for_status().json()
    assert job["status"] == "completed", job
    assert job["num_tokens"] == NUM_TOKENS
    return str(job["output_text"])


def final_job(fleet: Fleet, job_id: str, gateway: int = 0) -> dict[str, Any]:
    with fleet.client(gateway) as client:
        job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}?wait=30").raise_for_status().json()
    return job


def assert_exact(seen: Seen, job: dict[str, Any], expected: str) -> None:
    """No gap, no repeat, nothing rewritten: the client's bytes are the job's log and the undisturbed run."""
    assert job["status"] == "completed"
    assert job["num_tokens"] == NUM_TOKENS
    assert seen.offsets == sorted(set(seen.offsets))
    assert seen.text == job["output_text"]
    assert seen.text == expected


def dead_letters(fleet: Fleet) -> list[Any]:
    with fleet.client() as client:
        return list(client.get("/v1/fleet/dead-letters").raise_for_status().json()["data"])
