"""What a family is: a function from config to Spec, and how its checkpoints name and lay out their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from worker.model.config import ConfigReader
from worker.model.spec import AnySpec, Rope, RopeKind, Spec


class QkvLayout(StrEnum):
    """How a checkpoint stores the projections of queries, keys and values.

    separate      three tensors
    concatenated  one, all queries before all keys before all values
    grouped       one, for each head of keys its queries, the key, the value; with as many heads of keys as of queries
                  that is q, k, v head by head, with a single one it is `concatenated`
    """

    SEPARATE = "separate"
    CONCATENATED = "concatenated"
    GROUPED = "grouped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type`, or several that are the same.

    build              reads the config; every key it looks at counts as understood
    names              our name of a parameter -> the checkpoint's, without `.weight` and `.bias`; several are
                       alternatives. {i} is the layer, {e} the expert
    prefix             beginning of the names that some checkpoints leave out
    qkv                layout of the projections
    is_transposed      matrices are stored [in, out]
    is_interleaved     rope turns neighbours instead of halves
    has_norm_per_head  norms of queries and keys have weights for every head
    ignored            endings of tensors that follow from the config
    foreign            beginnings of tensors of parts that are not run
    """

    build: Callable[[ConfigReader], AnySpec]
    names: Mapping[str, str | tuple[str, ...]]
    prefix: str = ""
    qkv: QkvLayout = QkvLayout.SEPARATE
    is_transposed: bool = False
    is_interleaved: bool = False
    has_norm_per_head: bool = False
    ignored: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def candidates(self, key: str, layer: int, expert: int) -> list[str]:
        """The names that a tensor may have, the usual one first."""
        known = self.names[key]
        full = [name.format(i=layer, e=expert) for name in ((known,) if isinstance(known, str) else known)]
        return full + [name.removeprefix(self.prefix) for name in full if self.prefix and name.startswith(self.prefix)]


def decoder(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    """The fields that most families read alike. `differences` are what the caller knows better."""
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    head_dim = differences.pop("head_dim", None) or size_of_heads(config)
    common: dict[str, Any] = {
        "model_type": model_type,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "vocab_size": config.integer("vocab_size"),
        "scale": head_dim**-0.5,
        "windows": (None,) * num_layers,
        "ropes": (None,) * num_layers,
        "is_tied": config.flag("tie_word_embeddings"),
    }
    # looked up only where the family does not say otherwise, so that keys it has no use for stay unknown
    if "max_positions" not in differences:
        common["max_positions"] = reach(config.integer("max_position_embeddings"), differences.get("ropes", ()))
    if "ffn_size" not in differences:
        common["ffn_size"] = config.integer("intermediate_size")
    spec = Spec(**common | differences)
    if spec.num_heads % spec.num_kv_heads or (any(spec.ropes) and spec.head_dim % 2):
        raise config.error("num_attention_heads must be a multiple of num_key_value_heads, and head_dim even")
    _check_factors(config, spec)
    return spec


def size_of_heads(config: ConfigReader) -> int:
    return config.integer("head_dim", max(config.integer("hidden_size") // config.integer("num_attention_heads"), 1))


def reach(positions: int, ropes: Iterable[Rope | None]) -> int:
    """How many positions a model knows whose file says `positions`: files count what a rope is stretched to, except
    for dynamic, and often yarn."""
    stretched = [rope for rope in ropes if rope and rope.kind in (RopeKind.DYNAMIC, RopeKind.YARN)]
    return max([positions, *(int(rope.factor * rope.original_positions) for rope in stretched)])


def _check_factors(config: ConfigReader, spec: Spec) -> None:
    for rope in filter(None, spec.ropes):
        num_pairs = (rope.rotary_dim or spec.head_dim) // 2
        if rope.kind is RopeKind.LONGROPE and {len(rope.short_factors), len(rope.long_factors)} != {num_pairs}:
            raise config.error(f"short_factor and long_factor of longrope must have {num_pairs} numbers each")


def everywhere(config: ConfigReader, rope: Rope | None) -> tuple[Rope | None, ...]:
    """The same rope in every layer."""
    return (rope,) * config.integer("num_hidden_layers")


def same_window(config: ConfigReader, window: Any) -> tuple[int | None, ...]:
    if window is not None and (type(window) is not int or window <= 0):
        raise config.error(f"sliding_window must be a positive integer or null, not {window!r:.60}")
    return (window,) * config.integer("num_hidden_layers")
