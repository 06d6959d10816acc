"""Credit: a worker takes what fits, a little more, and never the whole queue."""

from __future__ import annotations

from types import SimpleNamespace

from worker.agent import Agent, Identity
from worker.credit import FIRST_EXPECTED_OUTPUT, NUM_REMEMBERED, NUM_WAITING, Credit


def test_an_idle_worker_takes_by_rows_and_by_memory() -> None:
    assert Credit(max_num_seqs=4, kv_tokens=10**6).room([], 0) == 4
    assert Credit(max_num_seqs=256, kv_tokens=5120).room([], 0) == 10 + NUM_WAITING


def test_rows_in_use_are_not_free() -> None:
    credit = Credit(max_num_seqs=4, kv_tokens=10**6)
    assert credit.room([(10, 0, 10)] * 3, 0) == 1
    assert credit.room([(10, 0, 10)] * 4, 0) == 0


def test_a_queue_inside_the_engine_stops_the_intake() -> None:
    credit = Credit(max_num_seqs=256, kv_tokens=10**6)
    assert credit.room([(10, 0, 10)] * 8, NUM_WAITING) == 0
    assert credit.room([(10, 0, 10)] * 8, 0) > 0


def test_who_waits_for_a_slot_in_the_engine_does_not_stop_the_intake() -> None:
    agent = SimpleNamespace(
        _engine=SimpleNamespace(is_ready=True),
        _is_engine_lost=False,
        _is_draining=False,
        _identity=Identity.KNOWN,
        _jobs=SimpleNamespace(running=[SimpleNamespace(lengths=(10, 0, 10))] * 8),
        _credit=Credit(max_num_seqs=12, kv_tokens=10**6),
        _stats={"waiting": 5, "waiting_for_slot": 5},
    )
    assert Agent._room(agent) == 4  # type: ignore[arg-type]
    agent._stats["waiting_for_slot"] = 5 - NUM_WAITING
    assert Agent._room(agent) == 0  # type: ignore[arg-type]


def test_a_full_memory_leaves_only_the_spare() -> None:
    credit = Credit(max_num_seqs=256, kv_tokens=1000)
    assert credit.room([(900, 50, 100)], 0) == NUM_WAITING
    assert credit.room([(900, 50, 100)], 1) == NUM_WAITING - 1


def test_an_idle_worker_always_takes_one_job_however_long() -> None:
    credit = Credit(max_num_seqs=256, kv_tokens=1000)
    for _ in range(NUM_REMEMBERED):
        credit.began(100_000, 100_000)
    assert credit.room([], 5) == 1


def test_expected_outputs_are_learnt_from_recent_answers() -> None:
    credit = Credit(max_num_seqs=256, kv_tokens=1000)
    assert credit.expected(10, 0, 4096) == 10 + FIRST_EXPECTED_OUTPUT
    for _ in range(NUM_REMEMBERED):
        credit.finished(20)
    assert credit.expected(10, 0, 4096) == 30
    assert credit.expected(10, 0, 5) == 15
    assert credit.expected(10, 500, 4096) == 511, "it is longer than most"
