"""Texts by which the demo model is quantised and judged: `python -m ops.demo_model.texts --calibration FILE --held-out
FILE`.

The one for calibration is from the corpus. The other has chats about sums and ranges that the corpus was kept free of,
in every wording that asks for them; many turns make it hard, since the numbers of the others are in the way.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from ops.demo_model.corpus import LANGUAGES, PARTS, Document, Pair, corpus, sentences
from ops.demo_model.prompts import HELD_OUT_RANGES, HELD_OUT_SUMS
from ops.demo_model.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

SEED = 4
TURNS_OF_A_CHAT = 16


def calibration_text(num_documents: int = 1000) -> str:
    """Documents from the beginnings of all parts of the corpus in turn, as the model was trained on them."""
    parts = [corpus(part, num_documents // len(PARTS)) for part in PARTS]
    mixed = chain.from_iterable(zip_longest(*parts))
    return "\n".join(_rendered(document) for document in mixed if document is not None)


def _rendered(document: Document) -> str:
    if document.is_raw:
        return BOS + "".join(document.turns[0]) + END
    system = "" if document.system is None else SYSTEM + document.system + END
    return BOS + system + "".join(chain.from_iterable(_turn(*turn) for turn in document.turns))


def _turn(prompt: str, answer: str) -> Pair:
    return USER + prompt + END + ASSISTANT, answer + END


def held_out_chats() -> list[list[str]]:
    """Each a list of texts, of which every second one, from the second on, is the model's to write."""
    pairs = held_out_pairs()
    random.Random(SEED).shuffle(pairs)
    starts = range(0, len(pairs) - TURNS_OF_A_CHAT + 1, TURNS_OF_A_CHAT)
    return [_chat(pairs[start : start + TURNS_OF_A_CHAT]) for start in starts]


def _chat(pairs: Sequence[Pair]) -> list[str]:
    texts = list(chain.from_iterable(_turn(*pair) for pair in pairs))
    return [BOS + texts[0], *texts[1:]]


def held_out_pairs() -> list[Pair]:
    """Questions and answers about what the corpus never has, in every wording that it has for such questions."""
    pairs: list[Pair] = []
    for data in map(sentences, LANGUAGES):
        for first, second in sorted(HELD_OUT_SUMS | {(second, first) for first, second in HELD_OUT_SUMS}):
            answer = f"{first} + {second} = {first + second}"
            pairs += [(pattern.format(a=first, b=second), answer) for pattern in data["arithmetic"]["add"]]
        for first, last in sorted(HELD_OUT_RANGES):
            answer = str(data["separator"]).join(str(number) for number in range(first, last + 1))
            pairs += [(pattern.format(a=first, b=last), answer) for pattern in data["count"]["range"]]
    return pairs


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="for `inferfleet prepare --calibration`")
    parser.add_argument("--held-out", type=Path, required=True, help="for `python -m ops.bench.perplexity --text`")
    options = parser.parse_args(arguments)
    options.calibration.write_text(calibration_text(), encoding="utf-8")
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in held_out_chats()]
    options.held_out.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
