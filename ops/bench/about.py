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
    """As the processor calls itself; "unknown" where that cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def caption(found: dict[str, Any]) -> str:
    """One line of Markdown: `found` is what `about` gave."""
    return "{date}; rounds: {rounds}; cores: {cores} of {cpu}; torch {torch}.".format(**found)
