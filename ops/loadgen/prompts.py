"""Prompts of wanted lengths: made of token ids or words, or read from a file. The same seed gives the same ones."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from common.errors import ConfigurationError
from ops.loadgen.workload import Ask, Prompt

SAFE_IDS = range(256, 1000)
"""Ordinary tokens in nearly every vocabulary: special ones and single bytes come before or far behind."""

COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother"
)
WORDS = COMMON_WORDS.split()
TEXT_FIELDS = ("prompt", "inputs", "text")
MAX_DATASET_BYTES = 1 << 30
NUM_WORDS, MIN_WORDS = 1000, 10
PLAIN_WORD = re.compile(r"[Ġ▁ ]?([a-z]{2,12})")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What prompts are put together of. A prompt of n units has `per_unit` * n + `overhead` tokens, as far as it is
    known: templates and first tokens that a server adds are the overhead."""

    units: Sequence[int] | Sequence[str]
    per_unit: float = 1.0
    overhead: float = 0.0

    @property
    def is_ids(self) -> bool:
        return isinstance(self.units[0], int)

    def draw(self, num_tokens: int, randomness: random.Random) -> list[Any]:
        """Units of so many tokens together, at least one."""
        return randomness.choices(self.units, k=max(round(num_tokens / self.per_unit), 1))

    def prompt(self, units: list[Any]) -> Prompt:
        return units if self.is_ids else " ".join(units)


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeUp:
    """Random prompts, each from its number: `input_range` tokens after `num_prefix` that all have in common."""

    vocabulary: Vocabulary
    input_range: range
    output_range: range
    seed: str
    num_prefix: int = 0
    _prefix: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_prefix:
            self._prefix.extend(self.vocabulary.draw(self.num_prefix, random.Random(f"{self.seed} prefix")))

    def ask_of(self, number: int) -> Ask:
        randomness = random.Random(f"{self.seed} {number}")
        num_input, num_output = randomness.choice(self.input_range), randomness.choice(self.output_range)
        rest = self.vocabulary.draw(max(num_input - round(self.vocabulary.overhead), 1), randomness)
        return Ask(self.vocabulary.prompt(self._prefix + rest), num_output)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromFile:
    """Prompts of a file in an order that the seed decides, again and again."""

    prompts: Sequence[Prompt]
    output_range: range
    seed: str
    _order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order.extend(random.Random(self.seed).sample(range(len(self.prompts)), len(self.prompts)))

    def ask_of(self, number: int) -> Ask:
        place = self._order[number % len(self._order)]
        return Ask(self.prompts[place], random.Random(f"{self.seed} {number}").choice(self.output_range))


def read_dataset(path: Path, *, with_messages: bool) -> list[Prompt]:
    """Prompts of a file with a JSON value a line: a text, or an object with one of `TEXT_FIELDS` or messages.

    Raises:
        ConfigurationError: it cannot be read, or a line is something else; says which.
    """
    try:
        if path.stat().st_size > MAX_DATASET_BYTES:
            raise ConfigurationError(f"--dataset {path} is larger than {MAX_DATASET_BYTES >> 20} MiB")
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigurationError(f"--dataset {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--dataset {path} is not UTF-8 text") from None
    prompts = [_read_line(line, f"--dataset {path}, line {number}") for number, line in enumerate(lines, 1) if line]
    if not prompts:
        raise ConfigurationError(f"--dataset {path} has no prompts")
    if not with_messages and not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigurationError(f"--dataset {path} has messages, which only --api chat takes")
    return prompts


def _read_line(line: str, place: str) -> Prompt:
    try:
        value = orjson.loads(line)
    except ValueError:
        raise ConfigurationError(f"{place} is not JSON") from None
    if isinstance(value, dict):
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            return messages
        value = next((value[name] for name in TEXT_FIELDS if name in value), None)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{place} is neither a text nor an object with {', '.join(TEXT_FIELDS)} or messages")
    return value


def vocabulary_of(path: Path) -> Vocabulary:
    """Words that are one token each wherever they stand, by the tokenizer.json of a file or folder.

    Raises:
        ConfigurationError: there is none, or it has no such words.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"--tokenizer {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"--tokenizer {file} is no tokenizer.json: {error}") from None
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    names = (match[1] for token, _ in by_id if (match := PLAIN_WORD.fullmatch(token)))
    words = list(itertools.islice((word for word in names if _is_one_token(tokenizer, word)), NUM_WORDS))
    if len(words) < MIN_WORDS:
        raise ConfigurationError(f"--tokenizer {file} has no words of one token to make prompts of")
    return Vocabulary(words, overhead=len(tokenizer.encode(words[0]).ids) - 1)


def _is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    alone, pair = (len(tokenizer.encode(text, add_special_tokens=False).ids) for text in (word, f"{word} {word}"))
    return (alone, pair) == (1, 2)
