"""The engine child: its settings and environment, its pipe, and that it never outlives the agent."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from common.errors import WireError
from common.job import SamplingParams
from common.settings import WorkerSettings
from tests.support.fake_engine import MAX_UNCOMMITTED_STEPS, Vocabulary, oracle
from tests.support.fake_worker import FAKE_ENGINE
from tests.support.fleet import ROOT, process_state
from tests.support.protocol import eventually
from tests.support.tiny_model import byte_tokenizer_json, write_tiny_model
from worker.engine_client import ALLOCATOR, EngineProcess, engine_environment, num_cores, settings_json
from worker.pipe import Abort, Commit, Failed, Message, Progress, Ready, Step, Stop, Submit

ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
VOCABULARY = Vocabulary(byte_tokenizer_json())


async def start(folder: Path, *options: str) -> EngineProcess:
    model = write_tiny_model(folder / "tiny")
    return await EngineProcess.start((*FAKE_ENGINE, *options), settings_json(WorkerSettings(), str(model)), ENVIRONMENT)


async def receive(engine: EngineProcess) -> Message:
    message = await asyncio.wait_for(engine.receive(), 20)
    assert message is not None
    return message


async def until_ready(engine: EngineProcess) -> Ready:
    while not isinstance(message := await receive(engine), Ready):
        assert isinstance(message, Progress)
    return message


def submit(seed: int, num_tokens: int, prompt: bytes = b"x", output_ids: list[int] | None = None) -> Submit:
    params = SamplingParams(max_new_tokens=num_tokens, seed=seed)
    return Submit(
        request_id="r",
        epoch=1,
        prompt_ids=list(prompt),
        output_ids=output_ids or [],
        params=params,
        eos_token_ids=[257],
    )


async def tokens(engine: EngineProcess, count: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < count:
        message = await receive(engine)
        assert isinstance(message, Step)
        for run in message.runs:
            ids += run.ids
        engine.send(Commit(message.step))
    return ids


async def test_steps_come_until_the_request_ends_and_stop_ends_the_process(tmp_path: Path) -> None:
    engine = await start(tmp_path, "--step-ms", "0")
    ready = await until_ready(engine)
    assert ready.kv_tokens > 0
    engine.send(submit(3, 20))
    assert await tokens(engine, 20) == oracle(VOCABULARY, 3, 20).ids
    engine.send(Stop())
    assert await asyncio.wait_for(engine.receive(), 20) is None
    assert await engine.close() == 0


async def test_a_request_goes_on_behind_the_tokens_it_has(tmp_path: Path) -> None:
    engine = await start(tmp_path, "--step-ms", "0")
    await until_ready(engine)
    whole = oracle(VOCABULARY, 3, 20).ids
    engine.send(submit(3, 20, output_ids=whole[:15]))
    assert await tokens(engine, 5) == whole[15:]
    assert whole[15:] != whole[:5], "starting over would look different"
    await engine.close()


async def test_the_engine_pauses_without_commits_and_goes_on_with_them(tmp_path: Path) -> None:
    engine = await start(tmp_path, "--step-ms", "0")
    await until_ready(engine)
    engine.send(submit(3, 200))
    steps = []
    with pytest.raises(TimeoutError):
        while True:
            message = await asyncio.wait_for(engine.receive(), 0.5)
            assert isinstance(message, Step)
            steps.append(message.step)
    assert len(steps) == MAX_UNCOMMITTED_STEPS
    engine.send(Commit(steps[-1]))
    assert isinstance(await receive(engine), Step)
    engine.send(Abort(["r"]))
    await engine.close()


async def test_an_engine_that_dies_ends_the_pipe(tmp_path: Path) -> None:
    engine = await start(tmp_path)
    await until_ready(engine)
    os.kill(engine.pid, signal.SIGKILL)
    while await asyncio.wait_for(engine.receive(), 20) is not None:
        pass
    assert await engine.close() == -signal.SIGKILL
    engine.send(Commit(1))


async def test_an_engine_that_does_not_leave_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine_client.STOP_LIMIT_S", 0.2)
    engine = await start(tmp_path)
    await until_ready(engine)
    engine.send(submit(1, 10, b"!hang@2"))
    await tokens(engine, 2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.receive(), 0.2)
    assert await engine.close() == -signal.SIGKILL


async def test_its_last_words_arrive(tmp_path: Path) -> None:
    engine = await start(tmp_path, "--fail", "the weights do not fit")
    assert isinstance(await receive(engine), Progress)
    assert await receive(engine) == Failed("the weights do not fit")
    assert await receive_end(engine) == 1


async def receive_end(engine: EngineProcess) -> int:
    assert await asyncio.wait_for(engine.receive(), 20) is None
    return await engine.close()


async def test_garbage_on_the_pipe_is_an_error(tmp_path: Path) -> None:
    script = "import socket,sys; socket.socket(fileno=int(sys.argv[2])).sendall(b'\\xff\\xff\\xff\\x7fgarbage')"
    engine = await EngineProcess.start((sys.executable, "-c", script), "{}", {})
    with pytest.raises(WireError, match="exceeds"):
        await engine.receive()
    await engine.close()


PARENT = """
import asyncio, sys
from tests.support.fake_worker import FAKE_ENGINE
from worker.engine_client import EngineProcess, settings_json
from common.settings import WorkerSettings

async def main():
    engine = await EngineProcess.start(FAKE_ENGINE, settings_json(WorkerSettings(), sys.argv[1]), {})
    await engine.receive()
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_engine_dies_with_its_agent(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-c", PARENT, str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = int(await asyncio.to_thread(parent.stdout.readline))
        assert process_state(engine) != "Z"
        parent.kill()
    await eventually(lambda: not Path(f"/proc/{engine}").exists() or process_state(engine) == "Z", what="its end")


BUSY_THREADS = "import os, time; os.register_at_fork(after_in_child=lambda: time.sleep(60))"
"""As if a thread of a download held a lock that a copy of this process would wait for."""


def test_an_engine_starts_beside_threads_that_hold_locks(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-c", BUSY_THREADS + PARENT, str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        selector = select.select([parent.stdout], [], [], 20)[0]
        line = parent.stdout.readline() if selector else "nothing"
        parent.kill()
    assert line.strip().isdigit(), line


def test_settings_travel_without_secrets() -> None:
    settings = WorkerSettings(redis_url=SecretStr("redis://:hunter2@host"), model_id="hub/name", dtype="float64")
    text = settings_json(settings, "/models/name")
    assert "hunter2" not in text
    again = WorkerSettings(**json.loads(text))
    assert (again.model_id, again.dtype) == ("/models/name", "float64")


def test_threads_are_limited_and_sleep_where_cores_are_shared() -> None:
    alone = engine_environment(0)
    assert alone["OMP_NUM_THREADS"] == str(num_cores())
    assert alone["OMP_WAIT_POLICY"] == "PASSIVE"
    assert engine_environment(1)["OMP_NUM_THREADS"] == "1"
    assert ("OMP_WAIT_POLICY" in engine_environment(1)) == (num_cores() < 3)


def test_memory_is_kept_unless_the_environment_says_how(monkeypatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert engine_environment(0)["GLIBC_TUNABLES"] == ALLOCATOR
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert engine_environment(0)["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"


def test_ranks_share_the_threads_and_each_has_one() -> None:
    assert engine_environment(8, 2)["OMP_NUM_THREADS"] == "4"
    assert engine_environment(8, 3)["MKL_NUM_THREADS"] == "2"
    many = engine_environment(0, num_cores() + 1)
    assert (many["OMP_NUM_THREADS"], many["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
