"""The jobs a worker holds: begun once, ended by the right hand, kept for a while in case their end gets lost."""

from __future__ import annotations

from typing import Any

import pytest

from common.job import Adapter, JobState, SamplingParams, TokenColumns
from common.store.replies import Control, StepReply, Taken
from common.text.tokenizer import TextTokenizer
from tests.support.metaspace import EXTRA, metaspace_tokenizer_json, word_id
from tests.support.protocol import make_job
from tests.support.tiny_model import byte_tokenizer_json
from worker.held import KEEP_CLOSED_S, Held, HeldJobs
from worker.pipe import Abort, Message, Step, Submit, TokenRun

TOKENIZER = TextTokenizer(byte_tokenizer_json())
EMPTY = TokenColumns(0, [], [], [])


class Bench:
    """HeldJobs with a clock to turn, a list of what the engine was told, and a Redis that says yes."""

    def __init__(self, tokenizer: TextTokenizer = TOKENIZER, *, is_encoder_decoder: bool = False) -> None:
        self.now = 100.0
        self.sent: list[Message] = []
        self.ended: list[tuple[Held, int]] = []
        self.jobs = HeldJobs(
            tokenizer,
            (257,),
            self.sent.append,
            lambda: self.now,
            lambda held, count: self.ended.append((held, count)),
            is_encoder_decoder=is_encoder_decoder,
        )

    def begin(self, taken: Taken, logged: TokenColumns = EMPTY) -> str:
        self.jobs.begin(taken, logged)
        return taken.job.job_id

    def step(self, number: int, *runs: TokenRun) -> None:
        self.jobs.on_step(Step(step=number, runs=list(runs), stats={}))

    def answer(self, **fields: Any) -> None:
        call = self.jobs.outbox.next_call({})
        base: dict[str, Any] = dict(
            is_duplicate=False, controls=[], lost=[], dead_gateways=[], control_cursor=call.control_cursor
        )
        self.jobs.answered(StepReply(**base | fields))

    def aborted(self) -> list[str]:
        return [job_id for message in self.sent if isinstance(message, Abort) for job_id in message.request_ids]


def taken(epoch: int = 1, cancel_reason: str = "", attempts: int = 0, **changes: Any) -> Taken:
    changes = {"prompt_ids": [65], "params": SamplingParams(max_new_tokens=5)} | changes
    return Taken(
        job=make_job(**changes),
        epoch=epoch,
        attempts=attempts,
        num_tokens=0,
        gateways=["g1"],
        cancel_reason=cancel_reason,
        deadline_ms=0,
    )


def run(job_id: str, ids: list[int], finish: str = "", epoch: int = 1, error: str = "") -> TokenRun:
    return TokenRun(request_id=job_id, epoch=epoch, ids=ids, logprobs=[-1.0] * len(ids), finish=finish, error=error)


def test_a_job_brings_its_adapter_and_fails_alone_without_it() -> None:
    bench, adapter = Bench(), Adapter("fr", "/adapters/fr", "0f")
    job_id, other = bench.begin(taken(adapter=adapter)), bench.begin(taken())
    assert [submit.adapter for submit in bench.sent if isinstance(submit, Submit)] == [adapter, None]
    bench.jobs.fail(job_id, 9, "adapter_error", "of an earlier run")
    assert bench.jobs.unended() == [(job_id, 1), (other, 1)]
    for _ in range(2):
        bench.jobs.fail(job_id, 1, "adapter_error", "there is no folder")
    assert bench.jobs.unended() == [(other, 1)]
    (finish,) = bench.jobs.outbox.next_call({}).finishes
    assert (finish.state, finish.error_code, finish.error_message) == (
        JobState.FAILED,
        "adapter_error",
        "there is no folder",
    )
    assert len(bench.ended) == 1


def test_a_job_goes_to_the_engine_with_the_tokens_of_its_log() -> None:
    bench = Bench()
    logged = TokenColumns(0, [66, 67], ["B", "C"], [0.0, 0.0])
    job_id = bench.begin(taken(epoch=3, attempts=1), logged)
    (submit,) = bench.sent
    assert isinstance(submit, Submit)
    assert (submit.request_id, submit.epoch, submit.prompt_ids) == (job_id, 3, [65])
    assert (submit.output_ids, submit.eos_token_ids, submit.is_suspect) == ([66, 67], [257], True)
    bench.step(1, run(job_id, [68], epoch=3))
    outgoing = bench.jobs.outbox.get(job_id)
    assert outgoing is not None
    assert outgoing.pending == TokenColumns(2, [68], ["D"], [-1.0])


@pytest.mark.parametrize(("is_encoder_decoder", "piece"), [(True, "Hello"), (False, " Hello")])
def test_answers_of_an_encoder_decoder_do_not_continue_their_prompts(is_encoder_decoder: bool, piece: str) -> None:
    bench = Bench(TextTokenizer(metaspace_tokenizer_json()), is_encoder_decoder=is_encoder_decoder)
    prompt = [word_id("▁world"), word_id(".")]
    fresh = bench.begin(taken(prompt_ids=prompt))
    resumed = bench.begin(taken(prompt_ids=prompt), TokenColumns(0, [EXTRA], ["<extra_id_0>"], [0.0]))
    assert [(message.prompt_ids, message.output_ids) for message in bench.sent] == [(prompt, []), (prompt, [EXTRA])]
    bench.step(1, *(run(job_id, [word_id("▁Hello")]) for job_id in (fresh, resumed)))
    assert [bench.jobs.outbox.get(job_id).pending.pieces for job_id in (fresh, resumed)] == [[piece], [piece]]


def test_answers_of_an_older_run_are_ignored() -> None:
    bench = Bench()
    job_id = bench.begin(taken(epoch=2))
    bench.step(1, run(job_id, [66], epoch=1), run("stranger", [66]))
    assert not bench.jobs.outbox.get(job_id).pending.ids
    bench.step(2, run(job_id, [66], epoch=2))
    assert bench.jobs.outbox.get(job_id).pending.ids == [66]


def test_ends_of_the_engine_end_the_job() -> None:
    bench = Bench()
    done, failed = bench.begin(taken()), bench.begin(taken())
    bench.step(1, run(done, [66], "length"), run(failed, [66], "error", error="no memory for it"))
    assert [(held.end.state, count) for held, count in bench.ended if held.end] == [
        (JobState.COMPLETED, 1),
        (JobState.FAILED, 1),
    ]
    finishes = {finish.job_id: finish for finish in bench.jobs.outbox.next_call({}).finishes}
    assert finishes[failed].error_message == "no memory for it"
    assert bench.aborted() == [], "the engine knows"
    assert not bench.jobs.is_empty
    bench.answer()
    assert bench.jobs.is_empty


def test_a_job_that_is_cancelled_already_never_reaches_the_engine() -> None:
    bench = Bench()
    bench.begin(taken(cancel_reason="expired"))
    assert bench.sent == []
    assert bench.ended[0][0].end is not None
    assert bench.ended[0][0].end.state is JobState.EXPIRED


def test_an_order_that_overtakes_its_job_is_kept() -> None:
    bench = Bench()
    early = taken()
    bench.jobs.control(Control("1-0", "cancel", early.job.job_id, ""))
    bench.begin(early)
    assert bench.sent == []
    assert bench.ended[0][0].end.state is JobState.CANCELLED
    late = taken()
    bench.jobs.control(Control("2-0", "cancel", late.job.job_id, ""))
    bench.jobs.forget_old(set())
    bench.begin(late)
    assert len(bench.ended) == 1, "by now everything it could be for was known"


def test_cancel_aborts_and_tokens_after_it_do_not_count() -> None:
    bench = Bench()
    job_id = bench.begin(taken())
    bench.step(1, run(job_id, [66]))
    bench.answer(controls=[Control("1-0", "cancel", job_id, "")])
    assert bench.aborted() == [job_id]
    bench.step(2, run(job_id, [67]))
    (finish,) = bench.jobs.outbox.next_call({}).finishes
    assert (finish.end, finish.state) == (1, JobState.CANCELLED)


def test_a_lost_job_is_aborted_and_forgotten() -> None:
    bench = Bench()
    job_id = bench.begin(taken())
    bench.step(1, run(job_id, [66]))
    bench.answer(lost=[job_id])
    assert bench.aborted() == [job_id]
    assert job_id not in bench.jobs


def test_closed_jobs_can_end_again_for_a_while() -> None:
    bench = Bench()
    first = taken()
    job_id = bench.begin(first)
    bench.step(1, run(job_id, [66], "length"))
    bench.answer()
    assert bench.jobs.is_recently_closed(job_id, 1)
    bench.jobs.reopen_closed()
    (finish,) = bench.jobs.outbox.next_call({}).finishes
    assert (finish.job_id, finish.end, finish.state) == (job_id, 1, JobState.COMPLETED)
    bench.answer()
    bench.now += KEEP_CLOSED_S + 1
    bench.jobs.forget_old({(job_id, 1)})
    assert not bench.jobs.is_recently_closed(job_id, 1)
    assert (job_id, 1) in bench.jobs.started, "Redis still names it, so it is not to be begun again"
    bench.jobs.forget_old(set())
    assert bench.jobs.started == set()


def test_only_jobs_with_a_grace_end_without_followers() -> None:
    bench = Bench()
    patient, impatient = bench.begin(taken()), bench.begin(taken(orphan_grace_s=5.0))
    assert bench.jobs.unfollowed() == []
    for job_id in (patient, impatient):
        bench.jobs.control(Control("1-0", "detach", job_id, "g1"))
    assert bench.jobs.unfollowed() == []
    bench.now += 4
    assert bench.jobs.unfollowed() == []
    bench.now += 2
    assert bench.jobs.unfollowed() == [impatient]
    bench.jobs.control(Control("2-0", "attach", impatient, "g2"))
    assert bench.jobs.unfollowed() == []
    bench.jobs.control(Control("3-0", "detach", impatient, "g2"))
    bench.now += 4
    assert bench.jobs.unfollowed() == [], "the grace begins anew"
