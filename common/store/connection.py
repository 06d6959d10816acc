"""One process' connection to Redis: calls of the protocol's functions, their retries, the meaning of their errors."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import resources
from typing import Any, Self

import redis
from redis.exceptions import NoPermissionError

from common import keys
from common.errors import (
    ConfigurationError,
    Fenced,
    StepGap,
    StoreError,
    StoreFull,
    StoreUnavailable,
    StoreUnsupported,
    UnknownIncarnation,
)
from common.store.link import Address, Argument, Link, OnPush

OLDEST_VERSION = (7, 0)
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
FIRST_OPEN_PAUSE_S, LONGEST_OPEN_PAUSE_S = 0.2, 5.0
AWAY = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError, redis.ReadOnlyError, TimeoutError, OSError)
"""What may pass by itself. A call that failed so may have been done: every function is safe to call again."""

logger = logging.getLogger(__name__)

Arguments = tuple[Argument, ...]


@cache
def library() -> tuple[str, str]:
    """The atomic functions as one Redis Functions library: (its source, the first 8 hex digits of the source's hash).

    The hash is part of every name, so that processes of two versions call each their own code on one server.
    """
    folder = resources.files("common") / "lua"
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".lua") and item.name != "_prelude.lua")
    parts = [folder.joinpath("_prelude.lua").read_text()]
    parts += [f"do\n{folder.joinpath(name).read_text()}\nend\n" for name in names]
    source = "\n".join(parts)
    version = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"#!lua name=inferfleet_{version}\nlocal VERSION = '{version}'\n{source}", version


class Connection:
    """One link for all calls of a process, opened again when it is lost, and `call` for the functions of the protocol.

    `generation` rises when the server process behind the URL changed (restart, failover). Whoever owns jobs must then
    say hello, look at what it owns and adopt the rest before its next step.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.run_id = ""
        self.generation = 0
        self._address = Address(url)
        self._link: Link | None = None
        self._opening = asyncio.Lock()

    @classmethod
    async def open(cls, url: str, *, timeout_s: float = 5.0) -> Self:
        """Connect and see to it that the server can do what the protocol needs.

        Raises:
            StoreUnavailable: nobody answers at `url`.
            StoreUnsupported: the server is older than 7.0 or has no functions.
        """
        connection = cls(url, timeout_s)
        try:
            await connection._check_server()
            await connection._load()
        except AWAY as error:
            await connection.close()
            raise StoreUnavailable(f"cannot reach Redis: {error}") from error
        except BaseException:
            # a cancellation too must not leave the link open
            await connection.close()
            raise
        return connection

    @classmethod
    async def open_patiently(cls, url: str) -> Self:
        """As `open`, but waits for a server that is not up yet, saying so in the log.

        Raises:
            ConfigurationError: the server is older than 7.0 or has no functions.
        """
        pause = FIRST_OPEN_PAUSE_S
        while True:
            try:
                return await cls.open(url)
            except StoreUnsupported as error:
                raise ConfigurationError(str(error)) from error
            except StoreUnavailable as error:
                logger.warning("waiting for Redis: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_OPEN_PAUSE_S)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()

    async def call(self, function: str, lane: str, *args: Argument, generation: int = -1) -> Any:
        """Call a function of the library and repeat it while replies get lost, within twice the time-out.

        With `generation` the call is made only to the server process that the caller has met.

        Raises:
            StoreUnavailable, StoreFull, StoreUnsupported, Fenced, UnknownIncarnation, StepGap, StoreError
        """
        return await self._call(function, keys.tag(lane), args, generation)

    async def write(self, key: str, command: str, *args: Argument) -> Any:
        """SET, SADD or HSET of a key outside lanes; works when memory is full, so that workers can come back then."""
        return await self._call("write", key, (command, *args), -1)

    async def run(self, *command: Argument) -> Any:
        """A plain Redis command that may be repeated like a function: a read, or the removal of a key outside lanes."""
        return await self._for_long(lambda: self._send(*command))

    async def _call(self, function: str, key: str, args: Arguments, generation: int) -> Any:
        command = ("FCALL", f"fleet_{function}_{library()[1]}", 1, key, *args)

        async def attempt() -> Any:
            try:
                return await self._send(*command, generation=generation)
            except StoreError as error:
                if "Function not found" not in str(error):
                    raise
                await self._load()
                return await self._send(*command, generation=generation)

        return await self._for_long(attempt)

    async def _for_long(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        limit = time.monotonic() + 2 * self.timeout_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await attempt()
            except AWAY as error:
                self._note_loss(error)
                if time.monotonic() + pause > limit:
                    raise StoreUnavailable(f"Redis is away: {error}") from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _send(self, *command: Argument, generation: int = -1) -> Any:
        try:
            link = await self._connected()
            if generation not in (-1, self.generation):
                raise UnknownIncarnation("the Redis server was replaced")
            return await link.call(*command)
        except redis.AuthenticationError as error:
            raise StoreUnsupported(f"Redis refuses this user: {error}") from error
        except AWAY:
            raise
        except redis.ResponseError as error:
            raise meaning_of(error) from error

    async def _connected(self) -> Link:
        """The link that all calls share. Its loss is an error of the call that finds it, as if an answer were lost."""
        if self._link is not None and self._link.loss is not None:
            loss, self._link = str(self._link.loss), None
            raise redis.ConnectionError(loss)
        if self._link is None:
            async with self._opening:
                self._link = self._link or await self.open_link()
        return self._link

    async def open_link(self, on_push: OnPush | None = None) -> Link:
        """A link of one's own: for what blocks, or for a subscription.

        Raises:
            redis.RedisError, TimeoutError, OSError: there is none, or the server is another process than before.
        """
        link = await self._address.connect(self.timeout_s, on_push)
        try:
            await self._check_identity(link)
        except BaseException:
            # a cancellation too must not leave the link open
            await link.close()
            raise
        return link

    async def _load(self) -> None:
        """Put our library on the server, unless it is there; never replace one that others may be calling."""
        source, version = library()
        try:
            await self._send("FUNCTION", "LOAD", source)
        except StoreError as error:
            if f"'inferfleet_{version}' already exists" not in str(error):
                raise

    async def _check_server(self) -> None:
        try:
            text = await self._send("INFO", "server")
        except StoreUnsupported:
            return
        version = info_field(text, "redis_version")
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers and numbers < OLDEST_VERSION:
            raise StoreUnsupported(f"this is Redis {version}, but version 7.0 or newer is needed")

    async def _check_identity(self, link: Link) -> None:
        try:
            text = await link.call("INFO", "server")
        except NoPermissionError:
            return
        run_id = info_field(text, "run_id")
        if run_id == self.run_id:
            return
        is_first = not self.run_id
        self.run_id = run_id
        if not is_first:
            self.generation += 1
            raise redis.ConnectionError("the Redis server was replaced")

    def _note_loss(self, error: Exception) -> None:
        """Without leave to ask for the server's identity, every broken connection might mean another server."""
        if not self.run_id and isinstance(error, redis.ConnectionError):
            self.generation += 1


def info_field(info: Any, name: str) -> str:
    """One field of an INFO reply, parsed or not; "" when it is not there."""
    if isinstance(info, dict):
        return str(info.get(name, ""))
    text = info.decode() if isinstance(info, bytes) else str(info)
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return line.removeprefix(f"{name}:").strip()
    return ""


def meaning_of(error: redis.ResponseError) -> StoreError:
    """Our exception for an error reply of the server or of one of our functions."""
    text = str(error)
    words = text.split()
    first = words[0] if words else ""
    if first == "FENCED":
        return Fenced("this incarnation was sealed or superseded")
    if first == "UNKNOWN":
        return UnknownIncarnation("Redis does not know this incarnation")
    if first == "GAP":
        return StepGap(words[1], int(words[2]))
    if isinstance(error, redis.OutOfMemoryError) or first in ("OOM", "FULL"):
        return StoreFull("Redis is at its memory limit")
    if first in ("LOADING", "MISCONF", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN", "BUSY"):
        return StoreUnavailable(f"Redis refuses writes: {text}")
    if isinstance(error, redis.AuthenticationError | NoPermissionError):
        return StoreUnsupported(f"Redis refuses this user: {text}")
    if "unknown command" in text:
        return StoreUnsupported("this Redis server does not offer functions, which need Redis 7.0 or newer")
    return StoreError(text)
