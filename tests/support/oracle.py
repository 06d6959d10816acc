"""What transformers says: greedy text of the demo model, the reference that the whole stack is compared with."""

from __future__ import annotations

from dataclasses import dataclass
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


def base() -> Any:
    """transformers' demo model, which nobody may change."""
    return _loaded()[1]


def greedy_ids(ids: list[int], max_new_tokens: int, model: Any = None) -> list[int]:
    import torch

    model = model or base()
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


def greedy_chat(text: str, max_new_tokens: int, model: Any = None) -> str:
    """`model` is another one than the demo model itself."""
    return text_of(greedy_ids(chat_ids([{"role": "user", "content": text}]), max_new_tokens, model))


def greedy_completion(text: str, max_new_tokens: int, model: Any = None) -> str:
    return text_of(greedy_ids(prompt_ids(text), max_new_tokens, model))


@lru_cache(maxsize=1)
def _exact() -> Any:
    """The model in float64; transformers keeps norms, rope and (with eager attention) the softmax in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float64, attn_implementation="eager")
    return model.eval()


@dataclass(frozen=True)
class Greedy:
    """Greedy ids up to and with the end, and the smallest distance between best and second logit on the way."""

    ids: tuple[int, ...]
    margin: float


def exact_greedy(prompts: list[list[int]], max_new_tokens: int, repetition_penalty: float = 1.0) -> list[Greedy]:
    """What transformers generates in float64; prompts of equal length share a batch, so nothing is padded."""
    found: dict[int, Greedy] = {}
    for length in {len(prompt) for prompt in prompts}:
        members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        rows = _generate([prompts[index] for index in members], max_new_tokens, repetition_penalty)
        found |= dict(zip(members, rows, strict=True))
    return [found[index] for index in range(len(prompts))]


def _generate(prompts: list[list[int]], max_new_tokens: int, repetition_penalty: float) -> list[Greedy]:
    import torch

    model = _exact()
    with torch.inference_mode():
        made = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(made.scores, 1).topk(2).values
    outputs, margins = made.sequences[:, len(prompts[0]) :].tolist(), (best[..., 0] - best[..., 1]).tolist()
    return [_until_end(ids, row) for ids, row in zip(outputs, margins, strict=True)]


def end_ids() -> list[int]:
    """The tokens that end an answer of the demo model."""
    ends = _exact().generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends)


def _until_end(ids: list[int], margins: list[float]) -> Greedy:
    length = next((index + 1 for index, token in enumerate(ids) if token in end_ids()), len(ids))
    return Greedy(tuple(ids[:length]), min(margins[:length]))


def exact_logits(prompt: list[int], output: list[int], repetition_penalty: float = 1.0) -> Any:
    """Teacher-forced: the float64 scores [len(output), vocab] from which each token of `output` is to be picked."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([prompt + output])
    with torch.inference_mode():
        logits = _exact()(ids).logits[0, len(prompt) - 1 : -1]
        if repetition_penalty == 1.0:
            return logits
        process = RepetitionPenaltyLogitsProcessor(repetition_penalty)
        rows = [process(ids[:, : len(prompt) + index], row[None]) for index, row in enumerate(logits)]
        return torch.cat(rows)
