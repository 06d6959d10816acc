"""The agent in this process, with a fake engine as its child and a real Redis: taking, committing, obeying, leaving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.job import FinishReason, JobState, SamplingParams
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.frames import Frame
from common.store.workers import WorkerStore
from tests.support.fake_engine import logprob_of, oracle
from tests.support.fake_fleet import GATEWAY, VOCABULARY, Follower
from tests.support.fake_worker import FAKE_ENGINE
from tests.support.local_agent import Running, agent_on, fail_to_start, worker_settings
from tests.support.protocol import eventually
from tests.support.redis_server import ServerUnderTest
from tests.support.tiny_model import write_tiny_model
from worker.agent import Agent


@pytest.fixture()
async def running(redis_url: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with agent_on(redis_url, tmp_path, "--step-ms", "5") as value:
        yield value


async def test_answers_are_the_engines_with_their_text_and_logprobs(running: Running) -> None:
    follower = running.follower
    jobs = [await follower.submit(seed, 60 + seed) for seed in range(20)]
    for job in jobs:
        await follower.assert_exact(job)
    log = await follower.jobs.log(jobs[4].job_id)
    assert log.logprobs == [logprob_of(4, position) for position in range(64)]
    assert any(ord(character) > 0x3000 for character in "".join(log.pieces)), "there was Japanese in it"
    assert running.metric("engine_batch_max") > 1, "they ran together"
    assert running.metric("worker_jobs_ended_total", state="completed", reason="length") == len(jobs)


async def test_stop_strings_end_a_job_and_the_engine_stops_working_on_it(running: Running) -> None:
    follower = running.follower
    whole = oracle(VOCABULARY, 1, 200).text
    stop = whole[70:74]
    end = whole.index(stop)
    for include, text in ((True, whole[: end + 4]), (False, whole[:end])):
        params = SamplingParams(max_new_tokens=100_000, seed=1, stop=(stop,), include_stop=include)
        job = await follower.submit(1, 200, params=params)
        record = await follower.end(job)
        log = await follower.jobs.log(job.job_id)
        assert record.finish_reason is FinishReason.STOP_SEQUENCE
        assert "".join(log.pieces) == text
        assert log.ids == list(whole[: end + 4].encode()), "the tokens of the stop count"
        assert record.num_tokens == len(log.ids)


async def test_eos_and_alternatives(running: Running) -> None:
    follower = running.follower
    params = SamplingParams(max_new_tokens=50, seed=2, num_top_logprobs=2)
    job = await follower.submit(2, 50, prompt="!eos@7", params=params)
    await follower.assert_exact(job, oracle(VOCABULARY, 2, 50, eos=(7, 257)))
    log = await follower.jobs.log(job.job_id)
    assert log.pieces[-1] == "</s>"
    assert log.top_tokens is not None
    assert [len(row) for row in log.top_tokens] == [2] * 8


def spaced_model(folder: Path) -> Path:
    """A model whose decoder takes the letter A for the space in front of a text."""
    path = write_tiny_model(folder) / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [content["decoder"], {"type": "Fuse"}, {"type": "Strip", "content": "A", "start": 1, "stop": 0}],
    }
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("engine", "start"), [((), "A step"), (("--decoder-start-id", "0"), " step")])
async def test_answers_continue_the_prompt_unless_an_encoder_read_it(
    redis_url: str, tmp_path: Path, engine: tuple[str, ...], start: str
) -> None:
    seed = next(seed for seed in range(100) if oracle(VOCABULARY, seed, 6).text == "A step")
    model_id = str(spaced_model(tmp_path / "spaced"))
    async with agent_on(redis_url, tmp_path, *engine, model_id=model_id) as running:
        job = await running.follower.submit(seed, 6)
        await running.follower.end(job)
        log = await running.follower.jobs.log(job.job_id)
        (card,) = await running.follower.fleet.cards()
    assert "".join(log.pieces) == start
    assert card.is_encoder_decoder == bool(engine)


async def test_a_cancelled_job_keeps_what_it_had(running: Running) -> None:
    follower = running.follower
    job = await follower.submit(3, 100_000)
    await follower.reach(job, 10)
    await follower.jobs.cancel(job.job_id)
    record = await follower.end(job)
    log = await follower.jobs.log(job.job_id)
    assert record.state is JobState.CANCELLED
    assert len(log.ids) == record.num_tokens >= 10
    assert log.ids == oracle(VOCABULARY, 3, len(log.ids)).ids
    other = await follower.submit(4, 10)
    await follower.assert_exact(other)
    late = await follower.submit(5, 100_000)

    async def is_alone() -> bool:
        (worker,) = await follower.fleet.workers()
        return worker.stats.get("running") == 1

    await eventually(is_alone, what="the engine has dropped the cancelled one")
    await follower.jobs.cancel(late.job_id)


async def test_a_running_job_past_its_deadline_expires(running: Running) -> None:
    job = await running.follower.submit(5, 100_000, timeout_s=0.3)
    await running.follower.reach(job, 3)
    record = await running.follower.end(job)
    assert record.state is JobState.EXPIRED
    assert record.num_tokens >= 3


async def test_a_job_that_nobody_follows_is_cancelled_after_its_grace(running: Running) -> None:
    follower = running.follower
    job = await follower.submit(6, 100_000, orphan_grace_s=0.2)
    for_ever = await follower.submit(7, 100_000)
    await follower.reach(job, 5)
    for one in (job, for_ever):
        await follower.jobs.detach(one.job_id, GATEWAY)
    record = await follower.end(job)
    assert record.state is JobState.CANCELLED
    still = await follower.jobs.record(for_ever.job_id)
    assert still is not None
    assert still.state is JobState.IN_PROGRESS
    await follower.jobs.cancel(for_ever.job_id)


async def test_a_gateway_that_died_does_not_count_as_follower(running: Running) -> None:
    follower = running.follower
    job = await follower.submit(8, 100_000, orphan_grace_s=0.2)
    await follower.jobs.attach(job.job_id, "ghost")
    await follower.jobs.detach(job.job_id, GATEWAY)
    assert (await follower.end(job)).state is JobState.CANCELLED


async def test_a_late_gateway_gets_what_the_log_lacks(running: Running) -> None:
    follower = running.follower
    job = await follower.submit(9, 200, prompt="!slow@5")
    await follower.jobs.detach(job.job_id, GATEWAY)

    async def flushed() -> int:
        return (await follower.jobs.states(follower.lane, [job.job_id]))[job.job_id][2]

    assert await eventually(flushed, what="a chunk in the log") < 200
    follower.heard.pop(job.job_id, None)
    record = await follower.jobs.attach(job.job_id, GATEWAY)
    assert record is not None
    await eventually(lambda: follower.heard.get(job.job_id), what="a frame")
    heard = sorted(follower.heard[job.job_id])
    assert heard[0] <= (await flushed()), "no hole between log and frames"
    await follower.assert_exact(job)
    heard = sorted(follower.heard[job.job_id])
    assert heard == list(range(heard[0], 200))


async def test_first_tokens_go_alone_and_quick_steps_share_calls(redis_url: str, tmp_path: Path) -> None:
    async with agent_on(redis_url, tmp_path, "--step-ms", "2") as running:
        neighbours = [await running.follower.submit(seed, 100_000) for seed in range(24)]
        for neighbour in neighbours:
            await running.follower.reach(neighbour, 1)
        sizes = await frame_sizes(running.follower, 12, 300)
        assert sizes[0] == 1, "the first token waits for nobody"
        assert max(sizes) >= 5, "with so many jobs a call brings several steps"
        assert sum(sizes) == 300


async def test_slow_steps_are_not_held_back(redis_url: str, tmp_path: Path) -> None:
    async with agent_on(redis_url, tmp_path, "--step-ms", "40") as running:
        sizes = await frame_sizes(running.follower, 18, 20)
        assert sorted(sizes)[len(sizes) // 2] == 1


async def frame_sizes(follower: Follower, seed: int, num_tokens: int) -> list[int]:
    """Tokens per frame of one job. Its first tokens are ASCII, so that none of them waits for the next."""
    assert all(byte < 128 for byte in oracle(VOCABULARY, seed, 20).ids)
    sizes: list[int] = []
    async with follower.jobs.frames("g2", [follower.lane]) as subscription:
        job = await follower.submit(seed, num_tokens, gateway="g2")
        while sum(sizes) < num_tokens:
            message = await asyncio.wait_for(subscription.__anext__(), 20)
            if isinstance(message, Frame):
                sizes += [len(columns.ids) for _, columns in message.runs]
    await follower.end(job)
    return sizes


async def test_a_job_whose_take_was_never_heard_of_is_started(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.agent.RECONCILE_S", 0.2)
    async with agent_on(redis_url, tmp_path, "--max-num-seqs", "1") as running:
        follower = running.follower
        first = await follower.submit(12, 100_000)
        await follower.reach(first, 3)
        unheard = await follower.submit(13, 30)
        (info,) = await follower.fleet.workers()
        twin = WorkerStore(follower.fleet.connection, follower.lane, "w1", "")
        await impersonate(twin, info.incarnation)
        taken = await twin.take(8, 999)
        assert [one.job.job_id for one in taken] == [unheard.job_id]
        await follower.jobs.cancel(first.job_id)
        record = await follower.assert_exact(unheard)
        assert record.attempts == 1


async def impersonate(store: WorkerStore, incarnation: str) -> None:
    """Speak as an incarnation that another object holds: what a call whose reply was lost has done."""
    store.nonce = incarnation.partition(".")[2]
    hello = await store.hello({"pid": 0, "host": "", "model": "", "started_ms": 0})
    assert hello.incarnation == incarnation


async def test_a_sealed_worker_drops_everything_and_begins_anew(running: Running) -> None:
    follower = running.follower
    job = await follower.submit(14, 200)
    position = await follower.reach(job, 20)
    (before,) = await follower.fleet.workers()
    assert await follower.fleet.seal_worker("w1") == 1
    assert position < 200
    record = await follower.assert_exact(job)
    (after,) = await follower.fleet.workers()
    assert before.incarnation != after.incarnation
    assert record.attempts == 2
    assert running.metric("worker_fenced_total") == 1


async def test_the_engine_waits_for_redis_and_nothing_is_lost(redis_server: ServerUnderTest, tmp_path: Path) -> None:
    async with agent_on(redis_server.url, tmp_path, "--step-ms", "1") as running:
        job = await running.follower.submit(15, 600)
        await running.follower.reach(job, 20)
        with redis_server.client() as client:
            client.execute_command("CLIENT", "PAUSE", "1200", "WRITE")
        steps = []
        while len(steps) < 3 or steps[-1] != steps[-3]:
            steps.append(running.metric("engine_steps"))
            await asyncio.sleep(0.1)
        assert steps[-1] < 600, "it stands still in the middle"
        await running.follower.assert_exact(job)
        assert running.metric("worker_fenced_total") == 0


async def test_a_job_that_breaks_the_text_stage_fails_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.text import TextStage

    push = TextStage.push

    def fragile(self: TextStage, run: Any) -> Any:
        if self._params.seed == 16:
            raise LookupError("no such token")
        return push(self, run)

    monkeypatch.setattr(TextStage, "push", fragile)
    broken, whole = await running.follower.submit(16, 50), await running.follower.submit(17, 50)
    record = await running.follower.end(broken)
    assert (record.state, record.error_code) == (JobState.FAILED, "internal_error")
    assert record.error_message == "LookupError: no such token"
    await running.follower.assert_exact(whole)


async def test_drain_lets_jobs_finish_within_their_time(redis_url: str, tmp_path: Path) -> None:
    async with agent_on(redis_url, tmp_path, graceful_termination_timeout=20) as running:
        job = await running.follower.submit(19, 100)
        await running.follower.reach(job, 5)
        running.agent.drain()
        late = await running.follower.submit(20, 10)
        record = await running.follower.assert_exact(job)
        assert record.attempts == 1
        assert await asyncio.wait_for(running.task, 10) == 0
        waiting = await running.follower.jobs.record(late.job_id)
        assert waiting is not None
        assert waiting.state is JobState.QUEUED
        assert await running.follower.fleet.workers() == []


async def test_a_second_signal_gives_jobs_back_at_once(redis_url: str, tmp_path: Path) -> None:
    async with agent_on(redis_url, tmp_path, graceful_termination_timeout=1000) as running:
        job = await running.follower.submit(21, 100_000)
        position = await running.follower.reach(job, 5)
        running.agent.drain()
        await eventually(states_are(running.follower, "draining"), what="everyone sees that it drains")
        running.agent.drain()
        assert await asyncio.wait_for(running.task, 10) == 0
        record = await running.follower.jobs.record(job.job_id)
        assert record is not None
        assert record.state is JobState.QUEUED
        assert record.num_tokens >= position
        log = await running.follower.jobs.log(job.job_id)
        assert log.ids == oracle(VOCABULARY, 21, len(log.ids)).ids


def states_are(follower: Follower, state: str) -> Any:
    async def check() -> bool:
        return [info.state for info in await follower.fleet.workers()] == [state]

    return check


async def test_drain_by_order_of_the_fleet(running: Running) -> None:
    assert await running.follower.fleet.drain("w1")
    assert await asyncio.wait_for(running.task, 10) == 0


async def test_a_loading_worker_is_visible_and_leaves_when_told(redis_url: str, tmp_path: Path) -> None:
    connection = await Connection.open(redis_url)
    fleet = FleetStore(connection)
    command = (*FAKE_ENGINE, "--load-s", "60")
    agent = Agent(worker_settings(redis_url, tmp_path, served_model_name=["tiny"]), connection, command=command)
    task = asyncio.create_task(agent.run())
    try:

        async def loading() -> bool:
            return any(info.phase == "weights" for info in await fleet.workers())

        await eventually(loading, what="progress")
        (info,) = await fleet.workers()
        assert (info.id, info.state, info.model, info.done, info.total) == ("w1", "loading", "tiny", 1, 2)
        assert await fleet.cards() == []
        agent.drain()
        assert await asyncio.wait_for(task, 10) == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await connection.close()


async def test_an_engine_that_says_why_it_cannot_start_is_not_started_again(redis_url: str, tmp_path: Path) -> None:
    assert await fail_to_start(redis_url, tmp_path, "--fail", "the weights do not fit") == "the weights do not fit"


async def test_an_engine_that_keeps_dying_while_it_loads_is_given_up(redis_url: str, tmp_path: Path) -> None:
    message = await fail_to_start(redis_url, tmp_path, "--no-such-option")
    assert "died 3 times while loading" in message
    assert "status 2" in message


async def test_a_metrics_port_in_use_is_one_sentence(redis_url: str, tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    message = await fail_to_start(redis_url, tmp_path, metrics_port=port)
    assert "choose another --metrics-port" in message
    server.close()
    await server.wait_closed()
