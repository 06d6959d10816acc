"""Every type and attention that is shipped, on the demo model: logits within the type's error bar of float64
transformers, and greedy text that leaves the reference's only where the reference itself hardly decides."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.job import SamplingParams
from common.settings import WorkerSettings
from ops.demo_model.prompts import examinations
from tests.support import oracle
from tests.support.engine_run import Engine, Run
from tests.support.fleet import DEMO_MODEL
from tests.support.paged import paged_logits
from worker.pipe import Submit
from worker.runner.load import load_device

NUM_TOKENS = 32
ERROR_BARS = {"float64": 5e-7, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2.5e-2}
"""Largest error of a logit, as a share of the largest logit. That of float64 is what norms, rope and softmax lose in
float32, on both sides; the others are a few roundings of their type."""

PATHS = [
    *((dtype, attention, dtype) for dtype in ERROR_BARS for attention in ("cpu", "reference")),
    ("auto", "cpu", "bfloat16"),
]
"""(--dtype, --attention, type that results): `auto` reads a float16 checkpoint, which a CPU runs in bfloat16."""


@dataclass(frozen=True)
class Known:
    """A prompt, what transformers answers in float64, and its logits at each position of the answer."""

    prompt: list[int]
    output: list[int]
    logits: Any


@pytest.fixture(scope="module")
def known() -> list[Known]:
    questions = [oracle.chat_ids([{"role": "user", "content": row.prompt}]) for row in examinations()[::3]]
    generator = random.Random(6)
    # where the model has nothing to say it wavers, and small errors show
    noise = [[0, *(generator.randrange(3, 2048) for _ in range(12))] for _ in range(10)]
    prompts = questions + noise
    outputs = [list(row.ids) for row in oracle.exact_greedy(prompts, NUM_TOKENS)]
    return [Known(p, output, oracle.exact_logits(p, output)) for p, output in zip(prompts, outputs, strict=True)]


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model stored as float16."""
    folder = Path(copytree(DEMO_MODEL, tmp_path_factory.mktemp("half") / "model"))
    path = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    return folder


@pytest.fixture(scope="module")
def load(half_folder: Path) -> Callable[[str, str], Engine]:
    def get(dtype: str, attention: str) -> Engine:
        folder = half_folder if dtype == "auto" else DEMO_MODEL
        settings = WorkerSettings(
            model_id=str(folder), dtype=dtype, attention=attention, threads=1, kv_tokens=4096, max_total_tokens=256
        )
        return Engine(*load_device(settings, lambda *_: None))

    return get


def error_bar(dtype: str, known: list[Known]) -> float:
    return ERROR_BARS[dtype] * max(float(row.logits.abs().max()) for row in known)


def logit_error(decoder: Any, known: list[Known]) -> float:
    """Largest error of a logit, when the known answers are computed together, in chunks."""
    computed, _ = paged_logits(decoder, [row.prompt + row.output for row in known])
    pairs = zip(computed, known, strict=True)
    return max(float((ours[len(row.prompt) - 1 : -1].double() - row.logits).abs().max()) for ours, row in pairs)


def greedy(engine: Engine, known: list[Known]) -> list[list[int]]:
    """All prompts at once through the engine core."""
    run = Run(engine)
    ends = oracle.end_ids()
    for index, row in enumerate(known):
        params = SamplingParams(max_new_tokens=NUM_TOKENS)
        run.submit(
            Submit(
                request_id=str(index), epoch=1, prompt_ids=row.prompt, output_ids=[], params=params, eos_token_ids=ends
            )
        )
    run.finish()
    assert run.scheduler.stats.batch_max == len(known)
    return [run.outcome(str(index))[0] for index in range(len(known))]


def margins_of(row: Known) -> list[float]:
    """Distance between the best and the second logit of the reference, at each position."""
    best = row.logits.topk(2).values
    return [float(margin) for margin in best[:, 0] - best[:, 1]]


def divergences(engine: Engine, known: list[Known]) -> list[float]:
    """For each answer that is not the reference's, how clearly that one decides where they part."""
    margins = []
    for row, output in zip(known, greedy(engine, known), strict=True):
        pairs = enumerate(zip(output, row.output, strict=False))
        place = next((position for position, (ours, theirs) in pairs if ours != theirs), None)
        if place is not None:
            margins.append(margins_of(row)[place])
        else:
            assert len(output) == len(row.output)
    return margins


@pytest.mark.parametrize(("dtype", "attention", "computed"), PATHS)
def test_logits_and_greedy_text(
    load: Callable[[str, str], Engine], known: list[Known], dtype: str, attention: str, computed: str
) -> None:
    engine = load(dtype, attention)
    assert engine.ready.dtype == computed
    bar = error_bar(computed, known)
    error = logit_error(engine.device._model, known)
    assert 0 < error <= bar
    if computed == "bfloat16":
        assert any(margin < bar for row in known for margin in margins_of(row)), "nothing was doubtful"
    assert [margin for margin in divergences(engine, known) if margin >= bar] == []


@pytest.mark.parametrize("dtype", ERROR_BARS)
def test_a_wrong_rope_is_beyond_every_bar(load: Callable[[str, str], Engine], known: list[Known], dtype: str) -> None:
    engine, bar = load(dtype, "cpu"), error_bar(dtype, known)
    for frequencies in engine.device._model._frequencies.values():
        frequencies *= 0.9
    assert logit_error(engine.device._model, known) > bar
    assert any(margin >= bar for margin in divergences(engine, known))
