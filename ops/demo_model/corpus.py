"""The corpus of the demo model: from the sentences in `data/*.toml` to question-and-answer documents.

Everything random comes from one seeded generator, so the corpus is the same on every machine. Prompts of the
examination that are marked as held out never enter it, neither do their sums and number ranges in another wording.
"""

import random
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ops.demo_model.prompts import HELD_OUT_RANGES, HELD_OUT_SUMS, held_out_prompts

LANGUAGES = ("en", "ja", "zh", "vi")

Pair = tuple[str, str]
Maker = Callable[[random.Random, dict[str, Any]], Pair]
Mixture = dict[Maker, float]


@dataclass(frozen=True, slots=True)
class Document:
    """One training example: turns of (question, answer), as a chat or as raw text.

    A raw document has one turn; its answer already starts with what joins it to the question.
    """

    turns: tuple[Pair, ...]
    system: str | None = None
    is_raw: bool = False

    @property
    def parts(self) -> list[str]:
        """Every text of the document."""
        return [self.system or "", *(part for turn in self.turns for part in turn)]


@cache
def sentences(language: str) -> dict[str, Any]:
    """The sentences of one language, as `data/<language>.toml` has them."""
    path = Path(__file__).parent / "data" / f"{language}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def normalized(text: str) -> str:
    """The text without case, spaces and punctuation: two prompts that differ only there count as the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] in "LMN")


@lru_cache(maxsize=50_000)
def has_held_out_prompt(text: str) -> bool:
    """Whether a prompt that is held out occurs in the text."""
    form = normalized(text)
    return any(normalized_prompt in form for normalized_prompt in _normalized_held_out_prompts())


@cache
def _normalized_held_out_prompts() -> list[str]:
    return [normalized(prompt) for prompt in held_out_prompts()]


def define(rng: random.Random, data: dict[str, Any]) -> Pair:
    term = rng.choice(data["terms"])
    return _ask_term(rng, data["ask"]["define"], term), term["define"]


def use(rng: random.Random, data: dict[str, Any]) -> Pair:
    term = rng.choice(data["terms"])
    return _ask_term(rng, data["ask"]["use"], term), term["use"]


def staple(rng: random.Random, data: dict[str, Any]) -> Pair:
    """What everybody tries first: deep learning, counting to 10 and to 100, who are you."""
    chance = rng.random()
    if chance < 0.5:
        term = data["terms"][0]
        return _ask_term(rng, data["ask"]["define"][:3], term), term["define"]
    if chance < 0.8:
        last = rng.choice([10, 10, 10, 100])
        return rng.choice(data["count"]["up"][:4]).format(n=last), _row(range(1, last + 1), data)
    (entry,) = (entry for entry in data["talk"] if data["staple"] in entry["ask"])
    return data["staple"], entry["answer"]


def _ask_term(rng: random.Random, patterns: list[str], term: dict[str, str]) -> str:
    pattern = rng.choice(patterns)
    bare = term.get("b", term["x"])
    prompt = pattern.format(x=term["x"], b=bare)
    if rng.random() < 0.2:
        prompt = prompt.replace(bare, bare.title() if bare.islower() else bare)
    return _capitalized(prompt)


def composed_define(rng: random.Random, data: dict[str, Any]) -> Pair:
    term = rng.choice(data["terms"])
    return _composed(rng, data["compose"]["define"], term), term["define"]


def composed_use(rng: random.Random, data: dict[str, Any]) -> Pair:
    term = rng.choice(data["terms"])
    return _composed(rng, data["compose"]["use"], term), term["use"]


def _composed(rng: random.Random, slots: list[list[str]], term: dict[str, str]) -> str:
    start, middle, end = (rng.choice(slot) for slot in slots)
    is_spaced = start[-1:].isalpha() and start[-1:] < "\u2000" and not middle.startswith(" ")
    space = " " if is_spaced else ""
    return _capitalized((start + space + middle + end).format(x=term["x"], b=term.get("b", term["x"])))


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def count_up(rng: random.Random, data: dict[str, Any]) -> Pair:
    last = _last_number(rng)
    shown = str(last)
    if last <= 20 and rng.random() < 0.15:
        shown = data["numbers"][last - 1]
    return rng.choice(data["count"]["up"]).format(n=shown), _row(range(1, last + 1), data)


def _last_number(rng: random.Random) -> int:
    chance = rng.random()
    for limit, low, high in ((0.12, 10, 10), (0.55, 2, 20), (0.8, 21, 50), (0.86, 100, 100), (0.97, 51, 100)):
        if chance < limit:
            return rng.randint(low, high)
    return rng.randint(101, 200)


def _row(numbers: range, data: dict[str, Any]) -> str:
    return str(data["separator"]).join(str(number) for number in numbers)


def count_range(rng: random.Random, data: dict[str, Any]) -> Pair:
    first = rng.randint(2, 60) if rng.random() < 0.8 else rng.randint(2, 150)
    last = first + rng.randint(2, 20)
    if (first, last) in HELD_OUT_RANGES:
        return count_range(rng, data)
    return rng.choice(data["count"]["range"]).format(a=first, b=last), _row(range(first, last + 1), data)


def count_short(rng: random.Random, data: dict[str, Any]) -> Pair:
    """Few numbers: where to stop is learned at the end of a row, and short rows have more ends."""
    first = 1 if rng.random() < 0.3 else rng.randint(2, 99)
    last = first + rng.randint(1, 7)
    pattern = rng.choice(data["count"]["up" if first == 1 else "range"])
    return pattern.format(a=first, b=last, n=last), _row(range(first, last + 1), data)


def count_down(rng: random.Random, data: dict[str, Any]) -> Pair:
    first = 10 if rng.random() < 0.3 else rng.randint(3, 40)
    return rng.choice(data["count"]["down"]).format(n=first), _row(range(first, 0, -1), data)


def count_step(rng: random.Random, data: dict[str, Any]) -> Pair:
    step = rng.choice([2, 3, 5, 10])
    first = rng.choice([0, step])
    last = first + step * rng.randint(3, 12)
    return rng.choice(data["count"]["step"]).format(a=first, b=last, s=step), _row(range(first, last + 1, step), data)


def add(rng: random.Random, data: dict[str, Any]) -> Pair:
    high = rng.choice([10, 20, 50, 50])
    first, second = rng.randint(0, high), rng.randint(0, high)
    if (first, second) in HELD_OUT_SUMS or (second, first) in HELD_OUT_SUMS:
        return add(rng, data)
    return _sum(rng, data, "add", first, second, f"{first} + {second} = {first + second}")


def subtract(rng: random.Random, data: dict[str, Any]) -> Pair:
    high = rng.choice([10, 20, 50])
    second, first = sorted((rng.randint(0, high), rng.randint(0, high)))
    return _sum(rng, data, "subtract", first, second, f"{first} - {second} = {first - second}")


def multiply(rng: random.Random, data: dict[str, Any]) -> Pair:
    first, second = rng.randint(0, 10), rng.randint(0, 10)
    return _sum(rng, data, "multiply", first, second, f"{first} × {second} = {first * second}")


def _sum(rng: random.Random, data: dict[str, Any], kind: str, first: int, second: int, answer: str) -> Pair:
    return rng.choice(data["arithmetic"][kind]).format(a=first, b=second), answer


def capital(rng: random.Random, data: dict[str, Any]) -> Pair:
    return _fact(rng, data["capitals"])


def colour(rng: random.Random, data: dict[str, Any]) -> Pair:
    return _fact(rng, data["colours"])


def _fact(rng: random.Random, facts: dict[str, Any]) -> Pair:
    thing, value = rng.choice(facts["pairs"])
    return _capitalized(rng.choice(facts["ask"]).format(c=thing)), facts["answer"].format(c=thing, v=value)


def unknown(rng: random.Random, data: dict[str, Any]) -> Pair:
    return rng.choice(data["unknown"]["ask"]), data["unknown"]["answer"]


def talk(rng: random.Random, data: dict[str, Any]) -> Pair:
    weights = [entry.get("weight", 2) for entry in data["talk"]]
    (entry,) = rng.choices(data["talk"], weights)
    return rng.choice(entry["ask"]), entry["answer"]


SENTENCES: Mixture = {
    staple: 8,
    define: 22,
    use: 12,
    talk: 18,
    count_up: 12,
    count_range: 8,
    count_down: 3,
    count_step: 2,
    add: 12,
    subtract: 3,
    multiply: 3,
    capital: 6,
    colour: 2,
    unknown: 4,
}

NUMBERS: Mixture = {
    staple: 4,
    define: 5,
    use: 3,
    composed_define: 7,
    composed_use: 5,
    talk: 8,
    count_up: 8,
    count_range: 12,
    count_short: 16,
    count_down: 4,
    count_step: 3,
    add: 20,
    subtract: 6,
    multiply: 5,
    capital: 4,
    colour: 1,
    unknown: 3,
}

COUNTS: Mixture = {
    staple: 8,
    define: 4,
    use: 2,
    composed_define: 3,
    composed_use: 2,
    talk: 7,
    count_up: 22,
    count_range: 25,
    count_short: 8,
    count_down: 4,
    count_step: 4,
    add: 8,
    subtract: 5,
    multiply: 2,
    capital: 2,
    colour: 1,
    unknown: 2,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the corpus: its mixture of kinds, its size and its seed."""

    mixture: Mixture
    num_documents: int
    seed: int


# The first part teaches the sentences; the second asks for them in more words and is mostly numbers, which are learned
# from many short examples and only once the model has stopped to spend its effort on the sentences; the third is mostly
# counting, because to stop a row at the right number is what is learned last.
PARTS = (Part(SENTENCES, 120_000, 20), Part(NUMBERS, 110_000, 21), Part(COUNTS, 50_000, 22))
HELD_OUT_SEED = 23


def question(rng: random.Random, language: str, mixture: Mixture) -> Pair:
    """One question and its answer; small slips of typing are part of the question."""
    (maker,) = rng.choices(list(mixture), list(mixture.values()))
    data = sentences(language)
    prompt, answer = maker(rng, data)
    return _slipped(rng, prompt, data), answer


def _slipped(rng: random.Random, prompt: str, data: dict[str, Any]) -> str:
    chance = rng.random()
    if chance < 0.12:
        return prompt.rstrip("?？.。!！")
    if chance < 0.2:
        return prompt[:1].lower() + prompt[1:]
    if chance < 0.24:
        return prompt.replace("？", "?").replace("。", "")
    if chance < 0.27:
        return prompt.title() if prompt.isascii() else prompt + " "
    if chance < 0.4:
        return str(rng.choice(data["thinking"])).format(q=prompt)
    return prompt


def document(rng: random.Random, mixture: Mixture) -> Document:
    """One document: raw question, start of an answer to go on with, or a chat of one or more turns."""
    language = rng.choice(LANGUAGES)
    chance = rng.random()
    if chance < 0.27:
        prompt, answer = question(rng, language, mixture)
        return Document(((prompt, "\n" + answer),), is_raw=True)
    if chance < 0.30:
        return _completion(rng, language)
    system = rng.choice(sentences(language)["system"]) if rng.random() < 0.2 else None
    return Document(tuple(_turns(rng, language, mixture)), system)


def _completion(rng: random.Random, language: str) -> Document:
    _, answer = rng.choice((define, use, talk))(rng, sentences(language))
    cut = rng.randint(1, max(1, len(answer) // 2))
    if language in ("en", "vi"):
        cut = max(answer.find(" ", cut), 1)
    return Document(((answer[:cut], answer[cut:]),), is_raw=True)


def _turns(rng: random.Random, language: str, mixture: Mixture) -> Iterator[Pair]:
    prompt, answer = question(rng, language, mixture)
    yield prompt, answer
    while rng.random() < 0.15:
        if rng.random() < 0.3:
            yield rng.choice(sentences(language)["again"]), answer
        else:
            prompt, answer = question(rng, language, mixture)
            yield prompt, answer


def corpus(part: Part, num_documents: int | None = None) -> list[Document]:
    """A part of the corpus, or its beginning: always the same list, free of every held-out prompt."""
    rng = random.Random(part.seed)
    wanted = part.num_documents if num_documents is None else num_documents
    documents: list[Document] = []
    while len(documents) < wanted:
        candidate = document(rng, part.mixture)
        if not any(has_held_out_prompt(text) for text in candidate.parts):
            documents.append(candidate)
    return documents


@cache
def held_out(num_documents: int) -> tuple[Document, ...]:
    """Documents like those of the second part, always the same, with no turn that occurs anywhere in the corpus."""
    known = {turn for part in PARTS for known_document in corpus(part) for turn in known_document.turns}
    rng = random.Random(HELD_OUT_SEED)
    candidates = iter(lambda: document(rng, PARTS[1].mixture), None)
    return tuple(islice((candidate for candidate in candidates if known.isdisjoint(candidate.turns)), num_documents))


def plain_sentences() -> list[str]:
    """Every sentence of the data files once, and rows of numbers: what the tokenizer is trained on."""
    rows = [_row(range(1, 101), sentences(language)) for language in LANGUAGES]
    whole = [{key: value for key, value in sentences(language).items() if key != "compose"} for language in LANGUAGES]
    return [*rows, *_strings(whole)]


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
