from __future__ import annotations

import pytest

from worker.runner.memory import available_bytes, readable

MEMINFO = "MemTotal:       8000 kB\nMemFree:         500 kB\nMemAvailable:   4000 kB\n"


@pytest.fixture()
def machine(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def container(folder, limit: str, used: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")


def test_what_the_machine_has(machine):
    assert available_bytes(machine / "meminfo", machine) == 4000 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", 100, 4_096_000), ("3000000", 1_000_000, 2_000_000), ("1000", 5000, 0), ("99999999", 1, 4_096_000)],
)
def test_a_containers_limit_counts(machine, limit, used, expected):
    container(machine, limit, used)
    assert available_bytes(machine / "meminfo", machine) == expected


def test_this_machine_has_some():
    assert available_bytes() > 1_000_000


def test_without_proc_the_whole_memory_counts(tmp_path):
    assert available_bytes(tmp_path / "none", tmp_path) >= available_bytes()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (9 << 50, "9216.0 TiB"),
    ],
)
def test_readable_sizes(number, text):
    assert readable(number) == text
