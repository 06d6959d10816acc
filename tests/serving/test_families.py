"""Every architecture through the whole stack: a stream over HTTP, Redis and a worker, against transformers' greedy.

Workers are started one ahead of the test, since most of their start is importing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from tests.support import tiny_models
from tests.support.fleet import Fleet, FleetProcess, wait_for
from tests.support.redis_server import ServerUnderTest

NUM_TOKENS, MIN_TOKENS = 24, 12
MIN_MARGIN = 1e-4
PROMPTS = ["".join(Random(number).choices(ascii_lowercase + " ", k=30)) for number in range(64)]
"""Equally long, so that the reference needs no padding, and different to the last letter."""


def one_case_each() -> list[str]:
    """The first tiny model of every model type."""
    cases: dict[str, str] = {}
    for name in tiny_models.CASES:
        cases.setdefault(getattr(transformers, f"{tiny_models.CASES[name][0]}Config").model_type, name)
    return list(cases.values())


NAMES = one_case_each()


@dataclass(frozen=True)
class Greedy:
    """What the reference says to `prompt` in `num_tokens`, as far as that does not hang on rounding."""

    prompt: str
    num_tokens: int
    text: str


class Models:
    """Serves one model after the other, and starts the next one meanwhile."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self._folder, self.fleet = folder, fleet
        self._started: dict[str, FleetProcess] = {}

    def serve(self, name: str) -> Path:
        """The folder of the model, which is being served when this returns."""
        following = NAMES[NAMES.index(name) + 1 :][:1]
        for wanted in (name, *following):
            if wanted not in self._started:
                self._started[wanted] = self._start(wanted)
        wait_for(lambda: f"w-{name}" in self._ready(), f"{name} is served", 90)
        return self._folder / name

    def stop(self, name: str) -> None:
        worker = self._started[name]
        worker.stop()
        self.fleet.workers.remove(worker)

    def _start(self, name: str) -> FleetProcess:
        tiny_models.save(name, self._folder / name)
        options = {"MODEL_ID": str(self._folder / name), "DTYPE": "float32", "KV_TOKENS": "512"}
        return self.fleet.add_worker(f"w-{name}", **{f"INFERFLEET_{key}": value for key, value in options.items()})

    def _ready(self) -> set[str]:
        for process in self.fleet.workers:
            assert process.process is not None and process.process.poll() is None, process.tail()
        return {state["id"] for state in self.fleet.worker_states() if state["state"] == "ready"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("families")
    server = ServerUnderTest(folder / "redis", ephemeral=True)
    fleet = Fleet(folder, server.url)
    try:
        fleet.add_gateway("g1")
        yield Models(folder, fleet)
    finally:
        fleet.__exit__()
        server.stop()


@torch.inference_mode()
def reference(name: str, folder: Path) -> Greedy:
    """The prompt with the longest clear answer."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS])
    made = tiny_models.build(name).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.scores, 1).topk(2).values
    answers = made.sequences[:, ids.shape[1] :]
    is_clear = best[..., 0] - best[..., 1] > MIN_MARGIN * best[..., 0].abs()
    # a special token ends a character for who reads as it comes, not for who decodes everything at once
    lengths = (is_clear & (answers < tiny_models.NUM_BYTES)).cumprod(1).sum(1)
    row = int(lengths.argmax())
    length = int(lengths[row])
    assert length >= MIN_TOKENS, "every answer hangs on rounding somewhere"
    return Greedy(PROMPTS[row], length, str(tokenizer.decode(answers[row, :length].tolist())))


def stream(fleet: Fleet, name: str, asked: Greedy) -> tuple[str, int]:
    """The text and the number of events of a stream."""
    body = {"model": name, "prompt": asked.prompt, "max_tokens": asked.num_tokens, "temperature": 0, "stream": True}
    texts = []
    with (
        fleet.client() as client,
        client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                texts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(texts), len(texts)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_says_what_transformers_says(models, name):
    folder = models.serve(name)
    try:
        expected = reference(name, folder)
        text, num_events = stream(models.fleet, name, expected)
    finally:
        models.stop(name)
    assert num_events > 1, "nothing was streamed"
    assert text == expected.text


def test_another_model_says_something_else(tmp_path):
    """So that a worker with another family's weights would be noticed."""
    first, second = (reference(name, tiny_models.save(name, tmp_path / name)) for name in NAMES[:2])
    assert first.text != second.text
