"""When all work is done every key has a time to live, or an owner on this list."""

from __future__ import annotations

import re

from common import keys
from common.job import JobState, Priority
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.reaper import Reaper
from common.store.replies import WorkerInfo
from tests.support.protocol import LANE, FakeAgent, make_card, make_job, submit
from tests.support.redis_server import ServerUnderTest

JOB = r"[a-z2-7]{28}"
WITH_TTL = {
    keys.record(LANE, "X").replace("X", JOB): 7 * 86400,
    keys.body(LANE, "X").replace("X", JOB): 7 * 86400,
    keys.log(LANE, "X").replace("X", JOB): 7 * 86400,
    keys.erased(LANE, "X").replace("X", JOB): 3600,
    keys.idempotency(LANE, "default", "[0-9a-f]{32}"): 7 * 86400,
    keys.worker(LANE, "w[0-9]"): 3600,
    keys.bell(LANE): 60,
    keys.last_life(LANE): 60,
    keys.rate(LANE): 3600,
    keys.model(LANE): 3600,
    keys.fingerprint(LANE): 3600,
    keys.adapters(LANE): 3600,
    keys.tokenizer("d1"): 7 * 86400,
    keys.worker_report("w9"): 60,
}
"""Pattern of a key and the longest time to live it may have, in seconds."""

OWNED = {
    keys.tenant_index(LANE, "default"): "one entry per record; the sweep removes them with their records",
    keys.expiries(LANE): "one entry per finished record; the sweep removes them",
    keys.dead_letters(LANE): "one entry per failed record; the sweep removes them",
    keys.audit(LANE): "trimmed to about 10,000 entries",
    keys.counters(LANE): "one field per counter",
    keys.incarnation_counter(LANE): "one number per lane",
    keys.LANES: "one member per lane; a reaper removes empty ones",
    keys.WORKERS: "one member per loading worker; readers remove the silent",
    keys.API_KEYS: "the operator's",
}
ONLY_WHILE_ALIVE = {keys.worker(LANE, "w7"), keys.incarnations(LANE), keys.gateways(LANE)}


def pattern(key: str) -> str:
    return "^" + key.replace("{abcdef}", r"\{abcdef\}") + "$"


async def work(jobs: JobStore, fleet: FleetStore, connection: Connection) -> None:
    """Jobs that end in every way, and workers that go in every way."""
    await fleet.announce(make_card(), b"{}")
    await fleet.report(WorkerInfo(id="w9", state="loading"))
    await fleet.create_key("default")
    await fleet.put_adapter(LANE, "fr", "/adapters/fr")
    agent = await FakeAgent(connection, "w1").start()
    for number in range(24):
        options = {"idempotency_key": f"k{number}", "body_hash": "h"} if number % 2 else {}
        priority = Priority.BATCH if number % 5 == 0 else Priority.INTERACTIVE
        await submit(jobs, make_job(priority=priority, orphan_grace_s=30, **options), gateway="g1")
    records, _ = await jobs.list_jobs([LANE], "default", limit=24)
    await jobs.cancel(records[0].job_id)
    await jobs.erase(records[1].job_id, "default")
    taken = [item.job.job_id for item in await agent.take(10)]
    await agent.step(dict.fromkeys(taken, 3), flush=taken[:5], gateways=["g1"])
    await jobs.attach(taken[0], "g2")
    await agent.finish(taken[1])
    await agent.finish(taken[2], JobState.FAILED)
    await jobs.cancel(taken[3])
    await agent.finish(taken[3])
    await agent.store.release([(taken[4], 1)], count_attempt=False)
    await agent.store.bye()
    second = await FakeAgent(connection, "w2").start()
    while items := await second.take(8):
        for item in items:
            await second.finish(item.job.job_id)
    await second.store.bye()


async def test_every_key_that_is_left_expires_or_has_an_owner(
    jobs: JobStore, fleet: FleetStore, connection: Connection, redis_server: ServerUnderTest
) -> None:
    await work(jobs, fleet, connection)
    reaper = Reaper(connection, lease_s=5, lanes=[LANE])
    await reaper.round()
    with redis_server.client() as client:
        client.hset(keys.gateways(LANE), mapping={"g1": 1, "g2": 1})
        await reaper.round()
        ttls = {key.decode(): client.ttl(key) for key in client.keys()}
        dispatch = [keys.dispatch(LANE, number) for number in keys.CLASSES] + [keys.suspects(LANE)]
        assert [client.xlen(key) for key in dispatch] == [0, 0, 0, 0]
    assert (await fleet.queue(LANE))["queued_tokens"] == 0
    assert len(ttls) > 40, "there was work"
    unexplained = {}
    for key, ttl in ttls.items():
        limits = [limit for one, limit in WITH_TTL.items() if re.match(pattern(one), key)]
        if limits:
            assert 0 <= ttl <= limits[0], key
        elif key not in OWNED and key not in dispatch:
            unexplained[key] = ttl
    assert unexplained == {}


async def test_the_list_would_notice_a_key_that_was_left(
    jobs: JobStore, fleet: FleetStore, connection: Connection, redis_server: ServerUnderTest
) -> None:
    agent = await FakeAgent(connection, "w7").start()
    job = make_job()
    await submit(jobs, job)
    await agent.take()
    with redis_server.client() as client:
        left = {key.decode() for key in client.keys() if client.ttl(key) == -1}
    assert keys.owned(LANE, "w7", agent.store.incarnation) in left - set(OWNED)
    assert left & ONLY_WHILE_ALIVE == {keys.worker(LANE, "w7"), keys.incarnations(LANE)}
