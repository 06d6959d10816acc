"""The outbox: what each step call carries, what pins the write-ahead stream, and how lost answers are made good."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.job import FinishReason, JobState, TokenColumns
from common.store.replies import Control, StepCall, StepReply
from worker.outbox import CHUNK_AGE_STEPS, CHUNK_TOKENS, JobEnd, Outbox

DONE = JobEnd(state=JobState.COMPLETED, finish_reason=FinishReason.LENGTH)
EMPTY = TokenColumns(0, [], [], [])


def columns(start: int, end: int) -> TokenColumns:
    ids = list(range(start, end))
    return TokenColumns(start, ids, [f"<{i}>" for i in ids], [-1.0] * len(ids))


def outbox_with(*job_ids: str, gateways: tuple[str, ...] = ()) -> Outbox:
    outbox = Outbox()
    for job_id in job_ids:
        outbox.add(job_id, 1, EMPTY, list(gateways))
    return outbox


def push(outbox: Outbox, job_id: str, count: int) -> None:
    job = outbox.get(job_id)
    assert job is not None
    outbox.push(job_id, columns(job.pending.end, job.pending.end + count))


def reply(call: StepCall, **fields: object) -> StepReply:
    base = StepReply(False, [], [], [], call.control_cursor)
    return replace(base, **fields)  # type: ignore[arg-type]


def send(outbox: Outbox, **fields: object) -> StepCall:
    call = outbox.next_call({})
    outbox.answered(reply(call, **fields))
    return call


def frame(data: bytes) -> list[tuple[str, int, int]]:
    return [(job_id, run.start, run.end) for job_id, run in wire.decode_frame(data)]


def test_a_call_carries_the_new_tokens_of_all_jobs_once() -> None:
    outbox = outbox_with("a", "b")
    push(outbox, "a", 2)
    push(outbox, "b", 1)
    first = send(outbox)
    assert frame(first.frame) == [("a", 0, 2), ("b", 0, 1)]
    assert (first.step, first.previous, first.chunks) == (1, 0, [])
    push(outbox, "a", 1)
    assert frame(send(outbox).frame) == [("a", 2, 3)]
    assert send(outbox).frame == b"", "a heartbeat"


def test_an_unanswered_call_is_repeated_unchanged_and_news_wait() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", 1)
    first = outbox.next_call({})
    push(outbox, "a", 1)
    assert outbox.next_call({"running": 1}) is first
    outbox.answered(reply(first))
    assert frame(outbox.next_call({}).frame) == [("a", 1, 2)]


def test_a_chunk_is_due_at_its_size() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", CHUNK_TOKENS - 1)
    assert send(outbox).chunks == []
    push(outbox, "a", 1)
    (chunk,) = send(outbox).chunks
    assert (chunk.start, chunk.end) == (0, CHUNK_TOKENS)
    assert wire.decode_columns(chunk.payload) == columns(0, CHUNK_TOKENS)
    push(outbox, "a", 1)
    assert send(outbox).chunks == []


def test_a_parked_job_is_flushed_when_its_tokens_are_old_so_the_write_ahead_stream_can_be_trimmed() -> None:
    outbox = outbox_with("parked", "busy")
    push(outbox, "parked", 5)
    calls = []
    while not calls or not any(chunk.job_id == "parked" for chunk in calls[-1].chunks):
        push(outbox, "busy", 1)
        calls.append(send(outbox))
        assert len(calls) <= CHUNK_AGE_STEPS + 1
    assert len(calls) == CHUNK_AGE_STEPS + 1
    assert all(call.min_step == 1 for call in calls), "its first step is kept until the answer to its flush"
    push(outbox, "busy", 1)
    after = send(outbox)
    assert after.min_step > 1


def test_an_end_rides_with_its_last_tokens_and_pins_the_stream_until_answered() -> None:
    outbox = outbox_with("a", "b")
    push(outbox, "a", 3)
    send(outbox)
    push(outbox, "a", 1)
    outbox.end("a", DONE)
    call = outbox.next_call({})
    (finish,) = call.finishes
    assert (finish.start, finish.end, finish.state, finish.finish_reason) == (0, 4, "completed", "length")
    assert wire.decode_columns(finish.tail) == columns(0, 4)
    assert call.min_step == 1
    assert "a" in outbox
    assert outbox.answered(reply(call)) == ["a"]
    assert "a" not in outbox
    push(outbox, "b", 1)
    assert send(outbox).min_step == 3


def test_an_end_without_new_tokens_has_no_tail() -> None:
    outbox = outbox_with("a")
    outbox.end("a", JobEnd(state=JobState.CANCELLED))
    (finish,) = send(outbox).finishes
    assert (finish.start, finish.end, finish.tail) == (0, 0, b"")


def test_each_gateway_gets_the_jobs_it_follows() -> None:
    outbox = Outbox()
    outbox.add("a", 1, EMPTY, ["g1", "g2"])
    outbox.add("b", 1, EMPTY, ["g2"])
    outbox.add("c", 1, EMPTY, [])
    for job_id in "abc":
        push(outbox, job_id, 1)
    frames = send(outbox).gateway_frames
    assert frame(frames["g1"]) == [("a", 0, 1)]
    assert frame(frames["g2"]) == [("a", 0, 1), ("b", 0, 1)]


def test_a_new_gateway_first_gets_what_the_log_lacks() -> None:
    outbox = outbox_with("a", gateways=("g1",))
    push(outbox, "a", CHUNK_TOKENS)
    send(outbox)
    push(outbox, "a", 3)
    send(outbox)
    outbox.attach("a", "g2")
    assert outbox.has_news
    assert outbox.is_urgent
    push(outbox, "a", 1)
    frames = send(outbox).gateway_frames
    assert frame(frames["g2"]) == [("a", CHUNK_TOKENS, CHUNK_TOKENS + 4)]
    assert frame(frames["g1"]) == [("a", CHUNK_TOKENS + 3, CHUNK_TOKENS + 4)]
    push(outbox, "a", 1)
    frames = send(outbox).gateway_frames
    assert frames["g1"] == frames["g2"]


def test_a_gateway_that_attached_during_a_call_is_served_by_the_next() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", 2)
    call = outbox.next_call({})
    outbox.attach("a", "g1")
    outbox.answered(reply(call))
    assert call.gateway_frames == {}
    assert frame(send(outbox).gateway_frames["g1"]) == [("a", 0, 2)]
    assert not outbox.has_news


def test_gateways_that_nobody_hears_are_dropped() -> None:
    outbox = outbox_with("a", gateways=("g1", "g2"))
    push(outbox, "a", 1)
    send(outbox, dead_gateways=["g1"])
    push(outbox, "a", 1)
    assert set(send(outbox).gateway_frames) == {"g2"}
    outbox.detach("a", "g2")
    assert not outbox.has_followers("a")


def test_lost_jobs_are_dropped() -> None:
    outbox = outbox_with("a", "b")
    push(outbox, "a", 1)
    call = outbox.next_call({})
    assert outbox.answered(reply(call, lost=["a"])) == ["a"]
    assert "a" not in outbox
    assert "b" in outbox


def test_only_the_first_token_is_urgent() -> None:
    outbox = outbox_with("a")
    urgent = []
    for _ in range(3):
        push(outbox, "a", 1)
        urgent.append(outbox.is_urgent)
        send(outbox)
    assert urgent == [True, False, False]


def test_an_urgent_call_leaves_the_others_for_the_next() -> None:
    outbox = outbox_with("a", "b", gateways=("g1",))
    push(outbox, "a", 1)
    send(outbox)
    outbox.engine_step = 1
    push(outbox, "a", 2)
    push(outbox, "b", 1)
    outbox.engine_step = 2
    urgent = outbox.next_call({}, only_urgent=True)
    assert frame(urgent.frame) == frame(urgent.gateway_frames["g1"]) == [("b", 0, 1)]
    outbox.answered(reply(urgent))
    assert outbox.has_news and not outbox.is_urgent
    assert outbox.settled_step == 0, "tokens of the second step are not on Redis yet"
    call = outbox.next_call({})
    assert (frame(call.frame), call.min_step) == ([("a", 1, 3)], 1)
    outbox.answered(reply(call))
    assert outbox.settled_step == 2 and not outbox.has_news


def test_a_call_without_an_answer_is_repeated_whatever_has_become_urgent() -> None:
    outbox = outbox_with("a", "b")
    push(outbox, "a", 1)
    call = outbox.next_call({}, only_urgent=True)
    push(outbox, "b", 1)
    assert outbox.next_call({}) is call


def test_the_control_cursor_goes_back_with_the_next_call() -> None:
    outbox = outbox_with("a")
    control = Control("7-0", "cancel", "a", "")
    send(outbox, controls=[control], control_cursor="7-0")
    assert outbox.next_call({}).control_cursor == "7-0"


def test_engine_steps_are_settled_by_the_answer_that_covers_them() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", 1)
    outbox.engine_step = 1
    assert outbox.settled_step == 0
    call = outbox.next_call({})
    push(outbox, "a", 1)
    outbox.engine_step = 2
    outbox.answered(reply(call))
    assert outbox.settled_step == 1, "the second step is not on Redis yet"
    send(outbox)
    assert outbox.settled_step == 2
    outbox.engine_step = 3
    assert outbox.settled_step == 3, "a step whose text is held back leaves nothing to wait for"


def test_a_gap_of_steps_is_filled_by_saying_all_again() -> None:
    outbox = outbox_with("a")
    for _ in range(4):
        push(outbox, "a", 1)
        send(outbox)
    push(outbox, "a", 1)
    assert outbox.next_call({}).step == 5
    outbox.continue_after(2)
    call = outbox.next_call({})
    assert (call.step, call.previous) == (3, 2)
    assert frame(call.frame) == [("a", 4, 5)], "what was answered is re-asserted by adopting the job"


def test_a_gap_of_a_log_is_filled_from_the_end_it_has() -> None:
    outbox = outbox_with("a", gateways=("g1",))
    push(outbox, "a", 2 * CHUNK_TOKENS)
    send(outbox)
    push(outbox, "a", CHUNK_TOKENS)
    assert outbox.next_call({}).chunks[0].start == 2 * CHUNK_TOKENS
    outbox.reopen("a", 10)
    call = send(outbox)
    assert frame(call.frame) == [("a", 10, 3 * CHUNK_TOKENS)]
    assert wire.decode_columns(call.chunks[0].payload) == columns(10, 3 * CHUNK_TOKENS)


def test_adopted_tokens_are_in_the_log_and_unframed_ones_still_go() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", 5)
    send(outbox)
    push(outbox, "a", 2)
    job = outbox.get("a")
    assert job is not None
    assert job.columns(job.framed_end) == columns(0, 5)
    outbox.begin_incarnation()
    outbox.adopted("a", 5)
    call = outbox.next_call({})
    assert (call.step, call.previous, call.control_cursor) == (1, 0, "0-0")
    assert frame(call.frame) == [("a", 5, 7)]
    assert job.columns(7) == columns(0, 7)


def test_a_job_taken_over_begins_at_the_end_of_its_log() -> None:
    outbox = Outbox()
    outbox.add("a", 3, columns(0, 40), ["g1"])
    push(outbox, "a", 1)
    assert outbox.is_urgent, "its reader has waited long enough"
    call = send(outbox)
    assert frame(call.frame) == [("a", 40, 41)]
    job = outbox.get("a")
    assert job is not None
    assert job.columns(41) == columns(0, 41)


def test_columns_do_not_mix_runs_that_do_not_meet() -> None:
    outbox = outbox_with("a")
    push(outbox, "a", 2)
    with pytest.raises(ValueError, match="start at 5"):
        outbox.push("a", columns(5, 6))


class Server:
    """What Redis would hold: the rules of the step function, in a dozen lines."""

    def __init__(self) -> None:
        self.wal: dict[int, bytes] = {}
        self.logs: dict[str, TokenColumns] = {}
        self.ended: set[str] = set()

    def step(self, call: StepCall) -> None:
        if call.frame:
            self.wal[call.step] = call.frame
        self.wal = {step: data for step, data in self.wal.items() if step >= call.min_step}
        for job_id, payload in [(c.job_id, c.payload) for c in call.chunks] + [
            (f.job_id, f.tail) for f in call.finishes if f.tail
        ]:
            self.logs.setdefault(job_id, TokenColumns(0, [], [], [])).extend(wire.decode_columns(payload))
        self.ended |= {finish.job_id for finish in call.finishes}

    def known(self, job_id: str) -> TokenColumns:
        """Log and write-ahead stream together."""
        log = self.logs.get(job_id, EMPTY)
        merged = TokenColumns(0, list(log.ids), list(log.pieces), list(log.logprobs))
        for step in sorted(self.wal):
            for name, run in wire.decode_frame(self.wal[step]):
                if name == job_id and run.start <= merged.end < run.end:
                    merged.extend(run.slice(merged.end))
        return merged


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["push", "end", "call", "answer"])), max_size=120)


@given(EVENTS, st.integers(1, 20))
@settings(max_examples=150)
def test_whatever_was_framed_is_in_log_or_stream_at_every_moment(events: list[tuple[str, str]], burst: int) -> None:
    outbox, server = outbox_with("a", "b", "c"), Server()
    framed = dict.fromkeys("abc", 0)
    waiting: StepCall | None = None
    for job_id, event in events:
        job = outbox.get(job_id)
        if event == "push" and job is not None and job.end is None:
            push(outbox, job_id, burst)
        elif event == "end":
            outbox.end(job_id, DONE)
        elif event == "call" and waiting is None:
            waiting = outbox.next_call({})
            server.step(waiting)
            for name, _, end in frame(waiting.frame) if waiting.frame else []:
                framed[name] = end
        elif event == "answer" and waiting is not None:
            outbox.answered(reply(waiting))
            waiting = None
        for name, end in framed.items():
            assert server.known(name).end >= end, "a shown token is nowhere"
            assert server.known(name) == columns(0, server.known(name).end)


def test_the_property_notices_a_stream_that_is_trimmed_too_early() -> None:
    outbox, server = outbox_with("a", "b"), Server()
    push(outbox, "a", 2)
    server.step(send(outbox))
    assert server.known("a").end == 2
    push(outbox, "b", 1)
    call = send(outbox)
    server.step(replace(call, min_step=call.step))
    assert server.known("a").end < 2
