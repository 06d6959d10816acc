"""Continuous batching is real and exact: 64 mixed requests through HTTP, Redis and one worker, against each one alone.

The worker runs in float64 with a small KV pool and a small prefill budget, so that it must preempt and cut prompts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support import oracle
from tests.support.fleet import Fleet
from tests.support.redis_server import ServerUnderTest

NUM_REQUESTS = 64
NUM_CANCELLED = 8
PREFIX = "You are a careful assistant. You answer shortly and you count slowly. " * 4
QUESTIONS = [
    "What is deep learning?",
    "Count to 20",
    "10まで数えてください",
    "什么是深度学习？",
    "Học sâu là gì?",
    "What is 3 plus 4?",
    "Who are you?",
    "ディープラーニングとは何ですか？",
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("batching")
    server = ServerUnderTest(folder, ephemeral=True)
    options = {
        "DTYPE": "float64",
        "INFERFLEET_KV_TOKENS": "2304",
        "MAX_TOTAL_TOKENS": "768",
        "MAX_BATCH_PREFILL_TOKENS": "64",
        "MAX_TOP_N_TOKENS": "5",
    }
    try:
        with Fleet(folder, server.url, options=options) as running:
            yield running
    finally:
        server.stop()


@dataclass(frozen=True)
class Ask:
    """One request on TGI's route; `delay_s` is when it arrives."""

    body: dict[str, Any]
    delay_s: float
    is_plain: bool


def parameters(generator: random.Random, index: int) -> tuple[dict[str, Any], bool]:
    given: dict[str, Any] = {"max_new_tokens": generator.choice([16, 48, 96]), "details": True, "ignore_eos": True}
    kind = index % 4
    if kind == 1:
        given |= {"repetition_penalty": 1.2, "frequency_penalty": 0.4}
    elif kind == 2:
        given |= {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": index}
    elif kind == 3:
        given |= {"do_sample": True, "top_k": 20, "typical_p": 0.9, "seed": 7 * index, "stop": ["learning", "四"]}
    else:
        given |= {"top_n_tokens": 2}
    return given, kind == 0


def asks() -> list[Ask]:
    generator = random.Random(4)
    made = []
    for index in range(NUM_REQUESTS):
        question = QUESTIONS[index % len(QUESTIONS)]
        shared = PREFIX if generator.random() < 0.6 else ""
        filler = " ".join(str(generator.randint(1, 99)) for _ in range(generator.choice([0, 30, 60])))
        given, is_plain = parameters(generator, index)
        body = {"inputs": f"{shared}{filler} {question}", "parameters": given}
        made.append(Ask(body, generator.random() * 1.5, is_plain))
    return made


def tokens(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


async def together(fleet: Fleet, requests: list[Ask]) -> list[dict[str, Any]]:
    """All requests, each at its moment; beside them long jobs that are cancelled while they run."""
    limits = httpx.Limits(max_connections=NUM_REQUESTS + NUM_CANCELLED)
    async with httpx.AsyncClient(base_url=fleet.url, timeout=120, limits=limits) as client:
        cancels = [asyncio.create_task(run_and_cancel(client, index)) for index in range(NUM_CANCELLED)]
        answers = await asyncio.gather(*(send(client, ask) for ask in requests))
        assert await asyncio.gather(*cancels) == ["cancelled"] * NUM_CANCELLED
    return list(answers)


async def send(client: httpx.AsyncClient, ask: Ask) -> dict[str, Any]:
    await asyncio.sleep(ask.delay_s)
    response = await client.post("/generate", json=ask.body)
    assert response.status_code == httpx.codes.OK, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def run_and_cancel(client: httpx.AsyncClient, index: int) -> str:
    """Cancel a job that has tokens, so that it was running."""
    text = f"{PREFIX} Count to 100 {index}"
    body = {"input": {"inputs": text, "parameters": {"max_new_tokens": 600, "ignore_eos": True}}}
    await asyncio.sleep(0.1 * index)
    job = (await client.post("/v1/jobs", json=body)).json()
    while (job := (await client.get(f"/v1/jobs/{job['id']}")).json())["num_tokens"] < 2:
        assert job["status"] in ("queued", "in_progress")
        await asyncio.sleep(0.01)
    await client.post(f"/v1/jobs/{job['id']}/cancel")
    return str((await client.get(f"/v1/jobs/{job['id']}?wait=30")).json()["status"])


def statistics(fleet: Fleet) -> dict[str, float]:
    """Counters of the engine since its start, as `ctl workers --json` shows them."""
    return dict(fleet.worker_states()[0]["stats"])


@pytest.fixture(scope="module")
def runs(fleet: Fleet) -> tuple[list[Ask], list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    requests = asks()
    with fleet.client() as client:
        alone = [client.post("/generate", json=ask.body).raise_for_status().json() for ask in requests]
    before = statistics(fleet)
    mixed = asyncio.run(together(fleet, requests))
    after = statistics(fleet)
    return (
        requests,
        alone,
        mixed,
        {name: after[name] - before.get(name, 0) for name in after} | {"batch_max": after["batch_max"]},
    )


def test_the_run_was_what_it_claims(runs: Any) -> None:
    _, _, _, counted = runs
    assert counted["batch_max"] >= 16
    assert counted["preemptions"] >= 5
    assert counted["prefix_hits"] >= 5
    assert counted["chunked_prompts"] >= 5


def test_company_changes_nothing(runs: Any) -> None:
    _, alone, mixed, _ = runs
    assert [tokens(answer) for answer in mixed] == [tokens(answer) for answer in alone]
    assert [answer["generated_text"] for answer in mixed] == [answer["generated_text"] for answer in alone]


def test_the_comparison_can_fail(runs: Any) -> None:
    _, alone, mixed, _ = runs
    assert [tokens(answer) for answer in mixed[1:]] != [tokens(answer) for answer in alone[:-1]]
    assert any("stop_sequence" == answer["details"]["finish_reason"] for answer in mixed)


def test_greedy_equals_the_reference_with_margin(runs: Any) -> None:
    """Greedy ids are transformers', and nowhere are two candidates closer than 100 times the measured error."""
    requests, _, mixed, _ = runs
    plain = [(ask, answer) for ask, answer in zip(requests, mixed, strict=True) if ask.is_plain]
    assert len(plain) == NUM_REQUESTS // 4
    error, margin = 0.0, float("inf")
    for ask, answer in plain:
        ids = oracle.prompt_ids(ask.body["inputs"])
        reference = oracle.top_two(ids, tokens(answer))
        assert tokens(answer) == [row[0][0] for row in reference]
        for token, row in zip(answer["details"]["tokens"], reference, strict=True):
            error = max(error, abs(token["logprob"] - row[0][1]))
            margin = min(margin, row[0][1] - row[1][1])
    assert margin > 100 * error, (margin, error)
