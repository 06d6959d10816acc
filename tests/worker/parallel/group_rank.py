"""Groups of ranks that add up and gather: `python -m tests.worker.parallel.group_rank FOLDER WORK WAY-SIZE ...`.

Each rank is a process, forked off one that has torch already. WAY is gloo or shared; what one finds of WORK, results or
losses, goes to FOLDER/WORK-WAY-SIZE-RANK.pt.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tests.support.fleet import process_state, wait_for
from worker.kernels.products import SUFFIXES
from worker.parallel.group import Group, Meeting, RankLost, agree_on_minimum
from worker.parallel.plans import anonymous_file
from worker.parallel.shard import Shard
from worker.parallel.torch_group import join
from worker.process import die_with_parent

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
SHAPES = ((1,), (3, 5), (0, 7), (257, 129))
LARGE = (3, 70_001)
"""Of which an exchange takes several pieces."""
NUM_SUMS = 300


def input_of(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """What a rank brings along."""
    source = torch.Generator().manual_seed(1000 * rank + len(shape))
    return (8 * torch.rand(shape, generator=source, dtype=torch.float64)).to(dtype)


@torch.inference_mode()
def results(group: Group) -> dict[str, object]:
    rank, size = group.shard.rank, group.shard.size
    found: dict[str, object] = {"shard": (rank, size), "is shared": group.exchange is not None}
    for dtype in DTYPES:
        for shape in SHAPES:
            x = input_of(rank, dtype, shape)
            total = x.clone()
            assert group.all_reduce(total) is total
            found[f"sum {dtype} {shape}"] = total
            found[f"all {dtype} {shape}"] = group.all_gather(x)
    for dtype in SUFFIXES:
        found[f"sum {dtype} {LARGE}"] = group.all_reduce(input_of(rank, dtype, LARGE))
    found["num wrong"] = num_wrong(group)
    column = input_of(rank, torch.float32, (3, 5)).t()
    found["columns"] = group.all_gather(column)
    assert group.all_reduce(column) is column
    found["column sum"] = column
    found["minimum"] = agree_on_minimum(group, 100 - rank)
    return found


def in_order(parts: Tensor) -> Tensor:
    """The sum of `parts` [ranks, ...] as an exchange has it, to the last bit."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def num_wrong(group: Group) -> tuple[int, int]:
    """Of many sums of random sizes, for some of which a rank comes late, those that are not the sum; and those that
    would not be if the first rank's part were that of the sum before."""
    randomness = random.Random(group.shard.size)
    given = torch.stack([input_of(rank, torch.float32, (100_000,)) for rank in range(group.shard.size)])
    counts, before = [0, 0], 0
    for _ in range(NUM_SUMS):
        start, length = randomness.randrange(50_000), randomness.choice((3, 17, 768, 5000, 40_000))
        parts = given[:, start : start + length].to(randomness.choice(list(SUFFIXES)))
        if randomness.random() < 0.1 and randomness.randrange(len(given)) == group.shard.rank:
            # longer than others stay awake
            time.sleep(0.003)
        total = group.all_reduce(parts[group.shard.rank].clone())
        stale = torch.cat((given[:1, before : before + length].to(parts.dtype), parts[1:]))
        for index, expected in enumerate((parts, stale)):
            counts[index] += not torch.equal(total, in_order(expected))
        before = start
    return counts[0], counts[1]


def losses(group: Group) -> dict[str, object]:
    """What the others find when the last rank is killed while they wait for it, and when they come again."""
    pids = group.all_gather(torch.tensor([os.getpid()])).flatten().tolist()
    if group.shard.rank == group.shard.size - 1:
        wait_for(lambda: all(process_state(pid) == "S" for pid in pids[:-1]), "the others wait")
        os.kill(os.getpid(), signal.SIGKILL)
    found: dict[str, object] = {}
    for operation in (group.all_reduce, group.all_gather):
        try:
            operation(torch.ones(5))
        except RankLost as error:
            found[operation.__name__] = str(error)
    return found


WORKS = {"results": results, "losses": losses}


def start(rank: int, size: int, listener: socket.socket, exchange_fd: int | None, work: str, file: Path) -> int:
    """Process id of that rank."""
    if pid := os.fork():
        return pid
    die_with_parent()
    try:
        at = ("127.0.0.1", listener.getsockname()[1], listener if rank == 0 else None)
        torch.save(WORKS[work](join(Meeting(Shard(rank, size), *at, exchange_fd))), file)
    except BaseException as error:
        sys.stderr.write(f"rank {rank} of {size}: {error!r}\n")
        os._exit(1)
    os._exit(0)


def main(folder: str, work: str, *groups: str) -> int:
    torch.set_num_threads(1)
    num_failed = 0
    for name in groups:
        way, size = name.split("-")
        exchange_fd = anonymous_file(name) if way == "shared" else None
        files = [Path(folder) / f"{work}-{name}-{rank}.pt" for rank in range(int(size))]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pids = [start(rank, int(size), listener, exchange_fd, work, file) for rank, file in enumerate(files)]
        num_failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
