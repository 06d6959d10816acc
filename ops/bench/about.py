"""When, on what and with what a measurement was made, as its file of results and the page on measurements have it."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worker.engine_client import num_cores


def about(rounds: int) -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"date": date, "rounds": rounds, "cores": num_cores(), "cpu": cpu_name(), "torch": version("torch")}


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor calls itself, with its family and model where there are any, since virtual machines often call
    several generations the same; "unknown" where that cannot be read."""
    try:
        lines = [line.partition(":") for line in path.read_text().splitlines()]
    except OSError:
        lines = []
    known = {name.strip(): value.strip() for name, _, value in lines}
    generation = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    return known.get("model name", "unknown") + generation


def caption(found: dict[str, Any]) -> str:
    """One line of Markdown: `found` is what `about` gave."""
    return "{date}; rounds: {rounds}; cores: {cores} of {cpu}; torch {torch}.".format(**found)
