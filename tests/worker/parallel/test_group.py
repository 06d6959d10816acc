"""Sums and collections over real ranks: right, and to the bit the same on all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.worker.parallel.group_rank import DTYPES, LARGE, NUM_SUMS, SHAPES, in_order, input_of
from worker.kernels.products import SUFFIXES
from worker.parallel.group import Alone, Meeting, agree_on_minimum
from worker.parallel.shard import WHOLE
from worker.parallel.torch_group import interface_towards, join

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0


GROUPS = ("gloo-2", "gloo-4", "shared-2", "shared-4")


def run_groups(folder: Path, work: str, *groups: str) -> int:
    """How many ranks failed."""
    command = [sys.executable, "-m", "tests.worker.parallel.group_rank", str(folder), work, *groups]
    return subprocess.run(command, cwd=ROOT, timeout=DEADLINE_S).returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where groups of 2 and of 4 have left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run_groups(folder, "results", *GROUPS) == 0
    return folder


def found_by(folder: Path, work: str, group: str) -> list[dict[str, Any]]:
    """What each rank of a group found."""
    files = [folder / f"{work}-{group}-{rank}.pt" for rank in range(int(group[-1]))]
    return [torch.load(file, weights_only=True) for file in files if file.exists()]


@pytest.fixture(params=GROUPS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    found = found_by(folder, "results", request.param)
    assert [each["is shared"] for each in found] == [request.param.startswith("shared")] * int(request.param[-1])
    return found


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


@pytest.mark.parametrize("dtype", SUFFIXES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_sums_through_memory_are_rounded_once(folder: Path, size: int, dtype: torch.dtype) -> None:
    given, ranks = inputs(size, dtype, LARGE), found_by(folder, "results", f"shared-{size}")
    total = given.to(torch.float64).sum(0)
    # half a unit of the result, and what sums in float32 are off by
    slack = total * (torch.finfo(dtype).eps / 2 + size * torch.finfo(torch.float32).eps)
    assert len(ranks) == size
    for found in ranks:
        summed = found[f"sum {dtype} {LARGE}"]
        assert torch.equal(summed, in_order(given))
        assert (summed - total).abs().le(slack).all()
    rounded_twice = total.to(torch.float16).to(dtype)
    assert not (rounded_twice - total).abs().le(slack).all(), "a sum that is rounded in between would not do"


def test_no_sum_has_a_part_of_another(ranks: list[dict[str, Any]]) -> None:
    num_wrong, num_stale = zip(*(found["num wrong"] for found in ranks), strict=True)
    assert min(num_stale) > NUM_SUMS * 0.9, "a part of another sum would not do"
    if ranks[0]["is shared"]:
        assert set(num_wrong) == {0}


@pytest.mark.parametrize("group", ["gloo-3", "shared-3"])
def test_who_waits_for_a_killed_rank_loses_it(tmp_path: Path, group: str) -> None:
    assert run_groups(tmp_path, "losses", group) == 1, "one was killed"
    found = found_by(tmp_path, "losses", group)
    assert [list(each) for each in found] == [["all_reduce", "all_gather"]] * 2
    if group == "shared-3":
        assert {text for each in found for text in each.values()} == {"another rank of this machine has ended"}


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
