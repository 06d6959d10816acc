"""A worker as a coroutine of the test: it takes jobs from a real Redis and gives every one the same scripted text."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from common import wire
from common.card import ModelCard
from common.job import FinishReason, JobState, TokenColumns
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.replies import Chunk, Control, Finish, StepCall, Taken
from common.store.workers import WorkerStore
from common.text.tokenizer import TextTokenizer
from tests.gateway.support import EOS
from tests.support.tiny_model import byte_tokenizer_json
from worker.pipe import TokenRun
from worker.text import Released, TextStage, TopTexts

ANSWER = "Hé, a. b!"
POISON = "!fail"


@dataclass
class _Run:
    taken: Taken
    stage: TextStage
    gateways: set[str]
    epoch: int
    num_tokens: int = 0
    is_cancelled: bool = False


@dataclass
class ScriptedWorker:
    """One token per job and step. `may_go_on` cleared: it beats, but gives no tokens. `seen` are all jobs it took."""

    connection: Connection
    card: ModelCard
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[Taken] = field(default_factory=list)
    ended: dict[str, JobState] = field(default_factory=dict)
    is_stopping: bool = False

    def __post_init__(self) -> None:
        self._tokenizer = TextTokenizer(byte_tokenizer_json())
        self._store = WorkerStore(self.connection, self.card.lane, "w1", "0123456789abcdef")
        self._runs: dict[str, _Run] = {}
        self._step = self._request = 0
        self._cursor = "0-0"
        self.may_go_on.set()

    async def begin(self) -> None:
        await FleetStore(self.connection).announce(self.card, byte_tokenizer_json())
        await self._store.hello({"pid": 1, "host": "test", "model": self.card.served_name, "started_ms": 0})

    async def run(self) -> None:
        while not self.is_stopping:
            self._request += 1
            for taken in await self._store.take(8, self._request):
                self.seen.append(taken)
                self._runs[taken.job.job_id] = self._started(taken)
            await self._commit()
            await asyncio.sleep(0.002)

    def _started(self, taken: Taken) -> _Run:
        job = taken.job
        stage = TextStage(self._tokenizer, TopTexts(self._tokenizer), job.prompt_ids, job.params)
        return _Run(taken, stage, set(taken.gateways), taken.epoch)

    async def _commit(self) -> None:
        call = StepCall(step=self._step + 1, previous=self._step, min_step=self._step + 1, control_cursor=self._cursor)
        frames: dict[str, list[tuple[str, TokenColumns]]] = {}
        for job_id, run in list(self._runs.items()) if self.may_go_on.is_set() or self._has_cancelled else []:
            released = Released(TokenColumns(run.num_tokens, [], [], [])) if run.is_cancelled else self._advance(run)
            columns = released.columns
            if columns.ids:
                call.chunks.append(Chunk(job_id, run.epoch, columns.start, columns.end, wire.encode_columns(columns)))
                for gateway in run.gateways:
                    frames.setdefault(gateway, []).append((job_id, columns))
            self._end(job_id, run, released, call)
        call.gateway_frames.update({gateway: wire.encode_frame(runs) for gateway, runs in frames.items()})
        reply = await self._store.step(call)
        self._step, self._cursor = call.step, reply.control_cursor
        for control in reply.controls:
            self._obey(control)

    @property
    def _has_cancelled(self) -> bool:
        return any(run.is_cancelled for run in self._runs.values())

    def _advance(self, run: _Run) -> Released:
        params = run.taken.job.params
        position = run.stage.num_released + len(run.stage._pending)
        script = [*ANSWER.encode()] if params.ignore_eos else [*ANSWER.encode(), EOS]
        token_id = script[position % len(script)]
        is_full = position + 1 >= params.max_new_tokens
        finish = "length" if is_full else "eos_token" if token_id == EOS else ""
        tops = [[(97 + n, -float(n)) for n in range(params.num_top_logprobs)]] if params.num_top_logprobs else []
        return run.stage.push(
            TokenRun(
                request_id=run.taken.job.job_id,
                epoch=run.epoch,
                ids=[token_id],
                logprobs=[-0.5],
                top_tokens=tops,
                finish=finish,
            )
        )

    def _end(self, job_id: str, run: _Run, released: Released, call: StepCall) -> None:
        run.num_tokens = released.columns.end
        has_failed = POISON in self._tokenizer.decode(run.taken.job.prompt_ids) and run.num_tokens >= 2
        if not (released.finish_reason or run.is_cancelled or has_failed):
            return
        state = JobState.FAILED if has_failed else JobState.CANCELLED if run.is_cancelled else JobState.COMPLETED
        reason = released.finish_reason if state is JobState.COMPLETED else None
        self._finish(job_id, run, state, reason, call)

    def _finish(self, job_id: str, run: _Run, state: JobState, reason: FinishReason | None, call: StepCall) -> None:
        code, message = ("engine", "the script says so") if state is JobState.FAILED else ("", "")
        end = run.num_tokens
        call.finishes.append(
            Finish(
                job_id=job_id,
                epoch=run.epoch,
                start=end,
                end=end,
                state=state,
                finish_reason=reason,
                error_code=code,
                error_message=message,
            )
        )
        self.ended[job_id] = state
        del self._runs[job_id]

    def _obey(self, control: Control) -> None:
        run = self._runs.get(control.job_id)
        if run is None:
            return
        if control.verb in ("cancel", "expire"):
            run.is_cancelled = True
        elif control.verb == "attach":
            run.gateways.add(control.gateway)
        elif control.verb == "detach":
            run.gateways.discard(control.gateway)
