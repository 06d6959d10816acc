"""A flood of one tenant does not keep the others waiting."""

from __future__ import annotations

import pytest

from common.store.jobs import JobStore
from tests.support.protocol import FakeAgent, make_job, submit


def assert_fair(order: list[str], light: str, num_light: int) -> None:
    """The light tenant gets at least 0.9 of an equal share while it has jobs waiting (8 are in the stream already)."""
    position_of_last = max(i for i, tenant in enumerate(order) if tenant == light)
    share = num_light / max(position_of_last + 1 - 8, 1)
    assert share >= 0.9 * 0.5, f"share of {light} is {share:.2f}"


async def submit_all(jobs: JobStore, tenants: list[str], cost: dict[str, int]) -> None:
    for tenant in tenants:
        await submit(jobs, make_job(tenant=tenant, cost=cost.get(tenant, 10)))


async def drain(agent: FakeAgent) -> list[str]:
    order = []
    while taken := await agent.take(1):
        order.append(taken[0].job.tenant)
    return order


async def test_a_late_light_tenant_gets_its_share(jobs: JobStore, agent: FakeAgent) -> None:
    submitted = ["flood"] * 60 + ["light"] * 10
    await submit_all(jobs, submitted, {})
    order = await drain(agent)
    assert sorted(order) == sorted(submitted)
    assert_fair(order, "light", 10)


def test_the_order_of_arrival_would_fail_the_check() -> None:
    with pytest.raises(AssertionError, match="share of light"):
        assert_fair(["flood"] * 60 + ["light"] * 10, "light", 10)


async def test_shares_are_of_tokens_and_not_of_jobs(jobs: JobStore, agent: FakeAgent) -> None:
    await submit_all(jobs, ["large"] * 40 + ["small"] * 40, {"large": 90, "small": 10})
    order = (await drain(agent))[8:48]
    assert 3 <= order.count("large") <= 10
    assert order.count("small") >= 30


async def test_a_tenant_that_comes_back_keeps_its_debt(jobs: JobStore, agent: FakeAgent) -> None:
    """One that always submits a single job pays for each, although its backlog is empty in between."""
    await submit_all(jobs, ["a"] * 200, {})
    num_single = 0
    for _ in range(60):
        await submit_all(jobs, ["single"], {"single": 50})
        (taken,) = await agent.take(1)
        num_single += taken.job.tenant == "single"
    assert 1 <= num_single <= 20


async def test_nothing_of_the_accounts_is_left_when_nobody_waits(
    jobs: JobStore, agent: FakeAgent, redis_server: object
) -> None:
    await submit_all(jobs, ["a", "b", "a"], {})
    await drain(agent)
    with redis_server.client() as client:  # type: ignore[attr-defined]
        left = [key for key in client.keys() if key.split(b":")[1] in (b"bk", b"vt", b"vf", b"qtok")]
    assert left == []
