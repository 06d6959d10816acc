"""`inferfleet prepare` from a folder or a hub to a folder that a worker finds complete."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigurationError
from common.settings import PrepareSettings, WorkerSettings
from tests.support import tiny_models
from tests.support.fleet import ROOT, wait_for
from tests.support.hub_server import HubServer
from worker import prepare as prepare_module
from worker.announce import find_model, read_model
from worker.model.checkpoint import find_files
from worker.prepare import STATE_NAME, Screen, make_tokenizer, prepare
from worker.shards import INDEX_NAME, SINGLE_NAME, shard_names

SHARD_BYTES = 100_000


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama_linear_tied", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture()
def folder(_tiny: Path, tmp_path: Path) -> Path:
    """A tiny model that has its weights pickled only, the tied head included."""
    made = Path(shutil.copytree(_tiny, tmp_path / "model"))
    tensors = load_file(made / SINGLE_NAME)
    (made / SINGLE_NAME).unlink()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, made / "pytorch_model.bin")
    return made


def split(folder: Path) -> None:
    """Turn the one pickled file into two with an index."""
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    weight_map = {name: names[index % 2] for index, name in enumerate(tensors)}
    weight_map["lm_head.weight"] = weight_map["model.embed_tokens.weight"]
    for name in names:
        torch.save({key: tensors[key] for key, place in weight_map.items() if place == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Shown(list[str]):
    """Collects what is said; `stop_after` shards' worth of bytes somebody presses Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after

    def screen(self) -> Screen:
        return Screen(self.append, self.show)

    def show(self, word: str, done: int, total: int) -> None:
        if self.stop_after is not None and done > self.stop_after:
            raise KeyboardInterrupt


def run(model: Path | str, shown: Shown | None = None, *, shard_bytes: int = 10**9, **fields: Any) -> list[str]:
    settings = PrepareSettings(model=str(model), **fields)
    return prepare(settings, (Shown() if shown is None else shown).screen(), shard_bytes=shard_bytes)


def problem(model: Path | str, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        run(model, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_served(folder: Path, original: Path) -> None:
    """A worker finds everything, and the tensors are those that transformers wrote."""
    settings = WorkerSettings(model_id=str(folder))
    assert read_model(find_model(settings), settings).chat_template == tiny_models.CHAT_TEMPLATE
    found: dict[str, torch.Tensor] = {}
    for path in find_files(folder):
        found |= load_file(path)
    expected = load_file(original / SINGLE_NAME)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("is_split", [False, True], ids=["one file", "two files"])
def test_a_folder_is_prepared_in_place(folder: Path, _tiny: Path, is_split: bool) -> None:
    if is_split:
        split(folder)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ConfigurationError, match="`inferfleet prepare "):
        find_model(WorkerSettings(model_id=str(folder)))
    assert run(folder, shown := Shown()) == ["--model-id", str(folder)]
    assert_served(folder, _tiny)
    new = {SINGLE_NAME} if not is_split else {*shard_names(2), INDEX_NAME}
    assert {path.name for path in folder.iterdir()} == before | new
    assert shown[-1].startswith("converted ")
    files = {path: path.stat().st_ino for path in find_files(folder)}
    assert run(folder, shown := Shown()) == ["--model-id", str(folder)]
    assert shown == [f"{folder} has safetensors and a tokenizer.json already: there is nothing to do"]
    assert {path: path.stat().st_ino for path in find_files(folder)} == files
    with pytest.raises(AssertionError):
        spoiled = load_file(find_files(folder)[0])
        next(iter(spoiled.values())).add_(1)
        assert all(torch.equal(spoiled[name], tensor) for name, tensor in load_file(_tiny / SINGLE_NAME).items())


def test_another_folder_gets_all_that_is_needed(folder: Path, _tiny: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_text("words")
    (folder / "README.md").write_text("words")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    output = tmp_path / "to" / "here"
    assert run(folder, output=str(output)) == ["--model-id", str(output)]
    assert_served(output, _tiny)
    names = {path.name for path in output.iterdir()}
    assert names == set(before) - {"pytorch_model.bin", "README.md"} | {SINGLE_NAME}
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    run(folder, shown := Shown(), output=str(output))
    assert shown == [f"{output} has safetensors and a tokenizer.json already: there is nothing to do"]


def test_a_folder_with_something_else_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert "holds something else; choose another --output" in problem(folder, output=str(other))
    (tmp_path / "file").touch()
    assert "holds something else" in problem(folder, output=str(tmp_path / "file"))
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_a_model_of_a_hub_goes_to_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model, name in {"owner/model": "model", "model": "model-safetensors"}.items():
        settings = PrepareSettings(model=model)
        assert prepare_module._target(settings, tmp_path / "cache", is_local=False) == Path(name)


def test_ctrl_c_and_the_same_command_again(folder: Path, _tiny: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Shown(stop_after=SHARD_BYTES), shard_bytes=SHARD_BYTES)
    done = sorted(folder.glob("*.safetensors"))
    num_shards = int(done[0].stem.rpartition("-")[2])
    assert [path.name for path in done] == shard_names(num_shards)[:1]
    assert not (folder / INDEX_NAME).exists()
    assert (folder / STATE_NAME).exists()
    before = (done[0].stat().st_ino, done[0].stat().st_mtime_ns)
    with pytest.raises(ConfigurationError, match="finish `inferfleet prepare`"):
        find_files(folder)
    run(folder, shard_bytes=SHARD_BYTES)
    assert (done[0].stat().st_ino, done[0].stat().st_mtime_ns) == before
    assert len(find_files(folder)) == num_shards
    assert not (folder / STATE_NAME).exists()
    assert_served(folder, _tiny)


def test_shards_of_other_pickles_are_not_taken(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Shown(stop_after=SHARD_BYTES), shard_bytes=SHARD_BYTES)
    (done,) = folder.glob("*.safetensors")
    tensors = torch.load(folder / "pytorch_model.bin")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save(changed, folder / "pytorch_model.bin")
    run(folder, shard_bytes=SHARD_BYTES)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in load_file(done).items())


def test_two_at_once_do_not_meet(folder: Path) -> None:
    with prepare_module._claimed(folder):
        assert "another `inferfleet prepare` is at work in" in problem(folder)
        assert (folder / STATE_NAME).exists()
    run(folder)


def test_what_is_wrong_is_said_and_nothing_stays_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no folder" in problem(tmp_path / "nowhere")
    names = {path.name for path in folder.iterdir()}
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:-1000])
    assert "or it is damaged: download it again" in problem(folder)
    assert {path.name for path in folder.iterdir()} == names
    (folder / "pytorch_model.bin").write_bytes(whole)

    def fill_up(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "convert", fill_up)
    assert f"no space left in {folder}" in problem(folder)
    monkeypatch.setattr(prepare_module, "convert", lambda *_, **__: (folder / "no" / "such").touch())
    assert "No such file or directory; --output names another folder" in problem(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor pickled weights" in problem(folder)
    (folder / SINGLE_NAME).write_bytes(b"\x10")
    assert "not a safetensors file" in problem(folder)
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "gone.safetensors of the index is missing" in problem(folder)
    (folder / "config.json").unlink()
    assert "there is no config.json" in problem(folder)


def write_slow_tokenizer(folder: Path) -> str:
    """Replace tokenizer.json by the files it is made of; returns what it was."""
    text = (folder / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    config |= {"unk_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return text


def test_a_missing_tokenizer_json_is_made(folder: Path, _tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = json.loads(write_slow_tokenizer(folder))["model"]["vocab"]
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was touched"))
    config = (folder / "tokenizer_config.json").read_bytes()
    with pytest.raises(ConfigurationError, match="has no tokenizer.json; `inferfleet prepare"):
        read_model(folder, WorkerSettings(model_id=str(folder)))
    run(folder, shown := Shown())
    assert shown[0] == "making tokenizer.json"
    made = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert {text: made[text] for text in vocabulary} == vocabulary
    assert (folder / "tokenizer_config.json").read_bytes() == config, "files that are there stay as they are"
    assert_served(folder, _tiny)


def test_a_tokenizer_that_cannot_be_made_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    assert f"no tokenizer.json can be made of the files in {folder} (" in problem(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigurationError, match="needs transformers: `pip install transformers`"):
        make_tokenizer(folder)
    (folder / "tokenizer.model").touch()
    with pytest.raises(ConfigurationError, match="needs transformers and sentencepiece: `pip install transformers sen"):
        make_tokenizer(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_models_of_a_hub(folder: Path, _tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"owner/pickled": files_of(folder), "owner/safe": files_of(_tiny) | {"pytorch_model.bin": b"old"}}
    write_slow_tokenizer(folder)
    without_tokenizer = {name: data for name, data in files_of(folder).items() if name != "pytorch_model.bin"}
    models["owner/bare"] = without_tokenizer | {SINGLE_NAME: (_tiny / SINGLE_NAME).read_bytes()}
    monkeypatch.chdir(tmp_path)
    with HubServer(models) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        assert run("owner/pickled") == ["--model-id", str(tmp_path / "pickled")]
        assert_served(tmp_path / "pickled", _tiny)
        assert run("owner/safe", shown := Shown(), revision="main") == [
            "--model-id",
            "owner/safe",
            "--revision",
            "main",
        ]
        assert shown == ["owner/safe has safetensors and a tokenizer.json already: there is nothing to do"]
        assert not (tmp_path / "safe").exists()
        assert not [path for path, _ in hub.requested if path.endswith("pytorch_model.bin") and "safe" in path]
        assert run("owner/bare", output="made") == ["--model-id", str(tmp_path / "made")]
        assert_served(tmp_path / "made", _tiny)
        assert (tmp_path / "made" / SINGLE_NAME).stat().st_nlink == 2, "no second copy"
        assert "the hub has no model owner/none" in problem("owner/none")


@pytest.fixture()
def command(tmp_path: Path) -> Iterator[tuple[HubServer, dict[str, Any]]]:
    """A hub, and what a command line in `tmp_path` needs to find it."""
    with HubServer() as hub:
        environment = os.environ | hub.environment(str(tmp_path / "cache")) | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        yield hub, {"cwd": tmp_path, "env": environment} | pipes


COMMAND = [sys.executable, "-m", "ops.cli", "prepare"]


def test_the_command_says_how_to_serve(folder: Path, tmp_path: Path, command: tuple[HubServer, dict[str, Any]]) -> None:
    hub, fields = command
    hub.models["owner/pickled"] = files_of(folder)
    done = subprocess.run([*COMMAND, "owner/pickled"], timeout=60, check=False, **fields)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"serve it with: inferfleet up --model-id {tmp_path / 'pickled'}"
    assert len(find_files(tmp_path / "pickled")) == 1


@pytest.mark.parametrize("is_impatient", [False, True], ids=["once", "twice"])
def test_ctrl_c_during_a_download_is_one_line(command: tuple[HubServer, dict[str, Any]], is_impatient: bool) -> None:
    hub, fields = command
    hub.models["owner/big"] = {"config.json": b"{}", SINGLE_NAME: bytes(48_000_000)}
    hub.hold_after = 24_000_000
    process = subprocess.Popen([*COMMAND, "owner/big"], **fields)
    wait_for(hub.is_holding.is_set, "the download is under way")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "inferfleet prepare: stopped; run the same command again to go on\n"
    if is_impatient:
        process.send_signal(signal.SIGINT)
    else:
        hub.release.set()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "")
