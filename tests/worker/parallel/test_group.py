"""Sums and collections over real ranks: right, and to the bit the same on all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.worker.parallel.group_rank import DTYPES, SHAPES, input_of
from worker.parallel.group import Alone, Meeting, agree_on_minimum
from worker.parallel.shard import WHOLE
from worker.parallel.torch_group import interface_towards, join

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where groups of 2 and of 4 have left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.worker.parallel.group_rank", str(folder), "2", "4"]
    assert subprocess.run(command, cwd=ROOT, timeout=DEADLINE_S).returncode == 0
    return folder


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each rank of a group of that size found."""
    size = request.param
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def inputs(size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.stack([input_of(rank, dtype, shape) for rank in range(size)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_collections(ranks: list[dict[str, Any]], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = len(ranks)
    given = inputs(size, dtype, shape)
    total = given.to(torch.float64).sum(0)
    # one rounding of each addition, none of integers and none to speak of in float64
    slack = 0.0 if not dtype.is_floating_point else size * torch.finfo(dtype).eps * 8 * size
    for found in ranks:
        summed, gathered = found[f"sum {dtype} {shape}"], found[f"all {dtype} {shape}"]
        assert (summed.dtype, summed.shape) == (dtype, shape)
        assert torch.equal(summed, ranks[0][f"sum {dtype} {shape}"]), "all ranks go on with the same bits"
        assert (summed - total).abs().le(slack).all()
        assert torch.equal(gathered, given)
    if shape == SHAPES[-1]:
        assert not (summed - total + given[0]).abs().le(slack).all(), "a sum without one rank would not do"
        assert not torch.equal(gathered.flip(0), given), "another order would not do"


def test_layout_does_not_matter(ranks: list[dict[str, Any]]) -> None:
    given = inputs(len(ranks), torch.float32, (3, 5)).transpose(1, 2)
    for found in ranks:
        assert torch.equal(found["columns"], given)
        torch.testing.assert_close(found["column sum"], given.sum(0))


def test_everybody_knows_its_place_and_the_minimum(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    assert [found["shard"] for found in ranks] == [(rank, size) for rank in range(size)]
    assert [found["minimum"] for found in ranks] == [100 - (size - 1)] * size


def test_a_rank_alone_needs_nobody() -> None:
    group = join(Meeting())
    assert isinstance(group, Alone) and group.shard == WHOLE
    assert agree_on_minimum(group, 7) == 7
    x = torch.ones(2)
    assert group.all_reduce(x) is x
    assert group.all_gather(x).tolist() == [[1.0, 1.0]]


def test_ranks_of_one_machine_talk_over_its_loopback() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") == ""
