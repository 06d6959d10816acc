"""Models, workers, queues, API keys: what operators and gateways see of the fleet."""

from __future__ import annotations

import pytest

from common import keys
from common.errors import StoreError
from common.job import JobState
from common.store.connection import Connection
from common.store.fleet import FleetStore, digest_of_key
from common.store.jobs import JobStore
from common.store.replies import WorkerInfo
from common.store.workers import WorkerStore
from tests.support.protocol import LANE, FakeAgent, make_card, make_job, submit
from tests.support.redis_server import ServerUnderTest


async def test_an_announced_model_is_found_with_its_tokenizer(fleet: FleetStore) -> None:
    assert await fleet.cards() == []
    await fleet.announce(make_card(), b"tokenizer bytes")
    assert await fleet.cards() == [make_card()]
    assert await fleet.tokenizer("d1") == b"tokenizer bytes"
    assert await fleet.tokenizer("d2") is None
    await fleet.retire(LANE)
    assert await fleet.cards() == []


async def test_limits_are_the_smallest_of_the_living_workers(connection: Connection, fleet: FleetStore) -> None:
    await fleet.announce(make_card(), b"{}")
    small, large = [WorkerStore(connection, LANE, f"w{i}", "aaaa") for i in range(2)]
    await large.hello({"max_input_tokens": 500, "max_total_tokens": 600})
    await small.hello({"max_input_tokens": 200, "max_total_tokens": 300})
    (card,) = await fleet.cards()
    assert (card.max_input_tokens, card.max_total_tokens) == (200, 300)
    await small.bye()
    (card,) = await fleet.cards()
    assert (card.max_input_tokens, card.max_total_tokens) == (500, 600)


async def test_a_lane_does_not_change_its_model_under_live_workers(agent: FakeAgent, fleet: FleetStore) -> None:
    await fleet.announce(make_card(), b"{}")
    with pytest.raises(StoreError, match="another model"):
        await fleet.announce(make_card(dtype="bfloat16"), b"{}")
    await fleet.announce(make_card(max_total_tokens=300), b"{}")
    await agent.store.bye()
    await fleet.announce(make_card(dtype="bfloat16"), b"{}")


async def test_a_card_outlives_its_last_worker_by_an_hour(
    agent: FakeAgent, fleet: FleetStore, connection: Connection, redis_server: ServerUnderTest
) -> None:
    await fleet.announce(make_card(), b"{}")
    with redis_server.client() as client:
        client.expire(keys.model(LANE), 50)
        await connection.call("sweep", LANE, 10)
        assert client.ttl(keys.model(LANE)) > 3500
        await agent.store.bye()
        client.expire(keys.model(LANE), 50)
        await connection.call("sweep", LANE, 10)
        assert client.ttl(keys.model(LANE)) <= 50


async def test_workers_are_listed_while_they_load_serve_and_drain(fleet: FleetStore, agent: FakeAgent) -> None:
    await fleet.announce(make_card(), b"{}")
    loading = WorkerInfo(id="w2", pid=7, host="there", model="demo", state="loading", phase="weights", done=3, total=9)
    await fleet.report(loading)
    ready, seen = await fleet.workers()
    assert seen == loading
    assert (ready.id, ready.state, ready.lane, ready.incarnation) == ("w1", "ready", LANE, agent.store.incarnation)
    assert await fleet.drain("w1")
    assert not await fleet.drain("nobody")
    assert [info.state for info in await fleet.workers()] == ["draining", "loading"]
    await fleet.unreport("w2")
    await agent.store.bye()
    assert await fleet.workers() == []


async def test_hello_ends_the_report_of_loading(fleet: FleetStore, connection: Connection) -> None:
    await fleet.announce(make_card(), b"{}")
    await fleet.report(WorkerInfo(id="w1", state="loading"))
    await FakeAgent(connection).start()
    assert [(info.id, info.state) for info in await fleet.workers()] == [("w1", "ready")]


async def test_a_reaped_process_is_sealed_at_once(
    jobs: JobStore, fleet: FleetStore, agent: FakeAgent, connection: Connection
) -> None:
    await fleet.announce(make_card(), b"{}")
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    await agent.step({job.job_id: 4})
    assert await fleet.seal_worker("w1") == 1
    (taken,) = await (await FakeAgent(connection, "w2").start()).take()
    assert (taken.job.job_id, taken.num_tokens) == (job.job_id, 4)
    assert await fleet.seal_worker("w1") == 0


async def test_the_queue_counts(jobs: JobStore, fleet: FleetStore, agent: FakeAgent) -> None:
    for _ in range(3):
        await submit(jobs, make_job(cost=7))
    (taken,) = await agent.take(1)
    queue = await fleet.queue(LANE)
    assert (queue["queued"], queue["queued_tokens"], queue["running"], queue["workers"]) == (2, 14, 1, 1)
    await agent.finish(taken.job.job_id)
    queue = await fleet.queue(LANE)
    assert (queue["submitted"], queue["completed"], queue["running"], queue["dead_letters"]) == (3, 1, 0, 0)


async def test_unfinished_jobs_are_counted_and_dropped(jobs: JobStore, fleet: FleetStore, agent: FakeAgent) -> None:
    await fleet.announce(make_card(), b"{}")
    ids = [make_job() for _ in range(3)]
    for job in ids:
        await submit(jobs, job)
    await agent.take(1)
    assert await fleet.count_unfinished() == 3
    assert await fleet.drop_unfinished() == 3
    assert await fleet.count_unfinished() == 0
    assert [await jobs.record(job.job_id) for job in ids] == [None] * 3


async def test_a_key_is_shown_once_and_found_by_its_digest(fleet: FleetStore, redis_server: ServerUnderTest) -> None:
    text = await fleet.create_key("team-a", name="laptop")
    assert text.startswith("if-")
    assert len(text) > 40
    (key,) = await fleet.keys()
    assert (key.tenant, key.name, key.digest) == ("team-a", "laptop", digest_of_key(text))
    assert await fleet.tenant_of(digest_of_key(text)) == "team-a"
    assert await fleet.tenant_of(digest_of_key("wrong")) is None
    with redis_server.client() as client:
        assert text.encode() not in b"".join(client.hvals(keys.API_KEYS))
    assert await fleet.revoke_key(key.key_id)
    assert not await fleet.revoke_key(key.key_id)
    assert await fleet.tenant_of(digest_of_key(text)) is None


async def test_a_dead_letter_is_kept_and_redriven(
    jobs: JobStore, fleet: FleetStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    job = make_job(result_ttl_s=60, orphan_grace_s=5)
    await submit(jobs, job, gateway="g1")
    await agent.take()
    await agent.step({job.job_id: 3}, flush=[job.job_id])
    await agent.finish(job.job_id, JobState.FAILED, error_code="engine_error", error_message="boom")
    (letter,) = await fleet.dead_letters(LANE)
    assert (letter.job_id, letter.error_code, letter.error_message) == (job.job_id, "engine_error", "boom")
    with redis_server.client() as client:
        for key in (keys.record(LANE, job.job_id), keys.body(LANE, job.job_id), keys.log(LANE, job.job_id)):
            assert 6 * 86400 < client.ttl(key) <= 7 * 86400
        assert await fleet.redrive(LANE, job.job_id) == 1
        for key in (keys.record(LANE, job.job_id), keys.body(LANE, job.job_id), keys.log(LANE, job.job_id)):
            assert client.ttl(key) == -1
    assert await fleet.dead_letters(LANE) == []
    (taken,) = await agent.take()
    assert (taken.job.prompt_ids, taken.num_tokens, taken.attempts) == (job.prompt_ids, 3, 0)
    await agent.finish(job.job_id)
    record = await jobs.record(job.job_id)
    assert record is not None
    assert (record.state, record.error_code) == (JobState.COMPLETED, "")


async def test_all_dead_letters_of_a_lane_at_once_and_nothing_else(
    jobs: JobStore, fleet: FleetStore, agent: FakeAgent
) -> None:
    done = make_job()
    failed = [make_job() for _ in range(3)]
    for job in [done, *failed]:
        await submit(jobs, job)
    await agent.take()
    for job in failed:
        await agent.finish(job.job_id, JobState.FAILED)
    await agent.finish(done.job_id)
    assert await fleet.redrive(LANE, done.job_id) == 0
    assert await fleet.redrive(LANE) == 3
    assert len(await agent.take()) == 3
