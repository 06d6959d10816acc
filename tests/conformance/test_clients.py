"""The examples people know from TGI, with the official clients as their users install them, nothing patched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conformance.conftest import Served
from tests.support import oracle
from tests.support.fleet import ROOT

CLIENTS = ROOT / ".venv" / "clients"
QUESTION = "What is Deep Learning?"
CHAT_TOKENS = 64

OPENAI = """
import sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="-")
stream = client.chat.completions.create(model="tgi", messages=[{"role": "user", "content": sys.argv[2]}], stream=True,
                                        max_tokens=64, temperature=0)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
"""
HUB = """
import sys
from huggingface_hub import InferenceClient
client = InferenceClient(base_url=sys.argv[1] + "/v1/")
stream = client.chat.completions.create(model="tgi", messages=[{"role": "user", "content": sys.argv[2]}], stream=True,
                                        max_tokens=64, temperature=0)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
"""
HUB_TEXT = """
import sys
from huggingface_hub import InferenceClient
client = InferenceClient(sys.argv[1])
print(client.text_generation(sys.argv[2], max_new_tokens=20, return_full_text=False), end="")
"""
TEXT_GENERATION = """
import sys
from text_generation import Client
client = Client(sys.argv[1])
print(client.generate(sys.argv[2], max_new_tokens=20).generated_text, end="")
"""
TEXT_GENERATION_STREAM = """
import sys
from text_generation import Client
text = ""
for response in Client(sys.argv[1]).generate_stream(sys.argv[2], max_new_tokens=20):
    if not response.token.special:
        text += response.token.text
print(text, end="")
"""


def run_client(client: str, script: str, *arguments: str) -> str:
    python = CLIENTS / client / "bin" / "python"
    assert python.exists(), "make test installs the clients"
    done = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(url: str, body: dict[str, object]) -> str:
    command = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def events(text: str) -> list[dict[str, object]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_the_reference_answers_depend_on_the_prompt() -> None:
    assert oracle.greedy_chat(QUESTION, CHAT_TOKENS) != oracle.greedy_chat("Count to 10", CHAT_TOKENS)
    assert len(oracle.greedy_chat(QUESTION, CHAT_TOKENS)) > 20


@pytest.mark.parametrize("question", [QUESTION, "10まで数えてください"])
@pytest.mark.parametrize(("client", "script"), [("openai", OPENAI), ("huggingface_hub", HUB)])
def test_chat_streams(served: Served, client: str, script: str, question: str) -> None:
    assert run_client(client, script, served.url, question) == oracle.greedy_chat(question, CHAT_TOKENS)


@pytest.mark.parametrize(
    ("client", "script"),
    [("huggingface_hub", HUB_TEXT), ("text-generation", TEXT_GENERATION), ("text-generation", TEXT_GENERATION_STREAM)],
)
def test_text_generation(served: Served, client: str, script: str) -> None:
    assert run_client(client, script, served.url, QUESTION) == oracle.greedy_completion(QUESTION, 20)


def test_curl_generate(served: Served) -> None:
    body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 20}}
    answer = json.loads(curl(f"{served.url}/generate", body))
    assert answer == {"generated_text": oracle.greedy_completion(QUESTION, 20)}


def test_curl_generate_stream(served: Served) -> None:
    body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 20}}
    found = events(curl(f"{served.url}/generate_stream", body))
    expected = oracle.greedy_completion(QUESTION, 20)
    assert [event["index"] for event in found] == list(range(1, len(found) + 1))
    assert found[-1]["generated_text"] == expected
    assert "".join(event["token"]["text"] for event in found if not event["token"]["special"]) == expected  # type: ignore[index]


def test_curl_chat_stream(served: Served) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "tgi", "messages": messages, "stream": True, "max_tokens": CHAT_TOKENS, "temperature": 0}
    text = curl(f"{served.url}/v1/chat/completions", body)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events(text)]  # type: ignore[index]
    assert text.rstrip().endswith("data: [DONE]")
    assert "".join(pieces) == oracle.greedy_chat(QUESTION, CHAT_TOKENS)


def test_sampled_chat_streams_with_defaults(served: Served) -> None:
    """The example as it stands in TGI's documentation: no temperature, no limit."""
    body = {"model": "tgi", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    text = curl(f"{served.url}/v1/chat/completions", body)
    last = events(text)[-1]
    assert last["choices"][0]["finish_reason"] in ("stop", "length")  # type: ignore[index]


def test_scripts_exist_only_here(tmp_path: Path) -> None:
    """The clients run outside the repository, so that they cannot import it."""
    python = CLIENTS / "openai" / "bin" / "python"
    done = subprocess.run([python, "-c", "import gateway"], capture_output=True, text=True, cwd=tmp_path)
    assert "ModuleNotFoundError" in done.stderr
