"""What is asked of all engines: prompts of random tokens, answers of fixed lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from ops.bench.peers.checkpoints import NUM_UNSAID
from ops.bench.peers.pipe import Request
from ops.bench.roofline import Machine, step_work

KV_TOKENS = 32_768
NUM_IDS = 32_000
Draw = Callable[[int], list[int]]


def _equal(number: int, num_input: int, num_output: int) -> Callable[[random.Random, Draw], list[Request]]:
    return lambda rng, draw: [Request(draw(num_input), num_output) for _ in range(number)]


def _mixed(rng: random.Random, draw: Draw) -> list[Request]:
    return [Request(draw(rng.randint(16, 512)), rng.randint(16, 256)) for _ in range(64)]


def _shared(rng: random.Random, draw: Draw) -> list[Request]:
    prefix = draw(512)
    return [Request(prefix + draw(32), 32) for _ in range(32)]


WORKLOADS: dict[str, Callable[[random.Random, Draw], list[Request]]] = {
    "decode": _equal(32, 64, 128),
    "mixed": _mixed,
    "prefill": _equal(16, 512, 16),
    "shared": _shared,
    "single": _equal(1, 64, 128),
}
TITLES = {
    "decode": "decode 32 x 64/128",
    "mixed": "mixed 64 x 16-512/16-256",
    "prefill": "prefill 16 x 512/16",
    "shared": "shared prefix 32 x (512+32)/32",
    "single": "single 1 x 64/128",
}


def requests_of(workload: str, seed: str) -> list[Request]:
    """The same for the same seed, which is part of every prompt's: no two runs of a bench may share a prefix."""
    rng = random.Random(f"{workload} {seed}")
    return WORKLOADS[workload](rng, lambda number: rng.choices(range(NUM_UNSAID, NUM_IDS), k=number))


def warming(seed: str) -> list[Request]:
    """A few short requests before what is measured: a machine may have taken back memory that was idle."""
    rng = random.Random(f"warming {seed}")
    return [Request(rng.choices(range(NUM_UNSAID, NUM_IDS), k=64), 8) for _ in range(4)]


def least_seconds(config: dict[str, Any], requests: Sequence[Request], machine: Machine, num_bytes: int) -> float:
    """The roofline of all requests at once: every prompt in one step, a shared beginning only once, then one token of
    every request that is not at its end in each step."""
    shared = shared_length(requests)
    rows = [(len(request.prompt) - shared, shared) for request in requests]
    works = [step_work(config, [(shared, 0), *rows] if shared else rows, len(requests), num_bytes)]
    for step in range(1, max(request.num_output for request in requests)):
        going = [(1, len(request.prompt) + step - 1) for request in requests if request.num_output > step]
        works.append(step_work(config, going, len(going), num_bytes))
    return sum(work.seconds(machine) for work in works)


def shared_length(requests: Sequence[Request]) -> int:
    """How many first tokens all prompts have, if there are several."""
    columns = zip(*(request.prompt for request in requests), strict=False)
    num = next((place for place, column in enumerate(columns) if len(set(column)) > 1), 0)
    return num if len(requests) > 1 else 0
