"""`inferfleet ctl adapter` beside a gateway and a worker of this process: what it asks for, prints and refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.store.connection import Connection
from common.store.replies import AdapterFinding
from ops.cli import ctl
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker

FITS = AdapterFinding(digest="0f" * 16, rank=8, place="/real/fr")


@pytest.fixture()
async def worker(connection: Connection) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(connection) as running:
        yield running


@pytest.fixture()
async def gateway(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[LiveGateway]:
    async with LiveGateway(redis_url) as running:
        yield running


async def run(gateway: LiveGateway, *arguments: str) -> None:
    assert await asyncio.to_thread(ctl.main, ["adapter", *arguments, "--url", gateway.url]) == 0


async def settle(worker: ScriptedWorker, found: AdapterFinding) -> str:
    """Be the worker that looks at what is loading; its source."""
    entries = await eventually(lambda: worker.fleet.adapters("abcdef"), what="a registration")
    await worker.store.settle_adapter(entries[0].name, entries[0].token, found)
    return str(entries[0].source)


async def test_load_list_and_unload(
    gateway: LiveGateway,
    worker: ScriptedWorker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    loading = asyncio.create_task(run(gateway, "load", "team/fr", "./fr", "--model", "demo", "--json"))
    assert await settle(worker, FITS) == str(tmp_path / "fr"), "workers do not know where we are"
    await loading
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["state"], shown["rank"]) == ("team/fr", "ready", 8)
    await run(gateway, "list")
    table = capsys.readouterr().out
    for word in ("name", "model", "state", "rank", "source", "digest", "team/fr", "demo", "ready", FITS.digest):
        assert word in table, word
    await run(gateway, "unload", "team/fr")
    capsys.readouterr()
    await run(gateway, "list")
    assert capsys.readouterr().out.strip() == "none"


async def test_refusals_are_one_sentence(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    async def problem(*arguments: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            await run(gateway, *arguments)
        return str(caught.value)

    misfit = "adapter fr: it is for another model"
    loading = asyncio.create_task(problem("load", "fr", "owner/fr"))
    assert await settle(worker, AdapterFinding(error=misfit)) == "owner/fr"
    assert await loading == misfit
    assert await problem("unload", "fr") == "no adapter 'fr' of demo; adapters here: none"
    assert await problem("load", "fr") == "adapter load needs a name and a source"
    assert await problem("unload") == "adapter unload needs a name and nothing else"
    for ignored in (("fr",), ("--model", "demo")):
        assert await problem("list", *ignored) == "adapter list shows those of all models; it needs no name"
    assert (
        await problem("load", "fr", "/x", "--model", "gpt") == "unknown model 'gpt'; served here: demo, alias/of-demo"
    )
