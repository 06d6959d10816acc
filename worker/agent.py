"""The agent: takes jobs when the engine has room, commits its steps to Redis, follows orders, beats, drains.

A few loops share one thread. Only `_converse` speaks to Redis about what this worker *is* and *has said* (hello, step,
mine, adopt, release), so these calls never overtake one another; `_pull` only takes. The engine is a child process:
when it dies, what it gave goes out first, then its jobs go back to the queue, and a new one is started.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

from common import wire
from common.background import News
from common.card import ModelCard
from common.errors import (
    ConfigurationError,
    Conflict,
    Fenced,
    StepGap,
    StoreError,
    StoreUnavailable,
    UnknownIncarnation,
    ValidationError,
)
from common.job import JobState, TokenColumns
from common.settings import WorkerSettings
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.reaper import Reaper
from common.store.replies import Taken, WorkerInfo
from common.store.workers import WorkerStore
from common.text.tokenizer import TextTokenizer
from worker.adapters import Adapters, Brought
from worker.announce import ModelFiles, find_model, make_card, read_model, served_name
from worker.credit import Credit
from worker.engine_client import REAL_ENGINE, engine_environment, settings_json
from worker.engine_keeper import EngineKeeper
from worker.held import CANCEL_REASONS, Held, HeldJobs
from worker.metrics import WorkerMetrics
from worker.pipe import Abort, AdapterChecked, Message, Progress, Ready, Step, Submit
from worker.search import Search

BEATS_PER_LEASE = 5
RECONCILE_S = 10.0
WINDOW_S, WINDOW_PER_JOB_S, LONGEST_WINDOW_S = 0.004, 0.001, 0.03
LONG_STEP_S = 0.01
IDLE_WAIT_S = 2.0
SUSPECT_WAIT_S = 0.2
RETRY_S = 0.1
REPORT_S = 1.0
STATS_S = 0.5
WATCH_S = 0.5
CANCEL_AGAIN_S = 0.2
MAX_SUSPECTS = 1
NUM_NONCE_BYTES = 8
LOG_PROGRESS_S = 5.0
UNREPORT_LIMIT_S = 1.0
NUM_LEASES = 2.0
"""That a worker waits for others to be gone who serve another adapter by a name that it brings."""

logger = logging.getLogger(__name__)


class Identity(Enum):
    """What Redis knows of this process."""

    NEW = "an incarnation is to be begun"
    DOUBTED = "Redis may have lost its last writes"
    KNOWN = "steps are accepted"


class Agent:
    """One worker. `run` returns when it was drained. `command` starts the engine; tests give another one."""

    def __init__(
        self,
        settings: WorkerSettings,
        connection: Connection,
        *,
        command: Sequence[str] = REAL_ENGINE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._connection, self._clock = settings, connection, clock
        self.worker_id = settings.worker_id or f"w-{secrets.token_hex(4)}"
        self.metrics = WorkerMetrics()
        self._fleet, self._job_store = FleetStore(connection), JobStore(connection)
        self._started_ms = round(time.time() * 1000)
        environment = engine_environment(settings.threads, settings.ranks_per_node)
        self._search = Search(partial(find_model, settings))
        self._adapters = Adapters(settings, self._send, self._on_no_adapter, self._wake)
        self._engine = EngineKeeper(command, environment, clock, self)
        self._stats: dict[str, float] = {}
        self._num_fenced = 0
        self._model_name = served_name(settings)
        self._drain_until: float | None = None
        self._is_drain_told = False
        self._to_release: dict[tuple[str, int], bool] = {}
        self._is_engine_lost = False
        self._num_tokens = 0
        self._request = 0
        self._identity = Identity.NEW
        self._last_call = self._last_whole_call = self._last_reconcile = self._last_stats = 0.0
        self._last_engine_step = 0.0
        self._starting: set[str] = set()
        self._is_loaded, self._is_serving, self._is_over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._news, self._room_changed = News(), asyncio.Event()

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Serve until drained; the exit status.

        Raises:
            ConfigurationError: the model or an option cannot work.
        """
        if self._settings.trust_remote_code:
            logger.warning("--trust-remote-code changes nothing: code from a checkpoint is never run")
        if self._settings.metrics_port:
            self._serve_metrics()
        try:
            async with asyncio.TaskGroup() as group:
                serving = (self._converse(), self._pull(), self._watch(), self._reap())
                loops = (self._compute(), self._open(), self._report_loading(), *serving)
                tasks = [group.create_task(loop) for loop in loops]
                await self._is_over.wait()
                await self._end_loops(tasks)
        finally:
            await self._close()
        return 0

    async def _compute(self) -> None:
        """Find the model and its adapters, and keep an engine running with it."""
        try:
            folder = await self._search.result()
            self._files: ModelFiles = await asyncio.to_thread(read_model, folder, self._settings)
            self._tokenizer = TextTokenizer(self._files.tokenizer_json)
            await self._adapters.find_own()
            await self._engine.run(settings_json(self._settings, str(folder)))
        finally:
            self._is_over.set()

    async def _open(self) -> None:
        """Serve as soon as the model is loaded and the adapters of the command line are known to fit it."""
        await self._is_loaded.wait()
        await self._adapters.check_own((self._card.served_name, *self._card.aliases))
        self._is_serving.set()

    @staticmethod
    async def _end_loops(tasks: list[asyncio.Task[None]]) -> None:
        """Cancel until they are gone: wait_for of Python 3.11 swallows a cancellation that comes with its result."""
        while not all(task.done() for task in tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)

    async def _close(self) -> None:
        if self._is_serving.is_set():
            await self._store.close()
        await self._engine.close()
        await self._adapters.close()
        await self._search.close()
        if not self._is_serving.is_set():
            with suppress(StoreError, TimeoutError):
                await asyncio.wait_for(self._fleet.unreport(self.worker_id), UNREPORT_LIMIT_S)

    def _serve_metrics(self) -> None:
        try:
            self.metrics.serve(self._settings.metrics_port)
        except OSError as error:
            message = f"port {self._settings.metrics_port} for metrics is taken; choose another --metrics-port"
            raise ConfigurationError(message) from error

    def drain(self) -> None:
        """Take no more jobs, let those that run finish for a while, give back the rest, leave. Twice: at once."""
        now = self._clock()
        if self._drain_until is None:
            self._drain_until = now + self._settings.graceful_termination_timeout
            logger.info("%s", self._farewell, extra={"worker": self.worker_id})
        else:
            self._drain_until = now
        if not self._is_serving.is_set():
            self._is_over.set()
        self._news.set()
        self._room_changed.set()

    @property
    def is_downloading(self) -> bool:
        """After `run`: whether a thread of a download is left, which waits for the network."""
        return self._running_search is not None

    @property
    def _running_search(self) -> Search[Any] | None:
        return self._search if self._search.is_running else self._adapters.search

    @property
    def _farewell(self) -> str:
        if self._is_serving.is_set():
            return "draining: no more jobs are taken"
        if self._running_search is not None:
            what = "the model" if self._search.is_running else "an adapter"
            return f"stopped while {what} was fetched; the same command goes on with the files that are missing"
        return "stopped before the model was loaded"

    @property
    def _is_draining(self) -> bool:
        return self._drain_until is not None

    @property
    def _is_drain_over(self) -> bool:
        return self._drain_until is not None and self._clock() >= self._drain_until

    # --- engine -----------------------------------------------------------------------------------------------------

    def on_ready(self, ready: Ready) -> None:
        """The engine has loaded: the lane is known now, and jobs may come."""
        card = make_card(self._files, ready, self._settings)
        self._adapters.on_engine_ready()
        if self._is_loaded.is_set():
            if card.lane != self._card.lane:
                raise ConfigurationError("the model's files changed while it was served; start the worker again")
            self._room_changed.set()
            return
        self._card: ModelCard = card
        self._log_limits(ready)
        self._credit = Credit(min(ready.max_num_seqs, self._settings.max_num_seqs), ready.kv_tokens)
        self._store = WorkerStore(self._connection, card.lane, self.worker_id, "")
        self._begin_incarnation()
        self._is_loaded.set()

    def _log_limits(self, ready: Ready) -> None:
        for reason in ready.reasons:
            logger.info("%s: %s", self._card.served_name, reason)

    def on_step(self, step: Step) -> None:
        self._last_engine_step = self._clock()
        self._num_tokens += sum(len(run.ids) for run in step.runs)
        if step.stats:
            self._stats = step.stats | {"tokens": self._num_tokens, "fenced": self._num_fenced}
            self.metrics.engine_stats = step.stats
        self._jobs.on_step(step)
        self._news.set()
        self._room_changed.set()

    def on_adapter_checked(self, answer: AdapterChecked) -> None:
        self._adapters.on_checked(answer)

    def on_engine_lost(self) -> None:
        self.metrics.engine_deaths.inc()
        self._adapters.on_engine_lost()
        self._is_engine_lost = self._is_serving.is_set()
        self._stats["waiting"] = self._stats["waiting_for_slot"] = 0
        self._news.set()

    def _send(self, message: Message) -> None:
        """To the engine; a job that comes while there is none goes back to the queue."""
        if isinstance(message, Submit):
            placed = self._adapters.placed(message)
            if placed is None:
                return
            message = placed
            if not self._engine.is_ready:
                self._to_release[(message.request_id, message.epoch)] = False
                self._news.set()
            if self._num_computing <= 1:
                self._engine.rest()
        elif isinstance(message, Abort):
            self._adapters.abort(message.request_ids)
        self._engine.send(message)

    @property
    def _num_computing(self) -> int:
        """Jobs that the engine has."""
        return len(self._jobs.running) - len(self._adapters.waiting)

    def _on_no_adapter(self, submit: Submit, problem: str) -> None:
        self._jobs.fail(submit.request_id, submit.epoch, "adapter_error", problem)
        self._wake()

    def _wake(self) -> None:
        self._news.set()

    async def _report_loading(self) -> None:
        """Be visible to gateways and people until hello."""
        last_log = self._clock()
        while not (self._is_serving.is_set() or self._is_over.is_set()):
            if self._clock() - last_log > LOG_PROGRESS_S:
                last_log = self._clock()
                self._engine.log_progress()
            with suppress(StoreError):
                await self._fleet.report(self._info(self._progress))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_serving.wait(), REPORT_S)
        with suppress(StoreError):
            await self._fleet.unreport(self.worker_id)

    @property
    def _progress(self) -> Progress:
        return self._engine.progress if self._running_search is None else self._running_search.progress

    def _info(self, progress: Progress) -> WorkerInfo:
        return WorkerInfo(
            id=self.worker_id,
            pid=os.getpid(),
            host=socket.gethostname(),
            model=self._model_name,
            state="loading",
            started_ms=self._started_ms,
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
        )

    # --- conversation with Redis ------------------------------------------------------------------------------------

    def _begin_incarnation(self) -> None:
        """Forget every job: a new incarnation owns nothing."""
        card = self._card
        self._jobs = HeldJobs(
            self._tokenizer,
            card.eos_token_ids,
            self._send,
            self._clock,
            self._on_job_end,
            is_encoder_decoder=card.is_encoder_decoder,
        )
        self._store.nonce, self._store.incarnation = secrets.token_hex(NUM_NONCE_BYTES), ""
        self._identity, self._request = Identity.NEW, 0
        self._to_release.clear()
        self._starting.clear()

    def _on_job_end(self, held: Held, num_tokens: int) -> None:
        end = held.end
        assert end is not None
        self.metrics.ended(end.state, end.finish_reason, num_tokens)
        self._credit.finished(num_tokens)
        if end.state is JobState.FAILED and held.job.adapter is not None:
            self._adapters.forget(held.job.adapter.digest)
        self._room_changed.set()
        logger.debug("job %s: %s after %d tokens", held.job.job_id, end.state.value, num_tokens)

    async def _converse(self) -> None:
        """Say and hear everything that concerns this incarnation, one call after the other, until drained."""
        await self._is_serving.wait()
        while not self._is_over.is_set():
            await asyncio.sleep(0)
            await self._news_or_beat()
            try:
                await self._turn()
            except Fenced:
                self._on_fenced()
            except UnknownIncarnation:
                self._identity = Identity.DOUBTED
            except StepGap as gap:
                self._on_gap(gap)
            except StoreUnavailable as error:
                logger.warning("%s", error)
                if self._is_drain_over:
                    # whoever stops us will not wait for Redis; the lease tells the others
                    self._is_over.set()
                self._news.set()
                await asyncio.sleep(RETRY_S)

    async def _news_or_beat(self) -> None:
        """Sleep until there is something to say or a beat is due. Short engine steps share a call."""
        if self._identity is not Identity.KNOWN:
            return
        self._news.clear()
        if not self._jobs.outbox.has_news and not self._has_business:
            await self._news.within(self._until_beat())
        while not self._jobs.outbox.is_urgent and (rest := self._until_due) > 0:
            self._news.clear()
            await self._news.within(rest)

    @property
    def _has_business(self) -> bool:
        has_word = bool(self._to_release) or bool(self._adapters.unsaid)
        return self._is_engine_lost or has_word or (self._is_draining and self._jobs.is_empty)

    @property
    def _until_due(self) -> float:
        """Seconds until everything goes out that is not urgent. What a call costs all processes is worth waiting for
        another step of the engine, the longer the more jobs there are, but not for one that would come too late, nor
        for a long one: two of those together are a pause that readers see."""
        window = min(WINDOW_S + WINDOW_PER_JOB_S * len(self._jobs), LONGEST_WINDOW_S)
        due = self._last_whole_call + window
        step = self._stats.get("step_ms", 0.0) / 1000
        is_last_step = step >= LONG_STEP_S or self._last_engine_step + step > due
        return 0.0 if is_last_step or self._has_business else max(0.0, due - self._clock())

    def _until_beat(self) -> float:
        """Seconds until Redis must hear of us, or a drained job must be given back."""
        moment = self._last_call + self._settings.lease / BEATS_PER_LEASE
        if self._drain_until is not None and self._drain_until > self._clock():
            moment = min(moment, self._drain_until)
        return max(0.0, moment - self._clock())

    async def _turn(self) -> None:
        if self._identity is not Identity.KNOWN:
            await self._introduce()
        if self._is_draining:
            await self._advance_drain()
        if self._is_engine_lost:
            self._lose_engine()
        if self._jobs.outbox.has_news or self._until_beat() == 0.0:
            await self._step()
        self._engine.commit(self._jobs.outbox.settled_step, at_once=not self._num_computing)
        if self._to_release:
            await self._release()
        if self._adapters.unsaid:
            await self._settle_adapters()
        if self._clock() - self._last_reconcile >= RECONCILE_S:
            await self._reconcile()
        if self._is_draining and self._jobs.is_empty and not self._starting:
            await self._leave()

    async def _introduce(self) -> None:
        """Say hello; and when Redis may have forgotten what it was told, tell it again before the next step."""
        if self._identity is Identity.NEW and not await self._fleet.is_announced(self._card.lane):
            self._adapters.bring_own()
        await self._announce()
        await self._put_adapters()
        before = self._store.incarnation
        info = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "model": self._card.served_name,
            "started_ms": self._started_ms,
            "max_input_tokens": self._card.max_input_tokens,
            "max_total_tokens": self._card.max_total_tokens,
        }
        hello = await self._store.hello(info)
        if self._identity is Identity.NEW:
            # who began at the same moment with other weights did not count as living before
            await self._put_adapters()
        if hello.incarnation != before:
            self._jobs.outbox.begin_incarnation()
            logger.info("incarnation %s of worker %s", hello.incarnation, self.worker_id)
        if self._identity is Identity.DOUBTED:
            self.metrics.reasserted.inc()
            logger.warning("Redis was replaced or lost its last writes: saying again what this worker holds")
            self._jobs.reopen_closed()
            await self._adopt_all()
        self._identity = Identity.KNOWN
        self._last_reconcile = self._clock()
        self._room_changed.set()
        await self._reconcile()

    async def _announce(self) -> None:
        try:
            await self._fleet.announce(self._card, self._files.tokenizer_json)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise ConfigurationError(f"{self._card.served_name} cannot be served here: {error}") from error

    async def _put_adapters(self) -> None:
        """Say which adapters this worker brings: those of its command line, later what it knew when Redis forgot it."""
        for brought in self._adapters.brought:
            await self._put_adapter(brought)

    async def _put_adapter(self, brought: Brought) -> None:
        """Somebody who serves other weights by this name may be one whose death nobody has noticed yet."""
        limit = self._clock() + NUM_LEASES * self._settings.lease
        while not self._is_draining:
            try:
                name, source, found = brought.name, brought.source, brought.found
                await self._fleet.put_adapter(self._card.lane, name, source, worker_id=self.worker_id, found=found)
                return
            except (Conflict, ValidationError) as error:
                if self._identity is Identity.DOUBTED:
                    logger.warning("%s", error)
                    return
                if isinstance(error, ValidationError):
                    raise ConfigurationError(error.message) from error
                if self._clock() > limit:
                    raise ConfigurationError(
                        f"adapter {brought.name} has other weights on workers that serve it now: "
                        "give this one another name, or stop them first"
                    ) from error
            await asyncio.sleep(self._settings.lease / BEATS_PER_LEASE)

    async def _settle_adapters(self) -> None:
        """Say what was found of registered adapters; the first worker's word counts."""
        for token, (entry, found) in list(self._adapters.unsaid.items()):
            stands = await self._store.settle_adapter(entry.name, token, found)
            self._adapters.unsaid.pop(token, None)
            if stands is None:
                continue
            if found.error:
                logger.warning("%s", found.error)
            elif stands.found.digest == found.digest:
                logger.info("adapter %s fits: rank %d, from %s", entry.name, found.rank, found.place)
            else:
                logger.warning("adapter %s is another one here than on the worker that was first", entry.name)
        self._last_reconcile = -math.inf

    async def _adopt_all(self) -> None:
        for job in self._jobs.outbox.jobs:
            await self._adopt(job.job_id)

    async def _adopt(self, job_id: str) -> None:
        """Claim a job with all tokens that were shown; drop it if another worker has it by now."""
        held, outgoing = self._jobs.get(job_id), self._jobs.outbox.get(job_id)
        if held is None or outgoing is None:
            return
        columns = outgoing.columns(outgoing.framed_end)
        if await self._store.adopt(job_id, held.epoch, wire.encode_job(held.job), columns):
            self._jobs.outbox.adopted(job_id, columns.end)
        else:
            self._jobs.drop(job_id)

    async def _step(self) -> None:
        """One step call; the same one again if the last was not answered."""
        jobs, started = self._jobs, self._clock()
        is_due = started - self._last_stats >= STATS_S
        self._last_stats = started if is_due else self._last_stats
        only_urgent = jobs.outbox.is_urgent and self._until_due > 0
        self._last_call = started
        self._last_whole_call = self._last_whole_call if only_urgent else started
        reply = await self._store.step(jobs.outbox.next_call(self._stats if is_due else {}, only_urgent=only_urgent))
        self.metrics.call_seconds.observe(self._clock() - started)
        jobs.answered(reply)
        verbs = {control.verb for control in reply.controls}
        if "drain" in verbs and not self._is_draining:
            self.drain()
        if "adapters" in verbs:
            self._last_reconcile = -math.inf
        self._room_changed.set()

    def _on_fenced(self) -> None:
        """Sealed or superseded: others have the jobs. Whatever is still said about them here must not leave."""
        logger.warning(
            "declared dead, or another process has the same --worker-id: dropping all jobs and beginning anew"
        )
        self.metrics.fenced.inc()
        self._num_fenced += 1
        self._stats["fenced"] = self._num_fenced
        self._abort([job_id for job_id, _ in self._jobs.unended()])
        # what was known of the lane's adapters is old
        self._adapters.brought = []
        last_step = self._jobs.outbox.engine_step
        self._begin_incarnation()
        self._jobs.outbox.engine_step = last_step
        self._engine.commit(self._jobs.outbox.settled_step, at_once=True)

    def _abort(self, job_ids: list[str]) -> None:
        if job_ids:
            self._send(Abort(job_ids))

    def _on_gap(self, gap: StepGap) -> None:
        """Redis has less than we thought, or more: go on from what it has."""
        logger.warning("continuing after a gap: %s", gap)
        if gap.subject == "step":
            if gap.last < self._jobs.outbox.last_step:
                self._identity = Identity.DOUBTED
            self._jobs.outbox.continue_after(gap.last)
        else:
            self._jobs.outbox.reopen(gap.subject, gap.last)
        self._news.set()

    async def _reconcile(self) -> None:
        """Compare what we hold with what Redis thinks we hold."""
        store, jobs = self._store, self._jobs
        self._last_reconcile = self._clock()
        if not await self._fleet.is_announced(store.lane):
            # its time to live ran out while nobody could renew it: this machine slept, or the server's clock was set
            raise UnknownIncarnation("the model is not announced any more")
        adapters = await self._fleet.adapters(store.lane)
        owned = await store.mine()
        # only now it is sure that Redis had not lost what was read before
        self._adapters.follow(adapters)
        for row in owned:
            held = jobs.get(row.job_id)
            if held is not None and held.epoch == row.epoch:
                if row.cancel_reason:
                    jobs.cancel(row.job_id, CANCEL_REASONS[row.cancel_reason])
            elif (row.job_id, row.epoch) not in jobs.started:
                taken = await store.body(row.job_id)
                if taken is not None:
                    await self._begin(jobs, taken)
            elif row.job_id not in self._starting and not jobs.is_recently_closed(row.job_id, row.epoch):
                await store.release([(row.job_id, row.epoch)], count_attempt=False)
        known = {row.job_id for row in owned}
        for held in jobs.running:
            if held.job.job_id not in known:
                await self._adopt(held.job.job_id)
        jobs.forget_old({(row.job_id, row.epoch) for row in owned})

    # --- giving jobs back -------------------------------------------------------------------------------------------

    def _lose_engine(self) -> None:
        """All jobs go back after what the engine gave has gone out, those that it had with the attempt counted."""
        self._is_engine_lost = False
        self._to_release |= {job: job[0] not in self._adapters.waiting for job in self._jobs.unended()}
        self._jobs.outbox.begin_engine()

    async def _advance_drain(self) -> None:
        """Say that we drain; when the time is over, let go of what still runs."""
        if not self._is_drain_told:
            await self._fleet.drain(self.worker_id)
            self._is_drain_told = True
        if self._is_drain_over:
            rest = [job for job in self._jobs.unended() if job not in self._to_release]
            self._to_release |= dict.fromkeys(rest, False)
            self._abort([job_id for job_id, _ in rest])

    async def _release(self) -> None:
        """Everything of these jobs that may be shown is on Redis now; let others go on with them."""
        unended = self._jobs.unended()
        for is_counted in (True, False):
            jobs = [job for job in unended if self._to_release.get(job) is is_counted]
            if jobs:
                await self._store.release(jobs, count_attempt=is_counted, max_attempts=self._settings.max_attempts)
            for job_id, _ in jobs:
                self._jobs.drop(job_id)
        self._to_release.clear()
        self._room_changed.set()

    async def _leave(self) -> None:
        await self._store.bye()
        logger.info("drained", extra={"worker": self.worker_id})
        self._is_over.set()

    # --- taking jobs ------------------------------------------------------------------------------------------------

    async def _pull(self) -> None:
        """Take as many jobs as there is room for, whenever there is some."""
        await self._is_serving.wait()
        while True:
            room = self._room()
            if not room:
                self._room_changed.clear()
                await self._room_changed.wait()
                continue
            jobs, taken = self._jobs, await self._take(room)
            for job in taken or []:
                await self._begin(jobs, job)
            if taken is not None and len(taken) < room:
                await self._store.wait_for_work(self._idle_wait_s)

    @property
    def _idle_wait_s(self) -> float:
        """The bell is enough, but for suspects that wait until the one we hold has ended."""
        return SUSPECT_WAIT_S if any(held.is_suspect for held in self._jobs.running) else IDLE_WAIT_S

    def _room(self) -> int:
        is_able = self._engine.is_ready and not self._is_engine_lost
        if not is_able or self._is_draining or self._identity is not Identity.KNOWN:
            return 0
        # who waits for a slot for its adapter holds up nobody else
        num_waiting = int(self._stats.get("waiting", 0) - self._stats.get("waiting_for_slot", 0))
        return self._credit.room([held.lengths for held in self._jobs.running], num_waiting)

    async def _take(self, room: int) -> list[Taken] | None:
        """One take; a lost reply is asked for again under the same number. None if it failed: the bell that led here
        may have rung for a job that is still there.
        """
        jobs = self._jobs
        try:
            taken = await self._store.take(room, self._request + 1, max_suspects=MAX_SUSPECTS)
        except StoreUnavailable:
            await asyncio.sleep(RETRY_S)
            return None
        except (Fenced, UnknownIncarnation):
            # the next step call meets the same refusal, and `_converse` deals with it
            await self._make_beat()
            return None
        if jobs is not self._jobs:
            return None
        self._request += 1
        self.metrics.taken.inc(len(taken))
        return taken

    async def _make_beat(self) -> None:
        self._last_call = 0.0
        self._news.set()
        await asyncio.sleep(RETRY_S)

    async def _begin(self, jobs: HeldJobs, taken: Taken) -> None:
        """Start a job of ours from the end of its log."""
        job_id = taken.job.job_id
        if (job_id, taken.epoch) in jobs.started or job_id in self._starting:
            return
        self._starting.add(job_id)
        try:
            empty = TokenColumns(0, [], [], [])
            logged = await self._job_store.log(job_id) if taken.num_tokens else empty
        except StoreUnavailable:
            return  # the next look at what is ours finds it again
        finally:
            self._starting.discard(job_id)
        if jobs is self._jobs:
            self._credit.began(len(taken.job.prompt_ids), taken.job.params.max_new_tokens)
            jobs.begin(taken, logged)

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Kill an engine that hangs, cancel what nobody follows."""
        await self._is_serving.wait()
        while True:
            await asyncio.sleep(min(WATCH_S, self._settings.lease / BEATS_PER_LEASE))
            if self._num_computing:
                self._engine.check(self._jobs.outbox.engine_step)
            else:
                self._engine.rest()
            self._check_followers()
            self.metrics.held.set(len(self._jobs.running))

    async def _reap(self) -> None:
        """Look after the other workers."""
        await self._is_serving.wait()
        settings = self._settings
        await Reaper(self._connection, lease_s=settings.lease, max_attempts=settings.max_attempts).run()

    def _check_followers(self) -> None:
        for job_id in self._jobs.unfollowed():
            logger.info("job %s has no follower left: cancelled", job_id)
            self._jobs.cancel(job_id, CANCEL_REASONS["cancelled"])
            self._news.set()
