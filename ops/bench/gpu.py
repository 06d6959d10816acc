"""What the GPU path does on a GPU, row by row, each against its bar.

python ops/bench/gpu.py [--rows a,b,c,d,e,f,g,i,j] [--json docs/data/gpu.json] [--plots docs/plots] [--again]

Needs nothing but this repository and what docs/gpu-checks.md lists. Models are made of random numbers on the device.
Each row has a process of its own, which is ended after four minutes with all that it started; figures that it had by
then are kept. They go into the file when a row is done, so that a run that was stopped goes on with the rows that are
missing or lack a figure that has a bar; a row that is there is measured again with `--again`, or on another GPU.
Status 1: a bar is missed. Status 2: there is no GPU.

`--dry-run` does the same in a minute or two on a CPU with tiny shapes; its figures mean nothing and meet no bar.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # called by its path, as people do who did not install anything
    sys.path[0] = str(Path(__file__).parents[2])

from ops.bench.gpu_rows import ROOT, ROWS, Bench, Figure, Found
from ops.loadgen.svg import Chart, Series, draw

ROW_LIMIT_S = 240.0
RESULT = "result "
DEFAULT_JSON = Path("docs/data/gpu.json")
MAX_SAID = 1500

Row = dict[str, Any]


def child_main(name: str, *, is_dry: bool) -> None:
    """Measures one row, and says all that it has found, in one line, each time that is more."""
    with tempfile.TemporaryDirectory(prefix="inferfleet-gpu-") as folder:
        tell(ROWS[name][1](Bench(Path(folder), is_dry=is_dry, tell=tell)))


def tell(found: Found) -> None:
    print(RESULT + json.dumps(as_row(found)), flush=True)


def as_row(found: Found) -> Row:
    figures = [asdict(figure) | {"met": figure.met} for figure in found.figures]
    return {"figures": figures, "curves": found.curves, "met": all(figure["met"] for figure in figures)}


def measured(name: str, *, is_dry: bool) -> Row:
    """In a process of its own. One that fails is a row with what it had found, whose last figure is missing."""
    words = [sys.executable, "-m", "ops.bench.gpu", "--child", name, *["--dry-run"] * is_dry]
    began = time.perf_counter()
    said, problem = output_of(words, ROW_LIMIT_S)
    results = [line.removeprefix(RESULT) for line in said.splitlines() if line.startswith(RESULT)]
    row: Row = json.loads(results[-1]) if results else as_row(Found())
    if problem:
        missing = as_row(Found([Figure("the row ends", None, bar=1.0, note=problem[-MAX_SAID:])]))
        row |= {"figures": row["figures"] + missing["figures"], "met": False}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def output_of(words: Sequence[str], limit_s: float) -> tuple[str, str]:
    """What a command says, and why it did not come to its end, which is nothing if it did. What it started ends with
    it: whatever stays would keep memory of the GPU."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=complaints, start_new_session=True)
        problem = ""
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            problem = f"it took longer than {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        for file in (said, complaints):
            file.seek(0)
        if status and not problem:
            problem = complaints.read().strip() or f"it ended with status {status}"
        return said.read(), problem


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def about(*, is_dry: bool) -> Row:
    import torch

    hardware = "dry run on a CPU" if is_dry else torch.cuda.get_device_name()
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "hardware": hardware, "torch": torch.__version__}


def wanted(names: Sequence[str], known: dict[str, Row], hardware: str, *, again: bool) -> list[str]:
    """Those that are to be measured: a row of the same hardware that has all that bars are for is not."""
    done = {name for name, row in known.items() if row["about"]["hardware"] == hardware and _has_ended(row)}
    return [name for name in names if again or name not in done]


def _has_ended(row: Row) -> bool:
    return all(figure["value"] is not None for figure in row["figures"] if figure["bar"] is not None)


def table(rows: dict[str, Row]) -> str:
    lines = ["| row | figure | value | bar | met |", "|---|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        said = f"{row['about']['date']}, {row['about']['hardware']}, {row['seconds']:.0f} s"
        lines.append(f"| **{name}** | **{ROWS[name][0]}** | {said} | | {_mark(row['met'])} |")
        lines += [_line(name, figure) for figure in row["figures"]]
    return "\n".join(lines)


def _line(name: str, figure: Row) -> str:
    value, bar = figure["value"], figure["bar"]
    measured = "" if value is None else f"{value:.4g} {figure['unit']}"
    shown = f"{measured} {figure['note']}".replace("\n", " ").strip() or "none"
    bound = "" if bar is None else f"{'at most' if figure['is_most'] else 'at least'} {bar:g}"
    return f"| {name} | {figure['name']} | {shown} | {bound} | {'' if bar is None else _mark(figure['met'])} |"


def _mark(is_met: bool) -> str:
    return "yes" if is_met else "no"


def plot(row: Row) -> str | None:
    """Milliseconds of a decoding step against the batch, beside what the machine allows."""
    curves = row["curves"]
    if not curves:
        return None
    series = [Series(name, curves["batch"], curves[key]) for name, key in (("step", "step_ms"), ("limit", "least_ms"))]
    chart = Chart(
        title=f"Decoding, Llama 8B in bf16, {row['about']['hardware']}",
        x_label="batch",
        y_label="milliseconds of a step",
        series=series,
        x_ticks=curves["batch"],
    )
    return draw([chart])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="letters, with commas")
    parser.add_argument("--json", type=Path, help=f"file of results; {DEFAULT_JSON}, or none of a dry run")
    parser.add_argument("--plots", type=Path, help="folder for plots as SVG")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file already")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(options.child, is_dry=options.dry_run)
        return 0
    names = [name for name in options.rows.split(",") if name]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows has {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if not options.dry_run and not has_gpu():
        sys.stderr.write("torch sees no GPU on this machine: the rows need one, --dry-run does not\n")
        return 2
    path = options.json or (None if options.dry_run else DEFAULT_JSON)
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path and path.exists() else {}
    where = about(is_dry=options.dry_run)
    for name in wanted(names, rows, where["hardware"], again=options.again):
        sys.stderr.write(f"row {name}: {ROWS[name][0]}\n")
        rows[name] = measured(name, is_dry=options.dry_run) | {"about": where}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if options.plots and "b" in rows and (drawn := plot(rows["b"])):
        options.plots.mkdir(parents=True, exist_ok=True)
        (options.plots / "gpu-decode.svg").write_text(drawn)
    shown = {name: rows[name] for name in names if name in rows}
    sys.stdout.write(table(shown) + "\n")
    if options.dry_run:
        return int(not all(map(_has_ended, shown.values())))
    return int(not all(row["met"] for row in shown.values()))


if __name__ == "__main__":
    # whoever is told to end ends its row first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
