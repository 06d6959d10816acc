"""Servers that take turns: who is measured works, the others stand still, and both benches over HTTP say what came."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from ops.bench import long_prompts, servers, serving_peers
from ops.bench.peers.environments import Environment
from ops.bench.servers import (
    LLAMA,
    OURS,
    PEERS,
    VLLM,
    Server,
    Serving,
    add_options,
    demo_serving,
    standing,
    starters_of,
)
from ops.bench.serving_cost import PARTS
from ops.cli.worker import DEMO_MODEL
from ops.loadgen.probe import Found
from ops.loadgen.target import Target

PACED = ("ops.bench.paced",)
STAND_IN = """#!{python}
import http.server, subprocess, sys
if "--version" in sys.argv or "-c" in sys.argv:
    sys.exit(sys.stderr.write("Loading\\nversion: 7 (abc)\\nbuilt somehow\\n") and 0)
subprocess.Popen(["sleep", "1000"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@contextmanager
def paced_peer(folder: Path, serving: Serving) -> Iterator[Server]:
    """Another server that costs little: ours around a model that only waits."""
    with servers.ours(folder, replace(serving, worker=PACED)) as server:
        yield replace(server, name=VLLM)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    folder = tmp_path_factory.mktemp("servers")
    with standing(
        {"ours": servers.ours, "paced": paced_peer}, folder, demo_serving(kv_tokens=8192, num_slots=8)
    ) as found:
        yield found


@pytest.fixture()
def started(both: Mapping[str, Server], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Server]:
    """Both benches find them started."""
    for bench in (serving_peers, long_prompts):
        monkeypatch.setattr(bench, "standing", lambda *_: nullcontext(both))
    return both


def state_of(pid: int) -> str:
    """What the kernel says of it; T: stopped, Z: ended."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def soon(pids: Iterable[int], state: str) -> bool:
    """A signal to another core takes a moment."""
    for _ in range(1000):
        if {state_of(pid) for pid in pids} == {state}:
            return True
        time.sleep(0.01)
    return False


def pids_of(server: Server) -> list[int]:
    return [pid for pids in server.processes().values() for pid in pids]


def stands(server: Server) -> bool:
    return soon(pids_of(server), "T")


def works(server: Server) -> bool:
    return all(state_of(pid) != "T" for pid in pids_of(server))


@contextmanager
def watched(server: Server, all_of_them: Mapping[str, Server], seen: list[tuple[str, bool]]) -> Iterator[None]:
    """Take down who worked and whether all others stood still."""
    assert works(server)
    seen.append((server.name, all(stands(other) for other in all_of_them.values() if other is not server)))
    yield


def test_servers_are_measured_in_turn_while_the_others_stand_still(
    started: Mapping[str, Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, bool]] = []
    measured = serving_peers.measured

    def watching(server: Server, *arguments: Any) -> dict[str, Any]:
        with watched(server, started, seen):
            return measured(server, *arguments)

    monkeypatch.setattr(serving_peers, "measured", watching)
    file = tmp_path / "found.json"
    command = ["--short", "--peers", "", "--clients", "1,3", "--rounds", "2", "--json", str(file)]
    assert serving_peers.main(command) == 0
    assert seen == [(name, True) for name in (OURS, VLLM, VLLM, OURS)] * 2
    assert all(map(stands, started.values()))
    levels = json.loads(file.read_text())["levels"]
    assert list(levels) == ["1", "3"]
    for level in levels.values():
        assert set(level["servers"]) == set(level["rounds"]) == {OURS, VLLM} and level["about"]["rounds"] == 2
        for row in (row for rows in level["rounds"].values() for row in rows):
            assert row["tokens_per_s"] > 0 and row["ttft_ms"] > 0 and row["gap_p99_ms"] >= row["gap_ms"]
            assert set(row["cpu_s"]) == set(PARTS) and min(*row["cpu_s"].values(), row["client_cpu_s"]) > 0
    out = capsys.readouterr().out
    assert f"| 3 | {VLLM} |" in out and "| clients | gateway | redis | agent | engine |" in out


def test_streams_go_on_while_long_prompts_come(
    started: Mapping[str, Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[Any]] = []
    figures = long_prompts.figures

    def watching(*arguments: Any) -> dict[str, Any]:
        seen.append(list(arguments))
        return figures(*arguments)

    monkeypatch.setattr(long_prompts, "figures", watching)
    file, sizes = tmp_path / "found.json", long_prompts.SHORT
    assert long_prompts.main(["--short", "--peers", "", "--rounds", "1", "--json", str(file)]) == 0
    assert len(seen) == 2, "a round at each"
    for streams, alone, beside, _ in seen:
        assert {answer.prompt_tokens for answer in (*alone, *beside)} == {sizes.prompt_input}
        assert (len(streams), len(alone), len(beside)) == (sizes.num_streams, sizes.num_prompts, sizes.num_prompts)
        assert max(answer.ended for answer in alone) < min(answer.started for answer in streams)
        num_before = sizes.num_settling + sizes.num_calm
        for prompt in beside:
            assert all(
                stream.times[num_before] < prompt.started < prompt.times[0] <= stream.times[-1] for stream in streams
            )
    rounds = json.loads(file.read_text())["rounds"]
    assert list(rounds) == [OURS, VLLM] and all(len(rows) == 1 for rows in rounds.values())
    assert f"| {OURS} | " in capsys.readouterr().out


def test_a_stream_that_ends_before_the_prompts_come_is_no_figure(started: Mapping[str, Server]) -> None:
    sizes = replace(long_prompts.SHORT, stream_output=20)
    with pytest.raises(
        RuntimeError, match="a stream ended before the prompts were sent: --stream-tokens gives it more"
    ):
        long_prompts.compare({VLLM: started[VLLM]}, servers.vocabulary_of(DEMO_MODEL), sizes, 1)


# Processes.


def test_who_goes_on_is_healthy_before_anything_is_asked_of_it(
    both: Mapping[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, wait = both[OURS], servers.seconds_until
    asked: list[tuple[str, str, bool]] = []

    def watching(url: str, path: str) -> float:
        asked.append((url, path, works(server)))
        return wait(url, path)

    monkeypatch.setattr(servers, "seconds_until", watching)
    assert stands(server)
    with server.at_work():
        assert asked == [(server.target.url, "/health", True)]
    assert stands(server)


def test_children_belong_to_the_part_of_their_parent_unless_they_are_parts() -> None:
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        target = Target(url="http://127.0.0.1:1")
        whole = Server("whole", target, {"server": parent.pid})
        parts = Server("parts", target, {"one": parent.pid, "other": child})
        assert whole.processes() == {"server": [parent.pid, child]}
        assert parts.processes() == {"one": [parent.pid], "other": [child]}
        assert whole.cpu_s()["server"] == pytest.approx(sum(parts.cpu_s().values()), abs=0.5)
        assert works(whole)
        whole.pause()
        assert stands(whole)
    finally:
        whole.resume()
        os.kill(child, signal.SIGKILL)
        parent.communicate()


@pytest.fixture()
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of the peers' programs one that answers at /health and has a child."""
    program = tmp_path / "program"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    found = Environment(python=program, variables={"FROM": "peers"}, llama_server=program)
    monkeypatch.setattr(servers, "environment", lambda peer, folder: found)
    monkeypatch.setattr(servers, "gguf_of", lambda model, environment: model / "model.gguf")
    return program


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, PEERS)
    return parser.parse_args(words)


def serving_in(folder: Path) -> Serving:
    config = {"num_hidden_layers": 12, "num_key_value_heads": 4, "head_dim": 64, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return Serving(folder, kv_tokens=1000, num_slots=128)


@pytest.mark.parametrize(
    ("name", "shown", "wanted"),
    [
        ("vllm", VLLM, ["--kv-cache-memory-bytes 12288000", "--model {folder} "]),
        ("llama.cpp", LLAMA, ["--ctx-size 1000", "--parallel 128", "--model model.gguf "]),
    ],
)
def test_a_peer_gets_the_same_room_and_ends_with_its_children(
    stand_in: Path, tmp_path: Path, name: str, shown: str, wanted: list[str]
) -> None:
    starters = starters_of(options("--peers", name, f"--{name}-options", "--seed 7"))
    assert list(starters) == ["ours", name]
    with starters[name](tmp_path, serving_in(tmp_path)) as server:
        (pids,) = server.processes().values()
        assert (server.name, len(pids)) == (shown, 2)
        assert server.about["version"] == "version: 7 (abc)"
        assert all(option.format(folder=tmp_path.name) in server.about["command"] for option in wanted)
        assert server.about["command"].endswith(" --seed 7")
        assert str(tmp_path) not in server.about["command"], "published figures tell nobody's folders"
        assert b"FROM=peers" in (Path("/proc") / str(pids[0]) / "environ").read_bytes()
    assert soon(pids, "Z")


def test_a_peer_that_ends_at_once_is_no_wait(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RuntimeError, match="the process for http://127.0.0.1:[0-9]+ ended with status 3"):
        with starters_of(options("--peers", "vllm"))["vllm"](tmp_path, serving_in(tmp_path)):
            pass


def test_an_unknown_peer_is_a_sentence() -> None:
    with pytest.raises(ConfigurationError, match="--peers has tgi; there are vllm, llama.cpp"):
        starters_of(options("--peers", "vllm,tgi"))


def test_who_is_told_to_end_ends_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand still: nobody else would wake them up to hear it."""
    monkeypatch.setattr(servers, "probe", lambda target, *_, **__: Found(target, servers.vocabulary_of(DEMO_MODEL), []))
    ends: list[str] = []

    @contextmanager
    def start(folder: Path, serving: Serving) -> Iterator[Server]:
        child = subprocess.Popen(["sleep", "1000"])
        try:
            yield Server("sleeper", Target(url="http://127.0.0.1:1"), {"server": child.pid})
        finally:
            child.terminate()
            ends.append(f"status {child.wait(60)}")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), standing({"sleeper": start}, tmp_path, serving_in(tmp_path)) as found:
        assert stands(found["sleeper"])
        os.kill(os.getpid(), signal.SIGTERM)
    assert ends == ["status -15"] and signal.getsignal(signal.SIGTERM) is before
