"""Quantised checkpoints through the whole stack: a stream over HTTP, Redis and a worker, against transformers' greedy
with the numbers that the format's definition gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.support import quantised, tiny_models
from tests.support.fleet import Fleet
from tests.support.redis_server import ServerUnderTest
from tests.support.streams import Greedy, longest_clear_answer, stream

FORMS = {"gptq": quantised.gptq(4, 32, has_order=True), "awq": quantised.awq(32), "nf4": quantised.bitsandbytes()}
NAMES = {"gptq": "gptq", "awq": "awq", "nf4": "bitsandbytes-nf4"}
"""What workers call them."""


def reference(folder: Path) -> Greedy:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return longest_clear_answer(model.eval(), folder)


@dataclass
class Served:
    """A worker for each format, and the dense folders."""

    fleet: Fleet
    whole: Path
    dense: dict[str, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("quantised")
    whole = tiny_models.save("llama", folder / "whole")
    server = ServerUnderTest(folder / "redis", ephemeral=True)
    fleet = Fleet(folder, server.url)
    dense: dict[str, Path] = {}
    try:
        fleet.add_gateway("g1")
        for name, form in FORMS.items():
            stored, dense[name] = quantised.save(whole, folder / f"of-{name}", form)
            named = stored.rename(folder / name)
            options = {"MODEL_ID": str(named), "DTYPE": "float32", "KV_TOKENS": "512"}
            fleet.add_worker(f"w-{name}", **{f"INFERFLEET_{key}": value for key, value in options.items()})
        fleet.wait_until_ready(len(FORMS))
        yield Served(fleet, whole, dense)
    finally:
        fleet.__exit__()
        server.stop()


@pytest.mark.parametrize("name", FORMS)
def test_a_stream_says_what_transformers_says_with_those_numbers(served, name):
    expected = reference(served.dense[name])
    text, num_events = stream(served.fleet, name, expected)
    assert num_events > 1, "nothing was streamed"
    assert text == expected.text
    assert reference(served.whole).text != text, "quantising changed nothing"


def test_workers_say_what_their_weights_are(served):
    for name, told in NAMES.items():
        assert f"quantize {told}: weights take" in served.fleet.worker(f"w-{name}").log.read_text()
