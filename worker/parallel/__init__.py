"""Tensor parallelism: which part of a model a rank holds, and what ranks say to each other."""
