"""Random traffic through the engine core on a GPU device over fake streams, and what it must come to."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from common.job import PenaltyKind, SamplingParams
from tests.support.engine_run import Engine, Run
from tests.support.hashing_model import VOCAB_SIZE, HashingModel
from tests.worker.runner.fake_streams import FakeStreams
from worker.engine.device import NO_IDS, TOKEN_ON_DEVICE, RowInit, StepPlan
from worker.engine.scheduler import Scheduler
from worker.model.lora import LoraSlots
from worker.pipe import Abort, Ready, Submit
from worker.runner.gpu_device import GpuDevice
from worker.runner.torch_device import TorchDevice

EOS = 7
SIZES = dict(num_blocks=20, block_size=4, max_num_seqs=6, max_total_tokens=60)
PREFILL = 16
PARAMS = [
    dict(),
    dict(do_sample=True, temperature=1.3, seed=5),
    dict(do_sample=True, top_k=8, seed=2**63 + 5, repetition_penalty=1.3),
    dict(frequency_penalty=1.5, presence_penalty=0.5, penalty_kind=PenaltyKind.OPENAI),
    dict(min_tokens=6, stop_token_ids=tuple(range(10, 20))),
    dict(do_sample=True, temperature=2.0, num_top_logprobs=3, seed=1),
]


def ready() -> Ready:
    return Ready(
        vocab_size=VOCAB_SIZE, dtype="float64", quantize="", weights_digest="", max_batch_prefill_tokens=PREFILL,
        kv_tokens=SIZES["num_blocks"] * SIZES["block_size"], block_size=SIZES["block_size"],
        max_num_seqs=SIZES["max_num_seqs"], max_input_tokens=59, max_total_tokens=SIZES["max_total_tokens"],
        step_limit_s=60.0, reasons=[],
    )  # fmt: skip


def no_adapters() -> dict:
    return dict(max_lora_rank=8, max_lora_bytes=1 << 20)


def gpu_device(streams: FakeStreams, depth: int, graph_sizes=(), device_class=GpuDevice) -> GpuDevice:
    slots = LoraSlots(None, torch.float64)
    device = device_class(HashingModel(), torch.float64, slots, streams, **SIZES, **no_adapters(), depth=depth)
    if graph_sizes:
        device.capture(graph_sizes)
    return device


def messages(seed: int, number: int) -> list[Submit]:
    """With shared beginnings, and ends of every kind."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(20)] for _ in range(2)]
    return [
        Submit(
            request_id=f"r{index}",
            epoch=1,
            prompt_ids=rng.choice(stems)[: rng.randrange(1, 21)]
            + [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 1, 9]))],
            output_ids=[],
            params=SamplingParams(max_new_tokens=rng.choice([1, 5, 9, 16]), **PARAMS[rng.randrange(len(PARAMS))]),
            eos_token_ids=[EOS] * (rng.random() < 0.7),
        )
        for index in range(number)
    ]  # fmt: skip


def plan_of_prompts(prompts: list[list[int]]) -> StepPlan:
    """A first step, of whole prompts that fit a page each: row i has page i + 1."""
    numbers, counts = ints(range(len(prompts))), ints(map(len, prompts))
    return StepPlan(
        step=1, rows=numbers, num_tokens=counts, num_drafts=0 * numbers, starts=0 * numbers,
        tokens=ints(sum(prompts, [])), samples=numbers >= 0, block_rows=numbers, block_offsets=0 * numbers,
        block_ids=numbers + 1, freed_rows=NO_IDS,
        new_rows=[
            RowInit(
                row=row, request_id=str(row), params=SamplingParams(max_new_tokens=9), prompt_ids=ints(ids),
                output_ids=NO_IDS, stop_ids=NO_IDS,
            )
            for row, ids in enumerate(prompts)
        ],
    )  # fmt: skip


def plan_of_decodes(starts: dict[int, int]) -> StepPlan:
    """A later step of these rows, each with so many tokens before; they get a page more where they need one."""
    rows, begins = ints(starts), ints(starts.values())
    grows = begins % SIZES["block_size"] == 0
    return StepPlan(
        step=2, rows=rows, num_tokens=0 * rows + 1, num_drafts=0 * rows, starts=begins,
        tokens=0 * rows + TOKEN_ON_DEVICE, samples=rows >= 0, block_rows=rows[grows],
        block_offsets=begins[grows] // SIZES["block_size"], block_ids=rows[grows] + 10, freed_rows=NO_IDS, new_rows=[],
    )  # fmt: skip


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


class Hopeful(Scheduler):
    """Lets everybody in whose prompt fits, so that the pool runs out again and again; counts what comes too late."""

    num_late = 0

    def _fits_later(self, newcomer, num_borrowed: int) -> bool:
        return True

    def _apply_sample(self, entry, picks):
        self.num_late += entry.request.is_ended
        return super()._apply_sample(entry, picks)


def run_traffic(device, seed: int, number: int = 16, aborts: float = 0.15) -> Run:
    """`messages`, submitted while others are in flight, some of them aborted at some time."""
    rng, run = random.Random(seed + 1), Run(Engine(device, ready()), Hopeful)
    for index, message in enumerate(messages(seed, number)):
        run.submit(message)
        for _ in range(rng.choice([0, 0, 1, 3])):
            run.run_pass()
            run.scheduler.check()
        if rng.random() < aborts:
            run.inbox.put(Abort([f"r{rng.randrange(index + 1)}"]))
    run.finish()
    while run.loop._pending:
        run.loop._apply_oldest()
    return run


@cache
def oracle(seed: int, number: int = 16) -> Run:
    """Step by step on the CPU."""
    slots = LoraSlots(None, torch.float64)
    device = TorchDevice(HashingModel(), torch.float64, slots, **SIZES, **no_adapters())
    return run_traffic(device, seed, number, aborts=0.0)


def agrees(run: Run, seed: int, number: int = 16) -> bool:
    """Whether every request got what it gets step by step, an aborted one the beginning of it."""
    expected = oracle(seed, number)
    return all(_is_same(run, expected, message.request_id) for message in messages(seed, number))


def _is_same(run: Run, expected: Run, name: str) -> bool:
    (got, finish), (ids, end) = run.outcome(name), expected.outcome(name)
    logprobs = torch.tensor(run.logprobs(name)), torch.tensor(expected.logprobs(name))[: len(got)]
    tops = [
        [[token for token, _ in top] for each in of.runs[name] for top in each.top_tokens] for of in (run, expected)
    ]
    is_whole = got == ids and finish == end
    is_beginning = not finish and got == ids[: len(got)]
    is_alike = torch.allclose(*logprobs, atol=1e-4) and tops[0] == tops[1][: len(tops[0])]
    return (is_whole or is_beginning) and is_alike
