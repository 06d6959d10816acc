"""Kernels for NVIDIA GPUs in Triton (Tillet et al., MAPL 2019). Importing any of them needs the package `triton`.

Each says how many bytes it moves and how many operations it does. None waits for the device or depends on numbers that
are there only: grids follow from shapes and from bounds that the host knows, so that graphs can hold every one.
"""
