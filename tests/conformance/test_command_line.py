"""The `inferfleet` command beside a running fleet: ctl, chat, and what wrong options say. Exact status, exact text."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conformance.conftest import Served
from tests.support import oracle
from tests.support.fleet import DEMO_MODEL, ROOT, free_port
from tests.support.hub_server import HubServer


def inferfleet(served: Served, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.cli", *arguments]
    env = served.environment() | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=env)


def test_ctl_workers_json(served: Served) -> None:
    workers = json.loads(inferfleet(served, "ctl", "workers", "--json").stdout)
    assert len(workers) == 1
    assert {"id", "pid", "host", "model", "state", "running"} <= set(workers[0])
    assert workers[0]["state"] == "ready"
    assert Path(f"/proc/{workers[0]['pid']}").exists()


@pytest.mark.parametrize(
    "command", [["workers"], ["jobs"], ["queue"], ["dead-letters"], ["adapter", "list"], ["key", "list"]]
)
def test_ctl_prints_tables(served: Served, command: list[str]) -> None:
    done = inferfleet(served, "ctl", *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_ctl_job_and_cancel(served: Served) -> None:
    with served.client() as client:
        job_id = client.post("/v1/jobs?wait=30", json={"input": {"inputs": "Count to 10"}}).json()["id"]
    shown = json.loads(inferfleet(served, "ctl", "job", job_id, "--json").stdout)
    assert shown["status"] == "completed"
    cancelled = json.loads(inferfleet(served, "ctl", "cancel", job_id, "--json").stdout)
    assert cancelled["status"] == "completed"


def test_chat_streams_the_reference_text(served: Served) -> None:
    done = inferfleet(served, "chat", "--temperature", "0", "--max-tokens", "64", "What is deep learning?")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == oracle.greedy_chat("What is deep learning?", 64) + "\n"


@pytest.mark.parametrize("api", ["completions", "chat", "generate_stream"])
def test_bench_counts_what_the_server_counts(served: Served, tmp_path: Path, api: str) -> None:
    path = tmp_path / "results.json"
    sizes = ("--num-requests", "6", "--clients", "3", "--input-tokens", "40", "--output-tokens", "8-24")
    tokenizer = () if api == "completions" else ("--tokenizer", str(DEMO_MODEL))
    done = inferfleet(served, "bench", "--api", api, *sizes, *tokenizer, "--results", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(path.read_text())
    (level,) = found["levels"]
    assert (level["num_good"], level["errors"], level["num_short"]) == (6, {}, 0)
    assert level["counted_by"] == "usage" and found["notes"] == []
    assert [request["input_tokens"] for request in level["requests"]] == [40] * 6
    assert all(8 <= request["output_tokens"] <= 24 for request in level["requests"])
    assert level["output_tokens"] == sum(request["output_tokens"] for request in level["requests"])
    assert level["most_open"] == 3 and level["tokens_per_event"] >= 1


@dataclass(frozen=True)
class BadCommand:
    """A command line that is refused: its arguments, environment and the one line on standard error."""

    arguments: list[str]
    message: str
    status: int = 2
    environment: dict[str, str] = field(default_factory=dict)


BAD = [
    BadCommand(["serve"], "inferfleet: no command 'serve'; there are up, gateway, worker, prepare, ctl, chat, demo, bench, edge, version"),
    BadCommand(["up", "--prot", "1"], "inferfleet up: unknown option --prot; did you mean --port?"),
    BadCommand(["up", "--port", "x"], "inferfleet up: --port: Input should be a valid integer, unable to parse string as an integer"),
    BadCommand(["up"], "inferfleet up: --port: Input should be less than or equal to 65535", environment={"PORT": "99999"}),
    BadCommand(["up", "--quantize", "exl2"], "inferfleet up: --quantize: Input should be 'none', 'int8', 'int4', 'fp8', 'bitsandbytes', 'bitsandbytes-nf4', 'bitsandbytes-fp4', 'gptq', 'awq' or 'compressed-tensors'"),
    BadCommand(["up", "--sharded", "false", "--num-shard", "2"], "inferfleet up: --sharded false contradicts --num-shard 2; give only one"),
    BadCommand(["up", "--workers", "many"], "inferfleet up: --workers: Input should be a valid integer, unable to parse string as an integer"),
    BadCommand(["up", "--dtype", "int4"], "inferfleet up: --dtype: Input should be 'auto', 'float16', 'bfloat16', 'float32' or 'float64'"),
    BadCommand(["gateway"], "inferfleet gateway: a gateway needs --redis-url or REDIS_URL; `inferfleet up` starts a Redis of its own"),
    BadCommand(["worker"], "inferfleet worker: a worker needs --redis-url or REDIS_URL; `inferfleet up` starts a Redis of its own"),
    BadCommand(["prepare"], "inferfleet prepare: the following arguments are required: MODEL"),
    BadCommand(["prepare", "a/b", "c/d"], "inferfleet prepare: unrecognized arguments: c/d"),
    BadCommand(["prepare", "a/b", "--ouput", "x"], "inferfleet prepare: unknown option --ouput; did you mean --output?"),
    BadCommand(["prepare", "a/b", "--quantize", "int8"], "inferfleet prepare: --quantize needs --output: a quantised model is never written over the whole one"),
    BadCommand(["prepare", "a/b", "--quantize", "awq", "--output", "x"], "inferfleet prepare: --quantize: Input should be 'gptq', 'int8' or 'int4'"),
    BadCommand(["prepare", "a/b", "--quantize", "gptq", "--output", "x"], "inferfleet prepare: --quantize gptq needs --calibration: a file of text such as the model is for"),
    BadCommand(["prepare", "a/b", "--quantize", "gptq", "--bits", "3"], "inferfleet prepare: --bits: must be one of 2, 4, 8, not 3"),
    BadCommand(["prepare", "a/b", "--quantize", "int4", "--output", "x", "--group-size", "many"], "inferfleet prepare: --group-size: Input should be a valid integer, unable to parse string as an integer"),
    BadCommand(["prepare", "a/b", "--calibration", "text.txt"], "inferfleet prepare: --calibration is for --quantize gptq"),
    BadCommand(["prepare", str(DEMO_MODEL), "--quantize", "int4", "--output", "x"], "inferfleet prepare: model.layers.0.mlp.down_proj has 704 columns, which groups of 128 do not divide; --group-size may be 64 or 32 or -1"),
    BadCommand(["prepare", str(DEMO_MODEL), "--quantize", "gptq", "--output", "x", "--calibration", "/no/such/text"], "inferfleet prepare: --calibration /no/such/text: No such file or directory"),
    BadCommand(["prepare", "/no/such/model"], "inferfleet prepare: there is no folder /no/such/model; check MODEL"),
    BadCommand(["chat", "--url", "http://127.0.0.1:9", "hi"], "inferfleet chat: no gateway at http://127.0.0.1:9; --url or INFERFLEET_URL names another"),
    BadCommand(["bench", "--url", "http://127.0.0.1:9"], "inferfleet bench: no server at http://127.0.0.1:9 (Connection refused); --url or INFERFLEET_URL names another"),
    BadCommand(["bench", "--model", "gpt"], "inferfleet bench: {url} gives no answer to a short question: HTTP 404, unknown model 'gpt'; served here: demo"),
    BadCommand(["ctl", "workers", "--url", "http://127.0.0.1:9"], "inferfleet ctl: no gateway at http://127.0.0.1:9; --url or INFERFLEET_URL names another"),
    BadCommand(["ctl", "key", "create"], "inferfleet ctl: key create needs a tenant"),
    BadCommand(["ctl", "adapter", "load", "fr"], "inferfleet ctl: adapter load needs a name and a source"),
    BadCommand(["up", "--lora-adapters", "/x"], "inferfleet up: --lora-adapters: '/x' is neither name=folder nor owner/name[@revision] of a hub"),
]  # fmt: skip


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: " ".join(bad.arguments))
def test_wrong_command_lines_are_one_line(served: Served, bad: BadCommand) -> None:
    done = inferfleet(served, *bad.arguments, **bad.environment)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (
        bad.status,
        bad.message.replace("{url}", served.url),
        "",
    )


@pytest.mark.usefixtures("unharmed")
def test_port_taken(served: Served, tmp_path: Path) -> None:
    done = inferfleet(served, "up", "--port", str(served.port), "--data-dir", str(tmp_path))
    expected = f"inferfleet up: cannot listen on 127.0.0.1:{served.port}: Address already in use; choose another --port"
    assert (done.returncode, done.stderr.strip()) == (2, expected)


@pytest.mark.usefixtures("unharmed")
def test_missing_model(served: Served, tmp_path: Path) -> None:
    """One sentence, exit status 2, and no restart loop."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    missing = tmp_path / "no-model"
    done = inferfleet(served, "up", "--port", str(port), "--data-dir", str(tmp_path), "--model-id", str(missing))
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("inferfleet up: ")
    assert str(missing) in last_line(done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def ask_for_too_much(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**24, "hidden_size": 2**16}))


HOPELESS: list[tuple[Callable[[Path], None], str]] = [
    (only_pickles, "`inferfleet prepare {}` converts them"),
    (damage, "{}/model.safetensors is shorter than its header says; download it again"),
    (
        ask_for_too_much,
        "of memory is free; choose a smaller model, --quantize int8 or int4, or --dtype bfloat16, or free memory",
    ),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("spoil", "words"), HOPELESS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_hopeless_model_ends_the_fleet(
    served: Served, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    """What starting again cannot cure is not tried again: one sentence, exit status 2."""
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    spoil(folder)
    options = ("--port", str(free_port()), "--data-dir", str(tmp_path), "--model-id", str(folder))
    done = inferfleet(served, "up", *options)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("inferfleet up: ")
    assert last_line(done.stderr).endswith(words.format(folder))
    assert "starting it again" not in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.usefixtures("unharmed")
def test_a_gated_model_ends_the_fleet(served: Served, tmp_path: Path) -> None:
    with HubServer({"owner/gated": {"config.json": b"{}"}}, gated={"owner/gated"}) as hub:
        options = ("--port", str(free_port()), "--data-dir", str(tmp_path), "--model-id", "owner/gated")
        done = inferfleet(served, "up", *options, **hub.environment(str(tmp_path / "cache")))
        expected = f"owner/gated is gated: accept its terms at {hub.url}/owner/gated and set HF_TOKEN"
    assert (done.returncode, last_line(done.stderr)) == (2, f"inferfleet up: {expected}")
    assert "starting it again" not in done.stdout


def test_prepare_explains_itself(served: Served) -> None:
    done = inferfleet(served, "prepare", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: inferfleet prepare [-h] [--revision str] [--output str]")
    assert "local folder or hub id" in done.stdout


@pytest.mark.usefixtures("unharmed")
def test_redis_away(served: Served) -> None:
    done = inferfleet(served, "up", "--port", "0", "--redis-url", "redis://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("inferfleet up: cannot reach Redis: ")
    assert len(done.stderr.splitlines()) == 1
