"""Prompts have the lengths that were asked for, and the seed decides them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from common.errors import ConfigurationError
from ops.loadgen.prompts import SAFE_IDS, FromFile, MadeUp, Vocabulary, read_dataset, vocabulary_of
from tests.support.fleet import DEMO_MODEL


def made_up(vocabulary: Vocabulary, seed: str = "1", num_prefix: int = 0) -> MadeUp:
    return MadeUp(
        vocabulary=vocabulary,
        input_range=range(5, 40),
        output_range=range(2, 9),
        seed=seed,
        num_prefix=num_prefix,
    )


def test_ids_have_the_lengths_of_the_ranges_and_no_others() -> None:
    asks = [made_up(Vocabulary(SAFE_IDS)).ask_of(number) for number in range(500)]
    assert {len(ask.prompt) for ask in asks} == set(range(5, 40))
    assert {ask.max_tokens for ask in asks} == set(range(2, 9))
    assert all(token_id in SAFE_IDS for ask in asks for token_id in ask.prompt)


def test_the_seed_decides_everything() -> None:
    def asks(seed: str) -> list[object]:
        prompts = made_up(Vocabulary(SAFE_IDS), seed)
        return [prompts.ask_of(number) for number in range(20)]

    assert asks("1 0") == asks("1 0")
    assert all(one != other for one, other in zip(asks("1 0"), asks("1 1"), strict=True)), "another run, other prompts"


def test_a_prefix_is_shared_and_comes_on_top() -> None:
    prompts = made_up(Vocabulary(SAFE_IDS), num_prefix=16)
    asks = [prompts.ask_of(number).prompt for number in range(50)]
    assert len({tuple(prompt[:16]) for prompt in asks}) == 1
    assert len({tuple(prompt[16:20]) for prompt in asks}) > 40
    assert {len(prompt) for prompt in asks} <= set(range(21, 56))


def test_words_by_a_tokenizer_have_exactly_the_wanted_tokens() -> None:
    """By that tokenizer, with what it adds; words of a text at random would not."""
    vocabulary = vocabulary_of(DEMO_MODEL)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    prompts = MadeUp(vocabulary=vocabulary, input_range=range(30, 31), output_range=range(1, 2), seed="1")
    lengths = [len(tokenizer.encode(prompts.ask_of(number).prompt).ids) for number in range(100)]
    assert set(lengths) == {30}
    unusual = Vocabulary(["photosynthesis", "xylophone", "bureaucracy"])
    other = MadeUp(vocabulary=unusual, input_range=range(30, 31), output_range=range(1, 2), seed="1")
    assert len(tokenizer.encode(other.ask_of(0).prompt).ids) != 30


def test_words_are_as_many_as_a_measurement_says() -> None:
    vocabulary = Vocabulary(["a", "b"], per_unit=2.5, overhead=10.0)
    prompts = MadeUp(vocabulary=vocabulary, input_range=range(60, 61), output_range=range(1, 2), seed="1")
    assert len(str(prompts.ask_of(0).prompt).split()) == 20


def test_a_dataset_gives_each_prompt_once_before_it_begins_again(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = ["one", {"prompt": "two"}, {"inputs": "three", "id": 4}, {"text": "four"}, {"messages": messages}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = read_dataset(path, with_messages=True)
    assert prompts == ["one", "two", "three", "four", messages]
    source = FromFile(prompts=prompts, output_range=range(3, 4), seed="1")
    lap = [source.ask_of(number).prompt for number in range(5)]
    assert sorted(map(str, lap)) == sorted(map(str, prompts)) and lap != prompts
    assert [source.ask_of(number).prompt for number in range(5, 10)] == lap


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{}\n", ", line 1 is neither a text nor an object with prompt, inputs, text or messages"),
        (b'"a"\n[1]\n', ", line 2 is neither a text nor an object with prompt, inputs, text or messages"),
        (b'{"messages": ["hi"]}\n', ", line 1 is neither a text nor an object with prompt, inputs, text or messages"),
        (b'"a"\n{"prompt"\n', ", line 2 is not JSON"),
        (b"\xff\xfe", " is not UTF-8 text"),
        (b"\n\n", " has no prompts"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', " has messages, which only --api chat takes"),
    ],
)
def test_a_wrong_dataset_is_one_sentence(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        read_dataset(path, with_messages=False)
    assert str(caught.value) == f"--dataset {path}{problem}"


def test_a_tokenizer_without_words_is_one_sentence(tmp_path: Path) -> None:
    from tests.support.tiny_model import byte_tokenizer_json

    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_tokenizer_json())
    with pytest.raises(ConfigurationError, match="has no words of one token to make prompts of"):
        vocabulary_of(tmp_path)
