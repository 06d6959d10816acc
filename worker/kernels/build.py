"""Compiles the C++ kernels for this processor when they are first needed, and keeps what came out of it.

One library for each instruction set level, named by a digest of everything that went into it, so that a changed source,
compiler or flag is another file. Without a compiler, or on another processor, there is none and torch does it all.

    python -m worker.kernels.build FOLDER      compiles every level into FOLDER, whatever this processor has

An installation whose FOLDER was the package's own `finished`, as that of the container images, needs no compiler.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.errors import ConfigurationError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
FINISHED = Path(__file__).parent / "finished"
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fno-trapping-math",
    "-Wno-psabi",
)
COMPILE_LIMIT_S = 300.0
"""A compiler that takes longer hangs; the kernels take some seconds."""
SCRATCH = "scratch-"


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set level: what the processor must have, in the words of /proc/cpuinfo, and how to compile."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_BF16 = (*_AVX512, "avx512vbmi", "avx512_bf16")
_AMX = (*_AVX512_BF16, "amx_tile", "amx_bf16")


def _level(name: str, needs: Iterable[str], *flags: str) -> Level:
    spelled = (f"-m{need.replace('avx512_', 'avx512').replace('amx_', 'amx-')}" for need in needs)
    return Level(name, frozenset(needs), (*spelled, *flags))


LEVELS = (
    _level("amx", _AMX, "-mfma", "-mprefer-vector-width=512"),
    _level("avx512_bf16", _AVX512_BF16, "-mfma", "-mprefer-vector-width=512"),
    _level("avx512", _AVX512, "-mfma", "-mprefer-vector-width=512"),
    _level("avx2", ("avx2", "fma", "f16c")),
)
"""Best first."""


def cpu_flags() -> frozenset[str]:
    """What the processor says it can do; nothing where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def supported_levels(flags: frozenset[str]) -> list[Level]:
    return [level for level in LEVELS if level.needs <= flags]


@cache
def load_library(choice: str = "auto") -> ctypes.CDLL | None:
    """The kernels at the level `choice`, or at the best this processor has; None means torch alone, and the log says
    why.

    Raises:
        ConfigurationError: the level that was asked for by name cannot be had here.
    """
    if choice == "off":
        return None
    levels = [level for level in supported_levels(cpu_flags()) if choice in ("auto", level.name)]
    if choice != "auto" and not levels:
        have = ", ".join(level.name for level in supported_levels(cpu_flags())) or "none of them"
        raise ConfigurationError(f"--cpu-kernels {choice}: this processor does not have it; it has {have}")
    try:
        libraries = (_opened(level) for level in levels)
        found = next(filter(None, libraries), None)
    except _CannotCompile as error:
        if choice != "auto":
            raise ConfigurationError(f"--cpu-kernels {choice}: {error}") from error
        log.warning("no kernels of our own, torch does it all, more slowly: %s", error)
        return None
    if found is None:
        log.warning("no kernels of our own for this processor, torch does it all, more slowly")
    return found


class _CannotCompile(Exception):
    pass


def _opened(level: Level) -> ctypes.CDLL | None:
    """None if the system does not let the process use the level."""
    path = FINISHED / _name(level)
    if not path.exists():
        path = compiled(level, cache_folder())
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _CannotCompile(f"the system does not load what was compiled: {error}") from error
    library.inferfleet_set_threads.argtypes = library.inferfleet_set_rest.argtypes = [ctypes.c_int64]
    return library if library.inferfleet_is_usable() else None


def cache_folder() -> Path:
    """
    Raises:
        _CannotCompile: nobody says where.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise _CannotCompile("there is no home folder to keep them in; set XDG_CACHE_HOME") from error
    return Path(base) / "inferfleet" / "kernels"


def compiled(level: Level, folder: Path) -> Path:
    """The library of a level in `folder`, compiled there unless it is there already.

    Raises:
        _CannotCompile: no compiler, no place to write to, or an error of the compiler.
    """
    compiler = _compiler()
    return _made(compiler, level, folder / _name(level, (compiler, _version(compiler))))


def _made(compiler: str, level: Level, path: Path) -> Path:
    """`path`, where the library of a level is then, compiled by whoever came first."""
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, level, path)
    except OSError as error:
        raise _CannotCompile(f"{path.parent} cannot be written: {error.strerror}") from error
    return path


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise _CannotCompile("there is no C++ compiler (g++) on the path")
    return compiler


def _version(compiler: str) -> bytes:
    try:
        return subprocess.check_output([compiler, "-dumpfullversion"], timeout=COMPILE_LIMIT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise _CannotCompile(f"{compiler} does not say its version: {error}") from error


def _name(level: Level, made_by: tuple[str, bytes] | None = None) -> str:
    """Of the library of a level: digested are sources, flags and `made_by`, a compiler and its version. Nobody changes
    the compiler of a finished library, which needs none."""
    digest = hashlib.sha256(repr((made_by, COMMON_FLAGS, level.flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"{level.name}-{digest.hexdigest()[:16]}.so"


def _compile(compiler: str, level: Level, path: Path) -> None:
    log.info("compiling kernels for %s, which is done once", level.name)
    _remove_leftovers(path.parent)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]
        flags = [*COMMON_FLAGS, *level.flags]
        _run([[compiler, *flags, "-c", str(SOURCES / f"{each.stem}.cpp"), "-o", str(each)] for each in objects])
        linked = Path(scratch) / path.name
        _run([[compiler, "-shared", *map(str, objects), "-o", str(linked)]])
        linked.replace(path)


def _remove_leftovers(folder: Path) -> None:
    """Of those who were killed while they compiled: whoever compiles here holds the lock."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _run(commands: Sequence[Sequence[str]]) -> None:
    """All at once."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, said = process.communicate(timeout=COMPILE_LIMIT_S)
            if process.returncode:
                raise _CannotCompile(f"the compiler failed: {said.strip()[:500]}")
    except subprocess.TimeoutExpired as error:
        raise _CannotCompile("the compiler takes too long") from error
    finally:
        for process in running:
            with process:
                process.kill()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m worker.kernels.build FOLDER\n")
        return 2
    if platform.machine() != "x86_64":
        sys.stderr.write(f"there are no kernels for {platform.machine()}, torch does it all\n")
        return 0
    try:
        for level in LEVELS:
            _made(_compiler(), level, Path(arguments[0]) / _name(level))
    except _CannotCompile as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
