"""What transformers says: greedy text of the demo model, the reference that the whole stack is compared with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tests.support.fleet import DEMO_MODEL


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return tokenizer, model.eval()


def chat_ids(messages: list[dict[str, str]]) -> list[int]:
    tokenizer, _ = _loaded()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


def prompt_ids(text: str) -> list[int]:
    tokenizer, _ = _loaded()
    return [int(token) for token in tokenizer(text)["input_ids"]]


def greedy_ids(ids: list[int], max_new_tokens: int) -> list[int]:
    import torch

    _, model = _loaded()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(ids) :]]


def text_of(ids: list[int]) -> str:
    tokenizer, _ = _loaded()
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def greedy_chat(text: str, max_new_tokens: int) -> str:
    return text_of(greedy_ids(chat_ids([{"role": "user", "content": text}]), max_new_tokens))


def greedy_completion(text: str, max_new_tokens: int) -> str:
    return text_of(greedy_ids(prompt_ids(text), max_new_tokens))


def top_two(prompt: list[int], output: list[int]) -> list[list[tuple[int, float]]]:
    """Teacher-forced: for each output position the two best (id, log-probability), in float64."""
    import torch

    _, model = _loaded()
    with torch.inference_mode():
        logits = model.double()(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        model.float()
        best = logits.double().log_softmax(-1).topk(2)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in rows]
