from __future__ import annotations

import pytest
import torch
from triton import knobs


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: in Triton's interpreter they are numpy over the memory of the host."""
    return torch.device("cpu" if knobs.runtime.interpret else "cuda")
