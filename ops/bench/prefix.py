"""What a long chat waits for: the first token of its tenth turn, beside that of a prompt which is only the new tokens.

python -m ops.bench.prefix [--rounds 7] [--http] [--json FILE]

A Llama of 125 million parameters with random weights in bfloat16 holds a chat: a system prompt of 3,000 tokens and some
more (so that what is left behind the last whole block is not the same in each round), ten turns of 50 new tokens, 30 of
an answer. Before or behind each turn, in turn, comes a prompt of 50 tokens without history. The figure is the median
over rounds, each with a system prompt of its own, of tenth turn by prompt without history.

What a tenth turn costs beyond that is shown beside it: the tokens behind the last whole block, the attention over the
history, and the search in the prefix cache, which is measured without a model. The roofline (ops/bench/roofline.py)
shows what of it no kernel could avoid. `--http` does the same over HTTP, with
gateway, Redis and worker on the same machine and a chat of messages, whose template adds a token to each of them.

`--short` is a dry run of seconds on a tiny model.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.settings import WorkerSettings
from ops.bench.about import about, caption
from ops.bench.roofline import Machine, RateMeter, best, step_work
from ops.bench.serving_cost import running_fleet
from ops.bench.speculation import CONFIG, TINY, submit
from worker.engine.blocks import BlockDigests, BlockPool
from worker.engine.device import StepResult
from worker.engine.request import request_of
from worker.engine.scheduler import EngineLimits, Scheduler
from worker.pipe import IDS

if TYPE_CHECKING:
    from ops.bench.offline import OfflineEngine

MAX_RATIO = 1.3
BAR = "last turn by new tokens alone, time until the first token"
PLACES = IN_PROCESS, OVER_HTTP = "in process", "over HTTP"
BLOCK_SIZE = 16
SHIFT = 5
"""Tokens that the system prompt of a round has more than that of the one before."""


@dataclass(frozen=True)
class Sizes:
    config: dict[str, Any]
    num_system: int = 3000
    num_new: int = 50
    num_answer: int = 30
    num_turns: int = 10
    threads: int = 0

    def num_total(self, rounds: int) -> int:
        return self.num_system + rounds * SHIFT + self.num_turns * (self.num_new + self.num_answer)


SHORT = Sizes(CONFIG | TINY | {"vocab_size": 500}, num_system=70, num_new=8, num_answer=4, num_turns=3, threads=1)


@dataclass(frozen=True, slots=True)
class Probe:
    """One request: its prompt, milliseconds until its first token, and how much of the prompt was computed, None where
    that cannot be seen from outside."""

    num_tokens: int
    ttft_ms: float
    num_computed: int | None = None


@dataclass
class Round:
    """`alone[n]` was asked just before or behind `turns[n]`; `equal` has as many tokens as the last turn computes, and
    no history."""

    turns: list[Probe] = field(default_factory=list)
    alone: list[Probe] = field(default_factory=list)
    equal: Probe | None = None

    @property
    def ratio(self) -> float:
        return self.turns[-1].ttft_ms / self.alone[-1].ttft_ms


Chat = list[tuple[str, list[int]]]
"""Roles and tokens of messages."""

Ask = Callable[[Chat, int], tuple[Probe, list[int]]]
"""Puts a chat and the number of tokens wanted to a server or an engine; how that went, and the answer."""


def ids_of(chat: Chat) -> list[int]:
    return [token_id for _, ids in chat for token_id in ids]


def hold_chat(ask: Ask, sizes: Sizes, number: int) -> Round:
    """One round. Nothing of its texts was seen in another one."""
    rng, found = random.Random(number), Round()

    def fresh(count: int) -> list[int]:
        return rng.choices(range(sizes.config["vocab_size"]), k=count)

    history = [("system", fresh(sizes.num_system + number * SHIFT))]
    for turn in range(sizes.num_turns):
        history.append(("user", fresh(sizes.num_new)))
        for is_turn in (turn % 2 == number % 2, turn % 2 != number % 2):
            if is_turn:
                probe, answer = ask(history, sizes.num_answer)
                found.turns.append(probe)
            else:
                found.alone.append(ask([("user", fresh(sizes.num_new))], sizes.num_answer)[0])
        history.append(("assistant", answer))
    if count := found.turns[-1].num_computed:
        found.equal, _ = ask([("user", fresh(count))], sizes.num_answer)
    return found


# An engine in this process.


def asker_of(engine: OfflineEngine) -> Ask:
    numbers = itertools.count()

    def ask(chat: Chat, num_wanted: int) -> tuple[Probe, list[int]]:
        prompt = array(IDS, ids_of(chat))
        asked = submit(str(next(numbers)), prompt, num_wanted, {"ignore_eos": True})
        before, answer, is_over = engine.stats.prefill_tokens, list[int](), False
        started = time.perf_counter()
        engine.send(asked)
        while not is_over:
            for run in engine.turn():
                if run.error:
                    raise RuntimeError(run.error)
                if not answer:
                    ttft_ms = 1e3 * (time.perf_counter() - started)
                answer += run.ids
                is_over = bool(run.finish)
        return Probe(len(prompt), ttft_ms, engine.stats.prefill_tokens - before), answer

    return ask


def in_process(folder: Path, sizes: Sizes, rounds: int) -> tuple[list[Round], Machine]:
    from ops.bench.offline import OfflineEngine

    room = 4 * sizes.num_total(rounds)
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "bfloat16", "block_size": BLOCK_SIZE}
    settings = WorkerSettings(model_id=str(folder), kv_tokens=room, threads=sizes.threads, **options)
    ask, meter = asker_of(OfflineEngine(settings)), RateMeter(is_short=sizes is SHORT)
    machines, found = list[Machine](), list[Round]()
    for number in range(rounds + 1):
        found.append(hold_chat(ask, sizes, number))
        machines.append(meter())
    return found[1:], best(machines)


# Over HTTP.


ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]
TEMPLATE = "{% for each in messages %}<|{{ each.role }}|>{{ each.content }}{% endfor %}<|assistant|>"


def words_of(vocab_size: int) -> list[str]:
    """By token id."""
    return [*ROLES, *(f"w{number}" for number in range(len(ROLES), vocab_size))]


def write_words(folder: Path, words: list[str]) -> None:
    """A tokenizer for which every token is a word, so that a text has the tokens one wants and every token is seen; and
    a template for chats."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def over_http(folder: Path, sizes: Sizes, rounds: int) -> list[Round]:
    words = words_of(sizes.config["vocab_size"])
    write_words(folder, words)
    worker = ["ops.cli", "worker", "--model-id", str(folder), "--load-format", "dummy", "--dtype", "bfloat16"]
    worker += ["--kv-tokens", str(4 * sizes.num_total(rounds)), "--threads", str(sizes.threads)]
    with running_fleet(folder, worker) as fleet, connected(fleet.port, words) as ask:
        return [hold_chat(ask, sizes, number) for number in range(rounds + 1)][1:]


@contextmanager
def connected(port: int, words: list[str]) -> Iterator[Ask]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    numbers = {word: number for number, word in enumerate(words)}

    def ask(chat: Chat, num_wanted: int) -> tuple[Probe, list[int]]:
        messages = [{"role": role, "content": " ".join(words[token_id] for token_id in ids)} for role, ids in chat]
        fields = {"messages": messages, "max_tokens": num_wanted, "temperature": 0}
        body = json.dumps(fields | {"ignore_eos": True, "stream": True})
        started, text = time.perf_counter(), ""
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        for line in response:
            event = json.loads(line[6:]) if line.startswith(b"data: {") else {"choices": []}
            if "error" in event:
                raise RuntimeError(event["error"])
            piece = "".join(choice["delta"].get("content", "") for choice in event["choices"])
            if piece and not text:
                ttft_ms = 1e3 * (time.perf_counter() - started)
            text += piece
        answer = [numbers[word] for word in text.split()]
        if response.status != http.client.OK or len(answer) != num_wanted:
            raise RuntimeError(f"HTTP {response.status} and {len(answer)} tokens instead of {num_wanted}")
        return Probe(len(ids_of(chat)), ttft_ms), answer

    try:
        yield ask
    finally:
        connection.close()


# The cache alone.


def search_costs(sizes: Sizes, repeats: int) -> dict[str, float]:
    """Medians in microseconds: a scheduler takes a request in and plans its step, with a long beginning that it finds
    and without; and what of it are digests and looking them up."""
    found: dict[str, list[float]] = {"with history": [], "without": [], "digests": [], "look up": []}
    for number in range(repeats):
        rng = random.Random(number)
        ids = array(IDS, rng.choices(range(sizes.config["vocab_size"]), k=sizes.num_total(0) - sizes.num_answer))
        scheduler = scheduler_for(len(ids))
        planned(scheduler, "before", ids[: -sizes.num_new])
        seconds, num_computed = planned(scheduler, "with", ids)
        assert sizes.num_new <= num_computed < sizes.num_new + BLOCK_SIZE, "the beginning is found"
        found["with history"].append(seconds)
        found["without"].append(planned(scheduler, "without", ids[: -sizes.num_new - 1 : -1])[0])
        for name, spent in zip(("digests", "look up"), search(ids), strict=True):
            found[name].append(spent)
    return {name: 1e6 * statistics.median(each) for name, each in found.items()}


def scheduler_for(num_tokens: int) -> Scheduler:
    num_blocks = 4 * (num_tokens // BLOCK_SIZE + 2)
    limits = EngineLimits(
        vocab_size=CONFIG["vocab_size"],
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=8,
        max_total_tokens=num_tokens + BLOCK_SIZE,
        max_batch_prefill_tokens=num_tokens,
    )
    return Scheduler(limits)


def planned(scheduler: Scheduler, name: str, ids: array[int]) -> tuple[float, int]:
    """Seconds until the request's step is planned, and the tokens of that step; the request ends with it."""
    asked = submit(name, ids, 1, {"ignore_eos": True})
    started = time.perf_counter()
    scheduler.add(request_of(asked, 1, None))
    launch = scheduler.schedule(len(ids))
    seconds = time.perf_counter() - started
    assert launch is not None
    scheduler.apply(launch, StepResult(ids=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32)))
    return seconds, launch.num_prompt_tokens


def search(ids: array[int]) -> Iterator[float]:
    """Seconds for the digests of these tokens, which an earlier turn had, and for finding them all."""
    maker, pool, digests = BlockDigests(BLOCK_SIZE), BlockPool(len(ids)), list[bytes]()
    maker.extend([], ids, "", len(ids) // BLOCK_SIZE)
    started = time.perf_counter()
    maker.extend(digests, ids, "", len(ids) // BLOCK_SIZE)
    yield time.perf_counter() - started
    for block, digest in zip(pool.allocate(len(digests)), digests, strict=True):
        pool.register(block, digest)
    started = time.perf_counter()
    hits = pool.lookup(digests)
    yield time.perf_counter() - started
    assert len(hits) == len(digests)


# What is printed.


def rounds_of(found: dict[str, Any], where: str) -> list[Round]:
    """As `--json` has written them."""
    return [
        Round(
            [Probe(**each) for each in one["turns"]],
            [Probe(**each) for each in one["alone"]],
            Probe(**one["equal"]) if one["equal"] else None,
        )
        for one in found.get(where, [])
    ]


def table(found: dict[str, Any]) -> str:
    """Of what `--json` writes."""
    titles = ["", "tokens", "computed", "until the first token, ms", "roofline"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    ratios = ["", f"| {BAR} | median (range) | bar | of the rooflines |", "|---|---|---|---|"]
    for where in PLACES:
        rounds = rounds_of(found, where)
        lines += [_row(f"{where}: {name}", probes, found) for name, probes in _named(rounds)]
        ratios += [_ratio_row(where, rounds, found)] if rounds else []
    searches = ["", "| a scheduler takes a prompt in and plans its step | µs |", "|---|---|"]
    searches += [f"| {name} | {value:.0f} |" for name, value in found["search_us"].items()]
    return "\n".join([caption(found["about"]), "", *lines, *ratios, *searches])


def _named(rounds: Sequence[Round]) -> Iterator[tuple[str, list[Probe]]]:
    if not rounds:
        return
    yield "new tokens alone", [one.alone[-1] for one in rounds]
    if equal := [one.equal for one in rounds if one.equal]:
        yield "alone, as many as the last turn computes", equal
    for turn in sorted({0, 1, len(rounds[0].turns) - 1}):
        yield f"turn {turn + 1}", [one.turns[turn] for one in rounds]


def _row(name: str, probes: Sequence[Probe], found: dict[str, Any]) -> str:
    cells = [f"{_median([each.num_tokens for each in probes]):.0f}"]
    for values, digits in (
        ([each.num_computed for each in probes], 0),
        ([each.ttft_ms for each in probes], 1),
        ([_roofline_ms(each, found) for each in probes], 1),
    ):
        known = [value for value in values if value is not None]
        cells.append(f"{_median(known):.{digits}f}" if known else "")
    return f"| {name} | " + " | ".join(cells) + " |"


def _roofline_ms(probe: Probe, found: dict[str, Any]) -> float | None:
    if probe.num_computed is None:
        return None
    rows = [(probe.num_computed, probe.num_tokens - probe.num_computed)]
    return 1e3 * step_work(found["config"], rows, 1).seconds(Machine(**found["machine"]))


def _ratio_row(where: str, rounds: Sequence[Round], found: dict[str, Any]) -> str:
    ratios = [one.ratio for one in rounds]
    floors = [[_roofline_ms(each, found) for each in (one.turns[-1], one.alone[-1])] for one in rounds]
    least = [turn / alone for turn, alone in floors if turn and alone]
    cells = [where, f"{_median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"at most {MAX_RATIO}"]
    return "| " + " | ".join([*cells, f"{_median(least):.2f}" if least else ""]) + " |"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def misses(found: dict[str, Any], sizes: Sizes) -> list[str]:
    """The bars that were not met, and turns whose history was computed again."""
    missed = []
    for where in PLACES:
        rounds = rounds_of(found, where)
        ratio = _median([one.ratio for one in rounds]) if rounds else 0.0
        if ratio > MAX_RATIO:
            missed.append(f"{where}: {ratio:.2f}, bar {MAX_RATIO}")
        most = sizes.num_new + BLOCK_SIZE
        if any(probe.num_computed and probe.num_computed > most for one in rounds for probe in one.turns[1:]):
            missed.append(f"{where}: a turn computed more than {most} tokens")
    return missed


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--http", action="store_true", help="over HTTP as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args(arguments)
    sizes = SHORT if options.short else Sizes(CONFIG)
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(sizes.config))
        rounds, machine = in_process(folder, sizes, options.rounds)
        found: dict[str, Any] = {"about": about(options.rounds), "config": sizes.config}
        found["machine"] = asdict(machine)
        found[IN_PROCESS] = [asdict(one) for one in rounds]
        if options.http:
            found[OVER_HTTP] = [asdict(one) for one in over_http(folder, sizes, options.rounds)]
    found["search_us"] = search_costs(sizes, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    missed = misses(found, sizes)
    sys.stdout.write("\n".join([table(found), *missed]) + "\n")
    return 1 if missed and not options.short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
