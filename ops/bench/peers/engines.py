"""How each engine is started, and the settings that are tried for it."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ops.bench.peers.checkpoints import checkpoint, gguf_of
from ops.bench.peers.children import Child
from ops.bench.peers.environments import LARGE_PAGES, PEERS, Environment, environment
from ops.bench.peers.workloads import KV_TOKENS
from worker.engine_client import engine_environment

OURS = "ours"
ENGINES = (OURS, *PEERS)
RATES = "rates"
MODULES = {
    OURS: "ops.bench.peers.ours_child",
    "vllm": "ops.bench.peers.vllm_child",
    "llama.cpp": "ops.bench.peers.llama_child",
    "transformers": "ops.bench.peers.transformers_child",
    RATES: "ops.bench.peers.rates_child",
}
Settings = dict[str, Any]

LLAMA_CPP: Settings = {
    "n_ubatch": 512,
    "n_seq_max": 32,
    "kv_unified": False,
    "flash_attn": True,
    "kv_type": "float16",
    "large_pages": True,
}
CANDIDATES: dict[str, list[Settings]] = {
    OURS: [{}],
    RATES: [{}],
    "vllm": [
        {"large_pages": True},
        {"large_pages": False},
        {"large_pages": True, "max_num_batched_tokens": 1024},
        {"large_pages": True, "max_num_batched_tokens": 8192},
        {"large_pages": True, "enable_prefix_caching": False},
        {"large_pages": True, "enable_prefix_caching": False, "max_num_batched_tokens": 8192},
    ],
    "llama.cpp": [
        *(
            LLAMA_CPP | {"kv_type": kv_type, "flash_attn": flash_attn}
            for kv_type, flash_attn in itertools.product(("float16", "bfloat16"), (True, False))
        ),
        LLAMA_CPP | {"n_ubatch": 2048},
        LLAMA_CPP | {"n_seq_max": 64, "kv_unified": True},
    ],
    "transformers": [{"continuous": False}, {"continuous": True}],
}
"""The first of each is taken where nothing was swept. `large_pages` are variables of the environment."""
EXACT: dict[str, Settings] = {"llama.cpp": LLAMA_CPP | {"kv_type": "float32", "flash_attn": False}}
"""For comparing probabilities: keys and values that are not rounded."""


class Site(NamedTuple):
    """A checkpoint of `shape` and `dtype`, and the folder with environments, checkpoints and logs."""

    shape: str
    dtype: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return checkpoint(self.shape, self.dtype, self.folder / "checkpoints")


def start(engine: str, site: Site, settings: Settings) -> Child:
    """The process of an engine, with its model.

    Raises:
        ConfigurationError: it is not there and cannot be installed.
        ChildFailed: it did not load.
    """
    found = environment_of(engine, site.folder)
    order = {
        "checkpoint": str(site.checkpoint),
        "dtype": site.dtype,
        "kv_tokens": KV_TOKENS,
        "num_threads": len(os.sched_getaffinity(0)),
        "settings": {name: value for name, value in settings.items() if name != "large_pages"},
    }
    if engine == "llama.cpp":
        order["gguf"] = str(gguf_of(site.checkpoint, found))
    variables = found.variables | (LARGE_PAGES if settings.get("large_pages") else {})
    logs = site.folder / "logs"
    logs.mkdir(exist_ok=True)
    child = Child(engine, [str(found.python), "-m", MODULES[engine]], variables, logs / f"{engine}.log")
    try:
        child.load(order)
    except BaseException:
        # whatever ends it, Ctrl-C too: a process in a group of its own must not stay behind
        child.close()
        raise
    return child


def environment_of(engine: str, folder: Path) -> Environment:
    if engine in PEERS:
        return environment(engine, folder)
    return Environment(Path(sys.executable), engine_environment(0), None)
