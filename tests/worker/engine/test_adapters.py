"""Slots for adapters: who gets one, who waits, and what goes back when."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.job import Adapter
from tests.worker.engine.fake_device import DeviceMisuse
from tests.worker.engine.harness import EOS, Harness, adapter, encoder_limits, limits, random_traffic, submit
from tests.worker.engine.test_scheduler import Bench, ids_of
from worker.engine.adapters import NO_SLOT, AdapterSlots, Entrance
from worker.engine.plan import PlanBuilder
from worker.engine.request import Request, Residency
from worker.engine.scheduler import Scheduler
from worker.pipe import CheckAdapter

DEPTHS = [0, 1, 2]
NUM_REQUESTS = 300


def slots_of(bench: Bench) -> dict[str, int]:
    return {r.request_id: r.residency.adapter_slot for r in bench.scheduler.running if r.residency}


# Traffic.


@pytest.mark.parametrize("depth", DEPTHS)
def test_more_adapters_than_slots_and_each_request_gets_what_it_gets_alone(depth: int) -> None:
    harness = Harness(limits(max_loras=2), depth)
    random_traffic(harness, seed=depth, num_requests=NUM_REQUESTS, num_adapters=5)
    stats = harness.steps[-1].stats
    assert harness.device.most_adapters == 2
    assert harness.device.num_adapter_loads >= 20, "slots changed hands"
    assert stats["prefix_hits"] >= 10 and stats["preemptions"] >= 1 and stats["batch_max"] >= 4
    adapted = [message for message in harness.submits.values() if message.adapter]
    assert len({message.adapter for message in adapted}) == 5
    assert 0 < len(adapted) < NUM_REQUESTS
    harness.check_outcomes()


def test_encoders_know_adapters_too() -> None:
    harness = Harness(encoder_limits(max_loras=2), depth=1)
    random_traffic(harness, seed=3, num_requests=100, num_adapters=4)
    assert harness.device.most_adapters == 2
    harness.check_outcomes()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    num_slots=st.integers(1, 3),
    num_adapters=st.integers(1, 4),
    max_num_seqs=st.integers(1, 6),
    prefill=st.integers(1, 40),
)
def test_any_number_of_slots_and_adapters(
    seed: int, depth: int, num_slots: int, num_adapters: int, max_num_seqs: int, prefill: int
) -> None:
    sizes = limits(max_loras=num_slots, max_num_seqs=max_num_seqs, max_batch_prefill_tokens=prefill)
    harness = Harness(sizes, depth)
    random_traffic(harness, seed, num_requests=25, num_adapters=num_adapters)
    harness.check_outcomes()


class SharesPrefixes(Scheduler):
    """Equal beginnings pass for equal keys and values, whatever the adapter."""

    def _extend_digests(self, request: Request) -> None:
        num_full = len(request.tokens) // self.limits.block_size
        self._digests.extend(request.digests, request.tokens, request.cache_salt, num_full)


class FreesSlotsAtOnce(Scheduler):
    """A slot goes back when its request ends, although launched steps still name it."""

    def _leave(self, request: Request, residency: Residency) -> None:
        super()._leave(request, residency)
        if residency.adapter_slot != NO_SLOT:
            self.slots.release(residency.adapter_slot)
            residency.adapter_slot = NO_SLOT

    def check(self) -> None: ...


class MixesUpSlots(Scheduler):
    """Two adapters find themselves in one slot."""

    def _move_in(self, request: Request, hits: list[int], num_borrowed: int, builder: PlanBuilder) -> Residency:
        if request.adapter and self.slots._num_stays[0]:
            self.slots._slot_of[request.adapter_digest] = 0
        return super()._move_in(request, hits, num_borrowed, builder)

    def check(self) -> None: ...


MISTAKES = [
    (SharesPrefixes, DeviceMisuse, "pages hold another history"),
    (FreesSlotsAtOnce, DeviceMisuse, "changes under a row"),
    (MixesUpSlots, DeviceMisuse, "changes under a row"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES)
def test_a_scheduler_that_mistreats_adapters_is_caught(
    wrong: type[Scheduler], error: type[Exception], message: str
) -> None:
    harness = Harness(limits(max_loras=2), depth=1, scheduler_class=wrong)
    with pytest.raises(error, match=message):
        random_traffic(harness, seed=1, num_requests=NUM_REQUESTS, num_adapters=5)
        harness.check_outcomes()


def test_the_books_notice_a_slot_that_was_not_given_back() -> None:
    bench = Bench(max_loras=2)
    bench.add("a", [10], adapter=adapter(1), max_new_tokens=1)
    launch = bench.launch()
    bench.scheduler.slots.take(adapter(1).digest)
    with pytest.raises(ValueError, match=r"slots are used \[1, 0\] times, stays say \[0, 0\]"):
        bench.apply(launch)


# The prefix cache.


@pytest.mark.parametrize(("second", "num_hits"), [(1, 1), (2, 0), (None, 0)])
def test_only_the_same_adapter_finds_what_it_computed(second: int | None, num_hits: int) -> None:
    bench = Bench(max_loras=2)
    for name, number in (("a", 1), ("b", second)):
        bench.add(name, list(range(10, 20)), adapter=None if number is None else adapter(number), max_new_tokens=1)
        bench.step()
    assert bench.scheduler.stats.prefix_hits == num_hits


def test_tenants_of_one_adapter_do_not_share() -> None:
    bench = Bench(max_loras=2)
    for name in "ab":
        bench.add(name, list(range(10, 20)), adapter=adapter(1), cache_salt=name)
        bench.step()
    assert bench.scheduler.stats.prefix_hits == 0


def test_no_salt_passes_for_a_digest_with_another_salt() -> None:
    bench = Bench(max_loras=2)
    for name, found, salt in (("a", adapter(1), "x"), ("b", None, f"{adapter(1).digest}x"), ("c", None, "")):
        bench.add(name, list(range(10, 20)), adapter=found, cache_salt=salt)
        bench.step()
    assert bench.scheduler.stats.prefix_hits == 0


# Who comes in.


def test_a_row_gets_its_adapter_and_the_slot() -> None:
    bench = Bench(max_loras=2)
    bench.add("a", [10], adapter=adapter(1))
    bench.add("b", [11])
    bench.add("c", [12], adapter=adapter(2))
    bench.add("d", [13], adapter=adapter(1))
    launch = bench.launch()
    found = {init.request_id: (init.adapter, init.adapter_slot) for init in launch.plan.new_rows}
    assert found == {"a": (adapter(1), 0), "b": (None, NO_SLOT), "c": (adapter(2), 1), "d": (adapter(1), 0)}


def test_who_waits_for_a_slot_does_not_hold_up_others_however_many_wait() -> None:
    bench = Bench(max_loras=1, max_num_seqs=6)
    bench.add("a", [10], adapter=adapter(1))
    bench.step()
    for number in range(40):
        bench.add(f"w{number}", [11], adapter=adapter(2))
    bench.add("base", [12])
    assert ids_of(bench.step()) == ["a", "base"]
    stats = bench.scheduler.snapshot()
    assert (stats["waiting"], stats["waiting_for_slot"]) == (40, 40)
    for name in "bcdef":
        bench.add(name, [13])
    bench.step()
    stats = bench.scheduler.snapshot()
    assert (stats["waiting"], stats["waiting_for_slot"]) == (41, 40), "one waits for a row"


def test_a_slot_is_free_when_the_last_step_that_names_it_is_applied() -> None:
    bench = Bench(max_loras=1)
    bench.add("a", [10], adapter=adapter(1))
    bench.add("base", [11])
    first, second = bench.launch(), bench.launch()
    bench.add("b", [12], adapter=adapter(2))
    bench.apply(first, token=EOS)
    bench.add("c", [13])
    third = bench.launch()
    assert [init.request_id for init in third.plan.new_rows] == ["c"], "a has ended, its slot is still in a step"
    bench.apply(second)
    fourth = bench.launch()
    assert [(init.request_id, init.adapter_slot) for init in fourth.plan.new_rows] == [("b", 0)]


def test_an_adapter_that_is_still_there_keeps_its_slot_and_the_oldest_gives_way() -> None:
    bench, found = Bench(max_loras=2), []
    for number in (1, 2, 1, 3, 1):
        bench.add("a", [10], adapter=adapter(number), max_new_tokens=1)
        found += [init.adapter_slot for init in bench.step().plan.new_rows]
    assert found == [0, 1, 0, 1, 0]


class LetsEveryoneIn(Entrance):
    """Whoever waits for a slot claims none."""

    def may_pass(self, digest: str) -> bool:
        passes = super().may_pass(digest)
        self.claims.clear()
        return passes


def num_steps_until_served(bench: Bench, limit: int = 100) -> int:
    """Steps that `x` waits while requests for the two adapters in the slots come again and again."""
    for number in range(limit):
        for slot in (1, 2):
            bench.add(f"{slot}.{number}", [10 + slot], adapter=adapter(slot), max_new_tokens=4, ignore_eos=True)
        if number == 3:
            bench.add("x", [30], adapter=adapter(3))
        if "x" in ids_of(bench.step()):
            return number
    return limit


def test_nobody_waits_for_ever_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(max_loras=2)
    assert num_steps_until_served(bench) <= 3 + 4 + 1, "as long as what is in the claimed slot still takes"
    assert set(slots_of(bench).values()) == {0, 1}, "the other adapter went on meanwhile"
    monkeypatch.setattr("worker.engine.scheduler.Entrance", LetsEveryoneIn)
    assert num_steps_until_served(Bench(max_loras=2)) == 100


def test_those_who_wait_for_different_adapters_claim_different_slots() -> None:
    slots = AdapterSlots(2)
    for digest in "ab":
        slots.take(digest)
    entrance = Entrance(slots)
    assert [entrance.may_pass(digest) for digest in ["c", "c", "a", "b", "", "d", "b", "e"]] == [
        *(False, False),
        *(False, True, True),
        *(False, False, False),
    ]
    assert entrance.claims == {"c": 0, "d": 1}


def test_a_claim_does_not_wander_when_one_of_several_ends() -> None:
    slots = AdapterSlots(2)
    for digest in "aab":
        slots.take(digest)
    slots.release(0)
    entrance = Entrance(slots)
    entrance.may_pass("c")
    assert entrance.claims == {"c": 0}


def test_a_preempted_request_gives_its_slot_back() -> None:
    bench = Bench(num_blocks=16, max_num_seqs=3, max_batch_prefill_tokens=60, max_loras=1)
    bench.scheduler._forecast.remaining = lambda num_output, max_new_tokens: 0
    bench.add("old", list(range(10, 20)), max_new_tokens=40, ignore_eos=True)
    bench.add("young", list(range(20, 30)), max_new_tokens=40, ignore_eos=True, adapter=adapter(1))
    while not bench.scheduler.stats.preemptions:
        bench.step()
    assert slots_of(bench) == {"old": NO_SLOT}
    assert bench.scheduler.slots.find("other") == 0


def test_a_row_that_fails_before_its_prompt_is_complete_ends_at_once() -> None:
    bench = Bench(max_batch_prefill_tokens=8, max_loras=1)
    bench.add("a", list(range(10, 30)), adapter=adapter(1))
    request = bench.scheduler.requests["a"]
    launch = bench.launch()
    assert launch.plan.samples.tolist() == [False]
    (run,) = bench.apply(launch, errors={0: "adapter a1 cannot be loaded any more"})
    assert (run.finish, run.error) == ("error", "adapter a1 cannot be loaded any more")
    assert bench.known_blocks(request) == 0
    assert bench.scheduler.slots.find("other") == 0
    assert not bench.scheduler.has_requests


def test_an_error_belongs_to_the_row_at_its_place() -> None:
    bench = Bench(max_batch_prefill_tokens=8, max_loras=1)
    bench.add("a", [10])
    bench.step()
    bench.add("b", list(range(10, 30)), adapter=adapter(1))
    bench.add("c", [11])
    launch = bench.launch(budget=4)
    bench.add("d", [12])
    assert (ids_of(launch), launch.plan.samples.tolist()) == (["a", "b"], [True, False])
    runs = bench.apply(launch, errors={1: "no"})
    assert Counter((run.request_id, run.error) for run in runs) == {("a", ""): 1, ("b", "no"): 1}


def test_a_check_is_answered_between_steps() -> None:
    harness = Harness(limits(max_loras=2))
    harness.submit(submit("a", [10, 11], adapter=Adapter("x", "/x", "0a"), max_new_tokens=4, ignore_eos=True))
    harness.run_pass()
    harness.inbox.put(CheckAdapter("y", "/y"))
    harness.run_until_idle()
    (checked,) = harness.checked
    assert (checked.name, checked.source) == ("y", "/y") and checked.error.startswith("adapter y: ")
    harness.check_outcomes()
