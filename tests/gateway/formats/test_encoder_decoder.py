"""Requests to an encoder-decoder model: what the encoder gets, what counts as input, and what an answer shows."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import TemplateError, ValidationError
from common.job import TokenColumns
from common.text.tokenizer import TextTokenizer
from gateway.formats.base import JobDraft, Limits
from gateway.formats.chat import parse_chat
from gateway.formats.completion import parse_completion
from gateway.formats.tgi import GenerateRenderer, generate_body, parse_generate
from gateway.models import ServedModel
from tests.gateway.support import card, record_of
from tests.gateway.support import served as served_decoder
from tests.support.metaspace import EOS, SPECIAL_TOKENS, metaspace_tokenizer_json, word_id

LIMITS = Limits()
TOKENIZER = TextTokenizer(metaspace_tokenizer_json())
SPECIAL = frozenset(range(len(SPECIAL_TOKENS)))
HELLO, WORLD = word_id("▁Hello"), word_id("▁world")


def served(**changes: Any) -> ServedModel:
    fields = {"is_encoder_decoder": True, "chat_template": "", "eos_token_ids": (EOS,), "max_input_tokens": 8}
    return ServedModel(card(**fields | changes), TOKENIZER, None)


def generate(inputs: str, **options: Any) -> JobDraft:
    door = options.pop("door", "generate")
    return parse_generate({"inputs": inputs, "parameters": options}, served(), LIMITS, door=door)


def test_the_encoder_gets_the_end_that_the_tokenizer_adds() -> None:
    assert generate("Hello world").prompt_ids == [HELLO, WORLD, EOS]
    (draft,) = parse_completion({"prompt": "Hello world"}, served(), LIMITS)
    assert draft.prompt_ids == [HELLO, WORLD, EOS]
    (draft,) = parse_completion({"prompt": [HELLO]}, served(), LIMITS)
    assert draft.prompt_ids == [HELLO], "ids are taken as they are"


@pytest.mark.parametrize(("count", "kept"), [(1, [EOS]), (2, [WORLD, EOS]), (3, [HELLO, WORLD, EOS])])
def test_truncate_keeps_the_last_tokens_with_the_end(count: int, kept: list[int]) -> None:
    assert generate("Hello Hello world", truncate=count).prompt_ids == kept
    assert TOKENIZER.encode("Hello Hello world")[:count] != kept, "cut at the other end it would differ"


def test_what_counts_as_input_is_what_the_encoder_reads() -> None:
    draft = generate("Hello world", details=True, max_new_tokens=5)
    assert draft.cost == 3 + 5
    columns = answer()
    record = record_of(draft, num_tokens=columns.end)
    renderer = GenerateRenderer(record, SPECIAL)
    *_, last = renderer.tokens(columns) + renderer.end(record)
    assert b'"input_length":3' in last.data


def test_an_input_fits_the_encoder_or_is_refused() -> None:
    assert len(generate("Hello " * 7).prompt_ids) == 8
    assert generate("Hello " * 20, truncate=8).prompt_ids == [HELLO] * 7 + [EOS]
    with pytest.raises(ValidationError, match="`inputs` must have less than 8 tokens. Given: 9"):
        generate("Hello " * 8)
    with pytest.raises(ValidationError, match="must have less than 8 tokens. Given: 9"):
        parse_completion({"prompt": "Hello " * 8}, served(), LIMITS)
    with pytest.raises(ValidationError, match="`truncate` must be strictly positive and less than 8. Given: 9"):
        generate("Hello", truncate=9)


def test_input_and_output_share_the_context() -> None:
    assert generate("Hello world").params.max_new_tokens == 97
    with pytest.raises(ValidationError, match="must be <= 100. Given: 3 `inputs` tokens and 98 `max_new_tokens`"):
        generate("Hello world", max_new_tokens=98)


def answer() -> TokenColumns:
    return TokenColumns(0, [WORLD, HELLO, EOS], ["world", " Hello", "</s>"], [-1.0, -2.0, -3.0])


@pytest.mark.parametrize(
    ("door", "options", "text"),
    [
        ("generate", {}, "world Hello"),
        ("compat", {}, "world Hello"),
        ("compat", {"return_full_text": False}, "world Hello"),
        ("compat", {"return_full_text": True}, "Helloworld Hello"),
        ("generate", {"return_full_text": True}, "Helloworld Hello"),
    ],
)
def test_the_prompt_stands_in_front_of_the_answer_only_when_asked_for(door: str, options: dict, text: str) -> None:
    draft = generate("Hello", door=door, **options)
    assert generate_body(record_of(draft), answer(), SPECIAL)["generated_text"] == text


def test_a_decoder_still_repeats_its_prompt_there() -> None:
    draft = parse_generate({"inputs": "hello"}, served_decoder(), LIMITS, door="compat")
    assert draft.view["prompt_text"] == "hello"


def test_details_have_no_prefill() -> None:
    draft = generate("Hello", decoder_input_details=True)
    details = generate_body(record_of(draft), answer(), SPECIAL)["details"]
    assert details["prefill"] == []
    assert [token["text"] for token in details["tokens"]] == ["world", " Hello", "</s>"]


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(TemplateError, match="^Template error: template not found"):
        parse_chat({"messages": [{"role": "user", "content": "Hello"}]}, served(), LIMITS)
