"""This engine behind `ops.bench.peers.pipe`: as in a worker with default options, but for the size of the KV cache."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from common.job import SamplingParams
from common.settings import WorkerSettings
from ops.bench.offline import OfflineEngine
from ops.bench.peers.pipe import Request, serve
from worker.pipe import Submit


class Ours:
    def __init__(self, order: dict[str, Any]) -> None:
        self._engine = OfflineEngine(WorkerSettings(model_id=order["checkpoint"], kv_tokens=order["kv_tokens"]))

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("inferfleet", "torch")}

    def run(self, requests: list[Request]) -> list[int]:
        submits = [_submit(number, request) for number, request in enumerate(requests)]
        outputs = self._engine.run(submits).outputs
        return [len(outputs[submit.request_id]) for submit in submits]

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        self._engine.send(_submit(0, Request(prompt, num_output), num_top))
        rows: list[list[tuple[int, float]]] = []
        while len(rows) < num_output:
            for run in self._engine.turn():
                rows += run.top_tokens
        return rows


def _submit(number: int, request: Request, num_top: int = 0) -> Submit:
    return Submit(
        request_id=str(number),
        epoch=1,
        prompt_ids=request.prompt,
        output_ids=[],
        params=SamplingParams(max_new_tokens=request.num_output, ignore_eos=True, num_top_logprobs=num_top),
        eos_token_ids=[],
    )


if __name__ == "__main__":
    serve(Ours)
