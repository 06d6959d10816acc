import pytest
from tokenizers import Tokenizer

from ops.demo_model.corpus import LANGUAGES, plain_sentences
from ops.demo_model.evaluate import CHECKPOINT
from ops.demo_model.tokenizer import CHAT_TEMPLATE, END, SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_the_committed_tokenizer_is_the_one_the_recipe_makes(tokenizer):
    assert train_tokenizer().to_str() == tokenizer.to_str()


def test_round_trip_of_every_sentence_in_all_four_languages(tokenizer):
    texts = plain_sentences()
    assert len(LANGUAGES) == 4
    assert len(texts) > 1000
    for text in [*texts, "naïve 🤖 ９ \n\t x  y", "한국어 العربية"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_round_trip_check_rejects_a_tokenizer_that_loses_a_byte(tokenizer):
    ids = tokenizer.encode("層", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "層"
    rare = tokenizer.encode("鬱", add_special_tokens=False).ids
    assert len(rare) > 1
    assert tokenizer.decode(rare[:-1]) != "鬱"


def test_one_digit_is_one_token(tokenizer):
    assert len(tokenizer.encode("1234567890", add_special_tokens=False).ids) == 10


def test_special_tokens_are_single_and_plain_text_starts_with_one_bos(tokenizer):
    for index, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False).ids == [index]
    ids = tokenizer.encode("hello").ids
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_special_tokens_vanish_from_decoded_text(tokenizer):
    ids = tokenizer.encode("yes" + END, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "yes"


def test_the_committed_chat_template_is_the_one_of_the_recipe():
    assert (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
