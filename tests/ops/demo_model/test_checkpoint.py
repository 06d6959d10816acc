import re

import pytest
import torch

from ops.demo_model.evaluate import CHECKPOINT, NUM_REQUIRED, Answer, Reference, passes
from ops.demo_model.prompts import LONG_STREAM_TOKENS, counts, examinations, long_streams, raw_prompts, says

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def reference():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference(CHECKPOINT)
    torch.set_num_threads(before)


def test_the_table_has_eight_kinds_in_four_languages_and_half_of_it_is_held_out():
    rows = examinations()
    assert len(rows) == len({row.prompt for row in rows}) == 32
    assert len({row.kind for row in rows}) == 8
    assert {(row.kind, row.language) for row in rows} == {
        (kind, language) for kind in {row.kind for row in rows} for language in ("en", "ja", "zh", "vi")
    }
    assert sum(row.is_held_out for row in rows) >= 16


def test_the_committed_checkpoint_passes_the_table_greedily(reference):
    rows = examinations()
    answers = reference.chat([row.prompt for row in rows])
    results = {row.prompt: passes(row, answer) for row, answer in zip(rows, answers, strict=True)}
    assert len(results) == 32
    assert sum(results.values()) >= NUM_REQUIRED, [prompt for prompt, has_passed in results.items() if not has_passed]


def test_every_predicate_rejects_its_wrong_answer_and_the_answer_to_another_kind(reference):
    rows = examinations()
    answers = reference.chat([row.prompt for row in rows])
    num_checked = 0
    for row, answer in zip(rows, answers, strict=True):
        assert not row.passes(row.wrong)
        assert not row.passes("")
        for other, other_answer in zip(rows, answers, strict=True):
            if other.kind != row.kind and {row.kind, other.kind} != {"deep learning", "neural network"}:
                # Deep learning is explained with networks, hence one definition can pass as the other.
                num_checked += passes(other, other_answer) and not row.passes(other_answer.text)
                assert not (passes(other, other_answer) and row.passes(other_answer.text)), (row.prompt, other.prompt)
    assert num_checked > 500


def test_predicates_reject_the_wrong_language():
    english = "Deep learning is the use of neural networks with many layers."
    assert says("en", "layer|network")(english)
    for language in ("ja", "zh", "vi"):
        assert not says(language, "layer|network")(english)


def test_counting_predicate_rejects_gaps_repeats_and_chatter():
    assert counts(1, 4)("1, 2, 3, 4")
    for wrong in ("1, 2, 4", "1, 2, 2, 3, 4", "4, 3, 2, 1", "1, 2, 3, 4, 5", "Here: 1, 2, 3, 4"):
        assert not counts(1, 4)(wrong)


def test_an_answer_without_end_does_not_pass():
    row = examinations()[0]
    text = "Deep learning is a kind of machine learning with neural networks."
    assert passes(row, Answer(text, 12, True, 1.0))
    assert not passes(row, Answer(text, 12, False, 1.0))


def test_plain_text_prompts_work_without_the_template(reference):
    rows = raw_prompts()
    answers = reference.raw([row.prompt for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert passes(row, answer), (row.prompt, answer)
        assert not row.passes(row.wrong)


def test_long_answers_are_long_enough_to_stream(reference):
    rows = [row for row in long_streams() if row.kind == "long"]
    assert len(rows) == 10
    answers = reference.chat([row.prompt for row in rows], max_new_tokens=700)
    for row, answer in zip(rows, answers, strict=True):
        assert answer.num_tokens >= LONG_STREAM_TOKENS, (row.prompt, answer)
        assert passes(row, answer), (row.prompt, answer)
        assert not row.passes(row.wrong)


def test_file_sizes_are_under_the_bar():
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sizes.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert MEGABYTE < sizes["model.safetensors"] < 16 * MEGABYTE
    assert sum(sizes.values()) < 16 * MEGABYTE


def test_the_model_card_has_the_table_and_says_what_the_model_is():
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert "not an assistant" in card
    for row in [*examinations(), *raw_prompts(), *long_streams()]:
        assert f"| {row.prompt} |" in card
    (num_passed,) = re.findall(r"\*\*(\d+) of 32 pass", card)
    assert int(num_passed) >= NUM_REQUIRED
