"""`python -m ops.bench`: every measurement in turn."""

from __future__ import annotations

import sys

from ops.bench import redis_cost

if __name__ == "__main__":
    sys.exit(redis_cost.main(sys.argv[1:]))
