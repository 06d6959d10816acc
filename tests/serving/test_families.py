"""Every architecture through the whole stack: a stream over HTTP, Redis and a worker, against transformers' greedy.

Workers are started one ahead of the test, since most of their start is importing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.support import tiny_models
from tests.support.fleet import Fleet, FleetProcess, wait_for
from tests.support.redis_server import ServerUnderTest
from tests.support.streams import Greedy, longest_clear_answer, stream


def one_case_each() -> list[str]:
    """The first tiny model of every model type."""
    cases: dict[str, str] = {}
    for name in tiny_models.CASES:
        cases.setdefault(getattr(transformers, f"{tiny_models.CASES[name][0]}Config").model_type, name)
    return list(cases.values())


NAMES = one_case_each()


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


def reference(name: str, folder: Path) -> Greedy:
    return longest_clear_answer(tiny_models.build(name), folder)


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
