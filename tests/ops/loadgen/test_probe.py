"""What is found out about a server before it is measured, from servers that differ."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from common.errors import ConfigurationError
from ops.loadgen import probe as module
from ops.loadgen.probe import Found, probe
from ops.loadgen.prompts import SAFE_IDS, Vocabulary
from ops.loadgen.target import Target
from tests.ops.loadgen.scripted_server import Request, ScriptedServer, completion, stream, usage, whole

REFUSED = '{"error": {"message": "Field required"}}'


def num_tokens(prompt: Any) -> int:
    """A server whose words have two tokens each, and one that it adds."""
    return len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split()) + 1


def server_that_refuses(*names: str, has_ids: bool = True, has_usage: bool = True) -> Callable[[Request], Any]:
    def script(request: Request) -> Sequence[bytes]:
        if request.method == "GET":
            return whole("200 OK", json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))
        is_refused = any(name in request.body for name in names)
        if is_refused or (not has_ids and isinstance(request.body["prompt"], list)):
            return whole("400 Bad Request", REFUSED)
        counts = usage(num_tokens(request.body["prompt"]), 2) if has_usage else None
        return stream(*completion("a", "b", usage=counts))

    return script


async def found_at(
    script: Callable[[Request], Any], vocabulary: Vocabulary | None = None, **target: Any
) -> tuple[Found, list[Request]]:
    async with ScriptedServer(script) as server:
        target_ = Target(url=server.url, **target)
        found = await asyncio.to_thread(probe, target_, vocabulary, timeout_s=10, longest=200)
        return found, server.requests


async def test_a_server_that_can_everything_is_asked_with_ids_and_without_notes() -> None:
    found, requests = await found_at(server_that_refuses())
    assert (found.target.model, found.target.ignore_eos, found.target.include_usage) == ("first", True, True)
    assert found.vocabulary.units == SAFE_IDS and found.notes == []
    assert len(requests) == 2, "the list of models and one question"


@pytest.mark.parametrize(
    ("refused", "note"), [("ignore_eos", module.WITHOUT_EOS), ("stream_options", module.WITHOUT_USAGE)]
)
async def test_a_field_that_is_refused_is_left_out_and_said(refused: str, note: str) -> None:
    found, _ = await found_at(server_that_refuses(refused), model="mine")
    assert found.notes == [note]
    assert found.target.ignore_eos == (refused != "ignore_eos")
    assert found.target.include_usage == (refused != "stream_options")
    assert found.target.model == "mine"


async def test_words_are_measured_where_ids_are_refused() -> None:
    found, _ = await found_at(server_that_refuses(has_ids=False))
    assert found.notes == [module.WITHOUT_IDS]
    assert isinstance(found.vocabulary.units[0], str)
    assert (found.vocabulary.per_unit, found.vocabulary.overhead) == (2.0, 1.0)


async def test_a_server_that_takes_ids_for_prompts_gets_words() -> None:
    """Eight prompts of one token are no prompt of eight."""
    honest = server_that_refuses()

    def script(request: Request) -> Sequence[bytes]:
        if isinstance(request.body.get("prompt"), list):
            return stream(*completion("a", "b", usage=usage(1, 2)))
        return honest(request)

    found, _ = await found_at(script)
    assert not found.vocabulary.is_ids and found.notes == [module.WITHOUT_IDS]


async def test_a_server_without_counts_is_said_to_have_none() -> None:
    found, _ = await found_at(server_that_refuses(has_ids=False, has_usage=False))
    assert module.WITHOUT_LENGTHS in found.notes
    assert (found.vocabulary.per_unit, found.vocabulary.overhead) == (1.0, 0.0)


async def test_another_tokenizer_than_the_servers_is_noticed() -> None:
    found, requests = await found_at(server_that_refuses(), Vocabulary(["word", "more"]))
    assert [note for note in found.notes if "2.00 tokens for a word" in note] == found.notes != []
    assert all(isinstance(request.body["prompt"], str) for request in requests if request.method == "POST")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("401 Unauthorized", "gives no answer to a short question: HTTP 401, Field required"),
        ("400 Bad Request", "gives no answer to a short question: HTTP 400, Field required"),
        ("503 Unavailable", "gives no answer to a short question: HTTP 503, Field required"),
    ],
)
async def test_a_server_that_answers_nothing_is_one_sentence(status: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        await found_at(lambda request: whole(status, REFUSED))


def test_nobody_there_is_one_sentence() -> None:
    for api in ("chat", "generate_stream"):
        with pytest.raises(ConfigurationError) as caught:
            probe(Target(url="http://127.0.0.1:9", api=api), None, timeout_s=10, longest=8)
        expected = "no server at http://127.0.0.1:9 (Connection refused); --url or INFERFLEET_URL names another"
        assert str(caught.value) == expected
