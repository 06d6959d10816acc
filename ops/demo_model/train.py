"""The recipe of the demo model, as one command: `python -m ops.demo_model.train --output DIR`.

Corpus, tokenizer, training and export all come from fixed seeds. A run that was stopped goes on where its last
saved state was when the same command is given again.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ops.demo_model.corpus import NUM_DOCUMENTS, Document, corpus
from ops.demo_model.network import Llama, Shape
from ops.demo_model.tokenizer import (
    ASSISTANT_ID,
    BOS_ID,
    END_ID,
    PAD_ID,
    SYSTEM_ID,
    USER_ID,
    save_tokenizer,
    train_tokenizer,
)

SEED = 7
TOKENS_PER_BATCH = 4096
MAX_DOCUMENT_TOKENS = 1024
PEAK_LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 100
STEPS_PER_SAVE = 200


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a document, and which of them the model must learn to write."""

    ids: list[int]
    is_target: list[bool]


class Encoder:
    """Turns documents into examples, exactly as the chat template and the raw prompt tokenise."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, document: Document) -> Example:
        example = Example([BOS_ID], [False])
        if document.system is not None:
            self._extend(example, [SYSTEM_ID, *self._plain(document.system), END_ID], False)
        for prompt, answer in document.turns:
            question = self._plain(prompt)
            self._extend(example, question if document.is_raw else [USER_ID, *question, END_ID], False)
            self._extend(example, [] if document.is_raw else [ASSISTANT_ID], False)
            self._extend(example, [*self._plain(answer), END_ID], True)
        return example

    @staticmethod
    def _extend(example: Example, ids: list[int], is_target: bool) -> None:
        example.ids.extend(ids)
        example.is_target.extend([is_target] * len(ids))


def batches_of(examples: Sequence[Example], epoch: int) -> list[list[Example]]:
    """Batches of examples of similar length, at most TOKENS_PER_BATCH with their padding, in shuffled order."""
    rng = random.Random(f"{SEED}/{epoch}")
    order = sorted(examples, key=lambda example: len(example.ids) + rng.random() * 4)
    batches: list[list[Example]] = [[]]
    for example in order:
        if (len(batches[-1]) + 1) * len(example.ids) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Ids and target marks of a batch, [batch, longest]; padding is never a target."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), PAD_ID)
    is_target = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        is_target[row, : len(example.ids)] = torch.tensor(example.is_target)
    return ids, is_target


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero (Loshchilov and Hutter 2017)."""
    if step < NUM_WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / max(1, num_steps - NUM_WARMUP_STEPS)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """The network, its optimizer and the number of steps done; saved together and restored together."""

    def __init__(self, shape: Shape, num_steps: int, output: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Llama(shape)
        self.num_steps = num_steps
        self.step = 0
        self.state_file = output / "state.pt"
        matrices = [weight for weight in self.model.parameters() if weight.dim() == 2]
        scales = [weight for weight in self.model.parameters() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)

    def restore(self) -> None:
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def learn(self, ids: Tensor, is_target: Tensor) -> float:
        """One step of AdamW; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.num_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model.loss(ids, is_target)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()


def run(trainer: Trainer, examples: Sequence[Example], num_epochs: int) -> None:
    """Train from the trainer's step to its last one; the batches of the steps already done are passed over."""
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=trainer.num_steps, completed=trainer.step, note="")
        step = 0
        for epoch in range(num_epochs):
            for batch in batches_of(examples, epoch):
                step += 1
                if step <= trainer.step:
                    continue
                loss = trainer.learn(*padded(batch))
                note = f"step {trainer.step} of {trainer.num_steps}, loss {loss:.3f}"
                progress.update(bar, completed=trainer.step, note=note)
                if trainer.step % STEPS_PER_SAVE == 0:
                    trainer.save()
                    progress.console.print(f"{time.strftime('%H:%M:%S')} {note}")


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder; weights are rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().bfloat16().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": BOS_ID, "eos_token_id": [END_ID], "pad_token_id": PAD_ID, "do_sample": False}
    for name, content in (
        ("config.json", model.shape.config(BOS_ID, END_ID, PAD_ID)),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def train(output: Path, num_documents: int, num_epochs: int) -> None:
    """The whole recipe: corpus, tokenizer, training, export to `output/checkpoint`."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    encoder = Encoder(tokenizer)
    every = [encoder.encode(document) for document in corpus(num_documents)]
    examples = [example for example in every if len(example.ids) <= MAX_DOCUMENT_TOKENS]
    num_steps = sum(len(batches_of(examples, epoch)) for epoch in range(num_epochs))
    print(f"{len(examples)} documents, {sum(len(example.ids) for example in examples)} tokens, {num_steps} steps")
    trainer = Trainer(Shape(tokenizer.get_vocab_size()), num_steps, output)
    trainer.restore()
    run(trainer, examples, num_epochs)
    trainer.save()
    export(trainer.model, tokenizer, output / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model: about 50 minutes on two CPU cores.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the saved state and the checkpoint")
    parser.add_argument("--num-documents", type=int, default=NUM_DOCUMENTS, help="size of the corpus")
    parser.add_argument("--num-epochs", type=int, default=2, help="passes over the corpus")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    train(options.output, options.num_documents, options.num_epochs)


if __name__ == "__main__":
    main()
