"""This engine beside vLLM, llama.cpp and transformers, without HTTP: same weights, prompts, cores and size of KV cache.

python -m ops.bench.peers --sweep [--json FILE]     which settings are best for each peer; kept in FILE
python -m ops.bench.peers [--json FILE]             ours with its defaults beside peers with their best settings
python -m ops.bench.peers --start [--json FILE]     seconds from the start of a process to its first token

Peers are installed into `--environments` when they are missing. Everything is loaded at once and asleep but for the one
that is measured; each has a short run to wake up before. Every round has new prompts, the same for all, and another
order. Figures are medians of rounds; the roofline is that of the best rates of memory and products seen between them.
In float32 the likeliest tokens of all are compared first. With `--json` parts can be measured at different times, a
part replaces what FILE has of it; the tables and bars are then of all that FILE has.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigurationError
from ops.bench.peers import compare, results
from ops.bench.peers.checkpoints import DTYPES, SHAPES
from ops.bench.peers.children import ChildFailed
from ops.bench.peers.engines import ENGINES
from ops.bench.peers.environments import DEFAULT_FOLDER
from ops.bench.peers.workloads import WORKLOADS


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        with _ended_in_order():
            return _measure(options)
    except (ConfigurationError, ChildFailed) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: no engine is left behind asleep."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(options: argparse.Namespace) -> int:
    found = results.read(options.json)
    plan = compare.Plan(
        folder=options.environments,
        shapes=options.shapes,
        dtypes=options.dtypes,
        workloads=options.workloads,
        engines=options.engines,
        repeats=options.repeats,
        found=found,
        save=lambda: results.write(found, options.json) if options.json else None,
    )
    options.what(plan)
    missed = results.misses(found)
    print("\n".join([results.table(found), *missed]))
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"--sweep": compare.sweep, "--start": compare.starts}
    what = parser.add_mutually_exclusive_group()
    for flag, act in kinds.items():
        what.add_argument(flag, dest="what", action="store_const", const=act, default=compare.compare)
    for flag, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("workloads", WORKLOADS), ("engines", ENGINES)):
        parser.add_argument(f"--{flag}", type=_some_of(list(known)), default=list(known), help=",".join(known))
    parser.add_argument("--repeats", type=_positive, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER")
    return parser


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(known)}")
        return names

    return read


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"must be from 1 to 1000, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
