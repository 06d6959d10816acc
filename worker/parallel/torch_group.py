"""The group of ranks: CPUs through memory where they share it, else over torch.distributed, gloo between CPUs and NCCL
between GPUs.

Everybody has the same bits. Through memory, which has kernels for float32 and bfloat16, each rank adds up for itself in
the same order; gloo lets one rank add each part for all, bfloat16 and float16 as they are.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from worker.kernels.build import load_library
from worker.parallel.exchange import Exchange, open_exchange
from worker.parallel.group import Alone, Group, Meeting, RankLost, agree_on_minimum
from worker.parallel.shard import Shard

LONGEST_WAIT = timedelta(minutes=30)
"""How much longer one rank may load than another. Deaths are noticed by those who watch processes, and steps that hang
by the agent, both far earlier."""
SIOCGIFADDR = 0x8915


def join(meeting: Meeting, cpu_kernels: str = "auto", *, is_on_gpu: bool = False) -> Group:
    """Meet the other ranks; returns when all are there. `cpu_kernels` is the option. On GPUs tensors go over NCCL, and
    numbers of hosts, of which there are few, over gloo.

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
            backend="cpu:gloo,cuda:nccl" if is_on_gpu else "gloo",
            store=_open_store(meeting),
            rank=meeting.shard.rank,
            world_size=meeting.shard.size,
            timeout=LONGEST_WAIT,
        )
    exchange = None if is_on_gpu else _own_exchange(meeting, cpu_kernels)
    have_all = agree_on_minimum(TorchGroup(meeting.shard), int(exchange is not None))
    return TorchGroup(meeting.shard, exchange if have_all else None)


def _own_exchange(meeting: Meeting, cpu_kernels: str) -> Exchange | None:
    library = None if meeting.exchange_fd is None else load_library(cpu_kernels)
    if library is None or meeting.exchange_fd is None:
        return None
    return open_exchange(library, meeting.exchange_fd, meeting.shard)


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

    def __init__(self, shard: Shard, exchange: Exchange | None = None) -> None:
        self._shard, self._exchange = shard, exchange

    @property
    def shard(self) -> Shard:
        return self._shard

    @property
    def exchange(self) -> Exchange | None:
        return self._exchange

    def all_reduce(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        if self._exchange is not None and self._exchange.can_add(whole):
            self._exchange.add_up(whole)
        else:
            with _others_may_leave():
                distributed.all_reduce(whole)
        return x if whole is x else x.copy_(whole)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered, own = x.new_empty((self._shard.size, *x.shape)), x.contiguous()
        if self._exchange is not None:
            self._exchange.gather(own, gathered)
            return gathered
        with _others_may_leave():
            distributed.all_gather(list(gathered), own)
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
