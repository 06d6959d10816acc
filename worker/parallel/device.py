"""A device of several ranks, as the engine loop sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from worker.engine.device import Device, StepPlan, StepResult
from worker.parallel.plan_codec import decode_plan, encode_plan
from worker.parallel.plans import PlanReader
from worker.pipe import AdapterChecked


class ParallelDevice:
    """Rank 0's part of the model, which gives every plan to the other ranks before it runs it. What it collects is what
    they all have."""

    def __init__(self, own: Device, publish: Callable[[bytes], None]) -> None:
        self._own, self._publish = own, publish

    @property
    def depth(self) -> int:
        return self._own.depth

    def forward(self, plan: StepPlan) -> None:
        self._publish(encode_plan(plan))
        self._own.forward(plan)

    def sample(self, plan: StepPlan) -> Any:
        return self._own.sample(plan)

    def collect(self, handle: Any) -> StepResult:
        return self._own.collect(handle)

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        return self._own.check_adapter(name, source)


def obey(device: Device, plans: PlanReader) -> None:
    """Run the plans of rank 0 until it says that there are no more. Their results are known there as well."""
    pending: deque[Any] = deque()
    while (data := plans.next()) is not None:
        plan = decode_plan(data)
        device.forward(plan)
        pending.append(device.sample(plan))
        if len(pending) > device.depth:
            device.collect(pending.popleft())
