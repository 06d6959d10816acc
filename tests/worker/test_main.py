"""The worker process: it waits for Redis, and what it cannot cure it says in one line and leaves with status 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError, StoreUnsupported
from common.settings import WorkerSettings
from common.store.connection import Connection
from tests.support.fake_fleet import Worker, WorkerFleet, card_of
from tests.support.fleet import ROOT
from tests.support.protocol import eventually
from tests.support.redis_server import ServerUnderTest
from tests.support.tiny_model import write_tiny_model
from worker.main import run


async def test_a_worker_waits_for_a_redis_that_is_not_up_yet(own_redis: ServerUnderTest, tmp_path: Path) -> None:
    own_redis.kill()
    with WorkerFleet(tmp_path, own_redis.url) as fleet:
        worker = fleet.start("w1")
        await eventually(lambda: "waiting for Redis" in worker.log.read_text(), limit_s=20, what="it waits")
        assert worker.process.poll() is None
        await leave_by_ctrl_c(fleet.start("w2"))
        own_redis.restart()
        connection = await Connection.open(own_redis.url)
        assert (await card_of(connection)).served_name == "tiny"
        await connection.close()


async def leave_by_ctrl_c(worker: Worker) -> None:
    await eventually(lambda: "waiting for Redis" in worker.log.read_text(), limit_s=20, what="it waits")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(20) == 0
    assert worker.log.read_text().endswith("worker.main: stopped before Redis answered\n")


def test_what_cannot_be_cured_ends_with_one_line_and_status_2(redis_url: str, tmp_path: Path) -> None:
    environment = os.environ | {"REDIS_URL": redis_url, "MODEL_ID": str(write_tiny_model(tmp_path / "tiny"))}
    command = [sys.executable, "-m", "tests.support.fake_worker", "--", "--fail", "the weights do not fit"]
    environment |= {"LOAD_FORMAT": "dummy"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "fake worker: the weights do not fit"
    assert "Traceback" not in ended.stderr


def test_a_server_without_functions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def refuse(url: str) -> Connection:
        raise StoreUnsupported("this is Redis 6.2, but version 7.0 or newer is needed")

    monkeypatch.setattr(Connection, "open", refuse)
    settings = WorkerSettings(redis_url="redis://localhost", model_id=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"Redis 6\.2"):
        run(settings)


def test_a_model_that_is_not_there_is_refused(redis_url: str, tmp_path: Path) -> None:
    settings = WorkerSettings(redis_url=redis_url, model_id=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="check --model-id"):
        run(settings)
