"""What the launcher plans for its children, without starting them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from common.errors import ConfigurationError
from common.settings import UpSettings, parse
from ops.cli.worker import DEMO_MODEL
from ops.launcher import Launcher


def planned(*arguments: str) -> Launcher:
    launcher = Launcher(parse(UpSettings, list(arguments)))
    launcher._plan_children("redis://example")
    return launcher


def test_each_child_has_its_own_place() -> None:
    children = {child.name: child.environment for child in planned("--gateways", "2", "--workers", "3").children}
    assert list(children) == ["g1", "g2", "w1", "w2", "w3"]
    assert [children[name]["PORT"] for name in ("g1", "g2")] == ["8080", "8081"]
    assert len({children[name]["INFERFLEET_WORKER_ID"] for name in ("w1", "w2", "w3")}) == 3
    assert {environment["REDIS_URL"] for environment in children.values()} == {"redis://example"}


def test_cores_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    threads = [child.environment["INFERFLEET_THREADS"] for child in planned("--workers", "3").children[1:]]
    assert threads == ["2", "2", "2"]
    assert planned("--workers", "3", "--threads", "1").children[1].environment["INFERFLEET_THREADS"] == "1"


def test_the_demo_model_is_served_when_none_is_asked_for() -> None:
    worker = planned().children[-1].environment
    assert (worker["MODEL_ID"], worker["SERVED_MODEL_NAME"]) == (str(DEMO_MODEL), "demo")
    other = planned("--model-id", "/models/x").children[-1].environment
    assert (other["MODEL_ID"], other["SERVED_MODEL_NAME"]) == ("/models/x", "")


def test_secrets_travel_in_the_environment_only() -> None:
    launcher = planned("--api-key", "hunter2")
    assert launcher.children[0].environment["API_KEY"] == "hunter2"
    assert all("hunter2" not in " ".join(child.arguments) for child in launcher.children)


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            planned("--port", str(port))._check_ports()


def test_a_fleet_whose_output_nobody_reads_goes_on() -> None:
    program = "import sys; from ops.launcher import say; sys.stdin.readline(); say('one'); say('two'); sys.exit(7)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.communicate(b"\n")
    assert process.returncode == 7


def test_workers_have_gpus_of_their_own_as_far_as_these_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*arguments: str) -> list[str | None]:
        children = planned(*arguments).children[1:]
        return [child.environment.get("CUDA_VISIBLE_DEVICES") for child in children]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6")
    assert given("--workers", "3") == ["4", "5", "6"]
    assert given("--workers", "4") == ["4", "5", "6", "4"]
    assert given("--workers", "2", "--num-shard", "2") == ["4,5", "6,4"]
    assert given("--workers", "2", "--num-shard", "4") == given("--workers", "2", "--device", "cpu") == [None, None]
    assert given("--workers", "1") == [None], "which sees them all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert given("--workers", "2") == [None, None]
