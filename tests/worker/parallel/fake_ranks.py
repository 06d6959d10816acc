"""Engine and rank processes around devices without a model.

`python -m tests.worker.parallel.fake_ranks MODE --fd N --settings JSON` is rank 0, as the agent starts it; with
`--rank` one of those that rank 0 starts; with a node rank in the settings the leader of that node. MODE says what goes
wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.worker.engine.fake_device import FakeDevice, Staged
from tests.worker.engine.harness import limits
from worker import engine_process
from worker.engine.device import Device, StepPlan
from worker.parallel import leader, node, rank_process
from worker.parallel.group import Group, Meeting, RankLost
from worker.parallel.loading import OnProgress
from worker.parallel.local_ranks import LocalRanks
from worker.parallel.plan_codec import decode_plan
from worker.parallel.rank_process import RankOptions
from worker.pipe import Ready
from worker.process import PR_SET_PDEATHSIG

LIMITS = limits(max_total_tokens=120, num_blocks=40)
THIS = (sys.executable, "-m", "tests.worker.parallel.fake_ranks")
SENTENCE = "the folder holds no model; name another one"


class WatchingDevice(FakeDevice):
    """Says on standard output which plans it gets; `fault` runs before the plan of step 3."""

    def __init__(self, rank: int, fault: Callable[[], None]) -> None:
        super().__init__(LIMITS, depth=1)
        self._rank, self._fault = rank, fault

    def forward(self, plan: StepPlan) -> None:
        say(f"rank {self._rank} step {plan.step}")
        if plan.step == 3:
            self._fault()
        super().forward(plan)


class CollectiveDevice(WatchingDevice):
    """Adds something up with the other ranks in every step, as a model does."""

    def __init__(self, rank: int, fault: Callable[[], None], group: Group) -> None:
        super().__init__(rank, fault)
        self._group = group

    def sample(self, plan: StepPlan) -> Staged:
        import torch

        say(f"rank {self._rank} adds {plan.step}")
        total = self._group.all_reduce(torch.full((1000,), float(plan.step)))
        assert total.eq(plan.step * self._group.shard.size).all()
        return super().sample(plan)


def say(text: str) -> None:
    # one write, so that lines of several processes do not mix
    os.write(1, f"{text}\n".encode())


def nothing() -> None:
    pass


def fall_over() -> None:
    raise RuntimeError("the device\nfell over")


def lose_touch() -> None:
    raise RankLost("nobody answers")


def hang() -> None:
    say("hanging")
    threading.Event().wait()


def load(mode: str, settings: WorkerSettings, on_progress: OnProgress, meeting: Meeting) -> tuple[Device, Ready]:
    rank = meeting.shard.rank
    say(f"rank {rank} is {os.getpid()}")
    on_progress("weights", 0, 10 + rank)
    if (mode, rank) in (("refuses", 1), ("refuses on 3", 3)):
        raise ConfigurationError(SENTENCE)
    if mode == "hangs while loading" and rank == 2:
        hang()
    if mode == "collective hangs" and rank == 2:
        # nothing but its own watch over the leader's socket can end it now
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    group = _join(meeting) if mode.startswith("collective") or mode == "refuses" else None
    on_progress("weights", 10 + rank, 10 + rank)
    faults = {
        ("breaks on 0", 0): fall_over,
        ("loses touch on 0", 0): lose_touch,
        ("loses touch on 1", 1): lose_touch,
        ("collective breaks", 1): fall_over,
        ("collective hangs", 1): hang,
    }
    fault = faults.get((mode, rank), nothing)
    device = WatchingDevice(rank, fault) if group is None else CollectiveDevice(rank, fault, group)
    return device, ready(settings, "other" if mode == "differs" and rank == 1 else "fake")


def _join(meeting: Meeting) -> Group:
    from worker.parallel.torch_group import join

    return join(meeting)


def ready(settings: WorkerSettings, digest: str) -> Ready:
    return Ready(
        vocab_size=LIMITS.vocab_size,
        dtype="float32",
        quantize="",
        weights_digest=digest,
        kv_tokens=LIMITS.num_blocks * LIMITS.block_size,
        block_size=LIMITS.block_size,
        max_num_seqs=LIMITS.max_num_seqs,
        max_input_tokens=LIMITS.max_total_tokens - 1,
        max_total_tokens=LIMITS.max_total_tokens,
        max_batch_prefill_tokens=LIMITS.max_batch_prefill_tokens,
        step_limit_s=settings.step_limit,
        reasons=[],
    )


def lead_node(settings: WorkerSettings, mode: str) -> int:
    """As `inferfleet worker` does it."""
    try:
        return node.serve_node(settings, (*THIS, mode))
    except ConfigurationError as error:
        say(str(error))
        return 2


def losing_step_5(publish: Callable[[LocalRanks, bytes], None]) -> Callable[[LocalRanks, bytes], None]:
    """Wrong on purpose: the others never hear of one step."""

    def publish_some(ranks: LocalRanks, data: bytes) -> None:
        if decode_plan(data).step != 5:
            publish(ranks, data)

    return publish_some


def main(mode: str, arguments: list[str]) -> int:
    if mode.startswith("loses touch"):
        leader.LAST_WORDS_S = rank_process.LAST_WORDS_S = 0.1
    if "--rank" in arguments:
        return rank_process.serve_rank(RankOptions.parse(arguments), partial(load, mode))
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--settings")
    options = parser.parse_args(arguments)
    settings = WorkerSettings(**json.loads(options.settings))
    if settings.node_rank:
        return lead_node(settings, mode)
    if mode == "loses a plan":
        LocalRanks.publish = losing_step_5(LocalRanks.publish)  # type: ignore[method-assign]
    connection = socket.socket(fileno=options.fd)
    return engine_process.serve(connection, settings, partial(load, mode), (*THIS, mode))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
