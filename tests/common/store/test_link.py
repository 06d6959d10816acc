"""A link: answers in the order of calls, callers that leave, silence, loss, and what a URL may say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis

from common.errors import ConfigurationError
from common.store.link import Address, Link
from tests.support.redis_server import ServerUnderTest


@pytest.fixture()
async def link(redis_url: str) -> AsyncIterator[Link]:
    opened = await Address(redis_url).connect(5.0)
    yield opened
    await opened.close()


async def test_calls_under_way_at_once_get_their_own_answers(link: Link) -> None:
    answers = await asyncio.gather(*(link.call("ECHO", f"{number}") for number in range(100)))
    assert answers == [b"%d" % number for number in range(100)]


async def test_an_error_is_the_answer_of_its_own_call_only(link: Link) -> None:
    answers = await asyncio.gather(
        link.call("SET", "k", "v"), link.call("LPUSH", "k", "v"), link.call("GET", "k"), return_exceptions=True
    )
    assert isinstance(answers[1], redis.ResponseError) and "WRONGTYPE" in str(answers[1])
    assert answers[2] == b"v"


async def test_a_caller_that_leaves_takes_nobody_else_s_answer_along(link: Link) -> None:
    leaving = asyncio.create_task(link.call("ECHO", "first"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await link.call("ECHO", "second") == b"second"
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_silence_ends_the_connection_and_every_call(link: Link) -> None:
    answers = await asyncio.gather(
        link.call("BLPOP", "nothing", 0, timeout_s=0.05), link.call("PING"), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [redis.TimeoutError, redis.TimeoutError]
    with pytest.raises(redis.ConnectionError, match="did not answer in time"):
        await link.call("PING")


async def test_a_call_that_may_take_longer_is_waited_for(redis_url: str) -> None:
    link = await Address(redis_url).connect(0.05)
    assert await link.call("BLPOP", "nothing", 0.2, timeout_s=5) is None
    await link.close()


async def test_calls_of_a_connection_that_breaks_are_told(link: Link, redis_server: ServerUnderTest) -> None:
    waiting = asyncio.create_task(link.call("BLPOP", "nothing", 0))
    await asyncio.sleep(0.05)
    with redis_server.client() as client:
        assert client.client_kill_filter(_type="normal", skipme=True) >= 1
    with pytest.raises(redis.ConnectionError, match="broke"):
        await waiting
    await link.gone()
    assert link.loss is not None


Server = Callable[[bytes], Awaitable[str]]


@pytest.fixture()
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that says one thing to everybody."""
    servers: list[asyncio.Server] = []

    async def start(data: bytes) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            while await reader.read(100):
                pass
            writer.close()

        servers.append(await asyncio.start_unix_server(serve, tmp_path / "server.sock"))
        return f"unix://{tmp_path}/server.sock?protocol=2"

    yield start
    for one in servers:
        one.close()


async def test_what_is_not_redis_s_protocol_ends_the_connection(server: Server) -> None:
    link = await Address(await server(b"HTTP/1.1 400 Bad Request\r\n\r\n")).connect(1.0)
    with pytest.raises(redis.RedisError):
        await link.call("PING")
    assert isinstance(link.loss, redis.InvalidResponse)
    await link.close()


async def test_a_server_that_never_answers_is_not_connected_to(server: Server) -> None:
    url = await server(b"")
    with pytest.raises(TimeoutError):
        await Address(url.replace("protocol=2", "db=1&protocol=2")).connect(0.1)


@pytest.mark.parametrize("version", [2, 3])
async def test_user_password_and_database_of_the_url_count(redis_server: ServerUnderTest, version: int) -> None:
    rules = {"passwords": ["+secret"], "categories": ["+@all"], "keys": ["*"]}
    with redis_server.client() as client:
        client.acl_setuser("someone", reset=True, enabled=True, **rules)
        url = redis_server.url.replace("unix://", "unix://someone:{}@") + f"?db=3&protocol={version}"
        link = await Address(url.format("secret")).connect(5.0)
        assert await link.call("ACL", "WHOAMI") == b"someone"
        assert b"db=3" in bytes(str(await link.call("CLIENT", "INFO")), "utf8")
        await link.close()
        with pytest.raises(redis.AuthenticationError):
            await Address(url.format("wrong")).connect(5.0)
        client.acl_deluser("someone")


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost/0?socket_timeout=soon", "redis://h?colour=red"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a URL of a Redis"):
        Address(url)
