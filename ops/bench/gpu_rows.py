"""The rows of ops/bench/gpu.py: each loads what it needs, measures it, and says its figures with their bars."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.settings import WorkerSettings
from ops.bench.gpu_shapes import SHAPES, Config
from ops.bench.offline import OfflineEngine
from ops.bench.roofline import Machine, decode_work, step_work
from ops.bench.scaling import Sizes, step_seconds
from ops.bench.speculation import submit
from worker.pipe import Submit

ROOT = Path(__file__).parents[2]
PYTEST_LIMIT_S = 220.0
PRESSURE_TURNS, LEFT_BYTES = 30, (64 << 20, 256 << 20, 512 << 20)
COPY_BYTES, PRODUCT_SIZE = 1 << 30, 8192
REPEATS, NUM_LAUNCHES = 5, 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One number; with a `bar` it must be at least that, or at most where `is_most`. None: it could not be had, and why
    is in `note`."""

    name: str
    value: float | None
    unit: str = ""
    bar: float | None = None
    is_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        if self.bar is None:
            return True
        if self.value is None:
            return False
        return self.value <= self.bar if self.is_most else self.value >= self.bar


@dataclass(slots=True)
class Found:
    """What a row comes to. `curves` are lists of numbers by name, for plots. `tell` is called whenever it is more."""

    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    tell: Callable[[Found], None] | None = None

    def add(self, name: str, value: float | None, unit: str = "", **more: Any) -> None:
        self.figures.append(Figure(name, value, unit, **more))
        if self.tell:
            self.tell(self)


class Bench:
    """Where a row runs: on a GPU, or dry, on a CPU with tiny shapes, where figures mean nothing. What is `found` is
    told at once, so that a row that does not come to its end has what it had by then."""

    def __init__(self, folder: Path, *, is_dry: bool, tell: Callable[[Found], None] | None = None) -> None:
        self.folder, self.is_dry, self.device = folder, is_dry, "cpu" if is_dry else "cuda"
        self.found = Found(tell=tell)
        self._num_engines = 0

    def sized(self, full: int, tiny: int) -> int:
        return tiny if self.is_dry else full

    def config(self, name: str) -> Config:
        return SHAPES[name][self.is_dry]

    def write(self, name: str) -> Path:
        """A folder with the config of a shape."""
        self._num_engines += 1
        home = self.folder / f"{name}-{self._num_engines}"
        home.mkdir()
        (home / "config.json").write_text(json.dumps(self.config(name)))
        return home

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of a worker, but for its model."""
        return {"load_format": "dummy", "dtype": "bfloat16", "device": self.device, "prefill_step": 0} | given

    @contextmanager
    def engine(self, name: str, **options: Any) -> Iterator[OfflineEngine]:
        """With random weights, whose memory is free again behind the block."""
        given = {"model_id": str(self.write(name))} | self.options(options)
        engine = OfflineEngine(WorkerSettings.model_validate(given))
        try:
            yield engine
        finally:
            # whoever entered the block still holds it
            engine.__dict__.clear()
            self.tidy()

    def tidy(self) -> None:
        torch = importlib.import_module("torch")
        gc.collect()
        if not self.is_dry:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if not self.is_dry:
            importlib.import_module("torch").cuda.synchronize()

    def seconds(self, act: Callable[[], object], *, is_short: bool = False) -> float:
        """Of one of many in a row, the median of some rounds. A GPU's by its own clock; what `is_short` beside its
        launch is recorded, so that none waits for the host."""

        def many() -> None:
            for _ in range(NUM_LAUNCHES):
                act()

        act()
        self.wait()
        run = self._recorded(many) if is_short and not self.is_dry else many
        return statistics.median(self._seconds_of(run) for _ in range(REPEATS)) / NUM_LAUNCHES

    def _recorded(self, act: Callable[[], object]) -> Callable[[], object]:
        cuda = importlib.import_module("torch").cuda
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            act()
        replay: Callable[[], object] = graph.replay
        return replay

    def _seconds_of(self, run: Callable[[], object]) -> float:
        if self.is_dry:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        cuda = importlib.import_module("torch").cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        # the GPU is busy with it while the host launches what counts
        run()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))

    def machine(self) -> Machine:
        """What copies move, bytes read and written together, and what products of matrices in bfloat16 compute."""
        torch = importlib.import_module("torch")
        num_bytes, size = self.sized(COPY_BYTES, 1 << 20), self.sized(PRODUCT_SIZE, 64)
        source = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        square = torch.randn(size, size, device=self.device).to(torch.bfloat16)
        copy_s, product_s = self.seconds(lambda: target.copy_(source)), self.seconds(lambda: square @ square)
        return Machine(2 * num_bytes / copy_s, 2 * size**3 / product_s)


def add_machine(found: Found, machine: Machine) -> None:
    found.add("copy bandwidth", machine.read_bytes_per_s / 1e12, "TB/s")
    found.add("bf16 products", machine.flops_per_s / 1e12, "TFLOP/s")


def prompts_of(vocab_size: int, lengths: Iterable[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(vocab_size), k=length) for length in lengths]


# (a) Kernels.

MAX_SAID = 1000
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def kernels(bench: Bench) -> Found:
    """The tests of all kernels, on the device."""
    tests = ["tests/triton/test_norms.py"] if bench.is_dry else ["tests/triton", "--ignore=tests/triton/ahead"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(ROOT)]
    words += ["--confcutdir=tests/triton", "--import-mode=importlib", *parallel(bench), *tests]
    interpreted = {"TRITON_INTERPRET": "1"} if bench.is_dry else {}
    environment = os.environ | interpreted | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PYTEST_LIMIT_S, check=False
    )
    add_tests(bench.found, done.stdout, done.stderr)
    return bench.found


def add_tests(found: Found, said: str, complaints: str) -> None:
    """Raises RuntimeError if no test has run."""
    counts = counts_of(said)
    if not counts.get("passed", 0) + counts.get("failed", 0):
        raise RuntimeError(f"no test has run: {(said + complaints).strip()[-MAX_SAID:]}")
    broken = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    found.add("tests that passed", counts.get("passed", 0), bar=1)
    num_broken = counts.get("failed", 0) + counts.get("error", 0)
    found.add("tests that failed", num_broken, bar=0, is_most=True, note="\n".join(broken)[:MAX_SAID])


def parallel(bench: Bench) -> list[str]:
    """What lets tests compile kernels side by side, where it is installed."""
    has_xdist = importlib.util.find_spec("xdist") is not None and not bench.is_dry
    return ["-n", str(min(os.cpu_count() or 1, 12))] if has_xdist else []


def counts_of(output: str) -> dict[str, int]:
    """By what became of them, out of the last lines of pytest."""
    tail = output.strip().splitlines()[-1:]
    return {word.rstrip("s"): int(number) for number, word in COUNTS.findall("".join(tail))}


# (b) A model of 8B parameters against what the machine can do.

DECODE_BARS = {(1, 128): 0.8, (8, 1000): None, (64, 1000): 0.7, (256, 300): 0.6}
PREFILL, PREFILL_BAR = (16, 1024), 0.6


def llama(bench: Bench) -> Found:
    machine, found, config = bench.machine(), bench.found, bench.config("llama")
    add_machine(found, machine)
    points = {(2, 16): 0.8, (4, 16): 0.7} if bench.is_dry else DECODE_BARS
    count, length = (2, 32) if bench.is_dry else PREFILL
    with bench.engine("llama", **llama_options(bench, [batch for batch, _ in points])) as engine:
        sizes = Sizes(config, (), num_steps=bench.sized(32, 4))
        for (batch, context), bar in points.items():
            step_s, least_s = step_seconds(engine, sizes, batch, context), _least(config, batch, context, machine)
            found.add(f"decode of {batch} at {context}: step", 1e3 * step_s, "ms")
            found.add(f"decode of {batch} at {context}: share of the limit", least_s / step_s, bar=bar)
            for name, value in (("batch", batch), ("step_ms", 1e3 * step_s), ("least_ms", 1e3 * least_s)):
                found.curves.setdefault(name, []).append(value)
        seconds = prefill_seconds(bench, engine, config["vocab_size"], count, length)
    work = step_work(config, [(length, 0)] * count, count)
    rate = (work.product_flops + work.attention_flops) / seconds
    found.add(f"prefill of {count} x {length}", 1e3 * seconds, "ms")
    found.add("prefill: share of the rate of products", rate / machine.flops_per_s, bar=PREFILL_BAR)
    return found


def llama_options(bench: Bench, batches: Sequence[int]) -> dict[str, Any]:
    return {
        "max_num_seqs": max(batches),
        "cuda_graphs": sorted(set(batches)),
        "max_total_tokens": bench.sized(2048, 128),
        "max_batch_prefill_tokens": bench.sized(PREFILL[0] * PREFILL[1], 256),
        "kv_tokens": bench.sized(131_072, 4096),
    }


def _least(config: Config, batch: int, context: int, machine: Machine) -> float:
    return decode_work(config, batch, context).seconds(machine)


def prefill_seconds(bench: Bench, engine: OfflineEngine, vocab_size: int, count: int, length: int) -> float:
    """Of prompts that no cache knows, all in one step; the median of some."""
    times = []
    for number in range(bench.sized(REPEATS, 1) + 1):
        prompts = prompts_of(vocab_size, [length] * count, seed=1000 + number)
        asked = [submit(str(n), ids, 1, {"ignore_eos": True}) for n, ids in enumerate(prompts)]
        times.append(engine.run(asked).seconds)
    return statistics.median(times[1:])


# (c) nano-vllm's public workload.

BUSY_BAR, WINDOW = 0.95, 40
WARM_TURNS = 5
"""Of a profile, in which it makes the host slower than later."""
SEED, OTHER_SEED = 1, 2


def workload(bench: Bench, vocab_size: int, seed: int = SEED) -> list[Submit]:
    """Lengths of prompts and answers evenly random, temperature 0.6, the end of a text ignored. Those with another
    `seed` share nothing but their lengths."""
    rng, (low, high) = random.Random(0), (4, 24) if bench.is_dry else (100, 1024)
    count = bench.sized(256, 6)
    prompts = prompts_of(vocab_size, [rng.randint(low, high) for _ in range(count)], seed)
    how = {"do_sample": True, "temperature": 0.6, "ignore_eos": True}
    return [submit(str(n), ids, rng.randint(low, high), how | {"seed": n}) for n, ids in enumerate(prompts)]


def workload_options(bench: Bench) -> dict[str, Any]:
    longest = bench.sized(2048, 64)
    return {"max_total_tokens": longest, "kv_tokens": bench.sized(256, 8) * longest, "max_num_seqs": 256}


def nano(bench: Bench) -> Found:
    machine, found, config = bench.machine(), bench.found, bench.config("qwen3")
    add_machine(found, machine)
    with bench.engine("qwen3", **workload_options(bench)) as engine:
        asked = workload(bench, config["vocab_size"])
        engine.run([replace(each, request_id=f"warm {each.request_id}") for each in asked[:4]])
        with watched(engine, config, machine) as steps:
            run = engine.run(asked)
        found.add("output tokens per second", run.num_tokens / run.seconds, "tokens/s")
        found.add("step time: share of the roofline", sum(steps) / run.seconds)
        add_busy_shares(found, bench, engine, workload(bench, config["vocab_size"], OTHER_SEED))
    return found


@contextmanager
def watched(engine: OfflineEngine, config: Config, machine: Machine) -> Iterator[list[float]]:
    """The least seconds of every step that is launched within the block."""
    device: Any = engine.device
    forward, seen, least = device.forward, list[tuple[Any, Any, Any]](), list[float]()

    def noted(plan: Any) -> None:
        # no more than must be: the host's time is measured too
        seen.append((plan.num_tokens.copy(), plan.starts.copy(), plan.samples.copy()))
        forward(plan)

    device.forward = noted
    try:
        yield least
    finally:
        device.forward = forward
        for num_tokens, starts, samples in seen:
            rows = zip(num_tokens.tolist(), starts.tolist(), strict=True)
            least.append(step_work(config, rows, int(samples.sum())).seconds(machine))


def add_busy_shares(found: Found, bench: Bench, engine: OfflineEngine, asked: Sequence[Submit]) -> None:
    """How much of the time any kernel runs, in some turns that each bring a prompt that no cache knows, and in as many
    without prompts."""
    num_later = bench.sized(WARM_TURNS + WINDOW, 2)
    later = iter(asked[:num_later])
    for each in asked[num_later:]:
        engine.send(each)

    def turn() -> None:
        if each := next(later, None):
            engine.send(each)
        engine.turn()

    for name, turns_before, bar in (("GPU busy while prompts come in", 100, None), ("GPU busy", 60, BUSY_BAR)):
        for _ in range(bench.sized(turns_before, 1)):
            engine.turn()
        spans = profiled(bench, turn, bench.sized(WINDOW, 2))
        begin, end = min(start for start, _ in spans.values), max(end for _, end in spans.values)
        found.add(name, covered(spans) / (end - begin), bar=bar)


@dataclass(frozen=True, slots=True)
class Spans:
    """Kernels that ran, in microseconds: from when to when, and how long by name."""

    values: list[tuple[float, float]]
    by_name: dict[str, float]


def profiled(bench: Bench, turn: Callable[[], object], num_turns: int) -> Spans:
    """Of `num_turns` turns behind some that do not count. Nothing but kernels is noted on a GPU: what the host does is
    much more, and noting it slows it."""
    profiler, kind = importlib.import_module("torch").profiler, "CPU" if bench.is_dry else "CUDA"
    num_warm = bench.sized(WARM_TURNS, 1)
    schedule = profiler.schedule(wait=0, warmup=num_warm, active=num_turns, repeat=1)
    with profiler.profile(activities=[getattr(profiler.ProfilerActivity, kind)], schedule=schedule) as found:
        for left in reversed(range(num_warm + num_turns)):
            turn()
            if not left:
                bench.wait()
            found.step()
    # the profiler's own marks of turns are no kernels
    events = [e for e in found.events() if e.device_type.name == kind and not e.name.startswith("ProfilerStep")]
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us()
    return Spans([(event.time_range.start, event.time_range.end) for event in events], by_name)


def covered(spans: Spans) -> float:
    """The time in which at least one of them is."""
    total, until = 0.0, -1.0
    for start, end in sorted(spans.values):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# (d) The full stack.

STACK_BAR, TTFT_BAR_MS = 0.95, 5.0


def full_stack(bench: Bench) -> Found:
    """Gateway, Redis and worker beside the engine alone, on this machine, with streams over HTTP."""
    from ops.bench.peers.checkpoints import NUM_UNSAID, write_tokenizer
    from ops.bench.servers import MODEL_NAME, OURS, WORKER, Server
    from ops.bench.serving_cost import running_fleet
    from ops.bench.serving_peers import made_up, put
    from ops.loadgen.prompts import Vocabulary
    from ops.loadgen.target import Target
    from ops.loadgen.workload import Workload

    found, config, streams = bench.found, bench.config("llama"), bench.sized(256, 4)
    num_input, num_output = bench.sized(128, 8), bench.sized(128, 16)
    options = {
        "max_num_seqs": streams,
        "max_total_tokens": bench.sized(512, 64),
        "kv_tokens": bench.sized(131_072, 2048),
    }
    prompts = made_up(Vocabulary(range(NUM_UNSAID, config["vocab_size"])), num_input, num_output, "gpu")
    rate, alone_ms = _offline(bench, options, prompts, streams, num_output)
    found.add(f"offline, {streams} at a time", rate, "tokens/s")
    found.add("first token, offline", alone_ms, "ms")
    home = bench.write("llama")
    write_tokenizer(home, config["vocab_size"], config["max_position_embeddings"])
    words = [*WORKER, "--model-id", str(home), "--served-model-name", MODEL_NAME, *flags_of(bench.options(options))]
    with running_fleet(bench.folder, words) as fleet:
        server = Server(OURS, Target(url=f"http://127.0.0.1:{fleet.port}", model=MODEL_NAME), fleet.pids)
        put(server, Workload.of([prompts.ask_of(-1 - number) for number in range(streams)], clients=streams))
        many = put(server, Workload(ask_of=prompts.ask_of, num_requests=2 * streams, clients=streams)).summary()
        found.add(f"full stack, {streams} streams", many["output_tokens_per_s"], "tokens/s")
        found.add("full stack to offline", many["output_tokens_per_s"] / rate, bar=STACK_BAR)
        others = made_up(prompts.vocabulary, num_input, num_output, "alone")
        workload = Workload(ask_of=others.ask_of, num_requests=bench.sized(20, 2), clients=1)
        ttft_ms = put(server, workload).summary()["ttft_ms"]["p50"]
    found.add("first token, full stack", ttft_ms, "ms")
    found.add("added to the first token", ttft_ms - alone_ms, "ms", bar=TTFT_BAR_MS, is_most=True)
    return found


def flags_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _offline(bench: Bench, options: dict[str, Any], prompts: Any, streams: int, num_output: int) -> tuple[float, float]:
    """Tokens per second of twice as many requests as run at a time, and milliseconds to a first token alone."""
    with bench.engine("llama", **options) as engine:
        asks = [prompts.ask_of(number) for number in range(-streams, 2 * streams)]
        asked = [submit(str(n), ask.prompt, num_output, {"ignore_eos": True}) for n, ask in enumerate(asks)]
        engine.run(asked[:streams])
        rate = (run := engine.run(asked[streams:])).num_tokens / run.seconds
        singles = prompts_of(bench.config("llama")["vocab_size"], [len(asks[0].prompt)] * REPEATS, seed=3)
        times = [engine.run([submit(f"one {n}", ids, 1, {})]).seconds for n, ids in enumerate(singles)]
    return rate, 1e3 * statistics.median(times)


# (e) Peers.


def peers(bench: Bench) -> Found:
    """Attention by torch and by flash-attn, and transformers' continuous batching on the same requests."""
    found, config = bench.found, bench.config("qwen3")
    asked = workload(bench, config["vocab_size"])
    asked = asked[: bench.sized(128, 3)]
    with bench.engine("qwen3", **workload_options(bench)) as engine:
        engine.run([replace(each, request_id=f"warm {each.request_id}") for each in asked[:4]])
        rate = (run := engine.run(asked)).num_tokens / run.seconds
    found.add("ours", rate, "tokens/s")
    for name, seconds in attention_times(bench):
        found.add(f"attention, {name}", 1e3 * seconds, "ms")
    bench.tidy()
    add_transformers(bench, config, asked, rate)
    return found


def add_transformers(bench: Bench, config: Config, asked: Sequence[Submit], rate: float) -> None:
    other, note = None, ""
    try:
        other = transformers_rate(bench, config, asked)
    except Exception as error:  # noqa: BLE001
        # a peer's way to fail is its own
        note = f"{type(error).__name__}: {error}"[:200]
    bench.found.add("transformers, continuous batching", other, "tokens/s", note=note)
    bench.found.add("ours to it", rate / other if other else None, bar=1.0, note=note)


def transformers_rate(bench: Bench, config: Config, asked: Sequence[Submit]) -> float:
    from ops.bench.peers.pipe import Request
    from ops.bench.peers.transformers_child import PAGE_SIZE, Transformers

    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    made = transformers.AutoConfig.for_model(**config)
    peer = Transformers.__new__(Transformers)
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation="sdpa")
    longest = max(len(each.prompt_ids) + each.params.max_new_tokens for each in asked)
    peer.__dict__ |= {
        "_torch": torch,
        "_transformers": transformers,
        "_model": model.eval(),
        "_num_pages": len(asked) * (longest // PAGE_SIZE + 1),
    }
    requests = [Request(list(each.prompt_ids), each.params.max_new_tokens) for each in asked]
    peer._continuous(requests[:2])
    began = time.perf_counter()
    num_tokens = sum(peer._continuous(requests))
    if num_tokens != sum(request.num_output for request in requests):
        raise RuntimeError(f"{num_tokens} tokens came")
    return num_tokens / (time.perf_counter() - began)


def attention_times(bench: Bench) -> Iterator[tuple[str, float]]:
    """Seconds of one layer of the 8B shape: by ours over pages, and by others over what lies in one piece."""
    config, (keys, prompt) = bench.config("llama"), (20, 16) if bench.is_dry else (1000, 1024)
    decode, prefill = (bench.sized(64, 2), 1, keys), (bench.sized(16, 2), prompt, prompt)
    for name, sizes in ((f"decode at {keys}", decode), (f"prefill of {prompt}", prefill)):
        yield f"{name}, ours", our_attention_s(bench, config, *sizes)
        for other, seconds in other_attention_s(bench, config, *sizes).items():
            yield f"{name}, {other}", seconds


def our_attention_s(bench: Bench, config: Config, rows: int, queries: int, keys: int) -> float:
    import numpy as np
    import torch

    from worker.attention import Attention, Batch, LayerShape

    block_size, head_dim = 16, config["head_dim"]
    per_row = -(-keys // block_size)
    tables = 1 + np.arange(rows * per_row).reshape(rows, per_row)
    ends = keys - queries + np.arange(queries)
    slots = torch.from_numpy((tables[:, ends // block_size] * block_size + ends % block_size).ravel()).to(bench.device)
    batch = Batch(np.full(rows, queries), np.full(rows, keys - queries), tables, slots)
    shape = (rows * per_row + 1, block_size, config["num_key_value_heads"], head_dim)
    pages = torch.randn(2, *shape, device=bench.device).to(torch.bfloat16)
    q = torch.randn(rows * queries, config["num_attention_heads"], head_dim, device=bench.device).to(torch.bfloat16)
    attention: Attention = _attention(bench)
    meta, layer = attention.prepare(batch, block_size), LayerShape(head_dim**-0.5)
    return bench.seconds(lambda: attention.attend(q, pages[0], pages[1], meta, layer), is_short=True)


def _attention(bench: Bench) -> Any:
    if bench.is_dry:
        return importlib.import_module("worker.attention.cpu").CpuAttention()
    return importlib.import_module("worker.attention.triton").TritonAttention()


def other_attention_s(bench: Bench, config: Config, rows: int, queries: int, keys: int) -> dict[str, float]:
    import torch

    heads, kv_heads, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def made(length: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, length, size, device=bench.device).to(torch.bfloat16)

    q, k, v = made(queries, heads), made(keys, kv_heads), made(keys, kv_heads)
    attend = torch.nn.functional.scaled_dot_product_attention
    is_causal = queries > 1
    found = {"torch": bench.seconds(lambda: attend(q, k, v, is_causal=is_causal, enable_gqa=True), is_short=True)}
    with suppress(ImportError):
        flash = importlib.import_module("flash_attn")
        turned = [each.transpose(1, 2).contiguous() for each in (q, k, v)]
        found["flash-attn"] = bench.seconds(lambda: flash.flash_attn_func(*turned, causal=is_causal), is_short=True)
    return found


# (f) Other architectures.


def families(bench: Bench) -> Found:
    """T5, BLOOM, Falcon and Mixtral: the same tokens with graphs and without."""
    found = bench.found
    for name in ("t5", "bloom", "falcon", "mixtral"):
        outputs, has_graphs = [], False
        for sizes in ([1, 8], [0]):
            options = {"max_num_seqs": 8, "max_total_tokens": 256, "kv_tokens": 8 * 512, "cuda_graphs": sizes}
            with bench.engine(name, **options) as engine:
                starts = ("cuda_graphs of ", "cuda_graphs from ")
                has_graphs |= any(reason.startswith(starts) for reason in engine.ready.reasons)
                prompts = prompts_of(bench.config(name)["vocab_size"], range(9, 17), seed=4)
                asked = [submit(str(n), ids, 32, {"ignore_eos": True}) for n, ids in enumerate(prompts)]
                outputs.append(engine.run(asked).outputs)
        found.add(f"{name}: answers that are the same with graphs", same_share(*outputs), bar=0.75)
        found.add(f"{name}: has graphs", float(has_graphs), bar=None if bench.is_dry else 1.0)
    return found


def same_share(some: dict[str, list[int]], others: dict[str, list[int]]) -> float:
    """Of answers: kernels for other numbers of rows round otherwise, and of two equally likely tokens pick either."""
    return sum(some[name] == others[name] for name in some) / len(some)


# (g) Few bits.

INT4_BAR, FP8_BAR = 2.0, 1.4


def few_bits(bench: Bench) -> Found:
    found, config = bench.found, bench.config("llama")
    vocab_size, (count, length) = config["vocab_size"], (2, 32) if bench.is_dry else PREFILL
    decode, prefill = {}, {}
    for scheme in ("none", "int4", "fp8"):
        with bench.engine("llama", quantize=scheme, **llama_options(bench, [1, 16])) as engine:
            sizes = Sizes(config, (), num_steps=bench.sized(32, 4))
            decode[scheme] = step_seconds(engine, sizes, 1, bench.sized(128, 16))
            prefill[scheme] = prefill_seconds(bench, engine, vocab_size, count, length)
        found.add(f"{scheme}: decode of 1", 1e3 * decode[scheme], "ms")
        found.add(f"{scheme}: prefill of {count} x {length}", 1e3 * prefill[scheme], "ms")
    found.add("int4 to bf16, decode of 1", decode["none"] / decode["int4"], "times", bar=INT4_BAR)
    found.add("fp8 to bf16, prefill", prefill["none"] / prefill["fp8"], "times", bar=FP8_BAR)
    return found


# (i) Out of memory.


def out_of_memory(bench: Bench) -> Found:
    """Somebody takes all memory of the GPU for a while in the middle of a workload."""
    found, config = bench.found, bench.config("qwen3")
    with bench.engine("qwen3", **workload_options(bench)) as engine:
        asked = workload(bench, config["vocab_size"])
        for each in asked[: len(asked) // 2]:
            engine.send(each)
        counts = dict.fromkeys((each.request_id for each in asked), 0)
        ended = set[str]()
        take_turns(engine, bench.sized(20, 2), counts, ended)
        # those that come now have prompts, for which a step needs the most
        for each in asked[len(asked) // 2 :]:
            engine.send(each)
        with pressure(bench, engine):
            take_turns(engine, bench.sized(PRESSURE_TURNS, 3), counts, ended)
        while len(ended) < len(asked):
            take_turns(engine, 1, counts, ended)
        complete = sum(counts[each.request_id] == each.params.max_new_tokens for each in asked)
        found.add("steps without memory", engine.stats.steps_too_large, bar=1)
    found.add("jobs", len(asked))
    found.add("jobs with their whole answer", complete, bar=len(asked))
    return found


def take_turns(engine: OfflineEngine, number: int, counts: dict[str, int], ended: set[str]) -> None:
    for _ in range(number):
        for run in engine.turn():
            counts[run.request_id] += len(run.ids)
            if run.finish:
                ended.add(run.request_id)


@contextmanager
def pressure(bench: Bench, engine: OfflineEngine) -> Iterator[None]:
    """All of the GPU's memory but a little is taken within the block; in a dry run steps only say so."""
    import torch

    device: Any = engine.device
    if bench.is_dry:
        from worker.engine.device import StepTooLarge

        forward, num_left = device.forward, 2

        def failing(plan: Any) -> None:
            nonlocal num_left
            num_left -= 1
            if num_left >= 0:
                raise StepTooLarge("a dry run has no memory")
            forward(plan)

        device.forward = failing
        yield
        device.forward = forward
        return
    bench.wait()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = taken(lambda size: torch.empty(size, dtype=torch.uint8, device=bench.device), free)
    yield
    del held
    torch.cuda.empty_cache()


def taken(allocate: Callable[[int], Any], free: int) -> Any:
    """As much as can be had of what is said to be free. Raises RuntimeError if that is not nearly all."""
    from torch import OutOfMemoryError

    for left in LEFT_BYTES:
        with suppress(OutOfMemoryError):
            return allocate(max(free - left, 0))
    raise RuntimeError(f"of {free} free bytes not all but {LEFT_BYTES[-1]} could be taken")


# (j) Where the time of a step goes.

GROUPS = {
    "attention": re.compile(r"attention|combine|flash|fmha|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|nvjet|cutlass|multiply_(row|groups)|add_parts|quantise_rows|splitk|linear", re.IGNORECASE
    ),
    "sampling": re.compile(r"^(scan|select|finish|wanted_scores)$"),
}
NUM_NAMED, MAX_NAME = 20, 80


def profile(bench: Bench) -> Found:
    """One decoding step of 64 rows: every kernel, and of each kind its share of what memory allows."""
    machine, found, config = bench.machine(), bench.found, bench.config("llama")
    batch, context, num_turns = bench.sized(64, 2), bench.sized(1000, 16), bench.sized(10, 2)
    with bench.engine("llama", **llama_options(bench, [batch])) as engine:
        prompts = prompts_of(config["vocab_size"], [context] * batch, seed=5)
        for n, ids in enumerate(prompts):
            engine.send(submit(str(n), ids, bench.sized(200, 40), {"ignore_eos": True}))
        for _ in range(bench.sized(60, 8)):
            engine.turn()
        spans = profiled(bench, engine.turn, num_turns)
    by_kind, named = grouped(spans.by_name), sorted(spans.by_name.items(), key=lambda pair: -pair[1])
    total, limits = sum(spans.by_name.values()), limits_us(config, batch, context, machine)
    found.add("kernels of a step", total / num_turns / 1e3, "ms")
    for kind, microseconds in by_kind.items():
        found.add(f"{kind}", microseconds / num_turns / 1e3, "ms")
        if kind in limits and microseconds:
            found.add(f"{kind}: share of the limit", limits[kind] * num_turns / microseconds)
    for name, microseconds in named[:NUM_NAMED]:
        found.add(f"`{name[:MAX_NAME]}`", microseconds / total, "of the step")
    return found


def grouped(by_name: dict[str, float]) -> dict[str, float]:
    """Microseconds by kind; "other" is what lies between: norms, rope, activations, copies."""
    found = dict.fromkeys((*GROUPS, "other"), 0.0)
    for name, microseconds in by_name.items():
        found[next((kind for kind, pattern in GROUPS.items() if pattern.search(name)), "other")] += microseconds
    return found


def limits_us(config: Config, batch: int, context: int, machine: Machine) -> dict[str, float]:
    """Microseconds that a step cannot go below, by kind: weights once, keys and values once, and what lies between
    reads and writes a row of each width a few times."""
    work, size = decode_work(config, batch, context), 2
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    written = 4 * config["num_key_value_heads"] * config["head_dim"]
    between = size * batch * layers * (6 * hidden + 3 * ffn + written)
    num_bytes = {
        "attention": work.kv_bytes,
        "products": work.weight_bytes,
        "sampling": size * batch * config["vocab_size"],
        "other": between,
    }
    return {kind: 1e6 * each / machine.read_bytes_per_s for kind, each in num_bytes.items()}


ROWS: dict[str, tuple[str, Callable[[Bench], Found]]] = {
    "a": ("every kernel is right on the device", kernels),
    "b": ("Llama 8B in bf16 against the machine's limits", llama),
    "c": ("nano-vllm's public workload, Qwen3 0.6B", nano),
    "d": ("the full stack beside the engine alone, Llama 8B", full_stack),
    "e": ("peers in the same run", peers),
    "f": ("T5, BLOOM, Falcon and Mixtral with graphs", families),
    "g": ("int4 and fp8 beside bf16, Llama 8B", few_bits),
    "i": ("out of memory in the middle of a workload", out_of_memory),
    "j": ("where the time of a decoding step goes, Llama 8B", profile),
}
