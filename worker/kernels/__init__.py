"""Kernels of our own for what torch cannot do fast: C++ for the CPU, compiled on the machine that runs it."""
