"""What readers of running streams feel when long prompts arrive, and what the prompts wait for: ours beside vLLM's.

python -m ops.bench.long_prompts [--folder FOLDER] [--peers vllm] [--rounds 5] [--json FILE]

Every server has the same random weights of a Llama of 125 million parameters in bfloat16, room for 65,536 tokens of KV
and its own defaults otherwise. Servers take turns; the others are stopped meanwhile. A round at one server:

1. 8 prompts of 4,000 random tokens come at once, nothing else runs: TTFT alone.
2. 4 streams write undisturbed, 350 times each. Then 8 other prompts of that length come at once: TTFT beside streams.
   The streams go on until the last of these prompts has its first token, and beyond.

Gaps lie between two arrivals of a stream; what comes in one read is one arrival. Undisturbed are those that lie
between the moment when every stream has 50 arrivals and the moment when the prompts are sent; disturbed all of which
any part lies between that and the first token of the last prompt. Besides, each gap is dealt out to the
tokens that ended it: time of a token. Exit status 1: a bar is missed, and which. `--short` is a dry run of seconds with
the demo model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from ops.bench.servers import OURS, Server, add_options, demo_serving, serving_of, standing, starters_of, vocabulary_of
from ops.bench.serving_peers import (
    Rounds,
    Row,
    caption_of,
    checked,
    concluded,
    in_turn,
    made_up,
    markdown,
    measured_with,
    median_of,
    peers_in,
    ratio,
    ratio_of,
)
from ops.loadgen.answer import Answer
from ops.loadgen.prompts import Vocabulary
from ops.loadgen.result import percentile
from ops.loadgen.run import Client
from ops.loadgen.target import Target
from ops.loadgen.workload import Ask

KV_TOKENS, NUM_SLOTS = 65_536, 16
MAX_DISTURBED, MAX_BESIDE, MAX_OF_PEER = 2.0, 2.5, 1.0
TIMEOUT_S = 600.0
POLL_S = 0.01
TOO_SHORT = "a stream ended before {}: --stream-tokens gives it more"


@dataclass(frozen=True)
class Sizes:
    """The prompts are sent when every stream has `num_settling` and `num_calm` arrivals, of which the first ones are
    left out."""

    num_streams: int = 4
    stream_input: int = 64
    stream_output: int = 3072
    num_prompts: int = 8
    prompt_input: int = 4000
    prompt_output: int = 16
    num_settling: int = 50
    num_calm: int = 300


SHORT = Sizes(stream_output=800, prompt_input=200, prompt_output=2, num_settling=5, num_calm=20)


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two arrivals, in seconds of one clock; `num_tokens` came with the second."""

    begin: float
    end: float
    num_tokens: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def gaps_of(answer: Answer) -> list[Gap]:
    """Events have equal shares of the tokens where they are not tokens."""
    per_event = answer.num_tokens / answer.num_events
    moments = zip(itertools.pairwise(answer.times), answer.counts[1:], strict=True)
    return [Gap(begin, end, per_event * count) for (begin, end), count in moments]


def within(gaps: Sequence[Gap], since: float, until: float) -> list[Gap]:
    """Those that lie between the two moments as a whole."""
    return [gap for gap in gaps if since <= gap.begin and gap.end <= until]


def touching(gaps: Sequence[Gap], since: float, until: float) -> list[Gap]:
    """Those of which any part lies between the two moments."""
    return [gap for gap in gaps if gap.end > since and gap.begin < until]


def gap_p99_ms(gaps: Sequence[Gap]) -> float:
    return 1000 * percentile(sorted(gap.seconds for gap in gaps), 99)


def token_p99_ms(gaps: Sequence[Gap]) -> float:
    """A gap with n tokens counts as n times its nth part."""
    shares = (round(gap.num_tokens) * [gap.seconds / gap.num_tokens] for gap in gaps)
    return 1000 * percentile(sorted(itertools.chain.from_iterable(shares)), 99)


def figures(streams: Sequence[Answer], alone: Sequence[Answer], beside: Sequence[Answer], num_settling: int) -> Row:
    """Of one round at one server, times in milliseconds. Every stream had more arrivals than `num_settling` before.

    Raises:
        RuntimeError: a stream did not write on.
    """
    sent, ended = min(answer.started for answer in beside), max(answer.times[0] for answer in beside)
    calm_since = max(answer.times[num_settling] for answer in streams)
    gaps = [gap for answer in streams for gap in gaps_of(answer)]
    calm, disturbed = within(gaps, calm_since, sent), touching(gaps, sent, ended)
    if any(answer.times[-1] < ended for answer in streams):
        raise RuntimeError(TOO_SHORT.format("the last prompt had its first token"))
    return {
        "disturbed_s": ended - sent,
        "num_calm_gaps": len(calm),
        "num_disturbed_gaps": len(disturbed),
        "calm_gap_p99_ms": gap_p99_ms(calm),
        "gap_p99_ms": gap_p99_ms(disturbed),
        "gap_max_ms": 1000 * max(gap.seconds for gap in disturbed),
        "calm_token_p99_ms": token_p99_ms(calm),
        "token_p99_ms": token_p99_ms(disturbed),
        **_first_tokens("alone", alone),
        **_first_tokens("beside", beside),
    }


def _first_tokens(name: str, answers: Sequence[Answer]) -> Row:
    waits = [1000 * (answer.times[0] - answer.started) for answer in answers]
    return {f"ttft_{name}_ms": statistics.median(waits), f"last_ttft_{name}_ms": max(waits)}


# Measuring.


class Load:
    """Asks one server. Every prompt is new."""

    def __init__(self, target: Target, vocabulary: Vocabulary, sizes: Sizes, seed: str) -> None:
        self._client = Client(target, TIMEOUT_S)
        self._sizes = sizes
        self._streams = made_up(vocabulary, sizes.stream_input, sizes.stream_output, f"stream {seed}")
        self._prompts = made_up(vocabulary, sizes.prompt_input, sizes.prompt_output, f"prompt {seed}")
        self._numbers = itertools.count()

    async def round(self) -> Row:
        try:
            await self._warm_up()
            alone = await self._all(self._next_prompts())
            asks = [self._streams.ask_of(number) for number in range(self._sizes.num_streams)]
            streams = [Answer(ask.max_tokens, time.perf_counter()) for ask in asks]
            writing = [asyncio.create_task(each) for each in map(self._client.fill, streams, asks)]
            await self._have_written(streams, writing)
            beside = await self._all(self._next_prompts())
            await asyncio.gather(*writing)
            return figures(checked(streams), alone, beside, self._sizes.num_settling)
        finally:
            self._client.close()

    async def _have_written(self, streams: Sequence[Answer], writing: Sequence[asyncio.Task[Answer]]) -> None:
        while any(len(answer.times) <= self._sizes.num_settling + self._sizes.num_calm for answer in streams):
            if ended := [task.result() for task in writing if task.done()]:
                checked(ended)
                raise RuntimeError(TOO_SHORT.format("the prompts were sent"))
            await asyncio.sleep(POLL_S)

    async def _warm_up(self) -> None:
        """A prompt of each kind, with few tokens as answer."""
        prompt = self._prompts.ask_of(next(self._numbers))
        stream = self._streams.ask_of(self._sizes.num_streams)
        await self._all([prompt, Ask(stream.prompt, min(64, stream.max_tokens))])

    def _next_prompts(self) -> list[Ask]:
        return [self._prompts.ask_of(next(self._numbers)) for _ in range(self._sizes.num_prompts)]

    async def _all(self, asks: Sequence[Ask]) -> list[Answer]:
        """Sent at once; their answers when all have ended."""
        answers = await asyncio.gather(*(self._client.ask(ask, time.perf_counter()) for ask in asks))
        return checked(answers)


def compare(
    servers: Mapping[str, Server], vocabulary: Vocabulary, sizes: Sizes, num_rounds: int
) -> dict[str, list[Row]]:
    """Rows of every server, round by round; in a round all get the same prompts."""
    found: dict[str, list[Row]] = {name: [] for name in servers}
    for number in range(num_rounds):
        for name in in_turn(list(servers), number):
            sys.stderr.write(f"round {number + 1} of {num_rounds}: {name}\n")
            with servers[name].at_work():
                load = Load(servers[name].target, vocabulary, sizes, str(number))
                found[name].append(uvloop.run(load.round()))
    return found


# What it amounts to.


def within_round(rows: Sequence[Row], figure: str, of: str) -> float:
    """One figure by another one of the same round; the median over rounds."""
    return ratio_of([row[figure] for row in rows], [row[of] for row in rows])


OWN_BARS = (
    ("gap_p99_ms", "calm_gap_p99_ms", MAX_DISTURBED, "p99 between arrivals, by undisturbed"),
    ("token_p99_ms", "calm_token_p99_ms", MAX_DISTURBED, "p99 of the time of a token, by undisturbed"),
    ("ttft_beside_ms", "ttft_alone_ms", MAX_BESIDE, "TTFT of the prompts, median, by alone"),
    ("last_ttft_beside_ms", "last_ttft_alone_ms", MAX_BESIDE, "TTFT of the last prompt, by alone"),
)
"""Of ours: figure, what it is divided by, the most it may be, what it is called."""


def missed(found: Row) -> list[str]:
    """Bars that do not hold, in sentences."""
    return [*_missed_alone(found["rounds"][OURS]), *_missed_beside(found["rounds"])]


def _missed_alone(rows: Sequence[Row]) -> Iterator[str]:
    for figure, of, bar, name in OWN_BARS:
        if (found := within_round(rows, figure, of)) > bar:
            yield f"{name}: {found:.2f}, bar {bar}"


def _missed_beside(rounds: Rounds) -> Iterator[str]:
    for peer in peers_in(rounds):
        if (found := ratio(rounds, peer, "gap_p99_ms")) >= MAX_OF_PEER:
            yield f"p99 between arrivals while prompts come: {found:.2f} times that of {peer}, bar {MAX_OF_PEER}"


def table(found: Row) -> str:
    """When and with what it was measured, and two tables: the streams, and the prompts."""
    rounds = found["rounds"]
    streams = ["server", "p99 between arrivals, ms: undisturbed", "while prompts come", "times", "longest"]
    streams += [
        "p99 of a token, ms: undisturbed",
        "while prompts come",
        "times",
        f"{OURS} to it: p99 while prompts come",
    ]
    prompts = ["server", "TTFT alone, ms: median", "last", "beside streams: median", "last", "times: median", "last"]
    return "\n\n".join(
        [
            caption_of(found),
            markdown(streams, (_stream_row(name, rounds) for name in rounds)),
            markdown(prompts, (_prompt_row(name, rows) for name, rows in rounds.items())),
        ]
    )


def _stream_row(name: str, rounds: Rounds) -> list[str]:
    rows, cells = rounds[name], [name]
    for kind in ("gap", "token"):
        cells += [f"{median_of(rows, figure):.1f}" for figure in (f"calm_{kind}_p99_ms", f"{kind}_p99_ms")]
        cells += [f"{within_round(rows, f'{kind}_p99_ms', f'calm_{kind}_p99_ms'):.2f}"]
        cells += [f"{median_of(rows, 'gap_max_ms'):.1f}"] if kind == "gap" else []
    return [*cells, "" if name == OURS else f"{ratio(rounds, name, 'gap_p99_ms'):.2f}"]


def _prompt_row(name: str, rows: Sequence[Row]) -> list[str]:
    figures = [f"{which}ttft_{place}_ms" for place in ("alone", "beside") for which in ("", "last_")]
    cells = [name, *(f"{median_of(rows, figure):.0f}" for figure in figures)]
    return cells + [f"{within_round(rows, figures[2 + n], figures[n]):.2f}" for n in range(2)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["vllm"])
    parser.add_argument("--stream-tokens", type=int, default=Sizes.stream_output, help="length of the streams")
    options = parser.parse_args(arguments)
    sizes = SHORT if options.short else Sizes(stream_output=options.stream_tokens)
    starters = starters_of(options)
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        room: Any = {"kv_tokens": KV_TOKENS, "num_slots": NUM_SLOTS}
        serving = demo_serving(**room) if options.short else serving_of(options.folder, **room)
        with standing(starters, Path(name), serving) as servers:
            rounds = compare(servers, vocabulary_of(serving.model), sizes, options.rounds)
            found = {**measured_with(servers, options.rounds), "sizes": asdict(sizes), "rounds": rounds}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return concluded(table(found), missed(found), is_short=options.short)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
