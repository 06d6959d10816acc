"""The tables of docs/performance.md and the plots beside it, made of the files in docs/data.

python -m ops.bench.tables             writes each table between its two marks, and the plots into docs/plots
python -m ops.bench.tables --check     says which are not up to date, with status 1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigurationError
from ops import kernels
from ops.bench import long_prompts, lora, prefix, quant, scaling, serving_peers, speculation
from ops.bench.peers import results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end of table -->\n)", re.DOTALL)


class Table(NamedTuple):
    """`make` gets what is in the file and gives Markdown, or a plot as SVG."""

    file: str
    make: Callable[[Any], str]


TABLES: dict[str, Table] = {
    "quant": Table("quant.json", quant.table),
    "lora": Table("lora.json", lora.table_of_file),
    "peers": Table("peers.json", results.table),
    "peers-zen4": Table("peers-zen4.json", results.table),
    "peers-zen5": Table("peers-zen5.json", results.table),
    "prefix": Table("prefix.json", prefix.table),
    "prefix-zen4": Table("prefix-zen4.json", prefix.table),
    "prefix-zen5": Table("prefix-zen5.json", prefix.table),
    "scaling": Table("scaling.json", scaling.table),
    "scaling-zen4": Table("scaling-zen4.json", scaling.table),
    "scaling-zen5": Table("scaling-zen5.json", scaling.table),
    "serving": Table("serving.json", serving_peers.table),
    "serving-zen4": Table("serving-zen4.json", serving_peers.table),
    "serving-zen5": Table("serving-zen5.json", serving_peers.table),
    "long-prompts": Table("long_prompts.json", long_prompts.table),
    "long-prompts-zen4": Table("long_prompts-zen4.json", long_prompts.table),
    "long-prompts-zen5": Table("long_prompts-zen5.json", long_prompts.table),
    "speculation": Table("speculation.json", speculation.table_of_file),
    "speculation-zen4": Table("speculation-zen4.json", speculation.table_of_file),
    "speculation-zen5": Table("speculation-zen5.json", speculation.table_of_file),
    "triton": Table("triton.json", kernels.summary),
}

PLOTS: dict[str, Table] = {
    "scaling-batch.svg": Table("scaling.json", partial(scaling.plot, varied="batch")),
    "scaling-context.svg": Table("scaling.json", partial(scaling.plot, varied="context")),
    "scaling-batch-zen4.svg": Table("scaling-zen4.json", partial(scaling.plot, varied="batch")),
    "scaling-batch-zen5.svg": Table("scaling-zen5.json", partial(scaling.plot, varied="batch")),
    "scaling-context-zen4.svg": Table("scaling-zen4.json", partial(scaling.plot, varied="context")),
    "scaling-context-zen5.svg": Table("scaling-zen5.json", partial(scaling.plot, varied="context")),
}


def with_tables(page: str, data: Path, tables: Mapping[str, Table] = TABLES) -> str:
    """The page with every table as the files in `data` have it.

    Raises:
        ConfigurationError: a mark names no table, a table has no mark, or not exactly one; or a file cannot be read.
    """
    marked = sorted(match[2] for match in MARKED.finditer(page))
    if marked != sorted(tables):
        raise ConfigurationError(f"the page has marks for {', '.join(marked)}; there are {', '.join(sorted(tables))}")
    return MARKED.sub(lambda match: match[1] + made(tables[match[2]], data) + match[4], page)


def made(table: Table, data: Path) -> str:
    path = data / table.file
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no table can be made of {path}: {error}") from None
    return table.make(found).rstrip("\n") + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    before, data = PAGE.read_text(), PAGE.parent / "data"
    after, plots = with_tables(before, data), {PAGE.parent / "plots" / name: made(PLOTS[name], data) for name in PLOTS}
    stale_plots = [path for path, plot in plots.items() if not path.exists() or path.read_text() != plot]
    if not options.check:
        PAGE.write_text(after)
        for path in stale_plots:
            path.parent.mkdir(exist_ok=True)
            path.write_text(plots[path])
        return 0
    stale = [*changed(before, after), *(path.name for path in stale_plots)]
    print("".join(f"{name} is not up to date\n" for name in stale), end="")
    return 1 if stale else 0


def changed(before: str, after: str) -> list[str]:
    """Names of the tables that differ."""
    pairs = zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
    return [old[2] for old, new in pairs if old[0] != new[0]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
