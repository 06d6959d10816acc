"""Adapters through a gateway: loaded, chosen, listed and unloaded; and every refusal on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from common.job import Adapter
from common.store.replies import AdapterEntry, AdapterFinding
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker

LANE = "abcdef"
FR = {"name": "fr", "source": "/adapters/fr"}
FITS = AdapterFinding(digest="0f" * 16, rank=8, place="/real/fr")
ADAPTER = Adapter("fr", "/real/fr", FITS.digest)
PROMPT = {"inputs": "hello", "parameters": {"max_new_tokens": 3}}


async def asked(worker: ScriptedWorker, name: str) -> AdapterEntry:
    """What is registered and waits for a worker's word."""

    async def loading() -> AdapterEntry | None:
        entry = await worker.fleet.adapter(LANE, name)
        return entry if entry is not None and entry.state == "loading" else None

    entry = await eventually(loading, what=f"adapter {name} is registered")
    assert isinstance(entry, AdapterEntry)
    return entry


async def load(
    gateway: LiveGateway, worker: ScriptedWorker, found: AdapterFinding = FITS, name: str = "fr", **body: Any
) -> httpx.Response:
    """POST, with a worker that says `found`."""
    post = asyncio.create_task(gateway.client.post("/v1/fleet/adapters", json=FR | {"name": name} | body))
    entry = await asked(worker, name)
    assert await worker.store.settle_adapter(name, entry.token, found) is not None
    return await post


async def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


async def test_an_adapter_is_loaded_chosen_and_unloaded(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    response = await load(gateway, worker, name="team/fr", model="demo")
    assert response.status_code == 201
    shown = response.json()
    assert {"name": "team/fr", "object": "adapter", "model": "demo", "lane": LANE, "state": "ready"}.items() <= (
        shown.items()
    )
    assert (shown["rank"], shown["source"], shown["digest"], shown["error"]) == (8, "/adapters/fr", FITS.digest, None)
    again = await gateway.client.post("/v1/fleet/adapters", json=FR | {"name": "team/fr"})
    assert (again.status_code, again.json()) == (200, shown)
    assert (await gateway.client.get("/v1/fleet/adapters")).json() == {"object": "list", "data": [shown]}
    worker.hold_at = 2
    running = await gateway.submit(input=PROMPT | {"model": "team/fr"})
    await eventually(lambda: worker.running, what="the job runs")
    assert (await gateway.client.delete("/v1/fleet/adapters/team/fr?model=demo")).status_code == 204
    assert (await gateway.client.get("/v1/fleet/adapters")).json()["data"] == []
    refused = await gateway.client.post("/generate", json=PROMPT | {"parameters": {"adapter_id": "team/fr"}})
    assert (refused.status_code, refused.json()["error"]) == (404, "unknown adapter 'team/fr'; adapters here: none")
    worker.hold_at = 10
    job = await gateway.finished(running)
    assert (job["status"], job["adapter"], job["model"]) == ("completed", "team/fr", "demo")


async def test_every_door_leads_to_the_adapter(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    await load(gateway, worker)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "model": "fr"}
    adapted = {"inputs": "hello", "parameters": {"max_new_tokens": 3, "adapter_id": "fr"}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate", adapted),
        ("/generate_stream", adapted),
        ("/", adapted | {"stream": True}),
        ("/generate", PROMPT | {"model": "fr"}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "model": "fr"}),
        ("/v1/jobs?wait=20", {"input": PROMPT, "model": "fr"}),
        ("/v1/jobs?wait=20", {"input": adapted}),
        ("/v1/jobs?wait=20", {"input": chat}),
    ]
    worker.hold_at = 0
    posts = [asyncio.create_task(gateway.client.post(path, json=body)) for path, body in bodies]
    await eventually(lambda: len(worker.running) == len(bodies) + 1, what="all run: /v1/completions are two")
    assert {running.taken.job.adapter for running in worker.running.values()} == {ADAPTER}
    worker.hold_at = 10
    answers = [await post for post in posts]
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    assert answers[4].json()["model"] == answers[6].json()["model"] == "fr"
    assert '"model":"fr"' in answers[5].text
    assert [(job.json()["model"], job.json()["adapter"]) for job in answers[7:]] == [
        ("demo", "fr"),
        ("demo", "fr"),
        ("fr", "fr"),
    ]
    base = await gateway.finished(await gateway.submit(max_new_tokens=3))
    assert base["adapter"] is None


async def test_one_that_another_gateway_has_loaded_a_moment_ago_is_known(
    gateway: LiveGateway, worker: ScriptedWorker
) -> None:
    for name, path, body in (
        ("fr", "/tokenize", {"inputs": "hello", "model": "fr"}),
        ("sql", "/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 3, "adapter_id": "sql"}}),
    ):
        registry = gateway.services.registry
        registry._looked_at = -1e9
        entry = await worker.fleet.put_adapter(LANE, name, f"/adapters/{name}")
        await worker.store.settle_adapter(name, entry.token, FITS)
        assert name not in registry.models[LANE].adapters, "nobody has told it"
        assert (await gateway.client.post(path, json=body)).status_code == 200


async def test_adapters_are_listed_as_models_with_their_base(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    await load(gateway, worker)
    rows = (await gateway.client.get("/v1/models")).json()["data"]
    assert [(row["id"], row["parent"], row["root"]) for row in rows] == [
        ("demo", None, "inferfleet/demo"),
        ("alias/of-demo", None, "inferfleet/demo"),
        ("fr", "demo", "/adapters/fr"),
    ]
    assert (await gateway.client.get("/v1/models/fr")).json() == rows[2]
    response = await gateway.client.post("/v1/completions", json={"prompt": "x", "model": "de"})
    message = "unknown model 'de'; served here: demo, alias/of-demo, fr"
    assert await error_of(response) == (404, "model_not_found", message)


async def test_what_does_not_fit_is_said_and_forgotten(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    misfit = "adapter fr: it is for 30 layers, the model has 24"
    response = await load(gateway, worker, AdapterFinding(error=misfit))
    assert await error_of(response) == (422, "adapter_error", misfit)
    assert response.json()["error"]["param"] == "source"
    assert await worker.fleet.adapters(LANE) == []
    assert (await load(gateway, worker)).status_code == 201


async def test_without_a_workers_word_it_stays_registered(
    gateway: LiveGateway, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.routes.fleet.ADAPTER_WAIT_S", 0.3)
    response = await gateway.client.post("/v1/fleet/adapters", json=FR)
    message = "no worker has looked at adapter 'fr' yet; it stays registered, and `inferfleet ctl adapter list` shows"
    status, code, said = await error_of(response)
    assert (status, code, said) == (503, "adapter_loading", f"{message} when it is ready")
    assert response.headers["retry-after"] == "1"
    (row,) = (await gateway.client.get("/v1/fleet/adapters")).json()["data"]
    assert (row["name"], row["state"], row["rank"], row["digest"]) == ("fr", "loading", None, None)
    entry = await asked(worker, "fr")
    await worker.store.settle_adapter("fr", entry.token, FITS)
    assert (await gateway.client.post("/v1/fleet/adapters", json=FR)).status_code == 200


async def test_two_operators_get_one_answer_or_are_told(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    first = asyncio.create_task(gateway.client.post("/v1/fleet/adapters", json=FR))
    entry = await asked(worker, "fr")
    other = await gateway.client.post("/v1/fleet/adapters", json=FR | {"source": "/other"})
    message = "adapter 'fr' is registered from '/adapters/fr'; unload it first"
    assert await error_of(other) == (409, "adapter_exists", message)
    assert (await gateway.client.delete("/v1/fleet/adapters/fr")).status_code == 204
    message = "adapter 'fr' was unloaded while it was loading"
    assert await error_of(await first) == (409, "adapter_unloaded", message)
    assert await worker.store.settle_adapter("fr", entry.token, FITS) is None


NAME = "an adapter's name is 1 to 96 of [A-Za-z0-9._-], in parts divided by /"
ANY_MODEL = "'tgi' means any model that is served; give the adapter another name"
SOURCE = "an adapter's source is a folder or owner/name[@revision], of at most 1024 characters"
URL = "an adapter's source is no URL but a folder or owner/name[@revision] of a hub"
REFUSED: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({"source": "/a"}, 422, "validation", "name", NAME),
    (FR | {"name": "a b"}, 422, "validation", "name", NAME),
    (FR | {"name": "../fr"}, 422, "validation", "name", NAME),
    (FR | {"name": "x" * 97}, 422, "validation", "name", NAME),
    (FR | {"name": 5}, 422, "validation", "name", "`name` must be a string"),
    (FR | {"name": "demo"}, 422, "validation", "name", "'demo' is the name of a model; give the adapter another one"),
    (FR | {"name": "tgi"}, 422, "validation", "name", ANY_MODEL),
    ({"name": "fr"}, 422, "validation", "source", SOURCE),
    (FR | {"source": "/a\0b"}, 422, "validation", "source", SOURCE),
    (FR | {"source": "/" + "x" * 1024}, 422, "validation", "source", SOURCE),
    (FR | {"source": "https://hub/fr"}, 422, "validation", "source", URL),
    (FR | {"source": ["/a"]}, 422, "validation", "source", "`source` must be a string"),
    (FR | {"rank": 8}, 422, "unsupported_parameter", "rank", "`rank` is not supported: no such field is known here"),
    (FR | {"model": "gpt"}, 404, "model_not_found", "model", "unknown model 'gpt'; served here: demo, alias/of-demo"),
]


async def test_refusals_change_nothing(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    for body, status, code, param, message in REFUSED:
        response = await gateway.client.post("/v1/fleet/adapters", json=body)
        assert await error_of(response) == (status, code, message), body
        assert response.json()["error"]["param"] == param
    assert await worker.fleet.adapters(LANE) == []
    for path, code, message in (
        ("none", "adapter_not_found", "no adapter 'none' of demo; adapters here: none"),
        ("fr?model=gpt", "model_not_found", "unknown model 'gpt'; served here: demo, alias/of-demo"),
    ):
        response = await gateway.client.delete(f"/v1/fleet/adapters/{path}")
        assert await error_of(response) == (404, code, message)
