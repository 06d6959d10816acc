"""Models of a hub: what is downloaded of them, whether it fits, how far it is, and one sentence for what goes wrong.

The hub client's own cache, token and offline switch count: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from worker.runner.memory import readable

SMALL_FILES = ("*.json", "*.jinja")
TOKENIZER_FILES = ("*.model", "*.txt", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors",)
PICKLED_FILES = ("*.bin", "*.pt", "*.pth")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
IGNORED_FILES = ("*/*", "consolidated*", "training_args*", "optimizer*", "scheduler*", "rng_state*")
"""Files in subfolders, weights once more in their maker's own layout, and what only training needs."""

NO_SPACE = 28
LINES_APART_S = 5.0

ProgressFunction = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread."""

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """Raised by a progress function to end the download that calls it; no error of the download."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """`revision` None: the main branch. `cache` None: the hub client's own folder."""

    name: str
    revision: str | None = None
    cache: str | None = None


class ProgressLines:
    """Writes how far a piece of work is and how long it will still take, at most every few seconds."""

    def __init__(self, word: str, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._word, self._write, self._clock = word, write, clock
        self._began = self._last = clock()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if done <= 0 or now - self._last < LINES_APART_S:
            return
        self._last = now
        left_s = (now - self._began) * (total - done) / done
        self._write(f"{self._word}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, about {left_s:.0f} s left")


def in_the_log(on_progress: ProgressFunction) -> ProgressFunction:
    """As `on_progress`, and lines in the log besides."""
    write = ProgressLines("downloading", logger.info)

    def show(done: int, total: int) -> None:
        on_progress(done, total)
        write(done, total)

    return show


def commit_of(folder: Path) -> str:
    """The hub keeps each commit in a folder named after it; "" for other folders."""
    return folder.name if folder.parent.name == "snapshots" else ""


def local_folder(name: str, option: str) -> Path | None:
    """The folder that `name` stands for, None when it can only be a hub id. `option` is where the name was given.

    Raises:
        ConfigurationError: it is a path, and there is no such folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no folder {name}; check {option}")
    return None


def fetch(model: HubModel, patterns: Sequence[str], on_progress: ProgressFunction) -> Path:
    """The folder of the hub's cache with the files that match, downloaded as far as they are not there yet.

    Only files at the top of the repository count, see IGNORED_FILES. After a broken connection the download goes on
    where it stopped, after a new start with the files that were not whole. `on_progress` is called once before the
    first byte; what it raises ends the download.

    Raises:
        ConfigurationError: one sentence with the fix.
    """
    num_bytes = _num_missing_bytes(model, patterns, on_progress)
    if num_bytes:
        logger.info("downloading %s: %.0f MB", model.name, num_bytes / 1e6)
        on_progress(0, num_bytes)
    return Path(_snapshot(model, patterns, num_bytes, on_progress))


def _num_missing_bytes(model: HubModel, patterns: Sequence[str], on_progress: ProgressFunction) -> int:
    """What is still to download, after a look at whether it fits."""
    from huggingface_hub.errors import DryRunError

    try:
        files = _snapshot(model, patterns, 0, on_progress, dry_run=True)
    except DryRunError:
        return 0  # the hub cannot be asked; the call that follows finds the cache complete, or says what is wrong
    missing = [file for file in files if file.will_download]
    num_bytes = sum(file.file_size or 0 for file in missing)
    if missing:
        _check_space(model, num_bytes, cache=Path(missing[0].local_path).parents[2])
    return num_bytes


def _check_space(model: HubModel, num_bytes: int, cache: Path) -> None:
    """`cache` is the folder of this model."""
    free = free_bytes(cache)
    if num_bytes > free:
        num_lost = sum(path.stat().st_size for path in (cache / "blobs").glob("*.incomplete"))
        lost = f" (interrupted downloads, {cache}/blobs/*.incomplete, hold {readable(num_lost)})" if num_lost else ""
        raise ConfigurationError(
            f"{model.name} needs {readable(num_bytes)} more in {cache.parent}, where {readable(free)} are free: "
            f"free some, or point --huggingface-hub-cache to another disk{lost}"
        )


def free_bytes(folder: Path) -> int:
    """Free space on the disk where `folder` is, or is going to be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def _snapshot(
    model: HubModel, patterns: Sequence[str], num_bytes: int, on_progress: ProgressFunction, **fields: Any
) -> Any:
    # Imported here: a local model does not need it, and it takes a while.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        return snapshot_download(
            model.name,
            revision=model.revision,
            cache_dir=model.cache,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED_FILES),
            tqdm_class=_bar_class(num_bytes, on_progress),
            **fields,
        )
    except DryRunError:
        raise
    except Exception as error:
        # the client lets errors of its transports through, and which transport that is depends on its version
        raise ConfigurationError(_problem(model, error)) from error


def _bar_class(num_bytes: int, on_progress: ProgressFunction) -> type[Any]:
    """A stand-in for the client's progress bars, which shows nothing and reports the bytes of all files together."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **fields: Any) -> None:
            # newer clients count what came over the network in a second bar of bytes
            is_second = str(fields.get("name")).endswith(".transfer")
            self.is_reported = fields.get("unit") == "B" and not is_second
            super().__init__(*arguments, **fields | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.is_reported and num_bytes:
                    on_progress(min(int(self.n), num_bytes), num_bytes)

    return Bar


def _problem(model: HubModel, error: Exception) -> str:
    from huggingface_hub import constants, errors

    name, text = model.name, " ".join(str(error).split())
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither a folder nor a hub id"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {model.revision!r}; check its name"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model {name}, or it is private: check the name, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        is_forbidden = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set: unset it" if is_forbidden else "the hub cannot be reached: check the network"
        return f"{name} is not all in the cache and {why}, or give a local folder"
    if getattr(error, "errno", None) == NO_SPACE or "No space left" in text:
        return f"no space left to download {name}: free some, or point --huggingface-hub-cache to another disk"
    return f"cannot download {name}: {text[:300]}; the same command goes on with the files that are missing"
