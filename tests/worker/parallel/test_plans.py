"""Every rank gets every plan unchanged and in order, however far behind it is."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.errors import WireError
from tests.support.fleet import process_state, wait_for
from worker.parallel import plans
from worker.parallel.group import RankLost
from worker.parallel.plans import ANNOUNCEMENT, NUM_SLOTS, PlanMemory, PlanReader, Way, send_plan, send_stop

ROOT = Path(__file__).parents[3]


class CarelessMemory(PlanMemory):
    """Wrong on purpose: takes the next slot whoever still reads it."""

    def _is_free(self, number: int) -> bool:
        return True


class Channel:
    """One writer and some readers in this process. `num_inline` counts plans that went through the sockets."""

    def __init__(self, stack: ExitStack, num_readers: int, kind: type[PlanMemory] = PlanMemory) -> None:
        self.memory = kind.create(num_readers)
        self.ends: list[socket.socket] = []
        self.readers: list[PlanReader] = []
        self.num_inline = 0
        for reader in range(num_readers):
            ours, theirs = socket.socketpair()
            stream = theirs.makefile("rb")
            for thing in (ours, theirs, stream):
                stack.enter_context(thing)
            self.ends.append(ours)
            self.readers.append(PlanReader(stream, PlanMemory(self.memory.fd), reader))

    def publish(self, data: bytes) -> None:
        is_shared = self.memory.write(data)
        self.num_inline += not is_shared
        for end in self.ends:
            send_plan(end, data, is_shared=is_shared)


@contextmanager
def channel(num_readers: int = 1, kind: type[PlanMemory] = PlanMemory) -> Iterator[Channel]:
    with ExitStack() as stack:
        yield Channel(stack, num_readers, kind)


def test_plans_go_through_shared_memory_while_ranks_keep_up() -> None:
    with channel(2) as both:
        for number in range(3 * NUM_SLOTS):
            both.publish(b"plan %d" % number)
            assert [reader.next() for reader in both.readers] == [b"plan %d" % number] * 2
        assert both.num_inline == 0
        send_stop(both.ends[0])
        assert both.readers[0].next() is None


@pytest.mark.parametrize("kind", [PlanMemory, CarelessMemory])
def test_a_slot_is_not_taken_while_somebody_may_read_it(kind: type[PlanMemory]) -> None:
    num_plans = 3 * NUM_SLOTS
    expected = [b"plan %02d" % number for number in range(num_plans)]
    with channel(2, kind) as both:
        for plan in expected:
            both.publish(plan)
            if kind is PlanMemory:
                assert both.readers[0].next() == plan
        if kind is CarelessMemory:
            assert [both.readers[1].next() for _ in range(NUM_SLOTS)] != expected[:NUM_SLOTS]
            return
        assert both.num_inline == num_plans - NUM_SLOTS
        assert [both.readers[1].next() for _ in expected] == expected
        both.publish(b"again")
        assert both.num_inline == num_plans - NUM_SLOTS, "who has caught up shares memory again"
        assert [reader.next() for reader in both.readers] == [b"again"] * 2


SMALL = 16


@given(st.lists(st.one_of(st.integers(0, 3 * SMALL).map(lambda size: (size,)), st.integers(0, 2)), max_size=60))
@settings(deadline=None)
def test_any_order_of_writing_and_reading_is_right(moves: list[tuple[int] | int]) -> None:
    """A tuple writes a plan of that size, a number lets that reader read."""
    with pytest.MonkeyPatch.context() as patch, channel_of_small_slots(patch) as three:
        sent: list[bytes] = []
        num_read = [0, 0, 0]
        for move in [*moves, *[0, 1, 2] * len(moves)]:
            if isinstance(move, tuple):
                sent.append(bytes([len(sent) % 256]) * move[0])
                three.publish(sent[-1])
            elif num_read[move] < len(sent):
                assert three.readers[move].next() == sent[num_read[move]]
                num_read[move] += 1
        assert num_read == [len(sent)] * 3


@contextmanager
def channel_of_small_slots(patch: pytest.MonkeyPatch) -> Iterator[Channel]:
    patch.setattr(plans, "SLOT_BYTES", SMALL)
    with channel(3) as three:
        yield three


@pytest.mark.parametrize("kind", [PlanMemory, CarelessMemory])
def test_a_process_that_was_stopped_reads_every_plan_and_one_too_large_for_a_slot(kind: type[PlanMemory]) -> None:
    source = random.Random(2)
    sent = [source.randbytes(source.randrange(2000)) for _ in range(40)] + [source.randbytes(plans.SLOT_BYTES + 1)]
    memory = kind.create(1)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.worker.parallel.plan_reader", str(theirs.fileno()), str(memory.fd), "0"]
    fds = (theirs.fileno(), memory.fd)
    with ours, subprocess.Popen(command, pass_fds=fds, cwd=ROOT, stdout=subprocess.PIPE) as reader:
        theirs.close()
        assert reader.stdout is not None and reader.stdout.readline() == b"here\n"
        reader.send_signal(signal.SIGSTOP)
        wait_for(lambda: process_state(reader.pid) == "T", "the reader's stop")
        are_shared = [memory.write(plan) for plan in sent[:-1]]
        for plan, is_shared in zip(sent[:-1], are_shared, strict=True):
            send_plan(ours, plan, is_shared=is_shared)
        assert not all(are_shared) or kind is CarelessMemory
        reader.send_signal(signal.SIGCONT)
        send_plan(ours, sent[-1], is_shared=memory.write(sent[-1]))
        send_stop(ours)
        digests = reader.stdout.read().decode().split()
    expected = [hashlib.sha256(plan).hexdigest() for plan in sent]
    assert (digests == expected) == (kind is PlanMemory)


@pytest.mark.parametrize(
    "announcement",
    [(Way.SHARED, plans.SLOT_BYTES + 1), (Way.INLINE, wire.MAX_BYTES + 1), (7, 0)],
)
def test_garbage_is_an_error(announcement: tuple[int, int]) -> None:
    with channel() as one, pytest.raises(WireError):
        one.ends[0].sendall(ANNOUNCEMENT.pack(*announcement))
        one.readers[0].next()


def test_without_shared_memory_no_plan_can_be_in_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, theirs.makefile("rb") as stream, pytest.raises(WireError):
        send_plan(ours, b"", is_shared=True)
        PlanReader(stream).next()


def test_the_end_of_either_side_is_a_lost_rank() -> None:
    with channel(2) as both:
        both.ends[0].sendall(ANNOUNCEMENT.pack(Way.INLINE, 100) + b"half")
        both.ends[0].shutdown(socket.SHUT_WR)
        with pytest.raises(RankLost):
            both.readers[0].next()
        both.ends[1].shutdown(socket.SHUT_WR)
        with pytest.raises(RankLost):
            send_stop(both.ends[1])
