"""The tokens of a model, and which of them belong to this rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigurationError
from worker.parallel.group import Alone, Group
from worker.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The `size` token ids of a model, whose logits the ranks of `group` hold in parts.

    Raises:
        ConfigurationError: if there is no token for one of the ranks.
    """

    size: int
    group: Group = field(default_factory=Alone)

    def __post_init__(self) -> None:
        if self.size < self.group.shard.size:
            raise ConfigurationError(
                f"--num-shard {self.group.shard.size} is more than the {self.size} tokens of the model's vocabulary; "
                f"at most {self.size} is possible"
            )

    @property
    def mine(self) -> range:
        """Ids of this rank: they belong to the columns of its logits."""
        return self.group.shard.bounds(self.size)

    @property
    def is_split(self) -> bool:
        return self.group.shard.size > 1

    def gather(self, part: Tensor) -> Tensor:
        """[..., this rank's ids] of all ranks side by side: [..., size]. One collective."""
        num_ranks = self.group.shard.size
        widths = [len(Shard(rank, num_ranks).bounds(self.size)) for rank in range(num_ranks)]
        gathered = self.group.all_gather(F.pad(part, (0, max(widths) - part.shape[-1])))
        return torch.cat([columns[..., :width] for columns, width in zip(gathered, widths, strict=True)], -1)
