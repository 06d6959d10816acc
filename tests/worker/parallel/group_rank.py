"""Groups of ranks that add up and gather: `python -m tests.worker.parallel.group_rank FOLDER SIZE ...`.

Each rank is a process, forked off one that has torch already. Everything that one gets goes to FOLDER/SIZE-RANK.pt.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from torch import Tensor

from worker.parallel.group import Meeting, agree_on_minimum
from worker.parallel.shard import Shard
from worker.parallel.torch_group import join

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
SHAPES = ((1,), (3, 5), (0, 7), (257, 129))


def input_of(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """What a rank brings along."""
    source = torch.Generator().manual_seed(1000 * rank + len(shape))
    return (8 * torch.rand(shape, generator=source, dtype=torch.float64)).to(dtype)


@torch.inference_mode()
def results(rank: int, size: int, listener: socket.socket) -> dict[str, object]:
    port = listener.getsockname()[1]
    group = join(Meeting(Shard(rank, size), "127.0.0.1", port, listener if rank == 0 else None))
    found: dict[str, object] = {"shard": (group.shard.rank, group.shard.size)}
    for dtype in DTYPES:
        for shape in SHAPES:
            x = input_of(rank, dtype, shape)
            total = x.clone()
            assert group.all_reduce(total) is total
            found[f"sum {dtype} {shape}"] = total
            found[f"all {dtype} {shape}"] = group.all_gather(x)
    column = input_of(rank, torch.float32, (3, 5)).t()
    found["columns"] = group.all_gather(column)
    assert group.all_reduce(column) is column
    found["column sum"] = column
    found["minimum"] = agree_on_minimum(group, 100 - rank)
    return found


def start(rank: int, size: int, listener: socket.socket, folder: str) -> int:
    """Process id of that rank."""
    if pid := os.fork():
        return pid
    try:
        torch.save(results(rank, size, listener), Path(folder) / f"{size}-{rank}.pt")
    except BaseException as error:
        sys.stderr.write(f"rank {rank} of {size}: {error!r}\n")
        os._exit(1)
    os._exit(0)


def main(folder: str, *sizes: int) -> int:
    torch.set_num_threads(1)
    num_failed = 0
    for size in sizes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pids = [start(rank, size, listener, folder) for rank in range(size)]
        num_failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
