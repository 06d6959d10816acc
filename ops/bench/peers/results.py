"""What was measured, in one file: parts of it replace what was there of the same kind; ratios, bars and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from ops.bench.peers.engines import CANDIDATES, ENGINES, OURS, Settings, Site
from ops.bench.peers.workloads import TITLES

Found = dict[str, list[dict[str, Any]]]
"""Lists of entries by kind."""
KEYS = {
    "runs": ("shape", "dtype", "workload"),
    "sweeps": ("shape", "dtype", "workload", "engine"),
    "starts": ("shape", "dtype"),
    "agreements": ("shape", "dtype"),
}
"""What names an entry."""
BARS = {"decode": 1.3, "mixed": 1.3, "shared": 1.3, "prefill": 1.1, "single": 1.0}
FLOAT32_BAR = 1.0
MEMORY_BAR, START_BAR_S = 1 / 3, 3.0
NEEDED = ("vllm", "llama.cpp")


def read(file: Path | None) -> Found:
    """Empty if there is no such file.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        found = json.loads(file.read_text()) if file and file.exists() else {}
        return {kind: list(found.get(kind, [])) for kind in KEYS}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{file} has no figures of peers: {error}") from None


def write(found: Found, file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)


def merge(found: Found, kind: str, entry: dict[str, Any]) -> None:
    """Put an entry in the place of that with the same names, or at the end."""
    names = [entry[key] for key in KEYS[kind]]
    rows = found.setdefault(kind, [])
    places = [place for place, row in enumerate(rows) if [row[key] for key in KEYS[kind]] == names]
    if places:
        rows[places[0]] = entry
    else:
        rows.append(entry)


def best_settings(found: Found, site: Site, workload: str, engine: str) -> Settings:
    """Of the sweep, else the first candidate. Ours has its defaults."""
    for row in found.get("sweeps", []):
        if [row[key] for key in KEYS["sweeps"]] == [site.shape, site.dtype, workload, engine]:
            best: Settings = row["best"]
            return best
    return CANDIDATES[engine][0]


# Figures.


def rates(run: dict[str, Any], engine: str) -> list[float]:
    """Output tokens per second, by round."""
    return [num / seconds for num, seconds in zip(run["num_output"], run["seconds"][engine], strict=True)]


def ratios(run: dict[str, Any], peer: str) -> list[float]:
    """How many times as fast ours was, by round."""
    return [theirs / own for theirs, own in zip(run["seconds"][peer], run["seconds"][OURS], strict=True)]


def rate(run: dict[str, Any], engine: str) -> float:
    return float(statistics.median(rates(run, engine)))


def share(run: dict[str, Any], engine: str) -> float:
    """Of the roofline."""
    pairs = zip(run["least_seconds"], run["seconds"][engine], strict=True)
    return float(statistics.median(least / seconds for least, seconds in pairs))


def best_peer(run: dict[str, Any], among: Iterable[str]) -> str:
    """The fastest of those that were measured; empty if none was."""
    return max((peer for peer in among if peer in run["seconds"]), key=lambda peer: rate(run, peer), default="")


def bar_of(run: dict[str, Any]) -> tuple[float, Sequence[str]]:
    """How many times as fast ours must be, and as whom."""
    if run["dtype"] == "float32":
        return FLOAT32_BAR, NEEDED
    return BARS[run["workload"]], ("llama.cpp",) if run["workload"] == "single" else NEEDED


def misses(found: Found) -> list[str]:
    """A sentence for each bar that was not met, or cannot be told of for lack of figures."""
    parts = [map(_missed_speed, found["runs"]), map(_missed_memory, sites(found["runs"]))]
    parts += [map(_missed_start, found["starts"]), map(_missed_agreement, found["agreements"])]
    return [sentence for part in parts for row in part for sentence in row]


def sites(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs by shape and dtype."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["shape"], run["dtype"]), []).append(run)
    return list(grouped.values())


def peak(runs: Sequence[dict[str, Any]], engine: str, kind: str = "peak") -> int | None:
    found: list[int] = [run["memory"][engine][kind] for run in runs if engine in run["memory"]]
    return max(found, default=None)


def _missed_speed(run: dict[str, Any]) -> Iterator[str]:
    name, (bar, among) = _name(run), bar_of(run)
    missing = [engine for engine in (OURS, *among) if engine not in run["seconds"]]
    if missing:
        yield f"{name}: no figures of {', '.join(missing)}"
        return
    peer = best_peer(run, among)
    ratio = statistics.median(ratios(run, peer))
    if ratio < bar:
        yield f"{name}: {ratio:.2f} times as fast as {peer}, bar {bar}"


def _missed_memory(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    own, theirs = peak(runs, OURS), peak(runs, "vllm")
    if own is not None and theirs is not None and own > MEMORY_BAR * theirs:
        name = f"{runs[0]['shape']} {runs[0]['dtype']}"
        yield f"{name}: {own / theirs:.2f} of the peak memory of vllm, bar {MEMORY_BAR:.2f}"


def _missed_start(entry: dict[str, Any]) -> Iterator[str]:
    seconds = statistics.median(entry["seconds"].get(OURS, [0.0]))
    if seconds > START_BAR_S:
        yield f"{entry['shape']} {entry['dtype']}: first token after {seconds:.1f} s, bar {START_BAR_S:.0f} s"


def _missed_agreement(entry: dict[str, Any]) -> Iterator[str]:
    allowed = entry["tolerance"]
    for peer, difference in entry["differences"].items():
        # not `>`: what is no number agrees with nothing
        if not difference <= allowed:
            yield f"{_name(entry)}: log-probabilities {difference:.1e} from those of {peer}, bar {allowed:.1e}"


def _name(entry: dict[str, Any]) -> str:
    return " ".join(entry[key] for key in ("shape", "dtype", "workload") if key in entry)


# Tables.


def table(found: Found) -> str:
    """Markdown: speed, memory, starts, what the peers agree on, and where the figures are from."""
    parts = [_speeds(found["runs"]), _memory(found["runs"]), _starts(found["starts"])]
    parts += [_agreements(found["agreements"]), _origin([row for rows in found.values() for row in rows])]
    return "\n\n".join(part for part in parts if part)


def _speeds(runs: Sequence[dict[str, Any]]) -> str:
    engines = [engine for engine in ENGINES if any(engine in run["seconds"] for run in runs)]
    titles = [
        "shape",
        "type",
        "output tokens/s",
        *engines,
        "roofline",
        "ours of roofline",
        "times as fast (range)",
        "bar",
    ]
    return _lines(titles, [_speed_row(run, engines) for run in runs])


def _speed_row(run: dict[str, Any], engines: Sequence[str]) -> list[str]:
    cells = [run["shape"], run["dtype"], TITLES[run["workload"]]]
    cells += [f"{rate(run, engine):.0f}" if engine in run["seconds"] else "" for engine in engines]
    roofline = statistics.median(
        num / least for num, least in zip(run["num_output"], run["least_seconds"], strict=True)
    )
    bar, among = bar_of(run)
    peer = best_peer(run, among)
    if OURS not in run["seconds"] or not peer:
        return [*cells, f"{roofline:.0f}", "", "", f"{bar}"]
    seen = ratios(run, peer)
    text = f"{statistics.median(seen):.2f} of {peer} ({min(seen):.2f} to {max(seen):.2f})"
    return [*cells, f"{roofline:.0f}", f"{share(run, OURS):.2f}", text, f"{bar}"]


def _memory(runs: Sequence[dict[str, Any]]) -> str:
    engines = [engine for engine in ENGINES if any(engine in run["memory"] for run in runs)]
    rows = []
    for group in sites(runs):
        pairs = [(peak(group, engine), peak(group, engine, "held")) for engine in engines]
        cells = [f"{most / 1e6:.0f} ({held / 1e6:.0f})" if most and held else "" for most, held in pairs]
        rows.append([group[0]["shape"], group[0]["dtype"], *cells])
    return _lines(["shape", "type", *(f"{engine}, MB at the peak (held)" for engine in engines)], rows)


def _starts(entries: Sequence[dict[str, Any]]) -> str:
    engines = [engine for engine in ENGINES if any(engine in entry["seconds"] for entry in entries)]
    rows = [
        [
            entry["shape"],
            entry["dtype"],
            *(f"{statistics.median(entry['seconds'].get(engine, [0.0])):.1f}" for engine in engines),
        ]
        for entry in entries
    ]
    return _lines(["shape", "type", *(f"{engine}, s to the first token" for engine in engines)], rows)


def _agreements(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [entry["shape"], entry["dtype"], peer, f"{difference:.1e}", f"{entry['tolerance']:.1e}"]
        for entry in entries
        for peer, difference in entry["differences"].items()
    ]
    return _lines(["shape", "type", "peer", "largest difference of log-probabilities", "allowed"], rows)


def _origin(entries: Sequence[dict[str, Any]]) -> str:
    """One line a machine, then one of versions."""
    places = sorted({_place(entry) for entry in entries})
    versions = {
        name: text for entry in entries for each in entry.get("versions", {}).values() for name, text in each.items()
    }
    shown = [f"{name} {text}" for name, text in sorted(versions.items()) if len(text) < 20]
    return "\n".join([*places, *([f"Versions: {', '.join(shown)}."] if shown else [])])


def _place(entry: dict[str, Any]) -> str:
    machine = entry["machine"]
    flags = ", ".join(machine["flags"])
    return f"Measured on {entry['date']}: {machine['processor']}, {machine['cores']} cores ({flags})."


def _lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))
