"""The least time that a step of a Llama can take on a machine: what it must read, what it must compute, which is more.

The roofline model of Williams, Waterman and Patterson (CACM 52, 2009). Weights are read once a step, keys and values of
every row once; nothing is said of what lies in caches, of norms, sampling and the writing of keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NUM_READ_BYTES = 1 << 28
"""Far more than any cache holds."""
SHORT_READ_BYTES = 1 << 20
PEAK_SIZE, SHORT_PEAK_SIZE = 2048, 64
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """The best rates seen, of all threads together."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a step must read and compute."""

    weight_bytes: int
    kv_bytes: int
    product_flops: int
    attention_flops: int

    def __add__(self, other: Work) -> Work:
        """Of two steps one after the other."""
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.product_flops + other.product_flops,
            self.attention_flops + other.attention_flops,
        )

    def seconds(self, machine: Machine) -> float:
        read_s = (self.weight_bytes + self.kv_bytes) / machine.read_bytes_per_s
        return max(read_s, (self.product_flops + self.attention_flops) / machine.flops_per_s)


def step_work(config: dict[str, Any], rows: Iterable[tuple[int, int]], num_sampled: int, num_bytes: int = 2) -> Work:
    """Of one step: `rows` have (new tokens, tokens before them), `num_sampled` of them get logits. `config` is a
    Llama's, an element has `num_bytes` in weights and pages."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    queries, keys = (config["head_dim"] * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    in_layers = layers * hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    in_head = config["vocab_size"] * hidden
    num_tokens = num_seen = num_pairs = 0
    for new, before in rows:
        num_tokens += new
        num_seen += before + new
        num_pairs += new * before + new * (new + 1) // 2
    return Work(
        weight_bytes=num_bytes * (in_layers + in_head * (num_sampled > 0)),
        kv_bytes=num_bytes * 2 * keys * layers * num_seen,
        product_flops=2 * (in_layers * num_tokens + in_head * num_sampled),
        attention_flops=4 * queries * layers * num_pairs,
    )


def decode_work(config: dict[str, Any], batch: int, context: int, num_bytes: int = 2) -> Work:
    """Of a step in which each of `batch` rows gets one more token behind `context` others."""
    return step_work(config, [(1, context)] * batch, batch, num_bytes)


class RateMeter:
    """Measures what the machine can do with torch's number of threads, anew whenever it is asked: rates move with the
    host. The better of torch and of the kernels counts: no step may look better than what is possible. Products are of
    `dtype`. With `is_short` the figures mean nothing."""

    def __init__(self, dtype: str = "bfloat16", *, is_short: bool = False) -> None:
        import torch

        from worker.kernels.build import load_library
        from worker.kernels.products import PackedLinear
        from worker.model.weights import DenseLinear

        library = load_library()
        if library is not None:
            library.inferfleet_set_threads(torch.get_num_threads())
        kind: torch.dtype = getattr(torch, dtype)
        self._num_bytes = SHORT_READ_BYTES if is_short else NUM_READ_BYTES
        self._size = size = SHORT_PEAK_SIZE if is_short else PEAK_SIZE
        num_long = self._num_bytes // kind.itemsize // size
        long, square, vector = (torch.full((count, size), 0.5, dtype=kind) for count in (num_long, size, 1))
        numbers = long.view(torch.int64)
        self._reads: list[Callable[[], object]] = [numbers.sum]
        self._products: list[Callable[[], object]] = [lambda: square @ square]
        if library is not None:
            packed_long, packed_square = (PackedLinear(library, DenseLinear(each, None)) for each in (long, square))
            self._reads.append(lambda: packed_long(vector))
            self._products.append(lambda: packed_square(square))

    def __call__(self) -> Machine:
        read_s, product_s = (min(map(_seconds, each)) for each in (self._reads, self._products))
        return Machine(self._num_bytes / read_s, 2 * self._size**3 / product_s)


def best(machines: Iterable[Machine]) -> Machine:
    seen = list(machines)
    return Machine(max(one.read_bytes_per_s for one in seen), max(one.flops_per_s for one in seen))


def _seconds(act: Callable[[], object]) -> float:
    return min(_once(act) for _ in range(REPEATS))


def _once(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started
