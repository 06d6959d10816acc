"""`inferfleet bench`: throughput and latency of a server, or of an engine in this process."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import ConfigurationError
from common.settings import BenchSettings, WorkerSettings, parse
from ops.loadgen.plan import Plan
from ops.loadgen.plot import plot
from ops.loadgen.probe import probe
from ops.loadgen.prompts import Vocabulary, read_dataset, vocabulary_of
from ops.loadgen.report import Level, remarks, tables
from ops.loadgen.result import LoadResult
from ops.loadgen.run import OnProgress, Running, run_load
from ops.loadgen.target import Target
from ops.loadgen.workload import Prompt, Workload

PROGRAM = "inferfleet bench"
FAILED, INTERRUPTED = 1, 130
NUM_SEED_BITS = 31
OF_SERVERS = ("url", "api", "model", "api_key", "tokenizer", "ignore_eos", "body", "timeout")
"""Options that say nothing to an engine in this process."""
OF_ENGINES = {
    "model_id",
    "dtype",
    "load_format",
    "quantize",
    "kv_cache_dtype",
    "speculate",
    "rope_scaling",
    "rope_factor",
    "max_input_tokens",
    "max_total_tokens",
    "max_batch_prefill_tokens",
    "prefill_step",
    "max_num_seqs",
    "kv_tokens",
    "block_size",
    "prefix_caching",
    "attention",
    "threads",
}

Runner = Callable[[Workload, OnProgress], LoadResult]
Prepared = tuple[Runner, Vocabulary | Sequence[Prompt], dict[str, Any]]
"""What runs a workload, what its prompts are made of, and what is asked, for the file of results."""


def main(arguments: list[str]) -> int:
    """Status 1 when a request failed."""
    try:
        return _bench(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _bench(arguments: list[str]) -> int:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, of_engine = arguments[:place], arguments[place + 1 :]
    settings = parse(BenchSettings, own, program=PROGRAM)
    for path in (settings.results, settings.plot):
        _check_writable(path)
    runner, source, asked = _offline(own, of_engine, settings) if settings.offline else _server(of_engine, settings)
    seed = random.getrandbits(NUM_SEED_BITS) if settings.seed is None else settings.seed
    levels = list(_run(Plan(settings, seed, source), runner))
    _write(settings, levels, asked | {"seed": seed})
    _show(levels)
    if levels[-1].result.is_interrupted:
        return INTERRUPTED
    return FAILED if any(level.result.errors for level in levels) else 0


def _given(settings_class: type[BenchSettings] | type[WorkerSettings], arguments: list[str]) -> set[str]:
    """Names of the options that the command line has, the environment left aside."""
    return parse(settings_class, arguments).model_fields_set - parse(settings_class, []).model_fields_set


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_writable(path: str | None) -> None:
    """Before the measurement, which would be lost."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(f"cannot write {path}")


def _server(of_engine: list[str], settings: BenchSettings) -> Prepared:
    if of_engine:
        raise ConfigurationError("options after -- are those of an engine in this process; give --offline too")
    _open_many_files()
    api_key = settings.api_key.get_secret_value() if settings.api_key else ""
    target = Target(
        url=settings.url,
        api=settings.api,
        model=settings.model,
        api_key=api_key,
        ignore_eos=settings.ignore_eos,
        extra=_body(settings.body),
    )
    prompts = vocabulary = None
    if settings.dataset is not None:
        prompts = read_dataset(Path(settings.dataset), with_messages=settings.api == "chat")
    if settings.tokenizer is not None:
        vocabulary = vocabulary_of(Path(settings.tokenizer))
    longest = 0 if prompts else settings.input_range[-1]
    found = probe(target, vocabulary, timeout_s=settings.timeout, longest=longest)
    for note in found.notes:
        _say(note)
    asked = {"url": settings.url, "api": settings.api, "model": found.target.model, "notes": found.notes}
    return partial(run_load, found.target), prompts or found.vocabulary, asked


def _open_many_files() -> None:
    """A connection is an open file, and systems begin with few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _body(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError(f"--body must be a JSON object, not {text!r}")
    return value


def _offline(own: list[str], of_engine: list[str], settings: BenchSettings) -> Prepared:
    for name in OF_SERVERS:
        if name in _given(BenchSettings, own):
            raise ConfigurationError(f"{_flag(name)} is for servers; --offline has none")
    engine_settings = parse(WorkerSettings, of_engine, program=f"{PROGRAM} --offline --")
    for name in sorted(_given(WorkerSettings, of_engine) - OF_ENGINES):
        raise ConfigurationError(f"{_flag(name)} says nothing to an engine alone")
    from ops.cli.worker import default_model

    model_id, _ = default_model(engine_settings.model_id, [])
    # torch takes seconds to import
    from ops.bench.offline import OfflineEngine
    from ops.loadgen.offline import run_offline

    engine = OfflineEngine(engine_settings.model_copy(update={"model_id": model_id}))
    source: Vocabulary | Sequence[Prompt] = Vocabulary(range(engine.ready.vocab_size))
    if settings.dataset is not None:
        source = _encoded(read_dataset(Path(settings.dataset), with_messages=False), Path(model_id))
    return partial(run_offline, engine), source, {"offline": of_engine, "model": model_id, "notes": []}


def _encoded(prompts: Sequence[Prompt], folder: Path) -> list[Prompt]:
    from common.text.tokenizer import TextTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigurationError(f"--dataset with --offline needs {path}; `inferfleet prepare` can make it")
    tokenizer = TextTokenizer(path.read_bytes())
    return [tokenizer.encode(prompt) for prompt in prompts if isinstance(prompt, str)]


def _run(plan: Plan, runner: Runner) -> Iterator[Level]:
    """One load after the other; none after Ctrl-C."""
    for number, (clients, rate) in enumerate(plan.loads):
        with _bar() as show:
            result = runner(plan.workload(number), show)
        yield Level(clients, rate, result)
        if result.is_interrupted:
            return


@contextmanager
def _bar() -> Iterator[OnProgress]:
    """A progress bar on a terminal, by time or by number, whichever is nearer to its end."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("warming up", total=1.0)
        yield lambda running: progress.update(task, completed=share_done(running), description=_line(running))


def share_done(running: Running) -> float:
    workload, num_done = running.workload, len(running.answers)
    by_time = (time.perf_counter() - running.started) / workload.duration_s if workload.duration_s else 0.0
    by_number = num_done / workload.num_requests if workload.num_requests else 0.0
    return min(max(by_time, by_number), 1.0)


def _line(running: Running) -> str:
    num_failed = sum(bool(answer.error) for answer in running.answers)
    return f"{len(running.answers)} answers, {running.num_open} under way, {num_failed} failed"


def _write(settings: BenchSettings, levels: Sequence[Level], asked: dict[str, Any]) -> None:
    if settings.results is not None:
        about = {"version": version("inferfleet"), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        options = settings.model_dump(include=settings.model_fields_set - {"api_key", "results", "plot"})
        document = {**about, **asked, "options": options, "levels": [level.figures() for level in levels]}
        Path(settings.results).write_text(json.dumps(document, indent=1) + "\n")
    if settings.plot is not None:
        Path(settings.plot).write_text(plot(levels))


def _show(levels: Sequence[Level]) -> None:
    console = Console()
    for table in tables(levels):
        console.print(table)
    for level in levels:
        for remark in remarks(level):
            sys.stdout.write(f"{level.name}: {remark}\n")


def _say(note: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {note}\n")
