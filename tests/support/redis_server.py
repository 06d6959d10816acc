"""Real Redis servers for tests: started on a unix socket, killed, restarted, robbed of the tail of their disk file."""

from __future__ import annotations

import shutil
from pathlib import Path

import redis

from ops.redis_server import RedisServer, find_binary, start_embedded

FLAVOURS = ("debian", "embedded")


def binary_of(flavour: str) -> str:
    """ "debian": the distribution's redis-server 7.0; "embedded": what `inferfleet up` starts."""
    if flavour == "embedded":
        return find_binary()
    path = shutil.which("redis-server")
    assert path is not None, "these tests need a redis-server of version 7.0 or newer on PATH"
    return path


class ServerUnderTest:
    """One server with its own data folder. `url` stays the same over restarts."""

    def __init__(
        self, data_dir: Path, *, flavour: str = "debian", ephemeral: bool = False, maxmemory: int = 256 << 20
    ) -> None:
        self.data_dir, self.flavour, self.ephemeral, self.maxmemory = data_dir, flavour, ephemeral, maxmemory
        self.server: RedisServer = self._start()

    def _start(self) -> RedisServer:
        return start_embedded(
            self.data_dir,
            ephemeral=self.ephemeral,
            maxmemory=self.maxmemory,
            binary=binary_of(self.flavour),
            options=("--appendfsync", "always") if not self.ephemeral else (),
        )

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def pid(self) -> int:
        return self.server.process.pid

    def client(self) -> redis.Redis:
        """A plain synchronous client: for looking, and for faults that Redis itself offers."""
        return redis.Redis.from_url(self.url)

    def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer does."""
        self.server.process.kill()
        self.server.process.wait()
        self.server.lock.close()

    def stop(self) -> None:
        self.server.stop()

    def restart(self) -> None:
        """Start again on the same folder and socket; the server must be down."""
        assert self.server.process.poll() is not None, "the server still runs"
        self.server = self._start()

    def aof_path(self) -> Path:
        """The incremental file that holds the newest writes."""
        paths = sorted((self.data_dir / "redis" / "appendonlydir").glob("*.incr.aof"))
        assert paths, "the server keeps no append-only file"
        return paths[-1]

    def aof_size(self) -> int:
        return self.aof_path().stat().st_size

    def cut_aof_tail(self, num_bytes: int) -> int:
        """Simulate a power loss on a dead server: the last `num_bytes` were never on disk. Returns bytes cut."""
        assert self.server.process.poll() is not None, "cut the file of a dead server"
        return self.truncate_aof(max(self.aof_size() - num_bytes, 0))

    def truncate_aof(self, size: int) -> int:
        """Cut the file back to the `size` that `aof_size()` once returned. Returns bytes cut."""
        path = self.aof_path()
        num_cut = path.stat().st_size - size
        assert num_cut > 0, "nothing was cut"
        with open(path, "r+b") as file:
            file.truncate(size)
        return num_cut

    def reset(self) -> None:
        """Empty the server between tests, functions kept: cheaper than a new one."""
        with self.client() as client:
            client.flushall()
            client.config_set("maxmemory", self.maxmemory)
            client.config_resetstat()
