"""The group of ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.

Sums are in the type of the tensor: gloo adds bfloat16 and float16 as they are, at half the bytes of float32, and one
rank adds each part for all, so that everybody has the same bits.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from worker.parallel.group import Alone, Group, Meeting, RankLost
from worker.parallel.shard import Shard

LONGEST_WAIT = timedelta(minutes=30)
"""How much longer one rank may load than another. Deaths are noticed by those who watch processes, and steps that hang
by the agent, both far earlier."""
SIOCGIFADDR = 0x8915


def join(meeting: Meeting) -> Group:
    """Meet the other ranks; returns when all are there.

    Raises:
        RankLost: if they do not come, or are gone again.
    """
    if meeting.shard.size == 1:
        return Alone()
    interface = interface_towards(meeting.host)
    if interface:
        # otherwise gloo asks for the address of the machine's name, which may be another network or nobody's
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    with _others_may_leave():
        distributed.init_process_group(
            backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=_open_store(meeting),
            rank=meeting.shard.rank,
            world_size=meeting.shard.size,
            timeout=LONGEST_WAIT,
        )
    return TorchGroup(meeting.shard)


def _open_store(meeting: Meeting) -> TCPStore:
    return TCPStore(
        meeting.host,
        meeting.port,
        is_master=meeting.listener is not None,
        timeout=LONGEST_WAIT,
        wait_for_workers=False,
        master_listen_fd=None if meeting.listener is None else meeting.listener.detach(),
    )


class TorchGroup:
    """This process as one of the ranks that have joined."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    @property
    def shard(self) -> Shard:
        return self._shard

    def all_reduce(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        with _others_may_leave():
            distributed.all_reduce(whole)
        return x if whole is x else x.copy_(whole)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self._shard.size, *x.shape))
        with _others_may_leave():
            distributed.all_gather(list(gathered), x.contiguous())
        return gathered


@contextmanager
def _others_may_leave() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # torch's own errors are subclasses, and a closed connection has none of its own
        raise RankLost(f"the connection to the other ranks broke: {error}") from error


def interface_towards(host: str) -> str:
    """The network interface with this machine's address on the way to `host`; "" where that cannot be said."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        # connecting a datagram socket sends nothing: it only looks up the route
        probe.connect((host, 1))
        address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            if _address_of(probe, name) == address:
                return name
    return ""


def _address_of(probe: socket.socket, interface: str) -> bytes:
    with suppress(OSError):
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return answer[20:24]
    return b""
