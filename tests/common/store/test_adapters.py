"""Adapters of a lane: registered once, settled by a worker's first word, dropped; whoever races, all see one thing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from common import keys
from common.adapters import MAX_ADAPTERS
from common.errors import Conflict, Fenced, ValidationError, WireError
from common.job import Adapter
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import WITHOUT_ADAPTERS, JobStore
from common.store.replies import AdapterEntry, AdapterFinding, decode_adapter
from tests.support.protocol import LANE, FakeAgent, make_card, make_job, submit
from tests.support.redis_server import ServerUnderTest

FR = "/adapters/fr"
FITS = AdapterFinding(digest="0f" * 16, rank=8, place="/real/fr")
OTHER = AdapterFinding(digest="1e" * 16, rank=4, place="/real/other")
MISFIT = AdapterFinding(error="adapter fr does not fit: it has 30 layers, the model has 24")


async def ready(fleet: FleetStore, agent: FakeAgent, name: str = "fr") -> AdapterEntry:
    entry = await fleet.put_adapter(LANE, name, FR)
    settled = await agent.store.settle_adapter(name, entry.token, FITS)
    assert settled is not None
    return settled


async def verbs(agent: FakeAgent) -> list[str]:
    return [control.verb for control in (await agent.step()).controls]


async def test_an_adapter_is_registered_settled_and_dropped(fleet: FleetStore, agent: FakeAgent) -> None:
    entry = await fleet.put_adapter(LANE, "fr", FR)
    assert (entry.state, entry.source, entry.found) == ("loading", FR, AdapterFinding())
    assert entry.created_ms > 10**12
    assert await fleet.adapters(LANE) == [entry] == [await fleet.adapter(LANE, "fr")]
    settled = await agent.store.settle_adapter("fr", entry.token, FITS)
    assert settled == replace(entry, state="ready", found=FITS)
    assert settled.adapter == Adapter("fr", "/real/fr", FITS.digest)
    assert await fleet.adapters(LANE) == [settled]
    assert await fleet.drop_adapter(LANE, settled)
    assert await fleet.adapters(LANE) == []
    assert await fleet.adapter(LANE, "fr") is None


async def test_living_workers_are_told_of_what_comes_and_goes(
    fleet: FleetStore, agent: FakeAgent, connection: Connection
) -> None:
    gone = await FakeAgent(connection, "w2").start()
    await gone.store.bye()
    third = await FakeAgent(connection, "w3").start()
    entry = await ready(fleet, agent)
    assert await verbs(agent) == await verbs(third) == ["adapters"]
    assert await fleet.drop_adapter(LANE, entry)
    assert await verbs(agent) == await verbs(third) == ["adapters"]


async def test_a_misfit_is_kept_until_somebody_tries_again(fleet: FleetStore, agent: FakeAgent) -> None:
    entry = await fleet.put_adapter(LANE, "fr", FR)
    settled = await agent.store.settle_adapter("fr", entry.token, MISFIT)
    assert settled == replace(entry, state="failed", found=MISFIT)
    again = await fleet.put_adapter(LANE, "fr", "/adapters/mended")
    assert (again.state, again.source, again.found) == ("loading", "/adapters/mended", AdapterFinding())
    assert again.token != entry.token


async def test_two_operators_mean_one_thing_or_the_second_is_told(fleet: FleetStore, agent: FakeAgent) -> None:
    first, second = await asyncio.gather(*[fleet.put_adapter(LANE, "fr", FR) for _ in range(2)])
    assert first == second, "the same source joins"
    with pytest.raises(Conflict, match="adapter 'fr' is registered from '/adapters/fr'; unload it first") as caught:
        await fleet.put_adapter(LANE, "fr", "/elsewhere")
    assert caught.value.code == "adapter_exists"
    settled = await agent.store.settle_adapter("fr", first.token, FITS)
    assert await fleet.put_adapter(LANE, "fr", FR) == settled, "it is ready already"
    with pytest.raises(Conflict):
        await fleet.put_adapter(LANE, "fr", "/elsewhere")
    assert await fleet.adapters(LANE) == [settled]


async def test_of_racing_workers_the_first_word_counts_and_the_others_hear_it(
    fleet: FleetStore, connection: Connection
) -> None:
    agents = [await FakeAgent(connection, f"w{number}").start() for number in range(4)]
    entry = await fleet.put_adapter(LANE, "fr", FR)
    findings = [FITS, OTHER, MISFIT, FITS]
    words = zip(agents, findings, strict=True)
    heard = await asyncio.gather(*[one.store.settle_adapter("fr", entry.token, found) for one, found in words])
    (stands,) = await fleet.adapters(LANE)
    assert set(heard) == {stands}
    assert stands.found in findings
    assert sum(found != stands.found for found in findings) >= 2, "somebody was told of another digest"


async def test_a_word_on_what_was_dropped_or_replaced_changes_nothing(fleet: FleetStore, agent: FakeAgent) -> None:
    old = await fleet.put_adapter(LANE, "fr", FR)
    assert await fleet.drop_adapter(LANE, old)
    assert await agent.store.settle_adapter("fr", old.token, FITS) is None
    assert await fleet.adapters(LANE) == []
    new = await fleet.put_adapter(LANE, "fr", "/elsewhere")
    assert await agent.store.settle_adapter("fr", old.token, FITS) is None
    assert not await fleet.drop_adapter(LANE, old), "the name stands for another registration"
    assert await fleet.adapters(LANE) == [new]
    assert await fleet.drop_adapter(LANE, new)
    assert await fleet.drop_adapter(LANE, new), "what is gone is gone"


async def test_a_worker_that_others_gave_up_says_nothing_of_adapters(fleet: FleetStore, agent: FakeAgent) -> None:
    entry = await fleet.put_adapter(LANE, "fr", FR)
    await fleet.connection.call("seal", LANE, "w1", agent.store.incarnation, -1)
    with pytest.raises(Fenced):
        await agent.store.settle_adapter("fr", entry.token, FITS)
    assert await fleet.adapters(LANE) == [entry]


async def bring(fleet: FleetStore, worker_id: str, found: AdapterFinding, source: str = FR) -> AdapterEntry:
    return await fleet.put_adapter(LANE, "fr", source, worker_id=worker_id, found=found)


async def test_what_a_worker_brings_is_ready_at_once(fleet: FleetStore, agent: FakeAgent) -> None:
    mine = await bring(fleet, "w1", FITS)
    assert (mine.state, mine.found) == ("ready", FITS)
    elsewhere = replace(FITS, place="/mnt/fr")
    assert await bring(fleet, "w2", elsewhere, "/mnt/fr") == mine, "the same weights lie elsewhere on another machine"


async def test_a_worker_that_brings_what_an_operator_asked_for_settles_it(fleet: FleetStore, agent: FakeAgent) -> None:
    asked = await fleet.put_adapter(LANE, "fr", FR)
    assert await bring(fleet, "w2", FITS) == replace(asked, state="ready", found=FITS)


async def test_other_weights_by_one_name_are_refused_while_somebody_else_serves_them(
    fleet: FleetStore, agent: FakeAgent
) -> None:
    mine = await bring(fleet, "w1", FITS)
    with pytest.raises(Conflict):
        await bring(fleet, "w2", OTHER)
    assert await fleet.adapters(LANE) == [mine]
    retrained = await bring(fleet, "w1", OTHER)
    assert retrained.found == OTHER, "nobody but itself, as it was before, serves the old ones"
    assert retrained.token != mine.token
    await agent.store.bye()
    assert (await bring(fleet, "w2", FITS)).found == FITS


async def test_there_is_an_end_to_adapters(fleet: FleetStore, redis_server: ServerUnderTest) -> None:
    with redis_server.client() as client:
        entry = await fleet.put_adapter(LANE, "n0", FR)
        packed = client.hget(keys.adapters(LANE), "n0")
        client.hset(keys.adapters(LANE), mapping={f"n{i}": packed for i in range(1, MAX_ADAPTERS)})
    with pytest.raises(ValidationError, match="has 1024 adapters; unload one first"):
        await fleet.put_adapter(LANE, "more", FR)
    assert (await fleet.put_adapter(LANE, "n0", FR)).token == entry.token
    assert len(await fleet.adapters(LANE)) == MAX_ADAPTERS


async def test_adapters_live_as_long_as_their_model(
    fleet: FleetStore, agent: FakeAgent, redis_server: ServerUnderTest
) -> None:
    await fleet.announce(make_card(), b"{}")
    await ready(fleet, agent)
    key = keys.adapters(LANE)
    with redis_server.client() as client:
        client.expire(key, 50)
        await fleet.connection.call("sweep", LANE, 10)
        assert client.ttl(key) > 3500
        await agent.store.bye()
        client.expire(key, 50)
        await fleet.connection.call("sweep", LANE, 10)
        assert client.ttl(key) <= 50
    await fleet.announce(make_card(dtype="bfloat16"), b"{}")
    assert await fleet.adapters(LANE) == [], "they belonged to another model"
    await fleet.put_adapter(LANE, "fr", FR)
    await fleet.retire(LANE)
    assert await fleet.adapters(LANE) == []


async def test_a_job_brings_its_adapter_to_workers_that_know_of_adapters(
    jobs: JobStore, agent: FakeAgent, connection: Connection
) -> None:
    adapter = Adapter("fr", "/real/fr", FITS.digest)
    job = make_job(adapter=adapter)
    await submit(jobs, job)
    old = await connection.call("take", LANE, "w1", agent.store.incarnation, 8, 1, 1, 1)
    assert old == [], "a worker of before leaves it in the queue"
    agent.num_requests = 1
    (taken,) = await agent.take()
    assert taken.job.adapter == adapter


@pytest.mark.parametrize("spoil", [{}, {"source": FR}, 5])
def test_what_is_no_entry_is_refused(spoil: Any) -> None:
    from common import wire

    with pytest.raises(WireError, match="not an adapter"):
        decode_adapter("fr", wire.pack(spoil))


async def test_jobs_that_need_a_newer_worker_hold_up_none_behind_them(
    agent: FakeAgent, jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a dispatch stream is fed with at a time, and the newer worker is gone."""
    adapted = [make_job(adapter=Adapter("fr", FR, FITS.digest)) for _ in range(20)]
    plain = [make_job() for _ in range(3)]
    for job in (*adapted, *plain):
        await submit(jobs, job)
    with monkeypatch.context() as patch:
        patch.setattr("common.store.workers.PROTOCOL", WITHOUT_ADAPTERS)
        taken = [await agent.store.take(2, request) for request in (1, 2, 3)]
    assert [[one.job.job_id for one in each] for each in taken] == [
        [plain[0].job_id, plain[1].job_id],
        [plain[2].job_id],
        [],
    ]
    assert [one.job.job_id for one in await agent.store.take(64, 4)] == [job.job_id for job in adapted]
