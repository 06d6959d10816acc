"""`python -m ops.bench`: every measurement in turn, with its default settings."""

from __future__ import annotations

import sys

from ops.bench import load, lora, quant, redis_cost, speculation, start

if __name__ == "__main__":
    for measurement in (redis_cost, start, load, quant, lora, speculation):
        measurement.main(sys.argv[1:])
