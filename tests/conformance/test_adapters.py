"""A LoRA adapter as an operator loads it and as the official clients choose it: OpenAI's by `model`, the hub's by
`adapter_id`. The client text-generation knows no adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.conftest import Served
from tests.conformance.test_clients import CHAT_TOKENS, QUESTION, curl, run_client
from tests.conformance.test_command_line import inferfleet
from tests.support import oracle
from tests.support.adapters import merged, write_adapter

NAME = "team/fr"
NUM_TOKENS = 20
OPENAI = """
import sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="-")
assert sys.argv[3] in [model.id for model in client.models.list()]
answer = client.chat.completions.create(model=sys.argv[3], messages=[{"role": "user", "content": sys.argv[2]}],
                                        max_tokens=64, temperature=0)
assert answer.model == sys.argv[3]
print(answer.choices[0].message.content, end="")
"""
HUB_TEXT = """
import sys
from huggingface_hub import InferenceClient
client = InferenceClient(sys.argv[1])
print(client.text_generation(sys.argv[2], max_new_tokens=20, adapter_id=sys.argv[3], return_full_text=False), end="")
"""


@dataclass(frozen=True)
class Adapted:
    """What the demo model says with the adapter."""

    chat: str
    text: str


@pytest.fixture(scope="module")
def adapted(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    folder, base = tmp_path_factory.mktemp("adapter") / "fr", oracle.base()
    modules = [name for name, _ in base.named_modules() if name.endswith(("v_proj", "down_proj"))]
    model = merged(base, write_adapter(folder, base, modules, rank=4, lora_alpha=8))
    loaded = inferfleet(served, "ctl", "adapter", "load", NAME, str(folder), "--json")
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert json.loads(loaded.stdout)["rank"] == 4
    yield Adapted(
        oracle.greedy_chat(QUESTION, CHAT_TOKENS, model), oracle.greedy_completion(QUESTION, NUM_TOKENS, model)
    )
    assert inferfleet(served, "ctl", "adapter", "unload", NAME).returncode == 0


def test_the_adapter_answers_in_another_way_than_the_base(adapted: Adapted) -> None:
    assert adapted.chat != oracle.greedy_chat(QUESTION, CHAT_TOKENS)
    assert adapted.text != oracle.greedy_completion(QUESTION, NUM_TOKENS)


def test_openais_client_names_it_as_the_model(served: Served, adapted: Adapted) -> None:
    assert run_client("openai", OPENAI, served.url, QUESTION, NAME) == adapted.chat


def test_the_hubs_client_names_its_id(served: Served, adapted: Adapted) -> None:
    assert run_client("huggingface_hub", HUB_TEXT, served.url, QUESTION, NAME) == adapted.text


def test_without_it_the_base_answers_beside(served: Served, adapted: Adapted) -> None:
    bodies = [{"max_new_tokens": NUM_TOKENS} | adapter for adapter in ({"adapter_id": NAME}, {}, {"adapter_id": None})]
    answers = [
        json.loads(curl(f"{served.url}/generate", {"inputs": QUESTION, "parameters": parameters}))
        for parameters in bodies
    ]
    base = oracle.greedy_completion(QUESTION, NUM_TOKENS)
    assert [answer["generated_text"] for answer in answers] == [adapted.text, base, base]


def test_what_is_no_lora_adapter_is_refused_in_a_sentence(served: Served, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "other", oracle.base(), ["model.layers.0.self_attn.v_proj"], rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    refused = inferfleet(served, "ctl", "adapter", "load", "other", str(folder))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("inferfleet ctl: adapter other: ")
    assert len(refused.stderr.splitlines()) == 1
