"""`inferfleet version`."""

from __future__ import annotations

import sys
from importlib.metadata import version


def main(arguments: list[str]) -> int:
    del arguments
    sys.stdout.write(f"inferfleet {version('inferfleet')}\n")
    return 0
