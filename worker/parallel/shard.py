"""Who holds what: the part of every split dimension that belongs to one rank. Arithmetic only.

Heads are split evenly, since a head is one piece of work for attention. Everything else (the width of feed-forward
layers, the vocabulary) is cut as evenly as whole numbers allow, so that nothing needs padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank `rank` out of `size`."""

    rank: int = 0
    size: int = 1

    def bounds(self, total: int) -> range:
        """This rank's part of `total` rows, columns or tokens; parts differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def heads(self, num_heads: int) -> range:
        return self.bounds(num_heads)

    def kv_heads(self, num_kv_heads: int) -> range:
        """Where there are fewer heads of keys and values than ranks, neighbours hold copies of the same one."""
        if num_kv_heads >= self.size:
            return self.bounds(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)


WHOLE = Shard()
"""All of everything: a model on one rank."""


def check_heads(num_heads: int, num_kv_heads: int, num_shards: int) -> None:
    """Every rank gets as many heads as any other, and whole groups of those that share keys and values.

    Raises:
        ConfigurationError: naming the numbers of shards that are possible.
    """
    allowed = [size for size in range(1, num_heads + 1) if is_even_split(num_heads, num_kv_heads, size)]
    if num_shards not in allowed:
        numbers = ", ".join(str(size) for size in allowed)
        raise ConfigurationError(
            f"--num-shard {num_shards} does not divide the model's {num_heads} heads "
            f"({num_kv_heads} of keys and values); possible are {numbers}"
        )


def is_even_split(num_heads: int, num_kv_heads: int, num_shards: int) -> bool:
    is_kv_even = num_kv_heads % num_shards == 0 or num_shards % num_kv_heads == 0
    return num_heads % num_shards == 0 and is_kv_even
