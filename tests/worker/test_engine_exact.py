"""The engine core on the torch device: in a crowd everyone gets what it gets alone, and what transformers picks."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.job import PenaltyKind, SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_models
from tests.support.engine_run import Engine, Run
from worker.engine.blocks import BlockDigests
from worker.engine.scheduler import Scheduler
from worker.pipe import Abort, Submit
from worker.runner.load import load_device

NUM_SHORT, NUM_LONG = 40, 24
EOS = [tiny_models.NUM_BYTES + 1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    folder: Path = tiny_models.save("llama", tmp_path_factory.mktemp("llama"))
    settings = WorkerSettings(
        model_id=str(folder), dtype="float64", kv_tokens=1536, max_batch_prefill_tokens=64, max_num_seqs=64, threads=1
    )
    device, ready = load_device(settings, lambda phase, done, total: None)
    return Engine(device, ready, tiny_models.build("llama").double())


def random_params(rng: random.Random, index: int, max_new_tokens: int) -> SamplingParams:
    """A third greedy, the others seeded; penalties, top-p, stop tokens and alternatives by chance."""
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        do_sample=index % 3 > 0,
        temperature=rng.choice([0.7, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.2]) if index % 3 else 1.0,
        frequency_penalty=rng.choice([0.0, 0.3]) if index % 3 else 0.0,
        penalty_kind=rng.choice(list(PenaltyKind)),
        seed=rng.randrange(2**63),
        stop_token_ids=(rng.randrange(256),) if index % 5 == 0 else (),
        ignore_eos=index % 2 == 0,
        min_tokens=rng.choice([0, 5]),
        num_top_logprobs=rng.choice([0, 0, 3]),
    )


def traffic(seed: int) -> list[Submit]:
    """Short outputs first, so that long ones come as a surprise; beginnings made of few parts in different orders."""
    rng = random.Random(seed)
    parts = [[rng.randrange(256) for _ in range(16)] for _ in range(3)]
    submits = []
    for index in range(NUM_SHORT + NUM_LONG):
        begin = [token for _ in range(rng.randrange(4)) for token in rng.choice(parts)]
        prompt = begin + [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        length = rng.randrange(8, 24) if index < NUM_SHORT else rng.randrange(100, 130)
        params = random_params(rng, index, length)
        submits.append(
            Submit(request_id=f"r{index}", epoch=1, prompt_ids=prompt, output_ids=[], params=params, eos_token_ids=EOS)
        )
    return submits


def crowd(engine: Engine, submits: list[Submit], scheduler_class: type[Scheduler] = Scheduler) -> tuple[Run, set[str]]:
    """All requests at random times, every eighth aborted some steps later. Returns the run and the aborted."""
    rng = random.Random(1)
    run, aborted = Run(engine, scheduler_class), set()
    for index, message in enumerate(submits):
        run.submit(message)
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            run.run_pass()
        if index % 8 == 7:
            victim = rng.choice([request.request_id for request in run.scheduler.running] or [message.request_id])
            aborted.add(victim)
            run.inbox.put(Abort([victim]))
    run.finish()
    return run, aborted


def alone(engine: Engine, message: Submit) -> Run:
    run = Run(engine)
    run.submit(message)
    run.finish()
    assert run.scheduler.stats.batch_max == 1
    assert run.scheduler.stats.preemptions == 0
    return run


def reference_greedy(reference: Any, message: Submit, output: list[int]) -> list[int]:
    """What transformers would pick at each position of the output, given the tokens before."""
    ids = torch.tensor([message.prompt_ids + output])
    with torch.no_grad():
        logits = reference(ids).logits[0, len(message.prompt_ids) - 1 : -1]
    for index in range(min(message.params.min_tokens, len(output))):
        stops = list(message.params.stop_token_ids) + ([] if message.params.ignore_eos else message.eos_token_ids)
        logits[index, stops] = -torch.inf
    return logits.argmax(-1).tolist()


def test_a_crowd_gives_everyone_what_it_gets_alone(engine: Engine) -> None:
    submits = traffic(seed=0)
    run, aborted = crowd(engine, submits)
    stats = run.scheduler.snapshot()
    assert stats["batch_max"] >= 16
    assert min(stats["preemptions"], stats["prefix_hits"], stats["chunked_prompts"]) >= 5
    cut = [request_id for request_id in aborted if not run.outcome(request_id)[1]]
    assert len(cut) >= 3
    for message in submits:
        ids, finish = run.outcome(message.request_id)
        single = alone(engine, message)
        expected, expected_finish = single.outcome(message.request_id)
        if message.request_id in cut:
            assert ids == expected[: len(ids)]
        else:
            assert (ids, finish) == (expected, expected_finish), message.request_id
        assert run.logprobs(message.request_id) == pytest.approx(single.logprobs(message.request_id)[: len(ids)])


def test_greedy_output_is_what_transformers_picks(engine: Engine) -> None:
    submits = [message for message in traffic(seed=0) if not message.params.do_sample]
    assert len(submits) >= 20
    run = Run(engine)
    for message in submits:
        run.submit(message)
    run.finish()
    for message in submits:
        ids, finish = run.outcome(message.request_id)
        assert finish
        assert ids == reference_greedy(engine.reference, message, ids), message.request_id


@pytest.mark.parametrize("num_logged", [0, 1, 7])
def test_a_migrated_job_goes_on_as_if_nothing_had_happened(engine: Engine, num_logged: int) -> None:
    submits = [message for message in traffic(seed=0) if message.params.max_new_tokens >= 100][:6]
    moved = Run(engine)
    wanted = {message.request_id: alone(engine, message).outcome(message.request_id) for message in submits}
    for message in submits:
        assert len(wanted[message.request_id][0]) > num_logged
        moved.submit(replace(message, epoch=2, output_ids=wanted[message.request_id][0][:num_logged]))
    moved.finish()
    for message in submits:
        ids, finish = moved.outcome(message.request_id)
        assert (wanted[message.request_id][0][:num_logged] + ids, finish) == wanted[message.request_id]


class UnchainedDigests(BlockDigests):
    """Blocks of equal tokens count as equal whatever stands before them."""

    def extend(
        self, digests: list[bytes], tokens: array[int], salt: str, num_blocks: int, adapter_digest: str = ""
    ) -> None:
        for index in range(len(digests), num_blocks):
            single: list[bytes] = []
            super().extend(single, tokens[index * self.block_size :], salt, 1, adapter_digest)
            digests += single


class SharesTooMuch(Scheduler):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._digests = UnchainedDigests(self.limits.block_size)


class ForgetsOutput(Scheduler):
    """After a preemption, penalties and the index of the noise begin anew."""

    def _move_in(self, request: Any, *arguments: Any) -> Any:
        num_prompt, request.num_prompt = request.num_prompt, len(request.tokens)
        residency = super()._move_in(request, *arguments)
        request.num_prompt = num_prompt
        return residency


@pytest.mark.parametrize("wrong", [SharesTooMuch, ForgetsOutput])
def test_a_scheduler_with_a_known_mistake_gives_other_tokens(engine: Engine, wrong: type[Scheduler]) -> None:
    submits = traffic(seed=0)
    right, _ = crowd(engine, submits)
    run, _ = crowd(engine, submits, wrong)
    assert run.scheduler.stats.prefix_hits >= 5
    assert run.scheduler.stats.preemptions >= 5
    whole = [r.request_id for r in submits if right.outcome(r.request_id)[1] and run.outcome(r.request_id)[1]]
    assert len(whole) >= 32
    assert any(run.outcome(request_id) != right.outcome(request_id) for request_id in whole)
