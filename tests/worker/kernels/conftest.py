from __future__ import annotations

import pytest

from worker.kernels.build import cpu_flags, load_library, supported_levels

LEVELS = [level.name for level in supported_levels(cpu_flags())]


@pytest.fixture(params=LEVELS or ["none"], scope="session")
def library(request):
    """The kernels at each level that this processor has."""
    assert LEVELS, "this processor has no level that kernels are written for"
    library = load_library(request.param)
    library.inferfleet_set_threads(3)
    return library
