"""The tokenizer wrapper against transformers, for byte-level and SentencePiece-like tokenizers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from common.errors import ConfigurationError
from common.text.tokenizer import TextTokenizer, TokenSpan
from tests.support.tiny_model import byte_tokenizer_json

TEXTS = ["", "a", "hello world", "  two  spaces ", "数えます。", "Xin chào các bạn", "a\nb\tc", "🙂🙂", "<s>x</s>", "é"]


def sentencepiece_json() -> bytes:
    """As Llama 2 has it: words begin with a lower block, unknown characters fall back to bytes, BOS is added."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehlorwx", "▁a", "he", "ll", "hell", "▁hello", "▁w"]
    merges = [("▁", "a"), ("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "w")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer.to_str().encode()


SOURCES = {"bytes": byte_tokenizer_json(), "sentencepiece": sentencepiece_json()}


def pair(name: str) -> tuple[TextTokenizer, PreTrainedTokenizerFast]:
    return TextTokenizer(SOURCES[name]), PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(SOURCES[name]))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_are_those_of_transformers(name: str, text: str, add_special_tokens: bool) -> None:
    ours, reference = pair(name)
    expected = reference(text, add_special_tokens=add_special_tokens).input_ids
    assert ours.encode(text, add_special_tokens) == expected
    assert ours.encode(text + "!", add_special_tokens) != expected


def test_the_sentencepiece_like_one_adds_its_beginning_and_falls_back_to_bytes() -> None:
    ours, _ = pair("sentencepiece")
    assert ours.encode("hello", True)[0] == 1
    assert ours.encode("hello", False)[0] != 1
    assert ours.encode("é", False)[-2:] == [3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize("name", SOURCES)
@given(text=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_texts_come_back_as_in_transformers(name: str, text: str) -> None:
    ours, reference = pair(name)
    ids = ours.encode(text, False)
    assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", SOURCES)
def test_special_tokens_are_skipped_on_request(name: str) -> None:
    ours, _ = pair(name)
    ids = ours.encode("a", False)
    bos = ours.encode("<s>", False)[-1:]
    assert ours.decode(bos + ids).startswith("<s>")
    assert ours.decode(bos + ids, skip_special_tokens=True).strip() == "a"


def test_spans_are_bytes_of_the_text() -> None:
    ours, _ = pair("sentencepiece")
    spans = ours.encode_with_offsets("é hello", True)
    assert spans[0] == TokenSpan(1, "", 0, 0)
    data = "é hello".encode()
    assert all(data[span.start : span.stop].decode() == span.text for span in spans)
    assert any(span.text for span in spans)


def test_truncation_and_padding_of_a_training_run_are_switched_off() -> None:
    tokenizer = Tokenizer.from_buffer(byte_tokenizer_json())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    source = tokenizer.to_str().encode()
    assert json.loads(source)["truncation"] is not None and json.loads(source)["padding"] is not None
    assert TextTokenizer(source).encode("abcdef") == list(b"abcdef")


@pytest.mark.parametrize("source", [b"", b"{}", b"not json", b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused(source: bytes) -> None:
    with pytest.raises(ConfigurationError, match="not a tokenizer.json"):
        TextTokenizer(source)


def test_the_size_counts_added_tokens() -> None:
    assert TextTokenizer(byte_tokenizer_json()).vocab_size == 261
