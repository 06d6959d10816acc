"""Every malformed argument of every function is refused before the first write."""

from __future__ import annotations

from typing import Any

import pytest

from common import keys, wire
from common.errors import StoreError
from common.job import JobState
from common.store import jobs as jobs_module
from common.store.connection import Connection, library
from common.store.jobs import JobStore, new_job_id
from tests.support.protocol import LANE, FakeAgent, make_job, payload, snapshot, submit
from tests.support.redis_server import ServerUnderTest

HUGE = "9" * 25


def good_calls(agent: FakeAgent, job_id: str, waiting: str) -> dict[str, list[Any]]:
    """One good call of each function that writes. The test spoils one argument at a time."""
    me = ["w1", agent.store.incarnation]
    new = list(jobs_module._submission_args(make_job(), "g1", 1000, 1000))
    tail = [0, 2, payload(0, 2)]
    job = ["team", 1, "chat", 10, 1000, 60, -1, 3, "", "-", 1, b"", wire.encode_job(make_job())]
    return {
        "submit": [*new, 0],
        "hello": ["w1", "aaaaaaaaaaaaaaaa", b"info"],
        "take": [*me, 4, 99, 1, 1],
        "mine": me,
        "body": [*me, job_id],
        "step": [*me, 1, 0, 0, b"frame", "0-0", b"", 1, "g1", b"frame", 1, job_id, 1, *tail]
        + [1, job_id, 1, *tail, "completed", "length", "", ""],
        "adopt": [*me, waiting, 1, *tail, *job],
        "seal": [*me, 0],
        "bury": me,
        "requeue": [*me, job_id, *tail, 3],
        "release": [*me, job_id, 1, *tail, 1, 3],
        "cancel": [waiting],
        "attach": [waiting, "g1"],
        "detach": [waiting, "g1"],
        "erase": [waiting, "default", "aa"],
        "redrive": [waiting, "aa"],
        "adapter_put": ["fr", b"/adapters/fr", "aa", "w1", "0f" * 16, 8, b"/real/fr"],
        "adapter_settle": [*me, "fr", "aa", "0f" * 16, 8, b"/real/fr", b""],
        "adapter_drop": ["fr", "aa"],
        "announce": [b"card", "ab12"],
        "retire": [],
        "drain": me,
        "sweep": [10],
        "record": [waiting],
        "states": [waiting],
        "list": ["default", "", 10, 0, ""],
        "workers": [],
        "queue": [],
        "dead_letters": [10],
    }


def spoiled(args: list[Any]) -> list[list[Any]]:
    """Each prefix, one argument too many, and each argument replaced by nonsense of its kind."""
    variants = [args[:count] for count in range(len(args))] + [[*args, "more"]]
    for index, value in enumerate(args):
        if isinstance(value, int):
            bad: list[Any] = ["", "x", "1.5", "-7", "nan", "inf", "0x10", HUGE]
        elif isinstance(value, bytes) or value in ("", "-"):
            continue
        else:
            bad = ["{", "a b", "a" * 300, "é"]
        variants += [[*args[:index], nonsense, *args[index + 1 :]] for nonsense in bad]
    return variants


REGISTERED = sorted(line.split("'")[1] for line in library()[0].splitlines() if line.startswith("register('"))
LANE_FUNCTIONS = [name for name in REGISTERED if name != "write"]


@pytest.mark.parametrize("function", LANE_FUNCTIONS)
async def test_malformed_arguments_change_no_key(
    function: str, jobs: JobStore, agent: FakeAgent, connection: Connection, redis_server: ServerUnderTest
) -> None:
    running, waiting = make_job(), make_job()
    await submit(jobs, running)
    await agent.take(1)
    await submit(jobs, waiting)
    args = good_calls(agent, running.job_id, waiting.job_id)[function]
    with redis_server.client() as client:
        before = snapshot(client)
        for variant in spoiled(args):
            if function == "states" and not variant:
                continue
            with pytest.raises(StoreError, match="BADARG"):
                await connection.call(function, LANE, *variant)
        assert snapshot(client) == before
    for lane in ("", "a{b", "ABC"):
        with pytest.raises(StoreError, match="BADARG"):
            await connection.call(function, lane, *args)
    if function not in ("requeue",):
        await connection.call(function, LANE, *args)


@pytest.mark.parametrize("place", [b"/a\0b", b"/a\nb", b"x" * 5000])
async def test_places_of_adapters_hold_no_control_characters(
    place: bytes, agent: FakeAgent, connection: Connection, redis_server: ServerUnderTest
) -> None:
    args = good_calls(agent, "", "")["adapter_put"]
    for index in (1, 6):
        with pytest.raises(StoreError, match="BADARG"):
            await connection.call("adapter_put", LANE, *args[:index], place, *args[index + 1 :])
    with redis_server.client() as client:
        assert not client.exists(keys.adapters(LANE))


async def test_write_reaches_only_keys_of_the_fleet(connection: Connection, redis_server: ServerUnderTest) -> None:
    for key, command in (
        ("{abcdef}:j:x", "SET"),
        ("fleet:lanes", "DEL"),
        ("fleet:lanes", "FLUSHALL"),
        ("other", "SET"),
    ):
        with pytest.raises(StoreError, match="BADARG"):
            await connection.write(key, command, "value")
    with redis_server.client() as client:
        assert client.keys() == []


async def test_an_empty_deadline_leaves_no_half_job(connection: Connection, jobs: JobStore, agent: FakeAgent) -> None:
    """A function that dies after its first write would answer the retry with DUP for a job that no worker ever sees."""
    job = make_job()
    args = [*jobs_module._submission_args(job, "g1", 1000, 1000), 0]
    spoiled_args = [*args]
    assert spoiled_args[5] == 3_600_000
    spoiled_args[5] = ""
    with pytest.raises(StoreError, match="BADARG time-out"):
        await connection.call("submit", LANE, *spoiled_args)
    assert await jobs.record(job.job_id) is None
    assert (await submit(jobs, job)).state is JobState.QUEUED
    assert len(await agent.take()) == 1


async def test_a_job_id_of_another_form_never_reaches_the_server(jobs: JobStore) -> None:
    assert await jobs.record(new_job_id(LANE) + "}") is None
