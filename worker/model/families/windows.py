"""Which layers see how much: the rules by which configs give layers a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from worker.model.config import FULL, SLIDING, ConfigReader
from worker.model.families.base import same_window


def layer_kinds(config: ConfigReader, is_full: Callable[[int], bool]) -> tuple[str, ...]:
    """What `layer_types` says of every layer, in files without it what `is_full` does."""
    num_layers, kinds = config.integer("num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        return tuple(FULL if is_full(layer) else SLIDING for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise config.error(f"layer_types must name {FULL} or {SLIDING} once per layer")
    return tuple(kinds)


def windows_of(config: ConfigReader, kinds: Sequence[str], window: Any) -> tuple[int | None, ...]:
    sizes = zip(kinds, same_window(config, window), strict=True)
    return tuple(size if kind == SLIDING else None for kind, size in sizes)


def every(period: int) -> Callable[[int], bool]:
    """Whether a layer is the last one of its `period`."""
    return lambda layer: (layer + 1) % period == 0


def switched_windows(config: ConfigReader, is_full: Callable[[int, int], bool]) -> tuple[int | None, ...]:
    """Qwen's rule: windows only when switched on. `is_full` gets the layer and `max_window_layers`."""
    is_on, window = config.flag("use_sliding_window"), config.get("sliding_window", 4096)
    limit = config.integer("max_window_layers", 28, least=0)
    return windows_of(config, layer_kinds(config, lambda layer: is_full(layer, limit)), window if is_on else None)
