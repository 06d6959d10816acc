"""What is said of rows of logits, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.triton.test_norms import UNITS, random
from worker.kernels.triton import summary
from worker.kernels.triton.operations import TritonOperations
from worker.model.operations import Operations

TORCH, OURS = Operations(), TritonOperations()


@pytest.mark.parametrize("columns", [1, 5, 1000, summary.BLOCK, 2 * summary.BLOCK + 1])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_rows_of_logits_are_summarised(device, dtype, columns):
    logits = random(5, columns + 3, dtype=dtype, device=device)[:, :columns] * 8
    assert summary.can_summarise(logits)
    most, places, normalisers = OURS.summarise(logits)
    assert most.dtype is normalisers.dtype is torch.float32 and places.dtype is torch.int64
    assert torch.equal(most, logits.float().max(-1).values)
    assert torch.equal(places, logits.float().max(-1).indices)
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(normalisers.double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(normalisers.double(), expected.roll(1, 0), rtol=1e-6, atol=1e-6)


def test_of_columns_that_tie_the_first_is_picked(device):
    logits = torch.zeros(4, 2 * summary.BLOCK, device=device)
    logits[0, [37, 5, 80]], logits[1, [summary.BLOCK, summary.BLOCK - 1]] = 2.0, 1.0
    logits[2, [3, summary.BLOCK + 3]] = 1.0
    assert OURS.summarise(logits)[1].tolist() == [5, summary.BLOCK - 1, 3, 0]


def test_rows_that_cannot_be_sampled_have_no_finite_normaliser(device):
    size = summary.BLOCK + 70
    logits = random(7, size, dtype=torch.float32, device=device)
    logits[0, size - 1], logits[1, 3], logits[2], logits[3, : size - 1] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[4] = torch.nan
    most, columns, normalisers = OURS.summarise(logits)
    assert normalisers.isfinite().tolist() == [False, False, False, True, False, True, True]
    assert columns[3] == size - 1 and normalisers[3] == most[3]
    assert bool(((columns >= 0) & (columns < size)).all())


def test_other_types_are_left_to_torch(device):
    logits = random(3, 8, dtype=torch.float64, device=device)
    assert not summary.can_summarise(logits)
    assert all(torch.equal(*each) for each in zip(OURS.summarise(logits), TORCH.summarise(logits), strict=True))
