"""Measurements: each figure is a ratio or a cost within one run. `make bench` runs all and prints their tables."""
