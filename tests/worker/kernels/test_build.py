from __future__ import annotations

import ctypes
import logging
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from worker.kernels import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library.cache_clear()
    yield tmp_path / "inferfleet" / "kernels"
    build.load_library.cache_clear()


def test_a_level_is_compiled_once_and_again_when_a_source_changes(cache, monkeypatch, tmp_path):
    level, sources = build.supported_levels(build.cpu_flags())[-1], tmp_path / "source"
    sources.mkdir()
    (sources / "usable.cpp").write_text('extern "C" int inferfleet_is_usable() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    path = build.compiled(level, cache)
    written = path.stat().st_mtime_ns
    assert ctypes.CDLL(str(path)).inferfleet_is_usable() == 1
    assert build.compiled(level, cache) == path and path.stat().st_mtime_ns == written
    (sources / "usable.cpp").write_text('extern "C" int inferfleet_is_usable() { return 2; }\n')
    assert build.compiled(level, cache) != path
    assert not [left for left in cache.iterdir() if left.is_dir()], "scratch folders are to be gone"


def compiler_that(does: str, folder: Path) -> str:
    """One that says its version, and otherwise does that."""
    path = folder / "compiler"
    path.unlink(missing_ok=True)  # the one before may still run
    path.write_text(f'#!/bin/sh\n[ "$1" = -dumpfullversion ] && echo 1 && exit\nfor last; do :; done\n{does}\n')
    path.chmod(0o755)
    return str(path)


REASONS = {
    "no_compiler": "there is no C\\+\\+ compiler",
    "no_version": "does not say its version",
    "broken_source": "the compiler failed: .*broken.cpp",
    "endless_compiler": "the compiler takes too long",
    "no_place": "cannot be written",
    "no_home": "there is no home folder to keep them in; set XDG_CACHE_HOME",
    "not_loadable": "the system does not load what was compiled",
}


@pytest.mark.parametrize("spoil", REASONS)
def test_without_a_library_torch_does_it_all_and_the_log_says_why(cache, monkeypatch, tmp_path, caplog, spoil):
    if spoil == "no_compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif spoil == "no_version":
        monkeypatch.setenv("CXX", "false")
    elif spoil == "broken_source":
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "broken.cpp").write_text("this is not C++\n")
        monkeypatch.setattr(build, "SOURCES", tmp_path / "source")
    elif spoil == "endless_compiler":
        monkeypatch.setenv("CXX", compiler_that("exec sleep 60", tmp_path))
        monkeypatch.setattr(build, "_version", lambda compiler: b"1")
        monkeypatch.setattr(build, "COMPILE_LIMIT_S", 0.1)
    elif spoil == "no_place":
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
    elif spoil == "no_home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        # as on a file system without execution: the compiler has written, and the loader refuses
        monkeypatch.setenv("CXX", compiler_that('echo "no library" > "$last"', tmp_path))
    with caplog.at_level(logging.WARNING):
        assert build.load_library("auto") is None
        assert build.load_library("auto") is None
    assert [record.message[:24] for record in caplog.records] == ["no kernels of our own, t"]
    with pytest.raises(ConfigurationError, match=f"--cpu-kernels avx2: .*{REASONS[spoil]}"):
        build.load_library("avx2")


def test_what_a_killed_compilation_left_is_gone_after_the_next(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler_that("kill -9 $BUILDER", tmp_path))
    words = "import os; os.environ['BUILDER'] = str(os.getpid()); from worker.kernels.build import load_library as load"
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", f"{words}; load()"], check=True)
    left = [each for each in cache.iterdir() if each.is_dir()]
    assert len(left) == 1, "it was killed while it compiled"
    monkeypatch.setenv("CXX", compiler_that('echo "no library" > "$last"', tmp_path))
    build.load_library()
    assert list(cache.glob("*.so")) and not [each for each in cache.iterdir() if each.is_dir()]


def test_finished_libraries_need_no_compiler_as_long_as_the_sources_are_theirs(cache, monkeypatch, tmp_path):
    sources, finished = tmp_path / "source", tmp_path / "finished"
    sources.mkdir()
    names = ("is_usable()", "set_threads(long)", "set_rest(long)")
    words = [f'extern "C" int inferfleet_{name} {{ return 1; }}\n' for name in names]
    (sources / "usable.cpp").write_text("".join(words))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "FINISHED", finished)
    assert build.main([str(finished)]) == 0
    names = sorted(path.name.split("-")[0] for path in finished.glob("*.so"))
    assert names == sorted(level.name for level in build.LEVELS)
    monkeypatch.setenv("CXX", "no-such-compiler")
    library = build.load_library("avx2")
    assert library is not None and Path(library._name).parent == finished and not cache.exists()
    build.load_library.cache_clear()
    (sources / "usable.cpp").write_text("// another one\n")
    with pytest.raises(ConfigurationError, match="there is no C\\+\\+ compiler"):
        build.load_library("avx2")


def test_the_command_says_why_it_compiles_nothing(cache, monkeypatch, tmp_path, capsys):
    assert build.main([]) == 2 and "usage" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([str(tmp_path)]) == 1 and "there is no C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.main([str(tmp_path)]) == 0 and "no kernels for aarch64" in capsys.readouterr().err


def test_levels_go_by_what_the_processor_says():
    everything = frozenset().union(*(level.needs for level in build.LEVELS))
    assert build.supported_levels(everything) == list(build.LEVELS)
    assert [level.name for level in build.supported_levels(everything - {"amx_tile"})][0] == "avx512_bf16"
    assert build.supported_levels(frozenset({"avx2", "fma"})) == []


def test_a_level_that_the_processor_lacks_is_refused_by_name(cache, monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    with pytest.raises(ConfigurationError, match="--cpu-kernels amx: this processor does not have it; it has avx2"):
        build.load_library("amx")
    assert build.load_library("off") is None
