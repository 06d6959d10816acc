"""Faults of Redis under running workers: lost replies, cut connections, a killed server, a lost tail of its disk."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.store.reaper import tails_of
from tests.support.fake_fleet import WorkerFleet, following, workers_ready
from tests.support.fleet import process_state
from tests.support.protocol import eventually
from tests.support.proxy import Proxy
from tests.support.redis_server import ServerUnderTest

NUM_TOKENS = 150
LOST_BYTES = 64 << 10


@pytest.fixture()
def fleet(own_redis: ServerUnderTest, tmp_path: Path) -> Iterator[WorkerFleet]:
    with WorkerFleet(tmp_path, own_redis.url) as running:
        yield running


async def test_lost_replies_change_nothing(own_redis: ServerUnderTest, tmp_path: Path) -> None:
    async with Proxy(own_redis.url, tmp_path) as proxy:
        with WorkerFleet(tmp_path, proxy.url) as fleet:
            proxy.lose("fleet_hello_")
            worker = fleet.start("w1")
            async with following(own_redis.url) as follower:
                await workers_ready(follower.fleet.connection, {"w1"})
                assert proxy.num_lost == 1
                proxy.lose("fleet_take_")
                jobs = [await follower.submit(seed, NUM_TOKENS) for seed in (1, 2)]
                for count, function in enumerate(("fleet_step_",) * 4, start=3):
                    await follower.reach(jobs[0], 20 * count)
                    proxy.lose(function)
                    await eventually(lambda count=count: proxy.num_lost >= count, what=f"reply {count} lost")
                proxy.cut()
                for job in jobs:
                    record = await follower.assert_exact(job)
                    assert record.attempts == 1, "it was taken once"
                assert proxy.num_lost == 6
                assert worker.metric("inferfleet_worker_fenced_total") == 0
            await asyncio.to_thread(worker.stop)


async def test_redis_killed_and_restarted(own_redis: ServerUnderTest, fleet: WorkerFleet) -> None:
    for name in ("w1", "w2"):
        fleet.start(name)
    async with following(own_redis.url) as follower:
        await workers_ready(follower.fleet.connection, {"w1", "w2"})
        jobs = [await follower.submit(seed, NUM_TOKENS) for seed in (1, 2, 3)]
        position = await follower.reach(jobs[0], 40)
        owner = fleet.workers[await follower.owner(jobs[0])]
        own_redis.kill()
        assert own_redis.server.process.returncode == -signal.SIGKILL
        assert 2 <= position <= NUM_TOKENS - 2
        own_redis.restart()
        for job in jobs:
            record = await follower.assert_exact(job)
            assert record.attempts == 1, "its worker kept it"
        assert owner.metric("inferfleet_worker_reasserted_total") >= 1
        assert sum(worker.metric("inferfleet_worker_fenced_total") for worker in fleet.workers.values()) == 0
        assert follower.num_reconnects >= 1


@pytest.mark.parametrize("num_before", [0, 12], ids=["everything lost", "tail lost"])
async def test_redis_loses_its_newest_writes(own_redis: ServerUnderTest, fleet: WorkerFleet, num_before: int) -> None:
    worker = fleet.start("w1")
    async with following(own_redis.url) as follower:
        await workers_ready(follower.fleet.connection, {"w1"})
        incarnation = (await follower.fleet.workers())[0].incarnation
        for seed in range(num_before):
            await follower.submit(100 + seed, NUM_TOKENS)
        await eventually(lambda: own_redis.aof_size() > num_before * 8000, limit_s=20, what="a long append-only file")
        jobs = [await follower.submit(seed, NUM_TOKENS) for seed in (1, 2, 3, 4)]
        position = await follower.reach(jobs[0], 60)
        worker.process.send_signal(signal.SIGSTOP)
        await eventually(lambda: process_state(worker.pid) == "T", what="the worker is frozen")
        own_redis.kill()
        assert own_redis.cut_aof_tail(LOST_BYTES) > 0
        own_redis.restart()
        ids = [job.job_id for job in jobs]
        tails = await tails_of(follower.fleet.connection, follower.lane, "w1", incarnation, ids)
        assert all(tails[job_id][1] < follower.position(job_id) for job_id in ids), "shown tokens are lost"
        assert 2 <= position <= NUM_TOKENS - 2
        worker.process.send_signal(signal.SIGCONT)
        for job in jobs:
            await follower.assert_exact(job)
        assert worker.metric("inferfleet_worker_reasserted_total") >= 1
