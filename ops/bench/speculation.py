"""What guessing ahead brings where a text copies, and costs where it does not.

python -m ops.bench.speculation [--rounds 5] [--drafts 8] [--editor FOLDER] [--json FILE]

Every workload runs with `--speculate` and without, in turn, in one process around one loaded model, after a round that
counts for nothing. The figure is the median over rounds of tokens per second with drafts by those without, once every
request has its first token. Answers must be the same.

- A Llama of 125 million parameters with random weights in bfloat16 computes every logit, and 20 is added to that of the
  next token of a script: random tokens that are repeated with an edit in 24 tokens on average, ordinary prose (pages of
  this project), or random tokens that never come again.
- A small model that was trained to edit text edits pieces that it never saw, in bfloat16; `--editor` keeps it.

`--short` is a dry run of seconds on tiny models.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.job import SamplingParams
from common.settings import WorkerSettings
from ops.bench.about import about, caption
from worker.pipe import Submit

if TYPE_CHECKING:
    from ops.bench.editor import Lesson
    from ops.bench.offline import OfflineEngine, Run

MIN_GAIN, MIN_KEPT = 1.7, 0.97
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
EMPHASIS = 20.0
TOKENS_PER_EDIT = 24
SAMPLED: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"do_sample": True, "temperature": 0.9, "seed": 7}}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sizes:
    """Of what is asked of the scripted model, whose `config` it is, and the number of texts to edit."""

    config: dict[str, Any]
    num_prompt: int = 256
    num_output: int = 256
    batches: tuple[int, ...] = (1, 8, 32)
    num_edits: int = 6
    threads: int = 0


SHORT = Sizes(
    CONFIG | TINY | {"vocab_size": 4000}, num_prompt=40, num_output=48, batches=(1, 3), num_edits=2, threads=1
)


@dataclass
class Result:
    """Tokens per second by round. `repeats` is the share of tokens that stood before behind the same two; `num_tokens`
    and drafts are counted over all rounds."""

    name: str
    batch: int
    bar: float | None
    repeats: float
    plain: list[float] = field(default_factory=list)
    guessing: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    is_same: bool = True
    num_right: int | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(one / other for one, other in zip(self.guessing, self.plain, strict=True))

    @property
    def misses(self) -> list[str]:
        found = [] if self.is_same else [f"{self.name}: drafts changed an answer"]
        if self.bar is not None and self.ratio < self.bar:
            found.append(f"{self.name}: {self.ratio:.2f} times as fast, bar {self.bar}")
        return found


# Texts.


@dataclass(frozen=True)
class Script:
    prompt: list[int]
    output: list[int]


def copied(sizes: Sizes) -> Script:
    """A text in which every token occurs once, and the same with tokens replaced, left out and put in."""
    rng = random.Random(3)
    ids = rng.sample(range(sizes.config["vocab_size"]), sizes.num_prompt + sizes.num_output)
    prompt, fresh = ids[: sizes.num_prompt], iter(ids[sizes.num_prompt :])
    output: list[int] = []
    while len(output) < sizes.num_output:
        for token in prompt:
            change = rng.randrange(3 * TOKENS_PER_EDIT)
            output += [[next(fresh)], [], [next(fresh), token]][change] if change < 3 else [token]
    return Script(prompt, output[: sizes.num_output])


def prose(sizes: Sizes) -> Script:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "ops/demo_model/checkpoint/tokenizer.json"))
    ids = tokenizer.encode((ROOT / "docs/protocol.md").read_text(), add_special_tokens=False).ids
    return Script(ids[: sizes.num_prompt], ids[sizes.num_prompt :][: sizes.num_output])


def never_repeated(sizes: Sizes) -> Script:
    ids = random.Random(4).sample(range(sizes.config["vocab_size"]), sizes.num_prompt + sizes.num_output)
    return Script(ids[: sizes.num_prompt], ids[sizes.num_prompt :])


SCRIPTS = {"copy with edits": copied, "prose": prose, "random tokens": never_repeated}


def repeat_rate(script: Script) -> float:
    """The share of the output's tokens that stood before, in prompt or output, behind the same two tokens."""
    ids, num_repeats = [*script.prompt, *script.output], 0
    known: set[tuple[int, ...]] = set()
    for place in range(2, len(ids)):
        gram = tuple(ids[place - 2 : place + 1])
        num_repeats += place >= len(script.prompt) and gram in known
        known.add(gram)
    return num_repeats / len(script.output)


# Measuring.


@contextmanager
def following(script: Script, engine: OfflineEngine) -> Iterator[None]:
    """The engine's model with emphasis on the script's next token behind the script's own, on another one behind any
    other: what goes astray stays astray."""
    import torch

    device: Any = engine.device
    model = device.model
    script_ids = torch.tensor([*script.prompt, *script.output])
    forward = model.forward

    def emphasised(tokens: Any, positions: Any, batch: Any, pages: Any, wanted: Any) -> Any:
        # others than the model's own, of which it knows a summary
        logits = forward(tokens, positions, batch, pages, wanted).clone()
        places = positions[wanted]
        is_astray = tokens[wanted] != script_ids[places]
        following_ids = (script_ids[places + 1] + is_astray) % logits.shape[1]
        logits[torch.arange(len(wanted)), following_ids] += EMPHASIS
        return logits

    model.forward = emphasised
    try:
        yield
    finally:
        del model.forward


def engines(folder: Path, drafts: int, **options: Any) -> tuple[OfflineEngine, OfflineEngine]:
    """Without and with drafts, around one device."""
    from ops.bench.offline import OfflineEngine

    settings = WorkerSettings(model_id=str(folder), prefix_caching=False, max_num_seqs=32, **options)
    plain = OfflineEngine(settings)
    return plain, OfflineEngine(settings.model_copy(update={"speculate": drafts}), (plain.device, plain.ready))


def compare(
    result: Result, pair: tuple[OfflineEngine, OfflineEngine], batches: Sequence[list[Submit]], rounds: int
) -> None:
    """Run both engines, who is first in turn too, and add to `result` what was seen."""
    for number in range(rounds + 1):
        seen: dict[int, list[Run]] = {}
        for side in (number % 2, 1 - number % 2):
            seen[side] = [pair[side].run(batch) for batch in batches]
        result.is_same &= [run.outputs for run in seen[0]] == [run.outputs for run in seen[1]]
        if number:
            result.plain.append(speed(seen[0]))
            result.guessing.append(speed(seen[1]))
            result.num_tokens += sum(run.num_tokens for run in seen[1])
            result.num_drafts += sum(run.num_drafts for run in seen[1])
            result.num_accepted += sum(run.num_accepted for run in seen[1])


def speed(runs: Sequence[Run]) -> float:
    return sum(run.num_decoded for run in runs) / sum(run.decode_s for run in runs)


def submit(name: str, prompt: Sequence[int], length: int, params: dict[str, Any], ends: Sequence[int] = ()) -> Submit:
    return Submit(
        request_id=name,
        epoch=1,
        prompt_ids=prompt,
        output_ids=[],
        params=SamplingParams(max_new_tokens=length, **params),
        eos_token_ids=list(ends),
    )


def of_scripts(folder: Path, sizes: Sizes, drafts: int, rounds: int) -> Iterator[Result]:
    """The scripted model: every text, greedy and at batch 1 seeded too."""
    (folder / "config.json").write_text(json.dumps(sizes.config))
    room = max(sizes.batches) * (sizes.num_prompt + sizes.num_output + 64)
    options = {"load_format": "dummy", "dtype": "bfloat16", "kv_tokens": room, "threads": sizes.threads}
    pair = engines(folder, drafts, **options)
    for name, make in SCRIPTS.items():
        script, gain = make(sizes), MIN_GAIN if make is copied else MIN_KEPT
        for word, batch in [("greedy", batch) for batch in sizes.batches] + [("seeded", 1)]:
            result = Result(f"{name}, {word}", batch, gain if batch == 1 else None, repeat_rate(script))
            asked = [submit(str(n), script.prompt, len(script.output), SAMPLED[word]) for n in range(batch)]
            with following(script, pair[0]):
                compare(result, pair, [asked], rounds)
            yield result


def of_editor(folder: Path, sizes: Sizes, lesson: Lesson, drafts: int, rounds: int) -> Iterator[Result]:
    """The model that edits, one piece after the other."""
    from ops.bench.editor import END_ID, Texts, answer, question, train_editor

    if not (folder / "config.json").exists():
        train_editor(folder, lesson)
    pair = engines(folder, drafts, dtype="bfloat16", threads=sizes.threads)
    texts = Texts(lesson.num_bytes, seed=11)
    pieces = [texts.held_out() for _ in range(sizes.num_edits)]
    rate = statistics.mean(repeat_rate(Script(question(piece), answer(piece))) for piece in pieces)
    for word, params in SAMPLED.items():
        result = Result(f"trained to edit, {word}", 1, MIN_GAIN, rate)
        batches = [[submit("edit", question(piece), lesson.num_bytes + 1, params, [END_ID])] for piece in pieces]
        compare(result, pair, batches, rounds)
        found = [pair[0].run(batch).outputs["edit"] for batch in batches]
        result.num_right = sum(ids == answer(piece) for ids, piece in zip(found, pieces, strict=True))
        yield result


def table_of_file(found: dict[str, Any]) -> str:
    """Of what `--json` writes."""
    names = {each.name for each in fields(Result)}
    results = [Result(**{name: row[name] for name in row if name in names}) for row in found["workloads"]]
    return caption(found["about"]) + "\n\n" + table(results)


def table(results: Sequence[Result]) -> str:
    titles = ["text", "batch", "repeat rate", "without, tokens/s", "with", "times as fast (range)", "bar"]
    titles += ["drafts a token", "accepted", "same answers"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *map(_row, results)])


def _row(result: Result) -> str:
    ratios = [one / other for one, other in zip(result.guessing, result.plain, strict=True)]
    cells = [result.name, str(result.batch), f"{result.repeats:.2f}"]
    cells += [f"{statistics.median(side):.0f}" for side in (result.plain, result.guessing)]
    cells += [f"{result.ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", str(result.bar or "")]
    cells += [f"{result.num_drafts / result.num_tokens:.2f}"]
    cells += [f"{result.num_accepted / result.num_drafts:.2f}" if result.num_drafts else "-"]
    return "| " + " | ".join([*cells, "yes" if result.is_same else "NO"]) + " |"


def main(arguments: Sequence[str]) -> int:
    from ops.bench.offline import wait_as_workers_do

    wait_as_workers_do()
    # imports torch
    from ops.bench.editor import Lesson

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafts", type=int, default=8, help="what is given to --speculate")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--editor", type=Path, help="folder of the trained model; trained there if it is empty")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args(arguments)
    sizes, lesson = Sizes(CONFIG, batches=tuple(map(int, options.batches.split(",")))), Lesson()
    if options.short:
        sizes, lesson = SHORT, Lesson(hidden_size=32, num_layers=1, num_bytes=24, num_steps=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [
            *of_scripts(folder, sizes, options.drafts, options.rounds),
            *of_editor(options.editor or folder / "editor", sizes, lesson, options.drafts, options.rounds),
        ]
    if options.json:
        found = {
            "about": about(options.rounds),
            "drafts": options.drafts,
            "workloads": [asdict(result) | {"ratio": result.ratio} for result in results],
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    missed = [line for result in results for line in result.misses]
    sys.stdout.write("\n".join([table(results), *missed]) + "\n")
    return 1 if missed and not options.short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
