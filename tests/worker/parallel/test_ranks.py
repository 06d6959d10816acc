"""Ranks as real processes around a device without a model: they obey the same plans, and end all together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.support.fleet import process_state, wait_for
from tests.worker.engine.fake_device import Oracle
from tests.worker.engine.harness import submit
from tests.worker.parallel.fake_ranks import LIMITS, SENTENCE
from tests.worker.parallel.running import DEADLINE_S, Group, is_alive, wait_until_gone
from worker.parallel.leader import LoadProgress
from worker.pipe import Progress


@pytest.fixture()
def start() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def make(mode: str, **settings: object) -> Group:
        groups.append(Group(mode, **settings))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def expected_ids() -> list[int]:
    message = submit("a", [10, 11, 12], max_new_tokens=100, ignore_eos=True)
    return Oracle(LIMITS.vocab_size).generate([10, 11, 12], [], message.params, [])[0]


def test_all_ranks_run_the_same_plans_and_leave_when_told(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    pids = group.wait_for_pids()
    assert group.serve() == expected_ids()
    assert all(map(is_alive, pids))
    assert group.stop() == 0
    wait_until_gone(pids)
    assert group.process.stdout is not None
    group.lines += group.process.stdout.read().decode().splitlines()
    plans = [[line.split()[-1] for line in group.lines if line.startswith(f"rank {rank} step")] for rank in range(3)]
    assert len(plans[0]) >= 100 and plans[1] == plans[2] == plans[0]


def test_a_plan_that_did_not_reach_the_others_would_be_noticed(start: Callable[..., Group]) -> None:
    group = start("loses a plan")
    group.start()
    group.begin()
    words = group.last_words()
    assert words is not None and words.endswith("DeviceMisuse: step 6 after 4")


def test_progress_is_that_of_all_ranks_together(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    assert {progress.total for progress in group.progress} == {10 + 11 + 12}
    done = [progress.done for progress in group.progress]
    assert done == sorted(done) and done[-1] == 33


def test_a_phase_counts_once_every_rank_is_in_it() -> None:
    progress = LoadProgress(2)
    assert progress.note(0, Progress("weights", 5, 10)) is None
    assert progress.note(1, Progress("weights", 1, 20)) == Progress("weights", 6, 30)
    assert progress.note(0, Progress("cache", 1, 1)) is None
    assert progress.note(1, Progress("weights", 20, 20)) == Progress("weights", 25, 30)
    assert progress.note(1, Progress("cache", 1, 1)) == Progress("cache", 2, 2)


def test_a_killed_rank_ends_an_idle_group(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    pids = group.wait_for_pids()
    group.kill(2)
    assert group.last_words() == "rank 2 was killed by signal 9"
    assert group.process.wait(DEADLINE_S) == 1
    wait_until_gone(pids)


def test_a_killed_rank_ends_a_group_whose_others_wait_for_it_in_a_collective(start: Callable[..., Group]) -> None:
    group = start("collective hangs")
    group.start()
    pids = group.wait_for_pids()
    group.begin()
    for line in ("hanging", "rank 0 adds 3", "rank 2 adds 3"):
        group.wait_for_line(line)
    assert all(map(is_alive, pids))
    group.kill(1)
    assert group.last_words() == "rank 1 was killed by signal 9"
    wait_until_gone(pids)


def test_no_rank_outlives_rank_0_not_even_in_a_collective(start: Callable[..., Group]) -> None:
    """Rank 2 has no death signal: what ends it is its watch over the socket."""
    group = start("collective hangs")
    group.start()
    pids = group.wait_for_pids()
    group.begin()
    for line in ("hanging", "rank 0 adds 3", "rank 2 adds 3"):
        group.wait_for_line(line)
    group.kill(0)
    assert group.last_words() is None
    wait_until_gone(pids)


def test_no_rank_outlives_a_killed_rank_0_that_is_idle(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    pids = group.wait_for_pids()
    group.kill(0)
    wait_until_gone(pids)


def test_what_a_rank_raises_is_the_last_word_of_the_group(start: Callable[..., Group]) -> None:
    """Also when other ranks notice in their collective that somebody has left."""
    group = start("collective breaks")
    group.start()
    pids = group.wait_for_pids()
    group.begin()
    assert group.last_words() == "rank 1: RuntimeError: the device fell over"
    assert group.process.wait(DEADLINE_S) == 1
    wait_until_gone(pids)


def test_what_rank_0_raises_ends_the_others(start: Callable[..., Group]) -> None:
    group = start("breaks on 0")
    group.start()
    pids = group.wait_for_pids()
    group.begin()
    assert group.last_words() == "RuntimeError: the device fell over"
    wait_until_gone(pids)


@pytest.mark.parametrize(("rank", "sentence"), [(0, "nobody answers"), (1, "rank 1: nobody answers")])
def test_a_rank_that_lost_the_others_says_so_when_nobody_knows_better(
    start: Callable[..., Group], rank: int, sentence: str
) -> None:
    group = start(f"loses touch on {rank}")
    group.start()
    group.begin()
    assert group.last_words() == sentence


def test_a_configuration_error_of_one_rank_arrives_word_for_word(start: Callable[..., Group]) -> None:
    """Although the others wait for that rank in vain."""
    group = start("refuses")
    assert group.last_words() == SENTENCE
    assert group.process.wait(DEADLINE_S) == 1


def test_a_rank_killed_while_it_loads_may_be_an_accident(start: Callable[..., Group]) -> None:
    """No last words, for those are final while loading: the agent tries again a few times."""
    group = start("hangs while loading")
    pids = group.wait_for_pids()
    group.wait_for_line("hanging")
    group.kill(2)
    assert group.last_words() is None
    assert group.process.wait(DEADLINE_S) == 1
    wait_until_gone(pids)


def test_ranks_that_loaded_different_things_do_not_serve(start: Callable[..., Group]) -> None:
    group = start("differs")
    assert group.last_words() == "rank 1 has weights_digest other but rank 0 has fake; all need the same model"


def test_signals_of_a_terminal_are_the_agents_matter(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    for pid in group.wait_for_pids():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    assert group.serve() == expected_ids()


def test_a_stopped_rank_gets_the_plans_it_missed(start: Callable[..., Group]) -> None:
    """Rank 0 of this model waits for nobody, so it runs ahead by more plans than shared memory holds."""
    group = start("good")
    group.start()
    pids = group.wait_for_pids()
    os.kill(pids[2], signal.SIGSTOP)
    wait_for(lambda: process_state(pids[2]) == "T", "the stop of rank 2")
    assert group.serve() == expected_ids()
    os.kill(pids[2], signal.SIGCONT)
    group.wait_for_line("rank 2 step 100")
    assert group.stop() == 0


def test_a_rank_that_dies_with_plans_unread_is_reported_like_any_other(start: Callable[..., Group]) -> None:
    group = start("good")
    group.start()
    pids = group.wait_for_pids()
    os.kill(pids[2], signal.SIGSTOP)
    wait_for(lambda: process_state(pids[2]) == "T", "the stop of rank 2")
    assert group.serve() == expected_ids()
    group.kill(2)
    assert group.last_words() == "rank 2 was killed by signal 9"
