"""Encoder-decoders through the whole stack: alone, in a crowd that does not fit, and through the death of a worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from tests.support import tiny_t5
from tests.support.fleet import Fleet, process_state, wait_for
from tests.support.redis_server import ServerUnderTest

pytestmark = pytest.mark.timeout(180)

NAMES = ["t5", "flan"]
NUM_LONG, NUM_SHORT, NUM_TOKENS, MIN_TOKENS = 20, 4, 64, 30
MIN_MARGIN = 1e-3
MIN_VARIETY = 6
BATCH = 16
SMALL = {"DTYPE": "float32", "INFERFLEET_KV_TOKENS": "1280", "MAX_TOTAL_TOKENS": "256", "INFERFLEET_LEASE": "3"}
WORDS = "summarize the following text about paged attention and continuous batching for people who read little".split()


@dataclass(frozen=True)
class Ask:
    """A request whose greedy answer hangs on no rounding within `num_tokens`."""

    prompt: str
    num_tokens: int
    text: str

    @property
    def body(self) -> dict[str, Any]:
        return {"inputs": self.prompt, "parameters": {"max_new_tokens": self.num_tokens, "details": True}}


def long_asks(name: str, folder: Path) -> list[Ask]:
    """Requests of many lengths that go on until the reference hesitates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [" ".join(WORDS[number % 7 : number % 7 + 1 + number % 5] + [str(number)]) for number in range(72)]
    answers = greedy(name, [list(tokenizer(prompt)["input_ids"]) for prompt in prompts])
    found = [
        Ask(prompt, len(ids), str(tokenizer.decode(ids, skip_special_tokens=True)))
        for prompt, ids in zip(prompts, answers, strict=True)
        if len(ids) >= MIN_TOKENS and len(set(ids)) >= MIN_VARIETY
    ]
    assert len(found) >= NUM_LONG, "too few prompts have long clear answers"
    return found[:NUM_LONG]


@torch.inference_mode()
def greedy(name: str, inputs: list[list[int]]) -> list[list[int]]:
    """What the reference answers, as far as its best and second logit are apart."""
    longest = max(map(len, inputs))
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in inputs])
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in inputs])
    # the reference's cache cannot hold more decoder layers than there are in the encoder
    made = tiny_t5.build(name).generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.scores, 1).topk(2).values
    is_clear = best[..., 0] - best[..., 1] >= MIN_MARGIN * best[..., 0].abs()
    lengths = is_clear.cumprod(-1).sum(-1).tolist()
    return [ids[:length] for ids, length in zip(made.sequences[:, 1:].tolist(), lengths, strict=True)]


@dataclass
class Served:
    """One worker with a small pool, and what the reference says."""

    fleet: Fleet
    asks: list[Ask]

    def generate(self, ask: Ask) -> dict[str, Any]:
        with self.fleet.client() as client:
            response = client.post("/generate", json=ask.body)
        assert response.status_code == httpx.codes.OK, response.text
        return dict(response.json())

    def stat(self, name: str) -> float:
        return max(worker["stats"].get(name, 0) for worker in self.fleet.worker_states())


@pytest.fixture(scope="module", params=NAMES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_t5.save(request.param, folder / "model")
    server = ServerUnderTest(folder / "redis")
    try:
        with Fleet(folder, server.url, options=SMALL | {"INFERFLEET_MODEL_ID": str(model)}) as fleet:
            yield Served(fleet, long_asks(request.param, model))
    finally:
        server.stop()


def test_alone_it_says_what_transformers_says(served: Served) -> None:
    for ask in served.asks[:4]:
        answer = served.generate(ask)
        assert answer["generated_text"] == ask.text
        assert answer["details"]["generated_tokens"] <= ask.num_tokens


def test_the_comparison_notices_another_prompt(served: Served) -> None:
    one, other = served.asks[:2]
    assert served.generate(Ask(other.prompt, one.num_tokens, one.text))["generated_text"] != one.text


async def num_unfinished(client: httpx.AsyncClient) -> int:
    (lane,) = (await client.get("/v1/fleet/queue")).json()["data"]
    return int(lane["queued"] + lane["running"])


async def ask_all(served: Served, asks: list[Ask]) -> list[str]:
    """The texts of requests that the engine, stopped meanwhile, finds all at once."""
    engine = served.fleet.workers[0].engine_pid
    os.kill(engine, signal.SIGSTOP)
    wait_for(lambda: process_state(engine) == "T", "the engine is stopped")
    limits = httpx.Limits(max_connections=len(asks) + 1)
    async with httpx.AsyncClient(base_url=served.fleet.url, timeout=100, limits=limits) as client:
        sent = [asyncio.create_task(client.post("/generate", json=ask.body)) for ask in asks]
        while await num_unfinished(client) < len(asks):
            answered = [task.result().text for task in sent if task.done()]
            assert not answered, "a stopped engine has answered"
            await asyncio.sleep(0.02)
        os.kill(engine, signal.SIGCONT)
        answers = await asyncio.gather(*sent)
    return [str(answer.raise_for_status().json()["generated_text"]) for answer in answers]


def test_a_crowd_that_does_not_fit_says_the_same(served: Served) -> None:
    """Short answers first: the engine then expects short ones, lets too many in, and must preempt."""
    asyncio.run(ask_all(served, [Ask(ask.prompt, 2, "") for ask in NUM_SHORT * served.asks]))
    texts = asyncio.run(ask_all(served, served.asks))
    wait_for(lambda: served.stat("batch_max") >= BATCH, f"a batch of {BATCH}")
    wait_for(lambda: served.stat("preemptions") > 0, "a preemption")
    assert texts == [ask.text for ask in served.asks]


def test_another_worker_goes_on_with_an_answer(served: Served) -> None:
    ask, fleet = max(served.asks, key=lambda ask: ask.num_tokens), served.fleet
    fleet.add_worker("w2")
    fleet.wait_until_ready()
    killed: list[str] = []
    engines = [worker.engine_pid for worker in fleet.workers]

    def kill(job_id: str) -> None:
        for engine in engines:
            # so small a model would be done before we know who runs it
            os.kill(engine, signal.SIGSTOP)
        owner = wait_for(lambda: fleet.owner(job_id), "the job has a worker")
        fleet.worker(owner).kill()
        killed.append(owner)
        for worker in fleet.workers:
            if worker.name != owner:
                os.kill(worker.engine_pid, signal.SIGCONT)

    text, attempts = stream(fleet, ask, 5, kill)
    assert killed, "nobody was killed in the middle"
    assert attempts >= 2, "the job never moved to another worker"
    assert text == ask.text


def stream(fleet: Fleet, ask: Ask, at: int, act: Callable[[str], None]) -> tuple[str, int]:
    """The text of a stream during which `act` is called at the `at`-th token, and how many workers had the job."""
    texts: list[str] = []
    with fleet.client() as client, client.stream("POST", "/generate_stream", json=ask.body) as response:
        job_id = response.headers["x-job-id"]
        for line in response.iter_lines():
            if line.startswith("data:"):
                token = json.loads(line[5:])["token"]
                texts += [] if token["special"] else [token["text"]]
                if len(texts) == at:
                    act(job_id)
    with fleet.client() as client:
        job = client.get(f"/v1/fleet/jobs/{job_id}").raise_for_status().json()
    return "".join(texts), int(job["attempts"])
