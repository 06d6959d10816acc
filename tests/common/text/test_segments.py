"""Texts put together from remembered parts against the tokenizer itself, for tokenizers that make it hard."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from common.text.segments import SegmentMemory, cuts_of
from common.text.tokenizer import SHORTEST_REMEMBERED, TextTokenizer
from tests.common.text.test_tokenizer import sentencepiece_json
from tests.support.metaspace import metaspace_tokenizer_json
from tests.support.tiny_model import byte_tokenizer_json

DEMO_MODEL = Path(__file__).parents[3] / "ops/demo_model/checkpoint/tokenizer.json"
PLAIN, BEHIND = "<|a|>", "<|b|>"


def tokenizer_with(*added: AddedToken, first_only: bool = False) -> Tokenizer:
    """Letters, merges over spaces, and a space before a text's first word only, or before every one."""
    letters = ["?", "▁", *"abcdogs<|>!^"]
    merges = [("a", "b"), ("b", "a"), ("▁", "a"), ("o", "g"), ("d", "og"), ("▁", "▁")]
    pieces = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    scheme = "first" if first_only else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_tokens(list(added))
    return tokenizer


def exact(text: str, **how: bool) -> AddedToken:
    return AddedToken(text, normalized=False, **how)


AWKWARD = (
    exact("abc"),
    exact("cab"),
    exact("<<|c|>"),
    exact("<|c|>"),
    exact("!", lstrip=True),
    exact("^", rstrip=True),
    exact("\n"),
    exact("\n\n"),
    AddedToken("DOG", normalized=True),
)
SOURCES = {
    "bytes": byte_tokenizer_json(),
    "sentencepiece": sentencepiece_json(),
    "unigram": metaspace_tokenizer_json(),
    "demo model": DEMO_MODEL.read_bytes(),
    "awkward": tokenizer_with(exact(PLAIN), exact(BEHIND, rstrip=True), *AWKWARD).to_str().encode(),
    "first": tokenizer_with(exact(PLAIN), first_only=True).to_str().encode(),
}
TOKENIZERS = {name: Tokenizer.from_buffer(source) for name, source in SOURCES.items()}


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def memory_of(tokenizer: Tokenizer, cuts: list[str]) -> SegmentMemory:
    return SegmentMemory(cuts, lambda text: plain(tokenizer, text))


def texts_for(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Added tokens and halves of them between words, spaces and anything else."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    halves = [part for text in added for part in (text[: len(text) // 2], text[len(text) // 2 :]) if part]
    words = ["a", "ab", "dogs", " ", "  ", "\n", "Hello world", " é", "日本", "<", "|>"]
    return st.lists(st.sampled_from(added + halves + words) | st.text(max_size=4), max_size=14).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_text_has_the_ids_of_its_segments(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    cuts = cuts_of(tokenizer)
    assert cuts, "something is remembered"
    memory = memory_of(tokenizer, cuts)
    begun, text, end = (data.draw(texts_for(tokenizer)) for _ in range(3))
    for turn in (begun, text, begun + cuts[0] + text, begun + cuts[0] + text + cuts[-1] + end, text + cuts[-1] + end):
        assert memory.encode(turn, "tenant") == plain(tokenizer, turn)


def test_only_tokens_that_leave_no_trace_are_cuts() -> None:
    assert cuts_of(TOKENIZERS["awkward"]) == ["^", PLAIN, BEHIND, "<<|c|>"]
    assert cuts_of(tokenizer_with(exact(PLAIN), exact("dog", single_word=True))) == []
    assert cuts_of(tokenizer_with(exact("<<"), exact(PLAIN))) == []


@pytest.mark.parametrize(
    ("cut", "others", "text"),
    [
        (exact("ba"), [exact("ab")], "aba"),
        (exact("<|c|>"), [exact("<<|c|>")], "a<<|c|>"),
        (exact("!", lstrip=True), [], "a !"),
        (AddedToken("og", normalized=True), [AddedToken("dog", normalized=True)], "dog"),
        (exact("s!"), [exact("dog", single_word=True)], "dogs!"),
    ],
)
def test_any_other_token_would_give_other_ids(cut: AddedToken, others: list[AddedToken], text: str) -> None:
    tokenizer = tokenizer_with(cut, *others)
    assert cut.content not in cuts_of(tokenizer)
    assert memory_of(tokenizer, [cut.content]).encode(text, "tenant") != plain(tokenizer, text)
    assert memory_of(tokenizer, cuts_of(tokenizer)).encode(text, "tenant") == plain(tokenizer, text)


class Spy:
    """Notes what is tokenised anew."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.texts.append(text)
        return list(text.encode())


def test_a_turn_tokenises_what_is_new_in_it_and_knows_nothing_of_others() -> None:
    spy = Spy()
    memory = SegmentMemory(["<u>", "<a>"], spy)
    turns = list(accumulate(["system<u>one<a>", "answer<u>two<a>", "more"]))
    assert [bytes(memory.encode(turn, "tenant")).decode() for turn in turns] == turns
    assert spy.texts == ["system", "<u>one", "<a>", "<a>answer", "<u>two", "<a>more"]
    spy.texts.clear()
    memory.encode(turns[0], "other")
    assert spy.texts == ["system", "<u>one", "<a>"]


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    spy = Spy()
    memory = SegmentMemory(["<u>"], spy, most=32)
    for text in ("<u>aa<u>bb", "<u>aa<u>cc", "<u>aa<u>dd"):
        memory.encode(text, "tenant")
        assert 0 < memory.size <= 32
    spy.texts.clear()
    memory.encode("<u>bb<u>aa", "tenant")
    assert spy.texts == ["<u>bb"]
    memory.encode("<u>" + "a" * 32 + "<u>", "tenant")
    assert memory.size <= 32


LONG = "a dog " * (SHORTEST_REMEMBERED // 6 + 1)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("name", [*SOURCES, "around", "twice"])
def test_what_is_added_around_a_text_stands_around_its_segments(name: str, add_special_tokens: bool) -> None:
    extra = tokenizer_with(exact(PLAIN), exact("</s>"))
    single = "</s> $A </s>" if name == "around" else f"{PLAIN} $A $A"
    special = [(text, extra.token_to_id(text)) for text in (PLAIN, "</s>")]
    extra.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    source = SOURCES.get(name, extra.to_str().encode())
    tokenizer, cuts = TextTokenizer(source), cuts_of(Tokenizer.from_buffer(source)) or [PLAIN]
    for text in (LONG, LONG + cuts[0] + "dog", cuts[-1] + LONG + cuts[0], LONG + cuts[0] + "dog" + cuts[-1]):
        ids = tokenizer.encode(text, add_special_tokens, "tenant")
        assert ids == tokenizer.encode(text, add_special_tokens)
        assert ids != tokenizer.encode(text + "!", add_special_tokens)
