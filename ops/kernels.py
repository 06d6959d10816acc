"""What the kernels for GPUs take of one, found by compiling them: `python -m ops.kernels` writes docs/data/triton.json
and prints it as a table. It needs Triton, what makes tables of the file does not."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "docs" / "data" / "triton.json"

Usages = Sequence[dict[str, Any]]


def usages() -> list[dict[str, Any]]:
    from worker.kernels.triton import ahead

    found = sorted(ahead.compile(each, target) for each in ahead.all_specimens() for target in each.targets)
    return [asdict(usage) for usage in found]


def summary(found: Usages) -> str:
    """Markdown: a line for each kernel, with what its variants take at least and at most of registers, and at most of
    the rest."""
    by_kernel: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for each in found:
        by_kernel[each["kernel"]][each["target"]].append(each)
    targets = _targets(found)
    columns = " | ".join(f"{target}: registers, shared, spilled" for target in targets)
    lines = [f"| kernel | variants | {columns} |", "|---|---|" + "---|" * len(targets)]
    for kernel, by_target in by_kernel.items():
        num_variants = max(map(len, by_target.values()))
        cells = " | ".join(_range(by_target[target]) for target in targets)
        lines.append(f"| `{kernel}` | {num_variants} | {cells} |")
    return "\n".join(lines) + "\n"


def _targets(found: Usages) -> list[str]:
    """Architectures, the oldest first."""
    return sorted({each["target"] for each in found}, key=lambda target: int(target.removeprefix("sm_")))


def _range(found: Usages) -> str:
    if not found:
        return ""
    registers = [each["registers"] for each in found]
    shared, spilled = (max(each[figure] for each in found) for figure in ("shared_bytes", "spill_bytes"))
    least, most = min(registers), max(registers)
    return f"{least if least == most else f'{least} to {most}'}, {shared:,}, {spilled}"


def table(found: Usages) -> str:
    """Markdown: a line for each variant of a kernel, with its registers, shared bytes and spilled bytes by target."""
    targets = _targets(found)
    columns = " | ".join(f"{target}: registers, shared, spilled" for target in targets)
    lines = [f"| kernel | variant | {columns} |", "|---|---|" + "---|" * len(targets)]
    by_variant: dict[str, dict[str, str]] = {}
    for each in found:
        cells = by_variant.setdefault(f"| `{each['kernel']}` | {each['variant']} |", {})
        cells[str(each["target"])] = f"{each['registers']}, {each['shared_bytes']:,}, {each['spill_bytes']}"
    lines += [
        f"{start} " + " | ".join(cells.get(target, "") for target in targets) + " |"
        for start, cells in by_variant.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    found = usages()
    PATH.write_text("[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
