"""Makes a model folder that can be served: weights as safetensors, in few bits if wanted, and a tokenizer.json.

A folder that is ready is left alone, and what was stopped goes on where it stopped: as long as a folder is unfinished,
a small file in it notes what its weights are made of. Nothing that was there before is ever removed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import ConfigurationError
from common.settings import PrepareSettings
from worker.conversion import Say, convert, find_pickles, plan
from worker.hub import (
    NO_SPACE,
    PICKLED_FILES,
    SMALL_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    HubModel,
    fetch,
    local_folder,
)
from worker.model.checkpoint import find_files, read_header
from worker.quantised_files import Work
from worker.quantising import Job, plan_job
from worker.runner.memory import readable
from worker.shards import INDEX_NAME, SHARD_BYTES, SINGLE_NAME, written_whole

STATE_NAME = ".inferfleet-prepare.json"
QUANTISED = "quantised"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"

ShowProgress = Callable[[str, int, int], None]
"""Called with a word for what is done, bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Where the work is shown: `say` takes a line."""

    say: Say
    show_progress: ShowProgress


def prepare(settings: PrepareSettings, screen: Screen, *, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Do all that is missing. Returns the options with which `inferfleet up` serves the model.

    Raises:
        ConfigurationError: one sentence that says what is wrong.
    """
    local = local_folder(settings.model, "MODEL")
    source = local or _fetch(settings, screen)
    if not (source / CONFIG_NAME).is_file():
        raise ConfigurationError(f"there is no {CONFIG_NAME} in {source}; is {settings.model} a model?")
    if settings.quantize:
        return _quantise(plan_job(settings, source), screen, shard_bytes)
    if _is_ready(source):
        screen.say(_nothing_to_do(settings.model))
        return _options(settings) if local is None else ["--model-id", str(source.resolve())]
    target, config = _target(settings, source, is_local=local is not None), (source / CONFIG_NAME).read_bytes()
    _check_target(target, config)
    if _is_ready(target):
        screen.say(_nothing_to_do(str(target)))
    else:
        with _unfinished(source, target, config, screen, _is_not_quantised) as notes:
            if not _has_weights(source):
                _convert(source, target, notes, screen, shard_bytes)
            elif not target.samefile(source):
                _link_weights(source, target)
    return ["--model-id", str(target.resolve())]


def _quantise(job: Job, screen: Screen, shard_bytes: int) -> list[str]:
    """Always into a folder of its own."""
    target = Path(str(job.settings.output)).expanduser()
    if target.exists() and target.samefile(job.folder):
        raise ConfigurationError("--output is the folder of the model itself, over which nothing is written")
    _check_target(target, job.config)
    if _is_ready(target):
        screen.say(f"{target} has this model quantised so already: there is nothing to do")
    else:
        _quantise_into(target, job, screen, shard_bytes)
    return ["--model-id", str(target.resolve())]


def _nothing_to_do(name: str) -> str:
    return f"{name} has safetensors and a {TOKENIZER_NAME} already: there is nothing to do"


def _fetch(settings: PrepareSettings, screen: Screen) -> Path:
    """The hub's files: safetensors where there are some, else the pickled ones."""
    model = HubModel(settings.model, settings.revision, settings.huggingface_hub_cache)

    def fetch_with(weights: Sequence[str]) -> Path:
        patterns = (*SMALL_FILES, *TOKENIZER_FILES, *weights)
        return fetch(model, patterns, lambda done, total: screen.show_progress("downloading", done, total))

    folder = fetch_with(WEIGHT_FILES)
    is_enough = settings.quantize or any(folder.glob(WEIGHT_FILES[0]))
    return folder if is_enough else fetch_with(PICKLED_FILES)


def _is_ready(folder: Path) -> bool:
    return _has_weights(folder) and (folder / TOKENIZER_NAME).is_file() and not (folder / STATE_NAME).exists()


def _has_weights(folder: Path) -> bool:
    """Whether there are safetensors. Raises ConfigurationError for some that are damaged or incomplete."""
    try:
        files = find_files(folder)
    except ConfigurationError:
        if (folder / INDEX_NAME).is_file():
            raise
        return False
    for path in files:
        read_header(path)
    return True


def _options(settings: PrepareSettings) -> list[str]:
    given = {"--revision": settings.revision, "--huggingface-hub-cache": settings.huggingface_hub_cache}
    more = [word for option, value in given.items() if value for word in (option, value)]
    return ["--model-id", settings.model, *more]


def _target(settings: PrepareSettings, source: Path, *, is_local: bool) -> Path:
    """The folder of --output; else a local model's own, or one named after a hub's model."""
    if settings.output:
        return Path(settings.output).expanduser()
    owner, _, name = settings.model.rpartition("/")
    # without an owner the folder would have the name of the model, and be taken for it the next time
    return source if is_local else Path(name if owner else f"{name}-safetensors")


def _check_target(target: Path, config: bytes) -> None:
    """Raises ConfigurationError if there is something else than the model with this config in it."""
    if target.exists() and not _is_ours(target, config):
        raise ConfigurationError(f"{target} is there already and holds something else; choose another --output")


def _is_ours(target: Path, config: bytes) -> bool:
    """Whether a folder is empty, or was begun for this model."""
    if not target.is_dir():
        return False
    path = target / CONFIG_NAME
    is_same = path.is_file() and path.read_bytes() == config
    return is_same or (target / STATE_NAME).exists() or not any(target.iterdir())


@contextmanager
def _unfinished(
    source: Path, target: Path, config: bytes, screen: Screen, may_go_on: Callable[[dict[str, Any]], bool]
) -> Iterator[BinaryIO]:
    """The folder with all but its weights, and the file of notes while these are made.

    Raises:
        ConfigurationError: work was begun there that may not go on so: its files would stay among the new ones.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _claimed(target) as notes:
            begun = _read_notes(notes)
            if begun is not None and not may_go_on(begun):
                raise ConfigurationError(
                    f"{target} was begun with other options, text or weights; give those again, or choose another "
                    "--output"
                )
            if not target.samefile(source):
                _copy_small_files(source, target, config)
            if not (target / TOKENIZER_NAME).is_file():
                screen.say(f"making {TOKENIZER_NAME}")
                make_tokenizer(target)
            yield notes
    except OSError as error:
        raise ConfigurationError(_disk_problem(target, error)) from error


def _disk_problem(target: Path, error: OSError) -> str:
    if error.errno == NO_SPACE:
        return f"no space left in {target}: free some; the same command goes on where it stopped"
    return f"{error.filename or target}: {error.strerror}; --output names another folder to write to"


@contextmanager
def _claimed(folder: Path) -> Iterator[BinaryIO]:
    """The file of notes, locked while somebody works in the folder; it stays when the work was begun and not ended."""
    path = folder / STATE_NAME
    with path.open("a+b") as notes:
        try:
            fcntl.flock(notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"another `inferfleet prepare` is at work in {folder}") from error
        try:
            yield notes
        except BaseException:
            if not notes.seek(0, os.SEEK_END):
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def _copy_small_files(source: Path, target: Path, config: bytes) -> None:
    """All that are small; `config` is what config.json is going to be."""
    for pattern in (*SMALL_FILES, *TOKENIZER_FILES):
        for path in source.glob(pattern):
            if path.name != STATE_NAME and not path.name.endswith(".index.json"):
                with written_whole(target / path.name) as file:
                    file.write(config if path.name == CONFIG_NAME else path.read_bytes())


def make_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, and what belongs to it and is missing, from the other files of a tokenizer.

    Raises:
        ConfigurationError: transformers or sentencepiece is not there, or they cannot do it.
    """
    needed = ["transformers", *(["sentencepiece"] if any(folder.glob("*.model")) else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{folder} has no {TOKENIZER_NAME}, and making one needs {' and '.join(missing)}: "
            f"`pip install {' '.join(missing)}`, then the same command again"
        )
    # Imported here: only few models need it, and a worker is installed without it.
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer.save_pretrained(scratch)
            made = sorted(Path(scratch).iterdir())
            if TOKENIZER_NAME not in [path.name for path in made]:
                raise ValueError("its class has no fast variant")
        except Exception as error:
            # every tokenizer class fails in ways of its own
            reason = " ".join(str(error).split())[:200]
            message = f"no {TOKENIZER_NAME} can be made of the files in {folder} ({reason}); put one there"
            raise ConfigurationError(message) from error
        for path in made:
            if not (folder / path.name).exists():
                with written_whole(folder / path.name) as file:
                    file.write(path.read_bytes())


def _convert(source: Path, target: Path, notes: BinaryIO, screen: Screen, shard_bytes: int) -> None:
    pickles = find_pickles(source)
    stamp = _stamp(pickles, shard_bytes)
    shards = plan(pickles, shard_bytes, screen.say)
    is_resumed = _read_notes(notes) == stamp
    _write_notes(notes, stamp)

    def show(done: int, total: int) -> None:
        screen.show_progress("converting", done, total)

    convert(shards, target, show, is_resumed=is_resumed)
    num_bytes = sum(shard.num_bytes for shard in shards)
    made = SINGLE_NAME if len(shards) == 1 else f"{len(shards)} files"
    screen.say(f"converted {readable(num_bytes)} of weights: {made} in {target}")


def _stamp(pickles: Sequence[Path], shard_bytes: int) -> dict[str, Any]:
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in pickles}
    return {"pickles": files, "shard_bytes": shard_bytes}


def _is_not_quantised(stamp: dict[str, Any]) -> bool:
    return QUANTISED not in stamp


def _quantise_into(target: Path, job: Job, screen: Screen, shard_bytes: int) -> None:
    stamp, path = {QUANTISED: job.stamp, "shard_bytes": shard_bytes}, target / STATE_NAME
    is_resumed = path.is_file() and _parsed(path.read_bytes()) == stamp
    # what is wrong shows before anything is written
    work = Work(job, target, is_resumed=is_resumed, shard_bytes=shard_bytes)

    def show(done: int, total: int) -> None:
        screen.show_progress("quantising", done, total)

    with _unfinished(job.folder, target, job.config, screen, stamp.__eq__) as notes:
        _write_notes(notes, stamp)
        if work.note:
            screen.say(work.note)
        before, after = work.run(show)
        screen.say(f"quantised {readable(before)} of weights to {readable(after)} in {target}")


def _read_notes(notes: BinaryIO) -> dict[str, Any] | None:
    notes.seek(0)
    return _parsed(notes.read())


def _parsed(notes: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(notes)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _write_notes(notes: BinaryIO, stamp: dict[str, Any]) -> None:
    notes.truncate(0)
    notes.write(json.dumps(stamp).encode())
    notes.flush()
    os.fsync(notes.fileno())


def _link_weights(source: Path, target: Path) -> None:
    """Give the files a second name in `target`, which costs no space; where that does not work, copy them."""
    index = source / INDEX_NAME
    for path in [*find_files(source), *([index] if index.is_file() else [])]:
        try:
            os.link(path.resolve(), target / path.name)
        except FileExistsError:
            continue
        except OSError:
            with path.open("rb") as reader, written_whole(target / path.name) as writer:
                shutil.copyfileobj(reader, writer)
