from __future__ import annotations

import ctypes
import logging

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


@pytest.mark.parametrize("spoil", ["no_compiler", "broken_source", "no_place"])
def test_without_a_library_torch_does_it_all_and_the_log_says_why(cache, monkeypatch, tmp_path, caplog, spoil):
    if spoil == "no_compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif spoil == "broken_source":
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "broken.cpp").write_text("this is not C++\n")
        monkeypatch.setattr(build, "SOURCES", tmp_path / "source")
    else:
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        assert build.load_library("auto") is None
        assert build.load_library("auto") is None
    assert [record.message[:24] for record in caplog.records] == ["no kernels of our own, t"]
    with pytest.raises(ConfigurationError, match="--cpu-kernels avx2: "):
        build.load_library("avx2")


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
