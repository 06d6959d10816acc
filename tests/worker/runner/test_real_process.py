"""The whole engine process, as the agent starts it, around a real tiny model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.job import Adapter, SamplingParams
from tests.support import tiny_models
from tests.support.adapters import merged, write_adapter
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import weight_bytes
from worker.parallel.shard import Shard
from worker.pipe import (
    AdapterChecked,
    CheckAdapter,
    Commit,
    Failed,
    Progress,
    Ready,
    Step,
    Stop,
    Submit,
    encode,
    read_message,
)

DEADLINE_S = 60.0
ROOT = Path(__file__).parents[3]
NUM_RANKS = 2
MOST_ROUNDS = 20
LIMIT_NAMES = ["kv_tokens", "max_num_seqs", "max_total_tokens", "max_input_tokens"]


class Engine:
    def __init__(self, **settings) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(DEADLINE_S)
        fields = dict(threads=1, kv_tokens=2048) | settings
        with theirs:
            arguments = ["--fd", str(theirs.fileno()), "--settings", json.dumps(fields)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.engine_process", *arguments],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stderr=subprocess.PIPE,
            )
        self.stream = self.connection.makefile("rb")

    def send(self, message) -> None:
        self.connection.sendall(encode(message))

    def receive(self):
        return read_message(self.stream)

    def close(self) -> int:
        self.stream.close()
        self.connection.close()
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        self.errors = errors.decode()
        return self.process.returncode


@pytest.fixture()
def engine(request, tmp_path):
    started = Engine(**request.param(tmp_path))
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.close()


def tiny_settings(folder: Path) -> dict:
    return dict(model_id=str(tiny_models.save("qwen3", folder)), dtype="float64")


@pytest.mark.parametrize("engine", [tiny_settings], indirect=True)
def test_a_tiny_model_loads_reports_and_answers_like_transformers(engine):
    message, progress = engine.receive(), []
    while isinstance(message, Progress):
        progress.append(message)
        message = engine.receive()
    assert isinstance(message, Ready), message
    assert len(progress) > 10
    assert progress[-1].done == progress[-1].total > 0
    prompts = {"a": [5, 6, 7], "b": list(range(40, 90))}
    for name, ids in prompts.items():
        params = SamplingParams(max_new_tokens=20)
        engine.send(Submit(request_id=name, epoch=1, prompt_ids=ids, output_ids=[], params=params, eos_token_ids=[]))
    got, ends = {name: [] for name in prompts}, {}
    while len(ends) < len(prompts):
        step = engine.receive()
        assert isinstance(step, Step), step
        engine.send(Commit(step.step))
        for run in step.runs:
            got[run.request_id] += run.ids
            if run.finish:
                ends[run.request_id] = run.finish
    assert ends == {"a": "length", "b": "length"}
    model = tiny_models.build("qwen3").double()
    for name, ids in prompts.items():
        sequence = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(20):
                sequence = torch.cat((sequence, model(sequence).logits[:, -1:].argmax(-1)), 1)
        assert got[name] == sequence[0, len(ids) :].tolist()
    engine.send(Stop())
    assert engine.process.wait(DEADLINE_S) == 0
    engine.close()


def guessing_ranks(folder: Path) -> dict:
    return tiny_settings(folder) | dict(num_shard=NUM_RANKS, speculate=8)


@pytest.mark.parametrize("engine", [guessing_ranks], indirect=True)
def test_ranks_that_guess_ahead_answer_like_transformers(engine):
    while not isinstance(engine.receive(), Ready):
        pass
    params, prompts = SamplingParams(max_new_tokens=90), {"a": [9] * 4, "b": [5, 6, 7] * 6}
    fields = dict(epoch=1, output_ids=[], params=params, eos_token_ids=[])
    model = tiny_models.build("qwen3").double()
    expected = {name: (greedy(model, ids, 90), "") for name, ids in prompts.items()}
    # how often guesses are tried depends on how long steps take
    for _ in range(MOST_ROUNDS):
        messages = [Submit(request_id=name, prompt_ids=ids, **fields) for name, ids in prompts.items()]
        assert tokens_of(engine, *messages) == expected
        if engine.stats["accepted_tokens"] >= 3:
            break
    assert engine.stats["accepted_tokens"] >= 3
    engine.send(Stop())
    assert engine.process.wait(DEADLINE_S) == 0
    engine.close()


def tiny_settings_of_ranks(folder: Path) -> dict:
    return dict(model_id=str(tiny_models.save("llama", folder)), num_shard=NUM_RANKS)


@pytest.mark.parametrize("engine", [tiny_settings_of_ranks], indirect=True)
def test_ranks_load_and_report_as_one(engine, tmp_path):
    message, progress = engine.receive(), []
    while isinstance(message, Progress):
        progress.append(message)
        message = engine.receive()
    assert isinstance(message, Ready), message
    (spec, family), checkpoint = read_spec(read_config(tmp_path)), Checkpoint(tmp_path)
    totals = [weight_bytes(spec, family, checkpoint, torch.float32, Shard(r, NUM_RANKS)) for r in range(NUM_RANKS)]
    assert {report.phase for report in progress} == {"weights"}
    assert {report.total for report in progress} == {sum(totals)}
    assert sum(totals) > max(totals), "a rank alone would have said less"
    done = [report.done for report in progress]
    assert len(done) > 10
    assert done == sorted(done)
    assert done[-1] == sum(totals)
    assert f"on each of {NUM_RANKS} ranks" in message.reasons[0]
    assert [reason.split()[0] for reason in message.reasons] == LIMIT_NAMES
    engine.send(Stop())
    assert engine.process.wait(DEADLINE_S) == 0
    engine.close()


def tokens_of(engine, *messages: Submit) -> dict[str, tuple[list[int], str]]:
    """Tokens and errors of requests that run together."""
    for message in messages:
        engine.send(message)
    got, errors = {message.request_id: [] for message in messages}, {}
    while len(errors) < len(messages):
        step = engine.receive()
        assert isinstance(step, Step), step
        engine.send(Commit(step.step))
        engine.stats = step.stats
        for run in step.runs:
            got[run.request_id] += run.ids
            if run.finish:
                errors[run.request_id] = run.error
    return {name: (ids, errors[name]) for name, ids in got.items()}


def greedy(model, ids: list[int], number: int) -> list[int]:
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=number, do_sample=False, eos_token_id=None)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("engine", [tiny_settings_of_ranks], indirect=True)
def test_ranks_check_an_adapter_serve_it_and_outlive_its_end(engine, tmp_path):
    model, folder, ids = tiny_models.build("llama"), tmp_path / "adapter", [5, 6, 7]
    modules = [f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.up", "mlp.down")]
    write_adapter(folder, model, modules)
    while not isinstance(engine.receive(), Ready):
        pass
    engine.send(CheckAdapter("x", str(folder)))
    checked = engine.receive()
    assert isinstance(checked, AdapterChecked) and (checked.rank, checked.error) == (4, "")
    adapter, params = Adapter("x", str(folder), checked.digest), SamplingParams(max_new_tokens=12)
    fields = dict(epoch=1, prompt_ids=ids, output_ids=[], params=params, eos_token_ids=[])
    got = tokens_of(engine, Submit(request_id="a", **fields, adapter=adapter), Submit(request_id="b", **fields))
    assert got == {"a": (greedy(merged(model, folder), ids, 12), ""), "b": (greedy(model, ids, 12), "")}
    assert got["a"] != got["b"]
    other = Adapter("y", str(folder), "0" * 32)
    got = tokens_of(engine, Submit(request_id="c", **fields, adapter=other), Submit(request_id="d", **fields))
    assert got["c"][0] == [] and "changed since the job was accepted" in got["c"][1]
    assert got["d"] == (greedy(model, ids, 12), "")
    engine.send(Stop())
    assert engine.process.wait(DEADLINE_S) == 0
    engine.close()


def unknown_family(folder: Path) -> dict:
    (folder / "config.json").write_text('{"model_type": "gpt9"}')
    return dict(model_id=str(folder))


@pytest.mark.parametrize("engine", [unknown_family], indirect=True)
def test_a_model_that_cannot_run_is_one_sentence_and_an_exit_status(engine):
    message = engine.receive()
    assert isinstance(message, Failed)
    assert "gpt9" in message.message
    assert "llama" in message.message
    assert engine.process.wait(DEADLINE_S) == 1
    engine.close()
    assert "Traceback" not in engine.errors
