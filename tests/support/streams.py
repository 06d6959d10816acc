"""Greedy answers of transformers' models that hang on no rounding, and streams of completions to compare them with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.support import tiny_models
from tests.support.fleet import Fleet

NUM_TOKENS, MIN_TOKENS = 24, 12
MIN_MARGIN = 1e-4
PROMPTS = ["".join(Random(number).choices(ascii_lowercase + " ", k=30)) for number in range(64)]
"""Equally long, so that the reference needs no padding, and different to the last letter."""


@dataclass(frozen=True)
class Greedy:
    """What the reference says to `prompt` in `num_tokens`, as far as that does not hang on rounding."""

    prompt: str
    num_tokens: int
    text: str


@torch.inference_mode()
def longest_clear_answer(model: Any, folder: Path) -> Greedy:
    """The prompt to which the model has one, with the tokenizer of a folder."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.scores, 1).topk(2).values
    answers = made.sequences[:, ids.shape[1] :]
    is_clear = best[..., 0] - best[..., 1] > MIN_MARGIN * best[..., 0].abs()
    # a special token ends a character for who reads as it comes, not for who decodes everything at once
    lengths = (is_clear & (answers < tiny_models.NUM_BYTES)).cumprod(1).sum(1)
    row = int(lengths.argmax())
    length = int(lengths[row])
    assert length >= MIN_TOKENS, "every answer hangs on rounding somewhere"
    return Greedy(PROMPTS[row], length, str(tokenizer.decode(answers[row, :length].tolist())))


def stream(fleet: Fleet, name: str, asked: Greedy) -> tuple[str, int]:
    """The text and the number of events of a stream."""
    body = {"model": name, "prompt": asked.prompt, "max_tokens": asked.num_tokens, "temperature": 0, "stream": True}
    texts = []
    with (
        fleet.client() as client,
        client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                texts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(texts), len(texts)
