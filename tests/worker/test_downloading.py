"""A worker whose model comes from a hub: it loads as far as the fleet can see, and ends promptly when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from common.errors import ConfigurationError, Unavailable
from common.settings import WorkerSettings
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.replies import WorkerInfo
from tests.support.fake_engine import ready
from tests.support.fake_fleet import VOCABULARY, Follower
from tests.support.fake_worker import FAKE_ENGINE
from tests.support.fleet import ROOT, wait_for
from tests.support.hub_server import HubServer
from tests.support.protocol import eventually, make_card, make_job
from tests.support.tiny_model import write_tiny_model
from worker import announce
from worker.agent import Agent
from worker.announce import read_model
from worker.engine_keeper import EngineKeeper
from worker.pipe import Progress, Ready, Step

MODEL = "owner/big"
NUM_BYTES, NUM_HELD_BYTES = 48_000_000, 24_000_000
FAREWELL = "stopped while the model was fetched; the same command goes on with the files that are missing"


@pytest.fixture()
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """Serves a tiny model with large weights, and stops in their middle."""
    files = {path.name: path.read_bytes() for path in write_tiny_model(tmp_path / "tiny").iterdir()}
    with HubServer({MODEL: files | {"model.safetensors": bytes(NUM_BYTES)}}, hold_after=NUM_HELD_BYTES) as server:
        yield server


def settings_of(redis_url: str) -> WorkerSettings:
    return WorkerSettings(redis_url=SecretStr(redis_url), model_id=MODEL, worker_id="w1")


async def announce_earlier(fleet: FleetStore, folder: Path, settings: WorkerSettings) -> str:
    """The lane of a worker that has served this model before."""
    card = announce.make_card(read_model(folder, settings), ready({}, VOCABULARY, 64), settings)
    await fleet.announce(card, (folder / "tokenizer.json").read_bytes())
    return card.lane


async def until_it_holds(hub: HubServer, fleet: FleetStore) -> WorkerInfo:
    """What the fleet sees of a worker whose download stands still."""
    seen: list[WorkerInfo] = []

    async def has_come_far() -> bool:
        seen[:] = await fleet.workers()
        return hub.is_holding.is_set() and any(info.done > 0 for info in seen)

    await eventually(has_come_far, what="a download under way", limit_s=20)
    (info,) = seen
    return info


async def test_jobs_wait_for_a_worker_that_still_downloads(
    hub: HubServer, connection: Connection, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch, tmp_path / "cache")
    fleet, settings = FleetStore(connection), settings_of(redis_url)
    follower = Follower(connection, await announce_earlier(fleet, tmp_path / "tiny", settings))
    with pytest.raises(Unavailable):
        await follower.submit(1, 40, orphan_grace_s=10)
    agent = Agent(settings, connection, command=FAKE_ENGINE)
    task = asyncio.create_task(agent.run())
    try:
        info = await until_it_holds(hub, fleet)
        assert (info.id, info.state, info.model, info.phase) == ("w1", "loading", MODEL, "download")
        assert NUM_HELD_BYTES / 2 < info.done <= NUM_HELD_BYTES
        num_small = sum(len(data) for name, data in hub.models[MODEL].items() if name.endswith(("json", "jinja")))
        assert info.total == NUM_BYTES + num_small
        job = await follower.submit(1, 40, orphan_grace_s=10)
        await refuse_others(fleet, connection)
        hub.release.set()
        await follower.assert_exact(job)
        assert [info.state for info in await fleet.workers()] == ["ready"]
        agent.drain()
        assert await asyncio.wait_for(task, 20) == 0
        assert not agent.is_downloading
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def refuse_others(fleet: FleetStore, connection: Connection) -> None:
    """A job of another model has nothing to wait for."""
    await fleet.announce(make_card(), b"{}")
    with pytest.raises(Unavailable):
        await JobStore(connection).submit(
            make_job(orphan_grace_s=10), gateway="g1", max_queued_tokens=10**6, tenant_max_jobs=10
        )


def let_it_hang(hub: HubServer) -> None:
    """Nothing more ever comes from the network."""


def let_it_flow(hub: HubServer) -> None:
    hub.release.set()


@pytest.mark.parametrize(
    ("number", "go_on", "num_left"), [(signal.SIGTERM, let_it_hang, 1), (signal.SIGINT, let_it_flow, 0)]
)
async def test_a_signal_ends_a_download_with_one_line(
    hub: HubServer,
    connection: Connection,
    redis_url: str,
    tmp_path: Path,
    number: signal.Signals,
    go_on: Callable[[HubServer], None],
    num_left: int,
) -> None:
    environment = os.environ | hub.environment(str(tmp_path / "cache"))
    environment |= {"REDIS_URL": redis_url, "MODEL_ID": MODEL, "INFERFLEET_WORKER_ID": "w1"}
    command = [sys.executable, "-m", "tests.support.fake_worker"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=output)
    try:
        info = await until_it_holds(hub, FleetStore(connection))
        assert (info.phase, info.pid) == ("download", process.pid)
        process.send_signal(number)
        wait_for(lambda: FAREWELL in log.read_text(), "the worker has heard it")
        go_on(hub)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    lines = log.read_text().splitlines()
    assert [FAREWELL in line for line in lines] == [False, True], lines
    assert "downloading owner/big: 48 MB" in lines[0]
    assert await FleetStore(connection).workers() == [], "nobody waits for it any more"
    assert not list((tmp_path / "cache").rglob("model.safetensors")), "it did not go on to the end"
    left = list((tmp_path / "cache").rglob("*.incomplete"))
    assert len(left) == num_left, "a file that nobody can use is cleared away when its thread can do that"


HALF_AN_ENGINE = """
import pathlib, socket, sys
from worker.pipe import Progress, encode
agent, mark = socket.socket(fileno=int(sys.argv[3])), pathlib.Path(sys.argv[1])
if not mark.exists():
    mark.touch()
    agent.sendall(encode(Progress("weights", 1, 2)))
"""


class Witness:
    """Keeps what was known of an engine's progress when it died."""

    keeper: EngineKeeper

    def __init__(self) -> None:
        self.seen: list[Progress] = []

    def on_ready(self, ready: Ready) -> None: ...

    def on_step(self, step: Step) -> None: ...

    def on_engine_lost(self) -> None:
        self.seen.append(self.keeper.progress)


async def test_an_engine_that_dies_half_loaded_leaves_no_progress_behind(tmp_path: Path) -> None:
    witness, command = Witness(), (sys.executable, "-c", HALF_AN_ENGINE, str(tmp_path / "mark"))
    keeper = witness.keeper = EngineKeeper(command, {}, time.monotonic, witness)
    with pytest.raises(ConfigurationError, match="died 3 times"):
        await keeper.run("{}")
    assert witness.seen == [Progress("weights", 1, 2), Progress("starting", 0, 0)]
    await keeper.close()
