from dataclasses import replace

import pytest

from ops.demo_model.corpus import LANGUAGES, PARTS, Document, corpus, normalized, sentences
from ops.demo_model.evaluate import prompts_in_corpus
from ops.demo_model.prompts import HELD_OUT_RANGES, HELD_OUT_SUMS, examinations, raw_prompts


@pytest.mark.parametrize("part", PARTS)
def test_the_corpus_is_the_same_every_time_and_another_for_another_seed(part):
    first = corpus(part, 500)
    assert len(first) == 500
    assert first == corpus(part, 500)
    assert first != corpus(replace(part, seed=part.seed + 100), 500)


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one():
    assert corpus(PARTS[0], 300) == corpus(PARTS[0], 500)[:300]


def test_every_language_has_the_same_kinds_of_sentences():
    english = sentences("en")
    for language in LANGUAGES:
        data = sentences(language)
        assert data.keys() == english.keys()
        assert len(data["numbers"]) == 20
        assert data["staple"] in {question for entry in data["talk"] for question in entry["ask"]}


def test_held_out_prompts_are_not_in_the_corpus_and_the_others_are():
    rows = [*examinations(), *raw_prompts()]
    held_out = {row.prompt for row in rows if row.is_held_out}
    assert len(held_out) >= 16
    known = prompts_in_corpus([row.prompt for row in rows])
    assert known == {row.prompt for row in rows} - held_out


def test_normalized_finds_a_prompt_in_another_case_and_punctuation():
    assert normalized("what is 17+25 ?") == normalized("What is 17 + 25?")
    assert normalized("What is 17 + 26?") != normalized("What is 17 + 25?")


def test_held_out_sums_and_ranges_are_not_in_the_corpus_in_another_wording():
    turns = [turn for part in PARTS for document in corpus(part, 20_000) for turn in document.turns]
    answers = {answer.strip() for _, answer in turns}
    assert "17 + 24 = 41" in answers
    for first, second in HELD_OUT_SUMS:
        assert not answers & {f"{a} + {b} = {first + second}" for a, b in ((first, second), (second, first))}
    assert any(answer.startswith("30, 31, 32") for answer in answers)
    for first, last in HELD_OUT_RANGES:
        rows = {separator.join(map(str, range(first, last + 1))) for separator in (", ", "、")}
        assert not answers & rows


def test_raw_documents_have_one_turn():
    raw = [document for document in corpus(PARTS[0], 2000) if document.is_raw]
    assert len(raw) > 300
    assert all(len(document.turns) == 1 and document.system is None for document in raw)


def test_parts_of_a_document_are_all_its_texts():
    document = Document((("question", "answer"), ("again", "answer")), system="be kind")
    assert document.parts == ["be kind", "question", "answer", "again", "answer"]
