"""Workers that keep keys and values in 8 bits, as their users meet them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ops.demo_model.prompts import examinations
from tests.support import oracle
from tests.support.fleet import Fleet, wait_for
from tests.support.redis_server import ServerUnderTest

pytestmark = pytest.mark.timeout(120)

NUM_TOKENS = 32
QUESTIONS = [row.prompt for row in examinations() if row.kind == "deep learning"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    server = ServerUnderTest(folder / "redis")
    try:
        with Fleet(folder, server.url, options={"KV_CACHE_DTYPE": "int8"}) as started:
            yield started
    finally:
        server.stop()


def answers(fleet: Fleet, questions: list[str]) -> tuple[list[str], str]:
    """Their greedy texts, and the lane that gave them."""
    texts, lanes = [], set()
    with fleet.client() as client:
        for question in questions:
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": NUM_TOKENS, "temperature": 0}
            response = client.post("/v1/chat/completions", json=body).raise_for_status()
            texts.append(response.json()["choices"][0]["message"]["content"])
            lanes.add(response.headers["x-job-id"][:6])
    (lane,) = lanes
    return texts, lane


def test_each_type_says_what_transformers_says_in_a_lane_of_its_own(fleet: Fleet) -> None:
    torch.set_num_threads(1)
    expected = [oracle.greedy_chat(question, NUM_TOKENS) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS) == 4
    texts, lane = answers(fleet, QUESTIONS)
    assert texts == expected
    assert "kv_cache_dtype int8: a token takes 1.5 KiB instead of 3.0 KiB" in fleet.worker("w1").log.read_text()
    fleet.add_worker("w2", KV_CACHE_DTYPE="fp8")
    fleet.wait_until_ready()
    wait_for(lambda: answers(fleet, QUESTIONS[:1])[1] != lane, "the newer model of the name answers")
    texts, _ = answers(fleet, QUESTIONS)
    assert texts == expected
    assert "kv_cache_dtype fp8_e4m3fn: a token takes 1.5 KiB instead of 3.0 KiB" in fleet.worker("w2").log.read_text()
