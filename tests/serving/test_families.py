"""Every architecture through the whole stack: a stream over HTTP, Redis and a worker, against transformers' greedy.

Workers are started one ahead of the test, since most of their start is importing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from tests.support import tiny_models
from tests.support.fleet import Fleet, FleetProcess, wait_for
from tests.support.redis_server import ServerUnderTest

NUM_TOKENS = 24
MIN_MARGIN = 1e-4
PROMPTS = [f"Prompt number {number} is as long as all others." for number in range(10, 42)]


def one_case_each() -> list[str]:
    """The first tiny model of every model type."""
    cases: dict[str, str] = {}
    for name in tiny_models.CASES:
        cases.setdefault(getattr(transformers, f"{tiny_models.CASES[name][0]}Config").model_type, name)
    return list(cases.values())


NAMES = one_case_each()


@dataclass(frozen=True)
class Greedy:
    """What the reference says to `prompt`, and the smallest distance between its best and second logit on the way."""

    prompt: str
    text: str
    margin: float


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
    """The prompt whose greedy answer hangs least on rounding."""
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
    margins = ((best[..., 0] - best[..., 1]) / best[..., 0].abs()).amin(1)
    clearest = int(margins.argmax())
    assert margins[clearest] > MIN_MARGIN, "every answer hangs on rounding somewhere"
    answer = made.sequences[clearest, ids.shape[1] :].tolist()
    return Greedy(PROMPTS[clearest], str(tokenizer.decode(answer, skip_special_tokens=True)), float(margins[clearest]))


def stream(fleet_url: Fleet, name: str, prompt: str) -> tuple[str, int]:
    """The text and the number of events of a stream."""
    body = {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    texts = []
    with (
        fleet_url.client() as client,
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
        text, num_events = stream(models.fleet, name, expected.prompt)
    finally:
        models.stop(name)
    assert num_events > 1, "nothing was streamed"
    assert text == expected.text


def test_another_model_says_something_else(tmp_path):
    """So that a worker with another family's weights would be noticed."""
    first, second = (reference(name, tiny_models.save(name, tmp_path / name)) for name in NAMES[:2])
    assert first.text != second.text
