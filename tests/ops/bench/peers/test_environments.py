"""Peers are installed when they are missing, and taken as they are when they are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from ops.bench.peers import environments
from ops.bench.peers.environments import FOLDERS, PEERS, environment, has_module


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> list[str]:
    """Names of the environments that were installed; installing one makes its Python find everything."""
    done: list[str] = []

    def install(home: Path) -> None:
        done.append(home.name)
        if len(done) == len(set(done)):
            (home / "bin").mkdir(parents=True)
            (home / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments, "INSTALLERS", dict.fromkeys(PEERS, install))
    monkeypatch.setattr(environments, "MODULES", dict.fromkeys(PEERS, "json"))
    monkeypatch.setattr(environments, "_allocator", lambda: Path("/usr/lib/any/libtcmalloc_minimal.so.4"))
    return done


def test_what_is_missing_is_installed_and_kept_afterwards(installed: list[str], tmp_path: Path):
    server = tmp_path / "llama-build" / "bin" / "llama-server"
    for peer in PEERS:
        found = environment(peer, tmp_path)
        assert found.python == tmp_path / FOLDERS[peer] / "bin" / "python"
        assert found.llama_server == (server if peer == "llama.cpp" else None)
    assert installed == ["vllm", "llama", "transformers"]
    server.parent.mkdir(parents=True)
    server.touch()
    assert [environment(peer, tmp_path).python for peer in PEERS] and len(installed) == 3, "nothing was installed again"


def test_a_server_that_was_never_built_is_a_reason_to_install(installed: list[str], tmp_path: Path):
    environment("llama.cpp", tmp_path)
    environment("llama.cpp", tmp_path)
    assert installed == ["llama", "llama"]


def test_vllm_gets_its_libraries_and_all_cores_that_this_process_may_use(installed: list[str], tmp_path: Path):
    variables = environment("vllm", tmp_path).variables
    assert variables["LD_PRELOAD"] == f"/usr/lib/any/libtcmalloc_minimal.so.4:{tmp_path}/vllm/lib/libiomp5.so"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_a_python_finds_a_module_or_not():
    assert has_module(Path(sys.executable), "json")
    assert not has_module(Path(sys.executable), "no_such_module")
    assert not has_module(Path("/no/python"), "json")


def test_an_installation_that_fails_is_one_sentence_with_the_log(tmp_path: Path):
    words = [sys.executable, "-c", "import sys; sys.exit('no disk')"]
    with pytest.raises(ConfigurationError, match=r"vllm cannot be installed: .* failed, see .*vllm\.log"):
        environments._do(tmp_path / "vllm", words)
    assert "no disk" in (tmp_path / "vllm.log").read_text()
