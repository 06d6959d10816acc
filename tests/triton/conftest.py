from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from triton import knobs

from tests.triton.interpreter import interpreter_as_a_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: in Triton's interpreter they are numpy over the memory of the host."""
    return torch.device("cpu" if knobs.runtime.interpret else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreter_as_a_device():
        yield
