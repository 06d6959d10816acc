"""Runs plans of the engine core on torch: rows, forward pass and sampling, and the loading of a model."""
