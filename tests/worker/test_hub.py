"""Downloads from a stand-in hub over HTTP: what comes, what does not, and one sentence for every refusal."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.support.fleet import ROOT, wait_for
from tests.support.hub_server import HubServer
from worker import hub as hub_module
from worker.announce import find_model
from worker.hub import PICKLED_FILES, SMALL_FILES, WEIGHT_FILES, HubModel, ProgressLines, fetch, local_folder

NUM_BYTES, NUM_HELD_BYTES = 48_000_000, 24_000_000
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights again",
    "original/model.safetensors": b"and again",
    "pytorch_model.bin": b"and pickled",
    "training_args.bin": b"no weights",
    "README.md": b"words",
}
WANTED = (*SMALL_FILES, *WEIGHT_FILES)


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({"owner/model": FILES, "owner/gated": FILES}, gated={"owner/gated"}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def be_silent(done: int, total: int) -> None:
    pass


def problem(name: str, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        fetch(HubModel(name, **fields), WANTED, be_silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_weights_that_count_are_downloaded(hub: HubServer) -> None:
    seen: list[tuple[int, int]] = []
    folder = fetch(HubModel("owner/model"), WANTED, lambda done, total: seen.append((done, total)))
    assert names_in(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    num_bytes = sum(len(FILES[name]) for name in names_in(folder))
    assert seen[-1] == (num_bytes, num_bytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}), "every byte is counted once"
    pickled = fetch(HubModel("owner/model"), PICKLED_FILES, be_silent)
    assert names_in(pickled) - names_in(folder) == set(), "one cache"
    assert "pytorch_model.bin" in names_in(pickled)
    assert "training_args.bin" not in names_in(pickled)


def test_what_is_there_is_not_downloaded_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = fetch(HubModel("owner/model"), WANTED, be_silent)
    files_sent = [path for path, _ in hub.requested if "/resolve/" in path]
    assert len(files_sent) == 3
    assert fetch(HubModel("owner/model"), WANTED, be_silent) == folder
    assert [path for path, _ in hub.requested if "/resolve/" in path] == files_sent
    num_requests = len(hub.requested)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(HubModel("owner/model"), WANTED, be_silent) == folder
    assert len(hub.requested) == num_requests


def test_refusals_are_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert "owner/gated is gated: accept its terms at http" in problem("owner/gated")
    assert "the hub has no model owner/none" in problem("owner/none")
    assert "owner/model has no revision 'v9'" in problem("owner/model", revision="v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not all in the cache and HF_HUB_OFFLINE is set" in problem("owner/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "not all in the cache and the hub cannot be reached" in problem("owner/other")
    assert "neither a folder nor a hub id" in problem("no such model!")


def test_what_does_not_fit_is_not_begun(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.huge["model.safetensors"] = 10**18
    assert "owner/model needs 909494.7 TiB more" in problem("owner/model")
    assert not [path for path, _ in hub.requested if "/resolve/" in path]
    hub.huge.clear()
    monkeypatch.setattr(hub_module, "free_bytes", lambda _: 11)
    assert "needs 12 B more" in (said := problem("owner/model"))
    assert "where 11 B are free" in said
    assert "interrupted" not in said
    blobs = tmp_path / "cache" / "models--owner--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.b.incomplete").write_bytes(bytes(100))
    assert "interrupted downloads" in problem("owner/model")
    monkeypatch.setattr(hub_module, "free_bytes", lambda _: 12)
    fetch(HubModel("owner/model"), WANTED, be_silent)


def test_a_disk_that_fills_up_meanwhile_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", fail)
    assert "no space left to download owner/model" in problem("owner/model")
    monkeypatch.setattr(file_download, "http_get", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("odd\nthing")))
    assert "cannot download owner/model: odd thing; the same command goes on with" in problem("owner/model")


def test_a_broken_connection_is_taken_up_where_it_broke(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.models["owner/big"] = {"config.json": b"{}", "model.safetensors": os.urandom(NUM_BYTES)}
    hub.hold_after, hub.breaks = NUM_HELD_BYTES, True
    hub.release.set()
    seen: list[int] = []
    folder = fetch(HubModel("owner/big"), WANTED, lambda done, _: seen.append(done))
    assert (folder / "model.safetensors").read_bytes() == hub.models["owner/big"]["model.safetensors"]
    assert hub.is_holding.is_set()
    assert hub.requested[-1][1].startswith("bytes=")
    assert seen[-1] == NUM_BYTES + 2


def test_a_killed_download_goes_on_with_the_files_that_are_missing(hub: HubServer, tmp_path: Path) -> None:
    sizes = {"config.json": 2, "model-00001-of-00002.safetensors": 1000, "model-00002-of-00002.safetensors": NUM_BYTES}
    hub.models["owner/big"] = {name: os.urandom(size) for name, size in sizes.items()}
    hub.hold_after = NUM_HELD_BYTES
    cache = tmp_path / "other"
    code = "import sys; from worker.hub import *; fetch(HubModel('owner/big'), sys.argv[1:], print)"
    environment = os.environ | hub.environment(str(cache))
    process = subprocess.Popen([sys.executable, "-c", code, *WANTED], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: hub.is_holding.is_set() and len(list(cache.rglob("*.safetensors"))) == 1, "one file of two")
    finally:
        process.kill()
        process.wait()
    num_requests = len(hub.requested)
    folder = fetch(HubModel("owner/big", cache=str(cache)), WANTED, be_silent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.models["owner/big"]
    sent = [path.rpartition("/")[2] for path, _ in hub.requested[num_requests:] if "/resolve/" in path]
    assert sent == ["model-00002-of-00002.safetensors"]


def test_a_worker_logs_how_far_a_download_is(
    hub: HubServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "LINES_APART_S", 0.0)
    hub.models["owner/big"] = {"config.json": b"{}", "model.safetensors": bytes(NUM_BYTES)}
    with caplog.at_level(logging.INFO, logger="worker"):
        find_model(WorkerSettings(model_id="owner/big"))
    assert "downloading owner/big: 48 MB" in caplog.messages
    assert any(line.startswith("downloading: 10 of 48 MB, about ") for line in caplog.messages)


def test_lines_come_seldom_and_say_how_long_it_takes() -> None:
    lines: list[str] = []
    times = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    show = ProgressLines("downloading", lines.append, clock=lambda: next(times))
    for done in (10, 60, 70, 90):
        show(done * 1_000_000, 120_000_000)
    assert lines == ["downloading: 60 of 120 MB, about 6 s left", "downloading: 90 of 120 MB, about 4 s left"]


def test_local_folders_never_touch_the_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: (connected.append(arguments), connect(*arguments)))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert find_model(WorkerSettings(model_id=str(tmp_path))) == tmp_path
    assert connected == []
    find_model(WorkerSettings(model_id="owner/model"))
    assert connected != [], "a hub id does"
    assert local_folder("owner/model", "--model-id") is None
