"""What the kernels for GPUs take of one, found by compiling them: `python -m ops.kernels` writes docs/data/triton.json
and prints it as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from worker.kernels.triton.ahead import TARGETS, Usage, all_specimens, compile

PATH = Path(__file__).resolve().parents[1] / "docs" / "data" / "triton.json"


def usages() -> list[Usage]:
    return sorted(compile(specimen, target) for specimen in all_specimens() for target in specimen.targets)


def table(found: Sequence[dict[str, str | int]]) -> str:
    """Markdown: a line for each variant of a kernel, with its registers, shared bytes and spilled bytes by target."""
    columns = " | ".join(f"{target}: registers, shared, spilled" for target in TARGETS)
    lines = [f"| kernel | variant | {columns} |", "|---|---|" + "---|" * len(TARGETS)]
    by_variant: dict[str, dict[str, str]] = {}
    for each in found:
        cells = by_variant.setdefault(f"| `{each['kernel']}` | {each['variant']} |", {})
        cells[str(each["target"])] = f"{each['registers']}, {each['shared_bytes']:,}, {each['spill_bytes']}"
    lines += [
        f"{start} " + " | ".join(cells.get(target, "") for target in TARGETS) + " |"
        for start, cells in by_variant.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    found = [asdict(each) for each in usages()]
    PATH.write_text("[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
