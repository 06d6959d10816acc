"""transformers behind `ops.bench.peers.pipe`: `generate` on a padded batch, or its continuous batching."""

from __future__ import annotations

import importlib
from typing import Any

from ops.bench.peers.pipe import Request, serve

PAGE_SIZE = 32


class Transformers:
    def __init__(self, order: dict[str, Any]) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        self._is_continuous = order["settings"]["continuous"]
        self._model = load(order["checkpoint"], dtype="auto", attn_implementation="sdpa").eval()
        self._model.generation_config.eos_token_id = self._model.config.eos_token_id = None
        self._num_pages = order["kv_tokens"] // PAGE_SIZE

    def versions(self) -> dict[str, str]:
        return {name: getattr(self, f"_{name}").__version__ for name in ("transformers", "torch")}

    def run(self, requests: list[Request]) -> list[int]:
        return self._continuous(requests) if self._is_continuous else self._padded(requests)

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        return []

    def _padded(self, requests: list[Request]) -> list[int]:
        """As long as the longest needs; of the others, what was not asked for does not count."""
        longest = max(len(request.prompt) for request in requests)
        rows = [[0] * (longest - len(request.prompt)) + request.prompt for request in requests]
        mask = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
        with self._torch.inference_mode():
            output = self._model.generate(
                self._torch.tensor(rows),
                attention_mask=self._torch.tensor(mask),
                do_sample=False,
                max_new_tokens=max(request.num_output for request in requests),
                pad_token_id=0,
            )
        return [min(request.num_output, output.shape[1] - longest) for request in requests]

    def _continuous(self, requests: list[Request]) -> list[int]:
        limits = self._transformers.ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=self._num_pages)
        how = self._transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        counts: dict[str, int] = {}
        opened = self._model.continuous_batching_context_manager(
            generation_config=how, continuous_batching_config=limits, block=True, timeout=5
        )
        with opened as manager:
            names = [manager.add_request(request.prompt, max_new_tokens=request.num_output) for request in requests]
            while len(counts) < len(requests) and manager.is_running():
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    counts[result.request_id] = len(result.generated_tokens)
        return [counts.get(name, 0) for name in names]


if __name__ == "__main__":
    serve(Transformers)
