"""Random schedules of takes, steps, repeated calls, freezes, seals, cancels and drains; then the invariants.

Tokens are coloured by the epoch that made them, so a token that was shown and then generated anew is seen at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import redis

from common import keys, wire
from common.errors import Fenced
from common.job import JobState, TokenColumns
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import decode_message
from common.store.jobs import JobStore
from common.store.reaper import recover
from common.store.replies import Chunk, Finish, StepCall, Taken
from common.store.workers import WorkerStore
from tests.support.protocol import LANE, make_job, submit
from tests.support.redis_server import ServerUnderTest

GATEWAY = "g1"
NUM_JOBS, NUM_MOVES = 14, 220


def coloured(epoch: int, start: int, end: int) -> TokenColumns:
    positions = range(start, end)
    return TokenColumns(start, list(positions), [f"{epoch}:{p}" for p in positions], [0.0 for _ in positions])


class Worker:
    """An agent with random habits; frozen it makes no calls, thawed after a seal it is a zombie."""

    def __init__(self, connection: Connection, number: int, chance: random.Random) -> None:
        self.store = WorkerStore(connection, LANE, f"w{number}", f"{chance.getrandbits(64):016x}")
        self.chance = chance
        self.held: dict[str, Taken] = {}
        self.texts: dict[str, TokenColumns] = {}
        self.flushed: dict[str, int] = {}
        self.step_number = self.request = 0
        self.is_frozen = False
        self.finish_chance = 0.02

    async def take(self) -> None:
        self.request += 1
        for _ in range(self.chance.choice((1, 1, 2))):
            taken = await self.store.take(3, self.request)
        for item in taken:
            job_id = item.job.job_id
            self.held[job_id], self.flushed[job_id] = item, item.num_tokens
            self.texts[job_id] = TokenColumns(item.num_tokens, [], [], [])

    async def step(self) -> None:
        runs, chunks, finishes = [], [], []
        for job_id, item in self.held.items():
            text = self.texts[job_id]
            fresh = coloured(item.epoch, text.end, text.end + self.chance.randrange(4))
            text.extend(fresh)
            if fresh.ids:
                runs.append((job_id, fresh))
            tail = text.slice(self.flushed[job_id])
            if self.chance.random() < self.finish_chance:
                payload = wire.encode_columns(tail) if tail.ids else b""
                finishes.append(
                    Finish(
                        job_id=job_id,
                        epoch=item.epoch,
                        start=tail.start,
                        end=tail.end,
                        tail=payload,
                        state=JobState.COMPLETED,
                    )
                )
            elif tail.ids and self.chance.random() < 0.4:
                chunks.append(Chunk(job_id, item.epoch, tail.start, tail.end, wire.encode_columns(tail)))
        frame = wire.encode_frame(runs) if runs else b""
        call = StepCall(
            step=self.step_number + 1,
            previous=self.step_number,
            min_step=0,
            frame=frame,
            gateway_frames={GATEWAY: frame} if frame else {},
            chunks=chunks,
            finishes=finishes,
        )
        for _ in range(self.chance.choice((1, 1, 2))):
            reply = await self.store.step(call)
        self.step_number += 1
        for chunk in chunks:
            self.flushed[chunk.job_id] = chunk.end
        for job_id in [*reply.lost, *(finish.job_id for finish in finishes)]:
            self.held.pop(job_id, None)

    async def release(self) -> None:
        job_id = self.chance.choice(sorted(self.held)) if self.held else None
        if job_id is not None:
            await self.store.release([(job_id, self.held.pop(job_id).epoch)], count_attempt=False)


class Fleet:
    """Everything that happens in one run, driven by one seed."""

    def __init__(self, connection: Connection, seed: int) -> None:
        self.connection, self.jobs, self.chance = connection, JobStore(connection), random.Random(seed)
        self.workers: list[Worker] = []
        self.ids: list[str] = []
        self.num_fenced = self.num_workers = 0

    async def start_worker(self) -> None:
        worker = Worker(self.connection, self.num_workers, self.chance)
        await worker.store.hello({})
        self.num_workers += 1
        self.workers.append(worker)

    async def run(self) -> None:
        for _ in range(3):
            await self.start_worker()
        for _ in range(NUM_JOBS):
            job = make_job(job_id=LANE + "".join(self.chance.choices("abcdefghijklmnopqrstuvwxyz234567", k=22)))
            await submit(self.jobs, job, gateway=GATEWAY)
            self.ids.append(job.job_id)
        for _ in range(NUM_MOVES):
            await self.move()
        for worker in list(self.workers):
            await self.seal(worker)
        await self.start_worker()
        self.workers[-1].finish_chance = 0.5
        for _ in range(400):
            if not await FleetStore(self.connection).queue(LANE) or await self.is_done():
                break
            await self.workers[-1].take()
            await self.workers[-1].step()

    async def is_done(self) -> bool:
        states = await self.jobs.states(LANE, self.ids)
        return all(state.is_terminal for state, _, _ in states.values())

    async def move(self) -> None:
        worker = self.chance.choice(self.workers)
        kind = self.chance.random()
        if kind < 0.04:
            worker.is_frozen = True
        elif kind < 0.10:
            await self.seal(worker)
            await self.start_worker()
        elif kind < 0.12:
            await self.jobs.cancel(self.chance.choice(self.ids))
        elif not worker.is_frozen:
            act = worker.take if kind < 0.3 else worker.release if kind < 0.35 else worker.step
            await act()

    async def seal(self, worker: Worker) -> None:
        """Declare it dead, recover once or twice, then let the zombie try to go on."""
        name, incarnation = worker.store.worker_id, worker.store.incarnation
        await self.connection.call("seal", LANE, name, incarnation, -1)
        for _ in range(self.chance.choice((1, 2))):
            await recover(self.connection, LANE, name, incarnation, max_attempts=1000)
        self.workers.remove(worker)
        with pytest.raises(Fenced):
            await worker.step()
        self.num_fenced += 1


def check_shown(shown: dict[tuple[str, int], set[str]], logs: dict[str, TokenColumns]) -> None:
    """Every token that was ever shown is the one in the log."""
    for (job_id, position), pieces in shown.items():
        assert pieces == {logs[job_id].pieces[position]}, f"token {position} of {job_id} was shown as {pieces}"


@pytest.fixture()
def hearing(redis_server: ServerUnderTest) -> Iterator[redis.client.PubSub]:
    with redis_server.client() as client, client.pubsub() as pubsub:
        pubsub.subscribe(keys.channel(LANE, GATEWAY))
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        yield pubsub


def everything_heard(pubsub: redis.client.PubSub) -> list[object]:
    messages = []
    while (message := pubsub.get_message(timeout=0.05)) is not None:
        messages.append(decode_message(message["data"]))
    return messages


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_invariants_hold_after_any_schedule(
    seed: int, connection: Connection, hearing: redis.client.PubSub, fleet: FleetStore, redis_server: ServerUnderTest
) -> None:
    run = Fleet(connection, seed)
    await run.run()
    counters = await fleet.queue(LANE)
    assert run.num_fenced >= 5
    assert counters["requeued"] >= 3, "jobs went from dead workers to living ones"
    logs = {job_id: await run.jobs.log(job_id) for job_id in run.ids}
    assert sum(len(columns.ids) for columns in logs.values()) > 100
    for job_id, columns in logs.items():
        record = await run.jobs.record(job_id)
        assert record is not None
        assert record.state in (JobState.COMPLETED, JobState.CANCELLED)
        assert record.num_tokens == columns.end
        assert columns.ids == list(range(columns.end)), "no gap and no repeat"
        epochs = [int(piece.split(":")[0]) for piece in columns.pieces]
        assert epochs == sorted(epochs)
    messages = everything_heard(hearing)
    ends = [message.job_id for message in messages if type(message).__name__ == "Ended"]
    assert sorted(ends) == sorted(run.ids), "one end each"
    shown: dict[tuple[str, int], set[str]] = {}
    for message in messages:
        for job_id, columns in getattr(message, "runs", []):
            for position, piece in zip(columns.ids, columns.pieces, strict=True):
                shown.setdefault((job_id, position), set()).add(piece)
    assert len(shown) > 100
    check_shown(shown, logs)
    assert (counters["queued_tokens"], counters["queued"], counters["running"]) == (0, 0, 0)


def test_a_token_that_was_generated_anew_fails_the_check() -> None:
    logs = {"job": coloured(2, 0, 3)}
    shown = {("job", p): {f"2:{p}"} for p in range(3)}
    check_shown(shown, logs)
    with pytest.raises(AssertionError, match="token 1 of job"):
        check_shown(shown | {("job", 1): {"1:1", "2:1"}}, logs)
