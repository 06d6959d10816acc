"""How much memory this process may still take, as the machine and its container see it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that can be allocated without swapping: the machine's, or what a container's limit leaves of them.
    Where there is no /proc, the whole memory."""
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    available = int(found[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(int(text) - int(used.read_text()), 0))
    return available


def return_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory, where it can be told to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def readable(num_bytes: int) -> str:
    """Such as 1.5 GiB."""
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{num_bytes} B" if power == 0 else f"{num_bytes / 1024**power:.1f} {UNITS[power]}"
