"""Adapters on a worker with a fake engine: those of its command line, those that come and go while it serves, and jobs
that bring one along."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import keys
from common.adapters import MAX_ADAPTERS
from common.job import Adapter, Job, JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.replies import AdapterEntry, AdapterFinding
from tests.support.fake_engine import Answer, adapted, digest_of, oracle, write_adapter
from tests.support.fake_fleet import VOCABULARY, Follower, following
from tests.support.hub_server import COMMIT, HubServer
from tests.support.local_agent import Running, agent_on, fail_to_start
from tests.support.protocol import FakeAgent, eventually
from tests.support.redis_server import ServerUnderTest
from worker.agent import Agent

HELD_BYTES, NUM_BYTES = 1_000_000, 2_000_000


@pytest.fixture()
async def running(redis_url: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with agent_on(redis_url, tmp_path, "--step-ms", "5") as value:
        yield value


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub with one adapter, whose weights stop in their middle."""
    write_adapter(tmp_path / "of-hub")
    files = {"adapter_config.json": (tmp_path / "of-hub" / "adapter_config.json").read_bytes()}
    files["adapter_model.safetensors"] = bytes(NUM_BYTES)
    with HubServer({"owner/fr": files}, hold_after=HELD_BYTES) as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def expected(job: Job) -> Answer:
    assert job.adapter is not None
    return oracle(VOCABULARY, adapted(job.params.seed, job.adapter.digest), job.params.max_new_tokens)


async def serving(running: Running) -> None:
    async def is_ready() -> bool:
        return [info.state for info in await running.follower.fleet.workers()] == ["ready"]

    await eventually(is_ready, limit_s=10, what="the worker serves")


async def load(follower: Follower, name: str, source: str | Path) -> AdapterEntry:
    """As the route does: register, then wait for a worker's word."""
    entry = await follower.fleet.put_adapter(follower.lane, name, str(source))

    async def settled() -> AdapterEntry | None:
        found = await follower.fleet.adapter(follower.lane, name)
        return found if found is not None and (found.token, found.state) != (entry.token, "loading") else None

    found = await eventually(settled, limit_s=10, what=f"a word on adapter {name}")
    assert isinstance(found, AdapterEntry)
    return found


# ------------------------------------------------------------------ of the command line


async def test_adapters_of_the_command_line_are_there_from_the_start(redis_url: str, tmp_path: Path) -> None:
    digests = {name: write_adapter(tmp_path / name, rank) for name, rank in (("fr", 8), ("sql", 16))}
    given = [f"{name}={tmp_path / name}" for name in digests]
    async with agent_on(redis_url, tmp_path, lora_adapters=given) as running:
        follower = running.follower
        await serving(running)
        entries = await follower.fleet.adapters(follower.lane)
        assert {entry.name: (entry.state, entry.found.digest, entry.found.rank) for entry in entries} == {
            "fr": ("ready", digests["fr"], 8),
            "sql": ("ready", digests["sql"], 16),
        }
        jobs = [await follower.submit(1, 40, adapter=entry.adapter) for entry in entries]
        jobs.append(await follower.submit(1, 40))
        texts = {expected(job).text if job.adapter else oracle(VOCABULARY, 1, 40).text for job in jobs}
        assert len(texts) == 3, "three different answers are to come"
        for job in jobs:
            await follower.assert_exact(job, expected(job) if job.adapter else None)


async def test_adapters_that_cannot_work_end_the_worker_with_a_sentence(redis_url: str, tmp_path: Path) -> None:
    async def problem(**orders: Any) -> str:
        write_adapter(tmp_path / "fr", **orders)
        return await fail_to_start(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path / 'fr'}"])

    misfit = "adapter fr: layer 3 has 64 columns, the model 128"
    assert await problem(misfit=misfit) == f"--lora-adapters: {misfit}"
    died = "adapter fr: the engine died 2 times while it looked at it"
    assert await problem(exits=9) == f"--lora-adapters: {died}"
    missing = await fail_to_start(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path}/none"])
    assert missing == f"--lora-adapters: fr: there is no folder {tmp_path}/none; check its source"
    named = await fail_to_start(redis_url, tmp_path, lora_adapters=[f"tiny={tmp_path / 'fr'}"])
    assert named == "--lora-adapters: tiny is the model's own name; give the adapter another one"
    connection = await Connection.open(redis_url)
    assert await FleetStore(connection).lanes() == [], "none of them was ever announced"
    await connection.close()


async def test_a_worker_whose_adapter_others_serve_with_other_weights_does_not_start(
    redis_url: str, tmp_path: Path
) -> None:
    old = write_adapter(tmp_path / "fr", 8)
    given = {"lora_adapters": [f"fr={tmp_path / 'fr'}"], "lease": 0.3}
    async with agent_on(redis_url, tmp_path, **given) as running:
        await serving(running)
        write_adapter(tmp_path / "fr", 4)
        message = await fail_to_start(redis_url, tmp_path, worker_id="w2", **given)
        assert message.startswith("adapter fr has other weights on workers that serve it now: give this one another")
        (entry,) = await running.follower.fleet.adapters(running.follower.lane)
        assert entry.found.digest == old
    async with agent_on(redis_url, tmp_path, worker_id="w2", **given) as running:
        await serving(running)
        (entry,) = await running.follower.fleet.adapters(running.follower.lane)
        assert entry.found.digest == digest_of(tmp_path / "fr"), "nobody serves the old ones any more"


async def test_an_adapter_of_the_command_line_is_found_again_where_it_lies_here(redis_url: str, tmp_path: Path) -> None:
    """Another worker has registered it from another folder, which jobs name; a job that fails is no reason to look
    for it there."""
    digest = write_adapter(tmp_path / "fr")
    async with agent_on(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path / 'fr'}"]) as running:
        await serving(running)
        follower, adapter = running.follower, Adapter("fr", "/on/another/machine", digest)
        shutil.move(tmp_path / "fr", tmp_path / "kept")
        record = await follower.end(await follower.submit(1, 20, adapter=adapter))
        assert (record.state, record.error_code) == (JobState.FAILED, "engine_error")
        shutil.move(tmp_path / "kept", tmp_path / "fr")
        job = await follower.submit(2, 20, adapter=adapter)
        await follower.assert_exact(job, expected(job))


async def test_of_two_workers_that_begin_at_once_with_other_weights_one_is_told(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder, rank in (("a", 8), ("b", 4)):
        write_adapter(tmp_path / folder, rank)
    put, goes_on = Agent._put_adapters, asyncio.Event()

    async def put_and_pause(agent: Agent) -> None:
        await put(agent)
        if agent.worker_id == "w2":
            await goes_on.wait()

    monkeypatch.setattr(Agent, "_put_adapters", put_and_pause)
    given = {"worker_id": "w2", "lease": 0.3}
    second = asyncio.create_task(fail_to_start(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path / 'a'}"], **given))
    async with following(redis_url) as follower:

        async def digests() -> list[str]:
            return [entry.found.digest for entry in await follower.fleet.adapters(follower.lane)]

        await eventually(digests, what="the second one has put its adapter, and is paused before its hello")
        assert await digests() == [digest_of(tmp_path / "a")]
        async with agent_on(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path / 'b'}"], lease=0.3) as running:
            await serving(running)
            assert await digests() == [digest_of(tmp_path / "b")]
            goes_on.set()
            assert (await second).startswith("adapter fr has other weights on workers that serve it now")
            assert await digests() == [digest_of(tmp_path / "b")]
            assert not running.task.done()


@pytest.mark.parametrize("is_sealed", [True, False])
async def test_a_lane_whose_time_ran_out_is_announced_again_with_its_adapters(
    redis_url: str, redis_server: ServerUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_sealed: bool
) -> None:
    """A worker was cut off for longer than its lane is kept, or all slept: nothing renewed these keys."""
    monkeypatch.setattr("worker.agent.RECONCILE_S", 0.2)
    write_adapter(tmp_path / "fr")
    async with agent_on(redis_url, tmp_path, lora_adapters=[f"fr={tmp_path / 'fr'}"]) as running:
        await serving(running)
        follower = running.follower
        (entry,) = await follower.fleet.adapters(follower.lane)
        await eventually(lambda: running.agent._adapters.brought, what="the worker has seen that it is ready")
        if is_sealed:
            assert await follower.fleet.seal_worker("w1") == 0
        with redis_server.client() as client:
            lane = (keys.model(follower.lane), keys.fingerprint(follower.lane), keys.adapters(follower.lane))
            assert client.delete(*lane) == 3

        async def is_back() -> bool:
            adapters = await follower.fleet.adapters(follower.lane)
            return [one.adapter for one in adapters] == [entry.adapter] and await follower.fleet.is_announced(
                follower.lane
            )

        await eventually(is_back, limit_s=10, what="model and adapter are offered again")
        job = await follower.submit(1, 20, adapter=entry.adapter)
        await follower.assert_exact(job, expected(job))
        assert running.metric("worker_fenced_total") == is_sealed


# ------------------------------------------------------------------ while it serves


async def test_an_adapter_is_loaded_and_unloaded_while_jobs_run(running: Running, tmp_path: Path) -> None:
    follower = running.follower
    base = await follower.submit(2, 150)
    await follower.reach(base, 5)
    digest = write_adapter(tmp_path / "fr", 32)
    entry = await load(follower, "fr", tmp_path / "fr")
    assert (entry.state, entry.found) == (
        "ready",
        AdapterFinding(digest=digest, rank=32, place=str(tmp_path / "fr")),
    )
    job = await follower.submit(2, 150, adapter=entry.adapter)
    position = await follower.reach(job, 5)
    assert await follower.fleet.drop_adapter(follower.lane, entry)
    assert position < 140, "it is in the middle"
    late = await follower.submit(3, 20, adapter=entry.adapter)
    await follower.assert_exact(job, expected(job))
    await follower.assert_exact(late, expected(late))
    await follower.assert_exact(base)
    assert running.metric("engine_batch_max") >= 2
    assert await follower.fleet.adapters(follower.lane) == []


async def test_what_does_not_fit_is_said_and_harms_nobody(running: Running, tmp_path: Path) -> None:
    follower = running.follower
    job = await follower.submit(4, 60, prompt="!slow@10")
    await follower.reach(job, 2)
    write_adapter(tmp_path / "bad", misfit="adapter bad: it is for another model")
    for source, problem in (
        (tmp_path / "bad", "adapter bad: it is for another model"),
        (tmp_path / "none", f"adapter bad: there is no folder {tmp_path}/none; check its source"),
        (tmp_path, f"adapter bad: there is no adapter_config.json in {tmp_path}"),
        ("~nobody-here/x", "adapter bad: ~nobody-here/x cannot be read: Could not determine home directory."),
        ("/" + 300 * "x", f"adapter bad: /{300 * 'x'} cannot be read: [Errno 36] File name too long: '/{300 * 'x'}'"),
    ):
        entry = await load(follower, "bad", source)
        assert (entry.state, entry.found.error) == ("failed", problem)
    await follower.assert_exact(job)
    assert running.metric("worker_engine_deaths_total") == 0


async def test_whatever_goes_wrong_in_a_search_is_said_and_ends_nobody(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("worker.adapters.fetch", locked)
    problem = "adapter fr: owner/fr cannot be read: [Errno 13] Permission denied: '/cache'"
    assert (await load(running.follower, "fr", "owner/fr")).found.error == problem
    job = await running.follower.submit(1, 20, adapter=Adapter("fr", "owner/fr", "0f" * 16))
    record = await running.follower.end(job)
    assert (record.error_code, record.error_message) == ("adapter_error", problem)
    await running.follower.assert_exact(await running.follower.submit(2, 20))


async def test_a_folder_whose_full_name_cannot_stand_in_a_job_is_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a\nb" / "fr")
    monkeypatch.chdir(tmp_path / "a\nb")
    entry = await load(running.follower, "fr", "fr")
    assert entry.found.error.startswith("adapter fr: fr is in '/") and "\n" not in entry.found.error


@pytest.mark.parametrize(("exits", "state"), [(1, "ready"), (9, "failed")])
async def test_an_engine_that_dies_over_an_adapter_is_asked_once_more(
    running: Running, tmp_path: Path, exits: int, state: str
) -> None:
    write_adapter(tmp_path / "fr", exits=exits)
    entry = await load(running.follower, "fr", tmp_path / "fr")
    assert (entry.state, running.metric("worker_engine_deaths_total")) == (state, min(exits, 2))
    if state == "failed":
        assert entry.found.error == "adapter fr: the engine died 2 times while it looked at it"
    await running.follower.assert_exact(await running.follower.submit(5, 20))


async def test_adapters_come_back_with_a_redis_that_forgot_them_and_not_after_a_seal(
    running: Running, redis_server: ServerUnderTest, tmp_path: Path
) -> None:
    follower = running.follower
    write_adapter(tmp_path / "fr")
    entry = await load(follower, "fr", tmp_path / "fr")
    await eventually(lambda: running.agent._adapters.brought, what="the worker has seen that it is ready")
    with redis_server.client() as client:
        client.flushall()

    async def is_back() -> bool:
        return [one.adapter for one in await follower.fleet.adapters(follower.lane)] == [entry.adapter]

    await eventually(is_back, limit_s=10, what="the adapter is registered again")
    await serving(running)
    (before,) = await follower.fleet.workers()
    (entry,) = await follower.fleet.adapters(follower.lane)
    assert await follower.fleet.seal_worker("w1") == 0
    assert await follower.fleet.drop_adapter(follower.lane, entry)

    async def is_new() -> bool:
        return {info.incarnation for info in await follower.fleet.workers()} - {before.incarnation} != set()

    await eventually(is_new, limit_s=10, what="the worker begins anew")
    assert await follower.fleet.adapters(follower.lane) == []


async def test_a_worker_serves_on_when_there_is_no_room_for_what_redis_forgot(
    running: Running, redis_server: ServerUnderTest, tmp_path: Path
) -> None:
    follower = running.follower
    write_adapter(tmp_path / "fr")
    await load(follower, "fr", tmp_path / "fr")
    await eventually(lambda: running.agent._adapters.brought, what="the worker has seen that it is ready")
    with redis_server.client() as client, client.pipeline(transaction=True) as pipe:
        key = keys.adapters(follower.lane)
        (packed,) = client.hvals(key)
        pipe.delete(key, f"{keys.tag(follower.lane)}:w:w1")
        pipe.hset(key, mapping={f"n{number}": packed for number in range(MAX_ADAPTERS)})
        pipe.execute()
    await eventually(lambda: running.metric("worker_reasserted_total"), limit_s=10, what="it begins anew")
    await follower.assert_exact(await follower.submit(1, 20))
    assert await follower.fleet.adapter(follower.lane, "fr") is None


async def test_a_registration_that_nobody_told_this_worker_of_is_found(
    running: Running, monkeypatch: pytest.MonkeyPatch, redis_server: ServerUnderTest, tmp_path: Path
) -> None:
    monkeypatch.setattr("worker.agent.RECONCILE_S", 0.2)
    follower = running.follower
    write_adapter(tmp_path / "fr")
    with redis_server.client() as client:
        entry = await follower.fleet.put_adapter(follower.lane, "fr", str(tmp_path / "fr"))
        for key in client.scan_iter("*:ctl:*"):
            client.delete(key)
    assert (await load(follower, "fr", entry.source)).state == "ready"


# ------------------------------------------------------------------ jobs that bring one


async def test_a_job_whose_adapter_cannot_be_had_fails_alone(running: Running, tmp_path: Path) -> None:
    follower, folder = running.follower, tmp_path / "fr"
    digest = write_adapter(folder)
    kept = tmp_path / "kept"
    shutil.move(folder, kept)
    adapter = Adapter("fr", str(folder), digest)
    beside = await follower.submit(6, 100)
    record = await follower.end(await follower.submit(6, 20, adapter=adapter))
    assert (record.state, record.error_code) == (JobState.FAILED, "adapter_error")
    assert record.error_message == f"adapter fr: there is no folder {folder}; check its source"
    write_adapter(folder, 99)
    record = await follower.end(await follower.submit(6, 20, adapter=adapter))
    assert (record.state, record.error_message) == (JobState.FAILED, f"adapter fr: {folder} holds other weights now")
    shutil.rmtree(folder)
    shutil.move(kept, folder)
    good = await follower.submit(6, 20, adapter=adapter)
    await follower.assert_exact(good, expected(good))
    shutil.rmtree(folder)
    again = await follower.submit(7, 20, adapter=adapter)
    await follower.assert_exact(again, expected(again))
    await follower.assert_exact(beside)
    assert running.metric("worker_engine_deaths_total") == 0


async def test_jobs_that_wait_for_an_adapter_hold_up_nobody(hub: HubServer, redis_url: str, tmp_path: Path) -> None:
    digest = digest_of(tmp_path / "of-hub")
    async with agent_on(redis_url, tmp_path, step_limit=0.3) as running:
        follower, adapter = running.follower, Adapter("fr", "owner/fr@main", digest)
        waiting, unwanted = [await follower.submit(8, 20, adapter=adapter) for _ in range(2)]
        await eventually(hub.is_holding.is_set, limit_s=10, what="the download stands still")
        await follower.assert_exact(await follower.submit(9, 60))
        await asyncio.sleep(1.0)
        await follower.assert_exact(await follower.submit(9, 60))
        await follower.jobs.cancel(unwanted.job_id)
        record = await follower.end(unwanted)
        assert (record.state, record.num_tokens) == (JobState.CANCELLED, 0)
        record = await follower.jobs.record(waiting.job_id)
        assert record is not None and record.state is JobState.IN_PROGRESS
        hub.release.set()
        await follower.assert_exact(waiting, expected(waiting))
        assert running.metric("worker_engine_deaths_total") == 0, "waiting is no hang"
        num_listed = sum("/tree/" in path for path, _ in hub.requested)
        another = await follower.submit(10, 20, adapter=adapter)
        await follower.assert_exact(another, expected(another))
        assert sum("/tree/" in path for path, _ in hub.requested) == num_listed, "it was looked for once"


async def test_the_death_of_an_engine_is_not_charged_to_jobs_that_it_never_had(
    hub: HubServer, redis_url: str, tmp_path: Path
) -> None:
    async with agent_on(redis_url, tmp_path) as running:
        follower = running.follower
        adapter = Adapter("fr", "owner/fr@main", digest_of(tmp_path / "of-hub"))
        waiting = await follower.submit(8, 20, adapter=adapter)
        await eventually(hub.is_holding.is_set, limit_s=10, what="the download stands still")
        poison = await follower.submit(9, 20, prompt="!exit@0")
        assert (await follower.end(poison)).error_code == "poison"
        assert running.metric("worker_engine_deaths_total") == 3

        async def is_back() -> bool:
            record = await follower.jobs.record(waiting.job_id)
            return record is not None and (record.state, record.epoch) == (JobState.IN_PROGRESS, 4)

        await eventually(is_back, limit_s=10, what="it was given back and taken again three times")
        hub.release.set()
        await follower.assert_exact(waiting, expected(waiting))


async def test_an_adapter_of_a_hub_is_the_same_on_every_worker(
    hub: HubServer, running: Running, tmp_path: Path
) -> None:
    hub.release.set()
    entry = await load(running.follower, "fr", "owner/fr")
    assert entry.found.place == f"owner/fr@{COMMIT}", "jobs name the commit"
    assert entry.found.digest == digest_of(tmp_path / "of-hub")
    missing = await load(running.follower, "none", "owner/none")
    assert missing.found.error.startswith("adapter none: the hub has no model owner/none")


async def test_the_word_of_the_first_worker_counts(running: Running, connection: Connection, tmp_path: Path) -> None:
    """What it said was ready is ready; on the other one, which has other weights there, jobs with it fail."""
    follower = running.follower
    write_adapter(tmp_path / "fr", exits=1)
    first = FakeAgent(connection, "w2")
    first.store.lane = follower.lane
    await first.start()
    entry = await follower.fleet.put_adapter(follower.lane, "fr", str(tmp_path / "fr"))
    found = AdapterFinding(digest="0f" * 16, rank=8, place=str(tmp_path / "fr"))
    assert await first.store.settle_adapter("fr", entry.token, found) is not None
    await first.store.bye()
    await eventually(lambda: running.agent._adapters.brought, limit_s=10, what="the other has seen it")
    record = await follower.end(await follower.submit(11, 20, adapter=Adapter("fr", found.place, found.digest)))
    assert record.error_message == f"adapter fr: {found.place} holds other weights now"
