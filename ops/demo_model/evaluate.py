"""The examination of the demo model, as one command: `python -m ops.demo_model.evaluate`.

Answers every prompt greedily with transformers as the runner, applies the predicates and writes the tables into the
model card of the checkpoint. Weights are read as they are stored (bfloat16) and computed with in float32.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ops.demo_model.corpus import PARTS, corpus, normalized
from ops.demo_model.prompts import LONG_STREAM_TOKENS, Examination, examinations, long_streams, raw_prompts

CHECKPOINT = Path(__file__).parent / "checkpoint"
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
NUM_REQUIRED = 28


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote, without the end mark; margin: smallest lead of a chosen token's logit over the second."""

    text: str
    num_tokens: int
    is_finished: bool
    margin: float


class Reference:
    """The checkpoint in float32 under transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def chat(self, prompts: Sequence[str], max_new_tokens: int = 128) -> list[Answer]:
        """Greedy answers to single-turn chats."""
        rendered = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
        return self._answers(rendered, False, max_new_tokens)

    def raw(self, prompts: Sequence[str], max_new_tokens: int = 128) -> list[Answer]:
        """Greedy continuations of plain text."""
        return self._answers(prompts, True, max_new_tokens)

    def _answers(self, texts: Sequence[str], add_special_tokens: bool, max_new_tokens: int) -> list[Answer]:
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=add_special_tokens)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        rows = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        best = torch.stack(output.logits, dim=1).topk(2).values
        margins = best[..., 0] - best[..., 1]
        return [self._answer(row, margin) for row, margin in zip(rows, margins, strict=True)]

    def _answer(self, ids: list[int], margins: torch.Tensor) -> Answer:
        end = self.tokenizer.eos_token_id
        num_tokens = ids.index(end) if end in ids else len(ids)
        text = self.tokenizer.decode(ids[:num_tokens])
        return Answer(text, num_tokens, end in ids, margins[: num_tokens + 1].min().item())


def prompts_in_corpus(prompts: Sequence[str]) -> set[str]:
    """Those of the prompts that occur anywhere in the corpus, whatever their case, spaces and punctuation."""
    wanted = {prompt: normalized(prompt) for prompt in prompts}
    texts = {text for part in PARTS for document in corpus(part) for text in document.parts}
    everything = "\n".join(normalized(text) for text in texts)
    return {prompt for prompt, form in wanted.items() if form in everything}


def passes(row: Examination, answer: Answer) -> bool:
    """Whether the answer is right, and long enough for a row of the kind `long`."""
    is_long_enough = row.kind != "long" or answer.num_tokens >= LONG_STREAM_TOKENS
    return answer.is_finished and is_long_enough and row.passes(answer.text)


def table(rows: Sequence[Examination], answers: Sequence[Answer], known: set[str]) -> str:
    """A Markdown table of prompt, in the corpus or not, answer, tokens, margin and result."""
    lines = ["| kind | prompt | in corpus | answer | tokens | margin | pass |", "|---|---|---|---|---|---|---|"]
    for row, answer in zip(rows, answers, strict=True):
        cells = [row.kind, row.prompt, _word(row.prompt in known), answer.text.strip(), str(answer.num_tokens)]
        cells += [f"{answer.margin:.2f}", _word(passes(row, answer))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _word(is_true: bool) -> str:
    return "yes" if is_true else "no"


def evaluate(folder: Path) -> int:
    """Answer everything, write `README.md` into the folder and return how many of the 32 prompts pass."""
    reference = Reference(folder)
    main_rows, raw_rows, long_rows = examinations(), raw_prompts(), long_streams()
    known = prompts_in_corpus([row.prompt for row in [*main_rows, *raw_rows, *long_rows]])
    answers = reference.chat([row.prompt for row in main_rows])
    num_passed = sum(passes(row, answer) for row, answer in zip(main_rows, answers, strict=True))
    raw_answers = reference.raw([row.prompt for row in raw_rows])
    long_answers = reference.chat([row.prompt for row in long_rows], max_new_tokens=1024)
    card = CARD_TEMPLATE.read_text(encoding="utf-8")
    card = card.replace("{num_passed}", str(num_passed)).replace("{main_table}", table(main_rows, answers, known))
    card = card.replace("{raw_table}", table(raw_rows, raw_answers, known))
    card = card.replace("{long_table}", table(long_rows, long_answers, known))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return num_passed


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine the demo model and write its model card.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    options = parser.parse_args()
    num_passed = evaluate(options.checkpoint)
    print(f"{num_passed} of 32 prompts pass; the tables are in {options.checkpoint / 'README.md'}")
    raise SystemExit(0 if num_passed >= NUM_REQUIRED else 1)


if __name__ == "__main__":
    main()
