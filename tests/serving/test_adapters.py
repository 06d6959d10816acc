"""LoRA adapters through the whole stack: streams with several and none on two workers that compute in float64, against
transformers with the adapters merged; loading and unloading under load; a worker that dies in the middle of a stream.

One adapter is on the workers' command line, the others come while they serve.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import httpx
import pytest
import torch

from tests.support import tiny_models
from tests.support.adapters import merged, write_adapter
from tests.support.fleet import Fleet, wait_for
from tests.support.redis_server import ServerUnderTest

MODEL = "qwen3"
NUM_TOKENS = 300
PROMPTS = ["".join(Random(number).choices(ascii_lowercase + " ", k=30)) for number in range(3)]
"""Equally long, so that the reference needs no padding."""
MODULES = {
    "fr": ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"),
    "sql": ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    "late": ("self_attn.k_proj", "mlp.down_proj"),
}
RANKS = {"fr": 4, "sql": 7, "late": 16}


@dataclass
class Served:
    """`expected` are the tokens of each prompt by the adapter's name, "" for none."""

    fleet: Fleet
    folder: Path
    expected: dict[str, list[list[int]]]


def write_all(folder: Path) -> dict[str, Any]:
    """The model and its adapters; transformers' model by the adapter that is merged into it."""
    base = tiny_models.build(MODEL)
    tiny_models.save(MODEL, folder / "tiny")
    models = {"": base}
    for seed, (name, parts) in enumerate(MODULES.items()):
        modules = [f"model.layers.{layer}.{part}" for layer in (0, 2) for part in parts]
        write_adapter(folder / name, base, modules, rank=RANKS[name], seed=seed)
        models[name] = merged(base, folder / name)
    return models


@torch.inference_mode()
def greedy(model: Any) -> list[list[int]]:
    torch.set_num_threads(1)
    ids = torch.tensor([list(tiny_models.tokenizer().encode(prompt).ids) for prompt in PROMPTS])
    made = model.double().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [list(row) for row in made[:, ids.shape[1] :].tolist()]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    models = write_all(folder)
    server = ServerUnderTest(folder / "redis", ephemeral=True)
    options = {
        "MODEL_ID": str(folder / "tiny"),
        "DTYPE": "float64",
        "LORA_ADAPTERS": f"fr={folder / 'fr'}",
        "MAX_LORAS": "2",
        "INFERFLEET_LEASE": "1.5",
    }
    fleet = Fleet(folder, server.url, options=options)
    try:
        fleet.add_gateway("g1")
        for name in ("w1", "w2"):
            fleet.add_worker(name)
        # workers spend their start on importing, which leaves time
        expected = {name: greedy(model) for name, model in models.items()}
        fleet.wait_until_ready()
        yield Served(fleet, folder, expected)
    finally:
        fleet.__exit__()
        server.stop()


@pytest.fixture()
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.fleet.url, timeout=60) as opened:
        yield opened


@dataclass
class Stream:
    """One answer on its way. `adapter` "" is none."""

    adapter: str
    number: int
    job_id: str = ""
    ids: list[int] = field(default_factory=list)

    async def run(self, client: httpx.AsyncClient) -> None:
        parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "adapter_id": self.adapter or None}
        body = {"inputs": PROMPTS[self.number], "parameters": parameters}
        async with client.stream("POST", "/generate_stream", json=body) as response:
            assert response.status_code == httpx.codes.OK, await response.aread()
            self.job_id = response.headers["x-job-id"]
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    assert "error" not in event, event
                    self.ids.append(event["token"]["id"])

    @property
    def is_in_the_middle(self) -> bool:
        return 2 <= len(self.ids) <= NUM_TOKENS - 2


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


def problems(served: Served, streams: list[Stream]) -> list[str]:
    """Streams that are not what the merged model says, token for token."""
    return [
        f"{one.adapter or 'base'} {one.number}"
        for one in streams
        if one.ids != served.expected[one.adapter][one.number]
    ]


async def load(client: httpx.AsyncClient, served: Served, name: str) -> None:
    body = {"name": name, "source": str(served.folder / name)}
    response = await client.post("/v1/fleet/adapters", json=body)
    assert response.status_code in (200, 201), response.text
    assert response.json()["rank"] == RANKS[name]


def test_every_adapter_answers_in_its_own_way(served: Served) -> None:
    """So that a stream with another one, or with none, would be noticed: at its first tokens already."""
    for number in range(len(PROMPTS)):
        beginnings = {tuple(rows[number][:40]) for rows in served.expected.values()}
        assert len(beginnings) == len(MODULES) + 1
    answered = Stream("fr", 0, ids=list(served.expected["fr"][0]))
    assert problems(served, [answered]) == []
    answered.ids[200] = (answered.ids[200] + 1) % tiny_models.NUM_BYTES
    assert problems(served, [answered]) == ["fr 0"]
    assert problems(served, [Stream("", 0, ids=list(served.expected["fr"][0]))]) == ["base 0"]


async def test_loading_and_unloading_under_load_loses_nothing(served: Served, client: httpx.AsyncClient) -> None:
    """The load is kept up until the last adapter is about to go, however fast the workers are."""
    streams: list[Stream] = []
    is_over = asyncio.Event()

    async def again_and_again(name: str, number: int) -> None:
        while not is_over.is_set():
            stream = Stream(name, number)
            streams.append(stream)
            await stream.run(client)

    def keep_up(*names: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(again_and_again(name, number)) for name in names for number in range(2)]

    def under_way(most_tokens: int) -> set[str]:
        return {stream.adapter for stream in streams if 2 <= len(stream.ids) <= most_tokens}

    tasks = keep_up("", "fr")
    await until(lambda: under_way(NUM_TOKENS // 2) == {"", "fr"})
    await asyncio.gather(*[load(client, served, name) for name in ("sql", "late")])
    tasks += keep_up("sql", "late")
    await until(lambda: len(under_way(NUM_TOKENS // 2)) >= 3)
    is_over.set()
    await until(lambda: all(stream.job_id for stream in streams))
    for name in MODULES:
        assert (await client.delete(f"/v1/fleet/adapters/{name}")).status_code == httpx.codes.NO_CONTENT
    assert len(under_way(NUM_TOKENS - 2)) >= 3, "streams with several adapters were in their middle"
    response = await client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "sql"}})
    assert (response.status_code, response.json()["error"]) == (404, "unknown adapter 'sql'; adapters here: none")
    await asyncio.gather(*tasks)
    assert problems(served, streams) == []
    for name in MODULES:
        await load(client, served, name)


async def test_what_does_not_fit_is_refused_and_harms_nobody(served: Served, client: httpx.AsyncClient) -> None:
    broken = served.folder / "broken"
    write_adapter(broken, tiny_models.build("llama_mha_gelu"), ["model.layers.0.self_attn.k_proj"])
    beside = Stream("fr", 2)
    task = asyncio.create_task(beside.run(client))
    await until(lambda: len(beside.ids) >= 5)
    response = await client.post("/v1/fleet/adapters", json={"name": "broken", "source": str(broken)})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_error")
    assert response.json()["error"]["message"].startswith("adapter broken: ")
    await task
    assert problems(served, [beside]) == []


def test_several_prompts_with_an_adapter_by_the_models_name(served: Served) -> None:
    body = {"model": "fr", "prompt": PROMPTS, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    with served.fleet.client() as client:
        wait_for(lambda: client.get("/v1/models/fr").status_code == httpx.codes.OK, "the adapter is a model")
        answer = client.post("/v1/completions", json=body | {"skip_special_tokens": False}).raise_for_status().json()
    assert answer["model"] == "fr"
    texts = [tiny_models.tokenizer().decode(row[:30], skip_special_tokens=False) for row in served.expected["fr"]]
    assert [choice["text"] for choice in answer["choices"]] == texts


async def test_a_job_goes_on_with_its_adapter_on_another_worker(served: Served, client: httpx.AsyncClient) -> None:
    await load(client, served, "sql")
    stream, beside = Stream("sql", 1), Stream("", 1)
    tasks = [asyncio.create_task(one.run(client)) for one in (stream, beside)]
    await until(lambda: len(stream.ids) >= 40)
    record = (await client.get(f"/v1/fleet/jobs/{stream.job_id}")).json()
    worker = served.fleet.worker(record["worker"])
    worker.kill()
    assert stream.is_in_the_middle, "the kill landed in the middle of the stream"
    await asyncio.gather(*tasks)
    job = (await client.get(f"/v1/jobs/{stream.job_id}")).json()
    assert (job["status"], job["attempts"], job["adapter"]) == ("completed", 2, "sql")
    assert problems(served, [stream, beside]) == []
