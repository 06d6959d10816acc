"""The recipe of the demo model, as one command: `python -m ops.demo_model.train --output DIR`.

Corpus, tokenizer, training and export all come from fixed seeds. A run that was stopped goes on where its last
saved state was when the same command is given again.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ops.demo_model.corpus import PARTS, Document, Part, corpus
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
MAX_DOCUMENT_TOKENS = 1024
NUM_WARMUP_STEPS = 100
STEPS_PER_SAVE = 200


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training on one part of the corpus.

    The learning rate is a cosine over `num_cosine_steps`, which may reach beyond the end of the phase. A step adds up
    the gradients of `num_batches` batches of `batch_tokens`. A token of an answer of n tokens weighs n to the power of
    -`brevity`.
    """

    part: Part
    num_steps: int
    num_cosine_steps: int
    peak: float
    num_batches: int
    batch_tokens: int
    brevity: float


# In the first phase the sentences fill every step; the others mix lengths within a step and give short answers more
# weight, without which the few tokens of a sum or of the end of a count drown in the sentences.
PHASES = (
    Phase(PARTS[0], 2000, 3524, 2e-3, num_batches=1, batch_tokens=4096, brevity=0.0),
    Phase(PARTS[1], 600, 2600, 1.5e-3, num_batches=4, batch_tokens=1024, brevity=0.5),
    Phase(PARTS[1], 2000, 2000, 1.2e-3, num_batches=2, batch_tokens=1024, brevity=0.5),
    Phase(PARTS[2], 1800, 1800, 1e-3, num_batches=2, batch_tokens=1024, brevity=0.5),
)


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


def batches_of(examples: Sequence[Example], epoch: int, num_tokens: int) -> list[list[Example]]:
    """Batches of examples of similar length, at most num_tokens with their padding, in shuffled order."""
    rng = random.Random(f"{SEED}/{epoch}")
    order = sorted(examples, key=lambda example: len(example.ids) + rng.random() * 4)
    batches: list[list[Example]] = [[]]
    for example in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(example.ids) > num_tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def padded(batch: Sequence[Example], brevity: float = 0.0) -> tuple[Tensor, Tensor]:
    """Ids [batch, longest] and the weight of each as a target; what the model need not write weighs nothing."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), PAD_ID)
    weights = torch.zeros((len(batch), longest))
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.is_target) / sum(example.is_target) ** brevity
    return ids, weights


def steps_of(phase: Phase, examples: Sequence[Example]) -> Iterator[list[list[Example]]]:
    """The batches of each step of a phase, in as many passes over the examples as it needs."""
    batches = chain.from_iterable(batches_of(examples, epoch, phase.batch_tokens) for epoch in count())
    for _ in range(phase.num_steps):
        yield list(islice(batches, phase.num_batches))


def learning_rate(phase: Phase, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero (Loshchilov and Hutter 2017); step counts within the phase."""
    if step < NUM_WARMUP_STEPS:
        return phase.peak * (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / max(1, phase.num_cosine_steps - NUM_WARMUP_STEPS)
    return phase.peak * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """The network, its optimizer and the number of steps done; saved together and restored together."""

    def __init__(self, shape: Shape, output: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Llama(shape)
        self.step = 0
        self.state_file = output / "state.pt"
        matrices = [weight for weight in self.model.parameters() if weight.dim() == 2]
        scales = [weight for weight in self.model.parameters() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

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

    def learn(self, batches: Sequence[tuple[Tensor, Tensor]], rate: float) -> float:
        """One step of AdamW over the batches of (ids, weights); the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total_weight = sum(weights.sum().item() for _, weights in batches)
        total_loss = 0.0
        for ids, weights in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.model.loss(ids, weights) / total_weight
            torch.autograd.backward(loss)
            total_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total_loss


def run(trainer: Trainer, phase: Phase, examples: Sequence[Example], num_before: int, progress: Progress) -> None:
    """Train through a phase that begins after `num_before` steps; steps that were done already are passed over."""
    bar = progress.add_task("training", total=phase.num_steps, note="")
    for step, batches in enumerate(steps_of(phase, examples)):
        if num_before + step < trainer.step:
            continue
        loss = trainer.learn([padded(batch, phase.brevity) for batch in batches], learning_rate(phase, step))
        note = f"step {trainer.step}, loss {loss:.3f}"
        progress.update(bar, completed=step + 1, note=note)
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


def examples_of(part: Part, encoder: Encoder, num_documents: int | None) -> list[Example]:
    """The examples of a part of the corpus, without the few that are very long."""
    examples = [encoder.encode(document) for document in corpus(part, num_documents)]
    return [example for example in examples if len(example.ids) <= MAX_DOCUMENT_TOKENS]


def train(output: Path, phases: Sequence[Phase] = PHASES, num_documents: int | None = None) -> None:
    """The whole recipe: tokenizer, corpus, training phase by phase, export to `output/checkpoint`."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    trainer = Trainer(Shape(tokenizer.get_vocab_size()), output)
    trainer.restore()
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        num_before = 0
        for phase in phases:
            if trainer.step < num_before + phase.num_steps:
                examples = examples_of(phase.part, Encoder(tokenizer), num_documents)
                run(trainer, phase, examples, num_before, progress)
            num_before += phase.num_steps
    trainer.save()
    export(trainer.model, tokenizer, output / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model: under an hour on two CPU cores.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the saved state and the checkpoint")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    train(options.output)


if __name__ == "__main__":
    main()
