"""Loading of the library, lost replies, errors and their meaning, servers that cannot serve us."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from common import keys
from common.errors import (
    Fenced,
    StepGap,
    StoreError,
    StoreFull,
    StoreUnavailable,
    StoreUnsupported,
    UnknownIncarnation,
)
from common.job import JobState
from common.store.connection import Connection, info_field, library, meaning_of
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.reaper import recover
from common.store.replies import AdapterFinding, Chunk
from tests.support.protocol import LANE, FakeAgent, columns, make_card, make_job, payload, submit
from tests.support.proxy import Proxy
from tests.support.redis_server import ServerUnderTest


@pytest.fixture()
async def proxy(redis_url: str, tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(redis_url, tmp_path) as running:
        yield running


@pytest.fixture()
async def far(proxy: Proxy, connection: Connection) -> AsyncIterator[Connection]:
    """A connection whose replies can be lost."""
    opened = await Connection.open(proxy.url)
    yield opened
    await opened.close()


Losing = Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]


@pytest.fixture()
def losing(proxy: Proxy) -> Losing:
    """Run one call while the first reply to its function is lost; it must have been lost, and the call must succeed."""

    async def run(function: str, call: Callable[[], Awaitable[Any]]) -> Any:
        before = proxy.num_lost
        proxy.lose(f"fleet_{function}_")
        result = await call()
        assert proxy.num_lost == before + 1, "no reply was lost"
        return result

    return run


async def test_the_library_names_itself_by_its_source(redis_server: ServerUnderTest, connection: Connection) -> None:
    source, version = library()
    assert source.startswith(f"#!lua name=inferfleet_{version}\n")
    with redis_server.client() as client:
        (found,) = client.execute_command("FUNCTION", "LIST", "LIBRARYNAME", f"inferfleet_{version}")
    text = repr(found)
    assert f"fleet_submit_{version}" in text
    assert f"fleet_step_{version}" in text


async def test_other_versions_of_the_library_are_left_alone(redis_server: ServerUnderTest) -> None:
    source, version = library()
    other = source.replace(version, "00000000")
    with redis_server.client() as client:
        client.execute_command("FUNCTION", "LOAD", other)
        opened = await Connection.open(redis_server.url)
        await opened.close()
        names = repr(client.execute_command("FUNCTION", "LIST"))
        client.execute_command("FUNCTION", "DELETE", "inferfleet_00000000")
    assert "inferfleet_00000000" in names
    assert f"inferfleet_{version}" in names


async def test_after_a_function_flush_calls_work(redis_server: ServerUnderTest, jobs: JobStore) -> None:
    with redis_server.client() as client:
        client.execute_command("FUNCTION", "FLUSH")
        assert client.execute_command("FUNCTION", "LIST") in ([], {})
    job = make_job()
    await submit(jobs, job)
    assert await jobs.record(job.job_id) is not None


@pytest.mark.parametrize("key", ["", "k"])
async def test_a_lost_reply_of_submit_makes_one_new_job(
    key: str, far: Connection, losing: Losing, agent: FakeAgent
) -> None:
    jobs, job = JobStore(far), make_job(idempotency_key=key, body_hash="h")
    submission = await losing("submit", lambda: submit(jobs, job))
    assert (submission.job_id, submission.is_duplicate) == (job.job_id, False)
    assert len(await agent.take()) == 1


async def test_a_lost_reply_of_hello_makes_one_incarnation(far: Connection, losing: Losing) -> None:
    agent = FakeAgent(far)
    await losing("hello", agent.start)
    rows = await far.call("workers", LANE)
    assert [row[1].decode() for row in rows] == [agent.store.incarnation]


async def test_a_lost_reply_of_take_loses_no_job(far: Connection, losing: Losing, jobs: JobStore) -> None:
    for _ in range(6):
        await submit(jobs, make_job())
    agent = await FakeAgent(far).start()
    taken = await losing("take", lambda: agent.take(2))
    assert len(taken) == 2
    assert {owned.job_id for owned in await agent.store.mine()} == {item.job.job_id for item in taken}


async def test_a_lost_reply_of_step_commits_once(far: Connection, losing: Losing, jobs: JobStore) -> None:
    first, second = make_job(), make_job()
    await submit(jobs, first)
    await submit(jobs, second)
    agent = await FakeAgent(far).start()
    await agent.take()
    await agent.step({second.job_id: 2})
    await jobs.cancel(first.job_id)
    agent.ends[first.job_id] = 4
    finish = agent.finish_of(second.job_id)
    stray = Chunk(make_job().job_id, 1, 0, 1, payload(0, 1))
    chunk = Chunk(first.job_id, 1, 0, 4, payload(0, 4))
    reply = await losing("step", lambda: agent.step(finishes=[finish], chunks=[chunk, stray]))
    assert reply.is_duplicate
    assert reply.lost == [stray.job_id]
    assert [control.verb for control in reply.controls] == ["cancel"]
    assert await jobs.log(first.job_id) == columns(0, 4)
    record = await jobs.record(second.job_id)
    assert record is not None
    assert (record.state, record.num_tokens) == (JobState.COMPLETED, 2)


async def test_lost_replies_to_a_dying_worker_and_its_reaper(far: Connection, losing: Losing, jobs: JobStore) -> None:
    job = make_job()
    await submit(jobs, job)
    agent = await FakeAgent(far).start()
    await agent.take()
    await agent.step({job.job_id: 3})
    incarnation = agent.store.incarnation
    assert len(await losing("mine", agent.store.mine)) == 1
    assert await losing("body", lambda: agent.store.body(job.job_id)) is not None
    assert await losing("seal", lambda: far.call("seal", LANE, "w1", incarnation, -1)) == 1
    await losing("requeue", lambda: recover(far, LANE, "w1", incarnation))
    assert await losing("bury", lambda: far.call("bury", LANE, "w1", incarnation)) == 1
    assert await jobs.log(job.job_id) == columns(0, 3)
    (taken,) = await (await FakeAgent(far, "w2").start()).take()
    assert (taken.epoch, taken.num_tokens) == (2, 3)


async def test_a_lost_reply_of_release_gives_back_once(far: Connection, losing: Losing, jobs: JobStore) -> None:
    job = make_job()
    await submit(jobs, job)
    agent = await FakeAgent(far).start()
    await agent.take()
    await losing("release", lambda: agent.store.release([(job.job_id, 1)], count_attempt=True))
    (taken,) = await agent.take()
    assert (taken.attempts, taken.epoch) == (1, 2)


async def test_lost_replies_of_what_gateways_ask(far: Connection, losing: Losing, agent: FakeAgent) -> None:
    jobs, job = JobStore(far), make_job(orphan_grace_s=60)
    await submit(jobs, job)
    await agent.take()
    assert await losing("attach", lambda: jobs.attach(job.job_id, "g1")) is not None
    await losing("detach", lambda: jobs.detach(job.job_id, "g1"))
    record = await losing("cancel", lambda: jobs.cancel(job.job_id))
    assert record.cancelling
    assert await losing("record", lambda: jobs.record(job.job_id)) == record
    assert len(await losing("states", lambda: jobs.states(LANE, [job.job_id]))) == 1
    assert len((await losing("list", lambda: jobs.list_jobs([LANE], "default")))[0]) == 1
    verbs = [control.verb for control in (await agent.step()).controls]
    assert verbs.count("cancel") == 1
    assert await losing("erase", lambda: jobs.erase(job.job_id, "default"))
    assert not await jobs.erase(job.job_id, "default")


async def test_lost_replies_of_what_operators_ask(
    far: Connection, losing: Losing, agent: FakeAgent, jobs: JobStore
) -> None:
    fleet, job = FleetStore(far), make_job()
    await losing("announce", lambda: fleet.announce(make_card(), b"{}"))
    await submit(jobs, job)
    await agent.take()
    await agent.finish(job.job_id, JobState.FAILED)
    assert len(await losing("dead_letters", lambda: fleet.dead_letters(LANE))) == 1
    assert await losing("redrive", lambda: fleet.redrive(LANE, job.job_id)) == 1
    assert (await losing("queue", lambda: fleet.queue(LANE)))["queued"] == 1
    assert len(await losing("workers", lambda: fleet.workers(LANE))) == 1
    assert await losing("drain", lambda: fleet.drain("w1"))
    await losing("sweep", lambda: far.call("sweep", LANE, 10))
    await losing("write", lambda: fleet.create_key("default"))
    assert len(await fleet.keys()) == 1
    await losing("retire", lambda: fleet.retire(LANE))
    assert await fleet.cards() == []


async def test_lost_replies_register_settle_and_drop_an_adapter_once(
    far: Connection, losing: Losing, agent: FakeAgent, connection: Connection
) -> None:
    fleet, worker = FleetStore(far), await FakeAgent(far, "w2").start()
    entry = await losing("adapter_put", lambda: fleet.put_adapter(LANE, "fr", "/adapters/fr"))
    assert await fleet.adapters(LANE) == [entry]
    assert [control.verb for control in (await agent.step()).controls] == ["adapters"]
    found = AdapterFinding(digest="0f", rank=8, place="/real/fr")
    settled = await losing("adapter_settle", lambda: worker.store.settle_adapter("fr", entry.token, found))
    assert [settled] == await fleet.adapters(LANE)
    assert settled.found == found
    assert await losing("adapter_drop", lambda: fleet.drop_adapter(LANE, entry))
    assert await fleet.adapters(LANE) == []


async def test_a_lost_reply_of_adopt_adopts(far: Connection, losing: Losing, jobs: JobStore) -> None:
    from common import wire

    agent, job = await FakeAgent(far).start(), make_job()
    body = wire.encode_job(job)
    assert await losing("adopt", lambda: agent.store.adopt(job.job_id, 1, body, columns(0, 3)))
    assert await jobs.log(job.job_id) == columns(0, 3)


def test_every_function_has_a_test_with_a_lost_reply() -> None:
    source, _ = library()
    registered = {line.split("'")[1] for line in source.splitlines() if line.startswith("register('")}
    text = Path(__file__).read_text()
    assert {name for name in registered if f'losing("{name}"' not in text} == set()
    assert len(registered) > 20


async def test_replies_lost_for_too_long_are_an_error(redis_url: str, proxy: Proxy) -> None:
    opened = await Connection.open(proxy.url, timeout_s=0.1)
    proxy.lose("fleet_submit_", times=10_000)
    with pytest.raises(StoreUnavailable):
        await submit(JobStore(opened), make_job())
    assert proxy.num_lost > 1
    await opened.close()


async def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await Connection.open(f"unix://{tmp_path}/nobody.sock", timeout_s=0.2)


async def test_a_server_without_functions_is_refused_in_one_sentence(redis_server: ServerUnderTest) -> None:
    url = redis_server.url.replace("unix://", "unix://limited:secret@")
    with redis_server.client() as client:
        client.acl_setuser("limited", enabled=True, passwords=["+secret"], categories=["+@all"], commands=["-function"])
        with pytest.raises(StoreUnsupported, match="function"):
            await Connection.open(url)
        client.acl_setuser("limited", reset=True, enabled=True, passwords=["+other"])
        with pytest.raises(StoreUnsupported):
            await Connection.open(url)
        client.acl_deluser("limited")


async def test_an_old_server_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    send = Connection._send

    async def old(self: Connection, *command: Any) -> Any:
        return b"redis_version:6.2.14\r\n" if command == ("INFO", "server") else await send(self, *command)

    monkeypatch.setattr(Connection, "_send", old)
    with pytest.raises(StoreUnsupported, match=r"Redis 6\.2\.14, but version 7\.0 or newer"):
        await Connection.open(redis_url)


async def test_a_server_that_hides_info_and_config_is_enough(redis_server: ServerUnderTest) -> None:
    url = redis_server.url.replace("unix://", "unix://managed:secret@")
    with redis_server.client() as client:
        client.acl_setuser(
            "managed",
            reset=True,
            enabled=True,
            passwords=["+secret"],
            categories=["+@all"],
            commands=["-info", "-config"],
            keys=["*"],
            channels=["*"],
        )
        opened = await Connection.open(url)
        job = make_job()
        await submit(JobStore(opened), job)
        agent = await FakeAgent(opened).start()
        assert len(await agent.take()) == 1
        client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(UnknownIncarnation):
            await agent.step()
        await agent.start()
        await agent.step()
        await opened.close()
        client.acl_deluser("managed")


async def test_the_generation_rises_when_the_server_is_another_process(own_redis: ServerUnderTest) -> None:
    connection = await Connection.open(own_redis.url)
    agent = await FakeAgent(connection).start()
    own_redis.kill()
    own_redis.restart()
    with pytest.raises(UnknownIncarnation):
        await agent.step()
    assert connection.generation == 1
    await agent.start()
    await agent.step()
    await connection.close()


async def test_a_broken_connection_to_the_same_server_changes_nothing(
    redis_server: ServerUnderTest, agent: FakeAgent, connection: Connection
) -> None:
    with redis_server.client() as client:
        assert client.client_kill_filter(_type="normal", skipme=True) >= 1
    await agent.step()
    assert connection.generation == 0


@pytest.mark.parametrize("version", [2, 3])
async def test_replies_are_read_in_both_versions_of_redis_protocol(redis_url: str, version: int) -> None:
    connection = await Connection.open(f"{redis_url}?protocol={version}")
    jobs, fleet, job = JobStore(connection), FleetStore(connection), make_job()
    async with jobs.frames("g1", [LANE]) as subscription:
        agent = await FakeAgent(connection).start()
        await submit(jobs, job, gateway="g1")
        await agent.take()
        await agent.step({job.job_id: 3}, gateways=["g1"])
        await agent.store.bye()
        assert await jobs.log(job.job_id) == columns(0, 3)
        heard = [type(await anext(subscription)).__name__ for _ in range(3)]
        assert heard == ["StatusChanged", "Frame", "StatusChanged"]
    await fleet.create_key("default")
    assert len(await fleet.keys()) == 1
    assert (await fleet.queue(LANE))["queued"] == 1
    assert connection.run_id
    await connection.close()


def test_errors_get_their_meaning() -> None:
    def meaning(text: str) -> StoreError:
        return meaning_of(redis.ResponseError(text))

    assert isinstance(meaning("FENCED sealed"), Fenced)
    assert isinstance(meaning("UNKNOWN incarnation"), UnknownIncarnation)
    gap = meaning("GAP step 7")
    assert isinstance(gap, StepGap)
    assert (gap.subject, gap.last) == ("step", 7)
    assert isinstance(meaning("OOM command not allowed when used memory > 'maxmemory'."), StoreFull)
    assert isinstance(meaning_of(redis.OutOfMemoryError("command not allowed")), StoreFull)
    assert isinstance(meaning("MISCONF Redis is configured to save RDB snapshots"), StoreUnavailable)
    assert isinstance(meaning("unknown command 'FCALL'"), StoreUnsupported)
    assert type(meaning("BADARG cost")) is StoreError


def test_info_is_read_in_any_shape() -> None:
    assert info_field(b"# Server\r\nrun_id:abc\r\nredis_version:7.0.15\r\n", "run_id") == "abc"
    assert info_field({"run_id": "abc"}, "run_id") == "abc"
    assert info_field("# Server\n", "run_id") == ""


def test_names_of_keys_fit_the_lane() -> None:
    assert keys.tag(LANE) == "{abcdef}"
