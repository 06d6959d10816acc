"""Ranks as processes of their own: each holds its part of a tiny model, and together they compute logits.

`python -m tests.support.ranks RANK SIZE PORT` is one of them; it reads one JSON command a line: a model folder, token
sequences, and the file that rank 0 leaves the logits in.
"""

from __future__ import annotations

import json
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
from worker.model.decoder import Decoder
from worker.parallel.group import Group, Meeting
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
    ) -> list[Tensor]:
        """What `paged_logits` gives, computed by all ranks together; RuntimeError with what one says went wrong.

        `is_wrong` deals out copies of heads of keys in the wrong order.
        """
        named = {"folder": str(folder), "sequences": sequences, "out": str(out)}
        command = json.dumps(named | {"is_wrong": is_wrong, "quantize": quantize})
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
        port = listener.getsockname()[1]
        processes = []
        for rank in range(size):
            words = [sys.executable, "-m", "tests.support.ranks", str(rank), str(size), str(port)]
            words += [str(listener.fileno())] if rank == 0 else []
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()]
            )
            processes.append(stack.enter_context(process))
        assert [_answer(process) for process in processes] == ["met"] * size
        # leaving the stack closes their input, which ends them
        yield Ranks(processes)


def main(arguments: list[str]) -> None:
    rank, size, port = (int(word) for word in arguments[:3])
    torch.set_num_threads(1)
    listener = socket.socket(fileno=int(arguments[3])) if rank == 0 else None
    group = join(Meeting(Shard(rank, size), HOST, port, listener))
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
            decoder = load_decoder(Path(command["folder"]), group=group, quantize=command["quantize"])
            parts, _ = paged_logits(decoder, command["sequences"])
    except Exception as error:
        # the test is to see what went wrong, whatever it is
        return f"{type(error).__name__}: {error}"
    whole = {str(index): gather(part, decoder, group) for index, part in enumerate(parts)}
    if group.shard.rank == 0:
        save_file(whole, command["out"])
    return "done"


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
