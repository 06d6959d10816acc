import json
import re

from ops.demo_model import texts
from ops.demo_model.corpus import normalized
from ops.demo_model.prompts import HELD_OUT_RANGES, HELD_OUT_SUMS, held_out_prompts
from ops.demo_model.texts import calibration_text, held_out_chats, held_out_pairs
from ops.demo_model.tokenizer import BOS, END


def test_nothing_that_is_asked_in_held_out_chats_is_in_the_calibration_text():
    known, text = normalized(calibration_text()), calibration_text()
    assert text == calibration_text() and text.count(BOS) > 900
    answers = {normalized(answer) for _, answer in held_out_pairs()}
    assert len(answers) >= 2 * len(HELD_OUT_SUMS) + len(HELD_OUT_RANGES)
    # digits may follow each other anywhere: it is whole answers that must be unknown
    known_answers = {normalized(part) for part in re.split(r"<\|\w+\|>|\n", text)}
    assert not answers & known_answers
    sums = {normalized(f"{first} + {second} = {first + second}") for first in range(51) for second in range(51)}
    assert len(sums & known_answers) > 50, "there was something to find"
    assert not [prompt for prompt in held_out_prompts() if normalized(prompt) in known]


def test_chats_have_questions_and_answers_in_turn():
    chats = held_out_chats()
    assert chats == held_out_chats() and len(chats) > 30
    for chat in chats:
        assert len(chat) == 2 * texts.TURNS_OF_A_CHAT and chat[0].startswith(BOS)
        assert all(answer.endswith(END) and any(sign.isdigit() for sign in answer) for answer in chat[1::2])


def test_the_command_writes_both(tmp_path):
    assert texts.main(["--calibration", str(tmp_path / "a"), "--held-out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a").read_text(encoding="utf-8") == calibration_text()
    lines = (tmp_path / "b").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == held_out_chats()
