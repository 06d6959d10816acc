"""Continuous batching is real and exact: 64 mixed requests through HTTP, Redis and one worker, against each one alone.

The worker runs in float64 with a small KV pool and a small prompt budget, so that it must preempt and cut prompts.
"Alone" is a fleet of its own: one request at a time, no prefix cache, nothing that others could have left behind.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch

from ops.demo_model.prompts import examinations, long_streams
from tests.support import oracle
from tests.support.fleet import DEMO_MODEL, Fleet
from tests.support.paged import load_decoder, paged_logits
from tests.support.redis_server import ServerUnderTest

pytestmark = pytest.mark.timeout(240)

LANGUAGES = ("en", "ja", "zh", "vi")
PREFIX = "You are a careful assistant. You answer shortly and you count slowly. " * 4
SMALL = {
    "DTYPE": "float64",
    "INFERFLEET_KV_TOKENS": "1024",
    "MAX_TOTAL_TOKENS": "640",
    "MAX_BATCH_PREFILL_TOKENS": "64",
}
ALONE = {"DTYPE": "float64", "PREFIX_CACHING": "false"}
NUM_REQUESTS, NUM_CANCELLED, NUM_CANCELLED_TOKENS = 64, 8, 400
NUM_SHORT_TOKENS, NUM_LONG_TOKENS = 24, 60
NUM_SHORT_ANSWERS_FIRST = 14
PENALTY = 1.2
MAX_DELAY_S = 0.3


@dataclass(frozen=True)
class Ask:
    """One request on TGI's route. `expected` is what transformers picks, empty where it knows no such request."""

    kind: str
    inputs: str
    parameters: dict[str, Any]
    expected: tuple[int, ...] = ()
    margin: float = float("inf")
    is_long: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "parameters": self.parameters | {"details": True}}


# ------------------------------------------------------------------ requests, chosen by the reference


def chat(question: str, system: str = "") -> str:
    """A prompt as the chat template of the demo model writes it, but for the first token."""
    before = f"<|system|>{system.strip()}<|end|>" if system else ""
    return f"{before}<|user|>{question}<|end|><|assistant|>"


def judged(kind: str, prompts: list[str], num_tokens: int, penalty: float = 1.0) -> list[Ask]:
    """A greedy request for each prompt, those with the clearest decisions first."""
    greedy = oracle.exact_greedy([oracle.prompt_ids(prompt) for prompt in prompts], num_tokens, penalty)
    parameters = {"max_new_tokens": num_tokens} | (
        {"top_n_tokens": 5} if penalty == 1.0 else {"repetition_penalty": penalty}
    )
    made = [
        Ask(kind, prompt, parameters, row.ids, row.margin, num_tokens == NUM_LONG_TOKENS)
        for prompt, row in zip(prompts, greedy, strict=True)
    ]
    return sorted(made, key=lambda ask: -ask.margin)


def of_each_language(kind: str, count: int, system: str = "") -> list[Ask]:
    found = []
    for language in LANGUAGES:
        prompts = [chat(row.prompt, system) for row in examinations() if row.language == language]
        found += judged(kind, prompts[:3], NUM_SHORT_TOKENS)[:count]
    return found


def stopped(ask: Ask) -> Ask:
    """The same request with a stop string out of the middle of its own answer; TGI looks at the ends of tokens."""
    texts = [oracle.text_of(list(ask.expected[: index + 1])) for index in range(len(ask.expected))]
    stop = next(text[-3:] for text in texts[len(texts) // 2 :] if not text.endswith("\N{REPLACEMENT CHARACTER}"))
    length = next(index + 1 for index, text in enumerate(texts) if text.endswith(stop))
    return Ask("stopped", ask.inputs, ask.parameters | {"stop": [stop]}, ask.expected[:length], ask.margin)


def compared_requests() -> list[Ask]:
    """28 greedy requests, in four languages, whose answers transformers knows."""
    bare = of_each_language("greedy", 2)
    long_prompts = [chat(row.prompt) for row in long_streams()[:6]]
    penalised = [chat(row.prompt) for row in examinations()[:8]]
    return [
        *bare,
        *of_each_language("greedy", 2, PREFIX),
        *(stopped(ask) for ask in bare[::2]),
        *judged("repetition", penalised, NUM_SHORT_TOKENS, PENALTY)[:4],
        *judged("greedy", long_prompts, NUM_LONG_TOKENS)[:4],
    ]


def seeded_parameters(index: int) -> dict[str, Any]:
    given: dict[str, Any] = {"seed": 1000 + index, "ignore_eos": True}
    if index % 4 == 0:
        return given | {"repetition_penalty": 1.2, "frequency_penalty": 0.4}
    if index % 4 == 1:
        return given | {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    if index % 4 == 2:
        return given | {"do_sample": True, "top_k": 20, "typical_p": 0.9, "stop": ["学習と", "never said"]}
    return given | {"do_sample": True, "temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.1}


def free_requests() -> list[Ask]:
    """28 requests that only this engine can repeat: seeds, penalties, no natural end. 20 of them are long."""
    generator, rows, made = random.Random(4), examinations(), []
    for index in range(NUM_REQUESTS - NUM_CANCELLED - 28):
        is_long = index >= 8
        # what is long grows out of a small beginning: nobody could foresee how much room it will need
        numbers = " ".join(str(generator.randint(1, 99)) for _ in range(0 if is_long else 40))
        beginning = PREFIX if index % 2 else numbers
        num_tokens = generator.randint(NUM_LONG_TOKENS + 10, NUM_LONG_TOKENS + 40) if is_long else 16
        parameters = seeded_parameters(index // 2) | {"max_new_tokens": num_tokens}
        made.append(Ask("free", f"{beginning} {rows[index].prompt}", parameters, is_long=is_long))
    return made


# ------------------------------------------------------------------ the run


@dataclass
class Crowd:
    """All requests at random moments. The long ones begin after some short answers: by then the engine expects short
    ones, lets in too many, and must preempt."""

    fleet: Fleet
    client: httpx.AsyncClient
    generator: random.Random = field(default_factory=lambda: random.Random(9))
    num_answered: int = 0
    expects_short: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, ask: Ask) -> dict[str, Any]:
        delay_s = self.generator.random() * MAX_DELAY_S
        if ask.is_long:
            await self.expects_short.wait()
        await asyncio.sleep(delay_s)
        answer = await generate(self.client, ask)
        self.num_answered += 1
        if self.num_answered >= NUM_SHORT_ANSWERS_FIRST:
            self.expects_short.set()
        return answer

    async def run_and_cancel(self, index: int) -> dict[str, Any]:
        """The job, cancelled when it had some tokens and was to have hundreds more."""
        delay_s = self.generator.random() * MAX_DELAY_S
        await self.expects_short.wait()
        await asyncio.sleep(delay_s)
        job = await submit(self.client, index, NUM_CANCELLED_TOKENS)
        while job["num_tokens"] < 10 + 8 * index:
            assert job["status"] in ("queued", "in_progress")
            await asyncio.sleep(0.02)
            job = (await self.client.get(f"/v1/jobs/{job['id']}")).json()
        await self.client.post(f"/v1/jobs/{job['id']}/cancel")
        return dict((await self.client.get(f"/v1/jobs/{job['id']}?wait=30")).json())


async def generate(client: httpx.AsyncClient, ask: Ask) -> dict[str, Any]:
    response = await client.post("/generate", json=ask.body)
    assert response.status_code == httpx.codes.OK, response.text
    return dict(response.json())


async def submit(client: httpx.AsyncClient, index: int, num_tokens: int, wait: str = "") -> dict[str, Any]:
    parameters = seeded_parameters(index) | {"max_new_tokens": num_tokens}
    question = examinations()[index].prompt
    response = await client.post(
        f"/v1/jobs{wait}", json={"input": {"inputs": PREFIX + question, "parameters": parameters}}
    )
    assert response.is_success, response.text
    return dict(response.json())


def connect(fleet: Fleet) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=fleet.url, timeout=100, limits=httpx.Limits(max_connections=NUM_REQUESTS))


@dataclass
class Runs:
    asks: list[Ask]
    mixed: list[dict[str, Any]] = field(default_factory=list)
    alone: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[dict[str, Any]] = field(default_factory=list)
    cancelled_alone: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    stats_alone: dict[str, float] = field(default_factory=dict)

    async def run(self, small: Fleet, large: Fleet) -> None:
        async with connect(small) as crowd_client, connect(large) as client:
            crowd = Crowd(small, crowd_client)
            together = asyncio.gather(
                asyncio.gather(*(crowd.send(ask) for ask in self.asks)),
                asyncio.gather(*(crowd.run_and_cancel(index) for index in range(NUM_CANCELLED))),
            )
            self.alone = [await generate(client, ask) for ask in self.asks]
            self.mixed, self.cancelled = map(list, await together)
            for index, job in enumerate(self.cancelled):
                self.cancelled_alone.append(await submit(client, index, job["num_tokens"], "?wait=60"))
        self.stats, self.stats_alone = statistics(small), statistics(large)

    def of_kind(self, *kinds: str) -> list[tuple[Ask, dict[str, Any]]]:
        return [pair for pair in zip(self.asks, self.mixed, strict=True) if pair[0].kind in kinds]


def statistics(fleet: Fleet) -> dict[str, float]:
    """Counters of the engine since its start, as `ctl workers --json` shows them."""
    return dict(fleet.worker_states()[0]["stats"])


def tokens(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerUnderTest]]:
    started = [ServerUnderTest(tmp_path_factory.mktemp(name), ephemeral=True) for name in ("crowd", "alone")]
    yield started
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def fleets(servers: list[ServerUnderTest]) -> list[Fleet]:
    """The small one of the crowd, and the large one in which everybody is alone."""
    options = (SMALL, ALONE)
    return [Fleet(server.data_dir, server.url, options=o) for server, o in zip(servers, options, strict=True)]


@pytest.fixture(scope="module")
def runs(fleets: list[Fleet]) -> Iterator[Runs]:
    with ThreadPoolExecutor() as threads:
        compared = threads.submit(compared_requests)
        with fleets[0], fleets[1]:
            made = Runs(compared.result() + free_requests())
            asyncio.run(made.run(*fleets))
            yield made


# ------------------------------------------------------------------ what it must show


def test_the_run_was_what_it_claims(runs: Runs) -> None:
    assert len(runs.asks) + len(runs.cancelled) == NUM_REQUESTS
    assert runs.stats["batch_max"] >= 16
    assert runs.stats["preemptions"] >= 5
    assert runs.stats["prefix_hits"] >= 5
    assert runs.stats["chunked_prompts"] >= 5
    assert len(runs.cancelled) >= 5
    for job in runs.cancelled:
        assert job["status"] == "cancelled"
        assert 2 <= job["num_tokens"] < NUM_CANCELLED_TOKENS
    texts = [answer["generated_text"] for answer in runs.mixed]
    assert sum(any(ord(character) > 0x3000 for character in text) for text in texts) >= 16
    alone = runs.stats_alone
    assert alone["batch_max"] == 1
    assert alone["preemptions"] == alone["prefix_hits"] == alone["chunked_prompts"] == 0


def test_company_changes_nothing(runs: Runs) -> None:
    assert [tokens(answer) for answer in runs.mixed] == [tokens(answer) for answer in runs.alone]
    assert [answer["generated_text"] for answer in runs.mixed] == [answer["generated_text"] for answer in runs.alone]
    reasons = [answer["details"]["finish_reason"] for answer in runs.mixed]
    assert reasons == [answer["details"]["finish_reason"] for answer in runs.alone]
    assert set(reasons) == {"length", "eos_token", "stop_sequence"}


def test_a_cancelled_request_had_the_text_it_has_alone(runs: Runs) -> None:
    assert [job["num_tokens"] for job in runs.cancelled] == [job["num_tokens"] for job in runs.cancelled_alone]
    assert [job["output_text"] for job in runs.cancelled] == [job["output_text"] for job in runs.cancelled_alone]
    assert len({job["output_text"] for job in runs.cancelled}) >= 5


def test_greedy_is_what_transformers_picks(runs: Runs) -> None:
    compared = runs.of_kind("greedy", "stopped", "repetition")
    assert len(compared) == 28
    for ask, answer in compared:
        assert tuple(tokens(answer)) == ask.expected, ask.inputs
    for _, answer in runs.of_kind("stopped"):
        assert answer["details"]["finish_reason"] == "stop_sequence"


def reference_scores(ask: Ask) -> Any:
    penalty = ask.parameters.get("repetition_penalty", 1.0)
    return oracle.exact_logits(oracle.prompt_ids(ask.inputs), list(ask.expected), penalty)


def logprob_error(answer: dict[str, Any], scores: Any) -> float:
    """Largest difference between what the answer says of its tokens and their alternatives and the reference."""
    wanted, error = scores.log_softmax(-1), 0.0
    details = answer["details"]
    for position, (token, tops) in enumerate(zip(details["tokens"], details["top_tokens"], strict=True)):
        for seen in [token, *tops]:
            error = max(error, abs(seen["logprob"] - float(wanted[position, seen["id"]])))
    return error


def logit_error(compared: list[tuple[Ask, Any]], seed: int = 0) -> float:
    """Largest difference of any logit, when the decoder computes the same sequences together in chunks."""
    sequences = [oracle.prompt_ids(ask.inputs) + list(ask.expected) for ask, _ in compared]
    computed, _ = paged_logits(load_decoder(DEMO_MODEL, torch.float64), sequences, seed)
    pairs = zip(computed, compared, strict=True)
    return max(float((ours[-len(wanted) - 1 : -1] - wanted).abs().max()) for ours, (_, wanted) in pairs)


def test_margins_are_a_hundred_times_the_error(runs: Runs) -> None:
    """Otherwise equal tokens would say nothing: the closest decision is far wider than rounding."""
    compared = [(ask, reference_scores(ask)) for ask, _ in runs.of_kind("greedy", "stopped", "repetition")]
    plain = [pair for pair in compared if pair[0].kind == "greedy"]
    answers = [answer for _, answer in runs.of_kind("greedy")]
    error = max(logprob_error(answer, scores) for answer, (_, scores) in zip(answers, plain, strict=True))
    error = max(error, logit_error(plain))
    assert 0.0 < error < 1e-3
    for ask, scores in compared:
        best = scores.topk(2)
        assert tuple(best.indices[:, 0].tolist()) == ask.expected
        assert float((best.values[:, 0] - best.values[:, 1]).min()) > 100 * error, (ask.inputs, error)


def test_a_worker_that_mixes_up_blocks_is_told_apart(runs: Runs, fleets: list[Fleet]) -> None:
    """Runs last: from here on the crowd's worker is one whose prefix cache looks at places, not at tokens."""
    fleets[0].replace_worker("w1", "tests.support.wrong_worker")
    chosen = [ask for ask, _ in runs.of_kind("greedy") if not ask.is_long]
    with fleets[0].client() as client:
        answers = [client.post("/generate", json=ask.body).raise_for_status().json() for ask in chosen]
    assert statistics(fleets[0])["prefix_hits"] >= 5
    assert [tuple(tokens(answer)) for answer in answers] != [ask.expected for ask in chosen]
