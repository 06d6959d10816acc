"""Ranks as processes of their own: each holds its part of a tiny model, and together they compute logits.

`python -m tests.support.ranks RANK SIZE PORT` is one of them; it reads one JSON command a line: a model folder, token
sequences, and the file that rank 0 leaves the logits in.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.paged import load_decoder, paged_logits
from worker.attention.native import NativeAttention
from worker.kernels.build import load_library
from worker.kernels.elementwise import CpuOperations
from worker.kernels.products import pack
from worker.model.decoder import Decoder
from worker.parallel.group import Group, Meeting
from worker.parallel.plans import anonymous_file
from worker.parallel.shard import Shard
from worker.parallel.torch_group import join

HOST = "127.0.0.1"


class Ranks:
    """So many processes that have met."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def logits(
        self,
        folder: Path,
        sequences: list[list[int]],
        out: Path,
        *,
        is_wrong: bool = False,
        quantize: str | None = None,
        dtype: str = "float32",
        layers: str = "in torch",
    ) -> list[Tensor]:
        """What `paged_logits` gives, computed by all ranks together; RuntimeError with what one says went wrong.

        `is_wrong` deals out copies of heads of keys in the wrong order. `layers` are computed "in torch", or with
        kernels "one by one", "together", together "without sums", or together until the last rank "leaves".
        """
        named = {"folder": str(folder), "sequences": sequences, "out": str(out)}
        command = json.dumps(named | {"is_wrong": is_wrong, "quantize": quantize, "dtype": dtype, "layers": layers})
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        answers = [_answer(process) for process in self._processes]
        errors = [answer for answer in answers if answer != "done"]
        if errors:
            raise RuntimeError("; ".join(errors))
        stored = load_file(out)
        return [stored[str(index)] for index in range(len(sequences))]


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip() or "a rank died"


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    with ExitStack() as stack, socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port, exchange_fd = listener.getsockname()[1], anonymous_file("exchange")
        stack.callback(os.close, exchange_fd)
        processes, fds = [], (exchange_fd, listener.fileno())
        for rank in range(size):
            words = [sys.executable, "-m", "tests.support.ranks", str(rank), str(size), str(port)]
            words += map(str, fds)
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds)
            processes.append(stack.enter_context(process))
        assert [_answer(process) for process in processes] == ["met"] * size
        # leaving the stack closes their input, which ends them
        yield Ranks(processes)


def main(arguments: list[str]) -> None:
    rank, size, port, exchange_fd, listener_fd = map(int, arguments)
    torch.set_num_threads(1)
    listener = socket.socket(fileno=listener_fd) if rank == 0 else None
    group = join(Meeting(Shard(rank, size), HOST, port, listener, exchange_fd))
    _say("met")
    for line in sys.stdin:
        _say(_obey(json.loads(line), group))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _every_other(shard: Shard, num_kv_heads: int) -> range:
    """Copies of heads dealt out in turn, which leaves queries with the keys of others."""
    return range(shard.rank % num_kv_heads, shard.rank % num_kv_heads + 1)


def _obey(command: dict[str, Any], group: Group) -> str:
    try:
        with ExitStack() as stack:
            if command["is_wrong"]:
                stack.enter_context(patch.object(Shard, "kv_heads", _every_other))
            dtype, quantize = getattr(torch, command["dtype"]), command["quantize"]
            decoder = load_decoder(Path(command["folder"]), dtype, group=group, quantize=quantize)
            if command["layers"] != "in torch":
                decoder = _with_kernels(decoder, command["layers"])
            parts, _ = paged_logits(decoder, command["sequences"])
    except Exception as error:
        # the test is to see what went wrong, whatever it is
        return f"{type(error).__name__}: {error}"
    whole = {str(index): gather(part, decoder, group) for index, part in enumerate(parts)}
    if group.shard.rank == 0:
        save_file(whole, command["out"])
    return "done"


def _with_kernels(decoder: Decoder, layers: str) -> Decoder:
    library, group = load_library(), decoder.group
    assert library is not None
    weights, operations = pack(decoder.weights, library), CpuOperations(library)
    decoder = Decoder(decoder.spec, weights, NativeAttention(library), group, operations=operations)
    stack: Any = decoder._stack
    assert stack is not None, "the layers can go together"
    is_last = group.shard.rank == group.shard.size - 1
    decoder._stack = None if layers == "one by one" else Together(stack, leaves=is_last and layers == "leaves")
    if layers == "without sums":
        stack._stack.exchange = None
    return decoder


class Together:
    """Layers that always go together."""

    def __init__(self, stack: Any, *, leaves: bool) -> None:
        self._stack, self._leaves = stack, leaves

    def is_ready(self, pages: Tensor) -> bool:
        assert self._stack.is_ready(pages)
        return True

    def __call__(self, *arguments: Any) -> Tensor:
        if self._leaves:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._stack(*arguments)  # type: ignore[no-any-return]


def gather(part: Tensor, decoder: Decoder, group: Group) -> Tensor:
    """Logits [length, vocab] out of every rank's columns, of which some have one more than others."""
    vocab_size = decoder.spec.vocab_size
    widths = [len(Shard(rank, group.shard.size).bounds(vocab_size)) for rank in range(group.shard.size)]
    assert part.shape[1] == widths[group.shard.rank]
    padded = torch.nn.functional.pad(part, (0, max(widths) - part.shape[1]))
    columns = group.all_gather(padded)
    return torch.cat([column[:, :width] for column, width in zip(columns, widths)], 1).contiguous()


if __name__ == "__main__":
    main(sys.argv[1:])
