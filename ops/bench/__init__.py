"""Measurements: every figure is a ratio or a cost within one run. `make bench` runs them all and prints their tables."""
