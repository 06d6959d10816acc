"""Incremental decoding equals decoding at once, and stop strings are found as a reader of single characters would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from common.text.detokenize import MAX_WINDOW, REPLACEMENT, Detokenizer, StopChecker
from common.text.tokenizer import TextTokenizer
from tests.support.metaspace import (
    EXTRA,
    PAD,
    SPECIAL_TOKENS,
    WORDS,
    metaspace_tokenizer,
    metaspace_tokenizer_json,
    word_id,
)
from tests.support.tiny_model import byte_tokenizer_json

TEXT = "naïve 日本語のテキスト。 emoji 👩‍🚀 and ünïcödé — xin chào các bạn 深度学习"
BYTES = TextTokenizer(byte_tokenizer_json())
METASPACE = TextTokenizer(metaspace_tokenizer_json())
METASPACE_IDS = range(len(SPECIAL_TOKENS) + len(WORDS))


class SentencePieceTokenizer:
    """A byte-fallback tokenizer as of Llama 2: words with a leading ▁, and 256 byte tokens behind them."""

    WORDS = ("▁Hello", "▁world", ",", "▁", "日", "▁a", "b")

    def __init__(self) -> None:
        names = [*self.WORDS, *[f"<0x{byte:02X}>" for byte in range(256)]]
        model = models.BPE(
            {name: index for index, name in enumerate(names)}, [], byte_fallback=True, unk_token=None, fuse_unk=False
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def word(self, text: str) -> int:
        return self.WORDS.index(text)

    def byte(self, value: int) -> int:
        return len(self.WORDS) + value

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


SENTENCE_PIECE = SentencePieceTokenizer()


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    pieces = [piece for token_id in ids for piece in detokenizer.push(token_id)]
    return pieces + detokenizer.flush()


def test_characters_come_out_whole_and_with_their_last_byte() -> None:
    ids = list("日a本".encode())
    detokenizer = Detokenizer(BYTES, [65])
    released = [detokenizer.push(token_id) for token_id in ids]
    assert released == [[], [], ["", "", "日"], ["a"], [], [], ["", "", "本"]]
    assert detokenizer.flush() == []


def test_unfinished_character_is_shown_at_the_end() -> None:
    ids = list("日本".encode())[:-1]
    detokenizer = Detokenizer(BYTES, [65])
    held = [detokenizer.push(token_id) for token_id in ids]
    assert held[-1] == [], "the last character is incomplete"
    assert detokenizer.flush() == ["", REPLACEMENT]


@given(st.text(max_size=60), st.binary(max_size=8))
def test_any_text_streams_as_it_decodes(text: str, prompt: bytes) -> None:
    ids = list(text.encode("utf-8", "surrogatepass"))
    context = [*prompt, 65]
    pieces = stream(Detokenizer(BYTES, context), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == BYTES.decode([65, *ids])[1:]


@given(st.lists(st.integers(0, 260), max_size=80))
def test_garbage_never_raises_and_every_token_gets_its_piece(ids: list[int]) -> None:
    assert len(stream(Detokenizer(BYTES, [65]), ids)) == len(ids)


def test_broken_characters_belong_to_the_tokens_that_brought_them() -> None:
    special = 256
    lead, following = "日".encode()[:2]
    pieces = stream(Detokenizer(BYTES, [65]), [lead, following, special, 66])
    assert pieces == ["", REPLACEMENT, "<s>", "B"]
    assert "".join(pieces).replace("<s>", "") == BYTES.decode([lead, following, 66])


def test_the_comparison_notices_a_decoder_that_forgets_incomplete_characters() -> None:
    ids = list(TEXT.encode())
    naive = "".join(BYTES.decode([token_id]) for token_id in ids)
    assert "".join(stream(Detokenizer(BYTES, [65]), ids)) == TEXT
    assert naive != TEXT


@given(st.lists(st.sampled_from([*SentencePieceTokenizer.WORDS, "é", "深", "👩"]), max_size=20))
def test_sentence_pieces_keep_their_spaces(words: list[str]) -> None:
    ids = []
    for word in words:
        known = word in SentencePieceTokenizer.WORDS
        ids += [SENTENCE_PIECE.word(word)] if known else [SENTENCE_PIECE.byte(byte) for byte in word.encode()]
    context = [SENTENCE_PIECE.word("▁Hello")]
    expected = SENTENCE_PIECE.decode(context + ids, False).removeprefix("Hello")
    pieces = stream(Detokenizer(SENTENCE_PIECE, context), ids)
    assert "".join(pieces) == expected
    assert len(pieces) == len(ids)


@given(st.lists(st.integers(0, 262), max_size=40))
@settings(max_examples=50)
def test_random_byte_fallback_tokens_never_raise(ids: list[int]) -> None:
    assert len(stream(Detokenizer(SENTENCE_PIECE, [0]), ids)) == len(ids)


def shown(pieces: Sequence[str], ids: Sequence[int]) -> str:
    """What a reader sees with special tokens hidden."""
    return "".join(piece for piece, token_id in zip(pieces, ids, strict=True) if token_id >= len(SPECIAL_TOKENS))


@given(st.lists(st.sampled_from(METASPACE_IDS), max_size=20))
@settings(max_examples=200)
def test_a_text_that_begins_here_is_what_decoding_at_once_gives(ids: list[int]) -> None:
    pieces = stream(Detokenizer(METASPACE, []), ids)
    assert shown(pieces, ids) == METASPACE.decode(ids, skip_special_tokens=True)


def test_transformers_gives_the_same_text_and_a_prompt_in_front_another() -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=metaspace_tokenizer())
    ids = [PAD, EXTRA, word_id("▁Hello"), word_id("▁world"), EXTRA, word_id("▁日"), word_id("本"), word_id(".")]
    expected = reference.decode(ids, skip_special_tokens=True)
    assert expected == "Hello world 日本."
    assert stream(Detokenizer(METASPACE, []), ids)[:4] == ["<pad>", "<extra_id_0>", "Hello", " world"]
    assert shown(stream(Detokenizer(METASPACE, []), ids), ids) == expected
    assert shown(stream(Detokenizer(METASPACE, [word_id("▁world")]), ids), ids) == f" {expected}"


@given(st.lists(st.sampled_from(METASPACE_IDS), min_size=1, max_size=20), st.data())
def test_a_text_that_began_elsewhere_goes_on_here(ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    second = Detokenizer(METASPACE, [])
    second.prime(ids[:cut])
    assert stream(second, ids[cut:]) == stream(Detokenizer(METASPACE, []), ids)[cut:]


def test_tokens_that_never_complete_a_character_are_held_within_a_bound() -> None:
    detokenizer = Detokenizer(BYTES, [65])
    released = [detokenizer.push(0x80) for _ in range(2 * MAX_WINDOW)]
    assert released[0] == [], "the first one is held"
    assert sum(map(len, released)) >= MAX_WINDOW


@given(st.text(min_size=1, max_size=40), st.data())
def test_a_primed_detokeniser_goes_on_as_if_nothing_happened(text: str, data: st.DataObject) -> None:
    ids = list(text.encode("utf-8", "surrogatepass"))
    first = Detokenizer(BYTES, [65])
    pieces = [first.push(token_id) for token_id in ids]
    done = [sum(map(len, pieces[: index + 1])) for index in range(len(ids))]
    cut = data.draw(st.sampled_from([0, *done]))
    second = Detokenizer(BYTES, [65])
    second.prime(ids[:cut])
    whole = [piece for released in pieces for piece in released] + first.flush()
    assert stream(second, ids[cut:]) == whole[cut:]


def first_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the text before the stop that a reader of single characters completes first; -1 if there is none."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(map(len, found))
    return -1


def cut(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool, int]:
    """(visible text, whether a stop was found, number of tokens until then)."""
    checker = StopChecker(stops, keep=False)
    shown: list[str] = []
    for count, piece in enumerate(pieces, start=1):
        shown += checker.push(piece)
        if checker.is_matched:
            assert len(shown) == count
            return "".join(shown), True, count
    shown += checker.flush()
    return "".join(shown), False, len(pieces)


PIECES = st.lists(st.text("abc", max_size=3), max_size=25)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@given(PIECES, STOPS)
@settings(max_examples=400)
def test_stop_strings_are_cut_across_tokens_and_overlaps(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stops)
    shown, is_matched, _ = cut(pieces, stops)
    assert is_matched == (expected >= 0)
    assert shown == (text if expected < 0 else text[:expected])


@pytest.mark.parametrize("keep", [False, True])
def test_the_oracle_of_stops_differs_from_a_checker_that_forgets_token_borders(keep: bool) -> None:
    pieces, stops = ["xa", "b", "cd"], ["abc"]
    alone = [any(stop in piece for stop in stops) for piece in pieces]
    assert not any(alone)
    assert first_stop("".join(pieces), stops) == 1
    assert cut(pieces, stops) == ("x", True, 3) or keep


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    checker = StopChecker(["abc"], keep=False)
    assert checker.push("xa") == []
    assert checker.push("b") == []
    assert checker.push("x") == ["xa", "b", "x"], "it was not one"
    assert checker.push("y") == ["y"]


def test_kept_stops_match_only_at_the_end_of_a_token() -> None:
    checker = StopChecker(["b", "xy"], keep=True)
    assert (checker.push("abc"), checker.is_matched) == (["abc"], False)
    assert (checker.push("x"), checker.is_matched) == (["x"], False)
    assert (checker.push("y"), checker.is_matched) == (["y"], True)


def test_overlapping_stops_end_at_the_one_complete_first() -> None:
    assert cut(["abcd"], ["abcd", "c"]) == ("ab", True, 1)
    assert cut(["ab", "cd"], ["bcd", "abc"]) == ("", True, 2)


def test_pieces_before_the_required_minimum_cannot_stop() -> None:
    checker = StopChecker(["b"], keep=False)
    assert (checker.push("b", may_stop=False), checker.is_matched) == (["b"], False)
    assert (checker.push("b"), checker.is_matched) == ([""], True)
