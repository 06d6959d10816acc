"""Which quantisation a model gets: that of its checkpoint, or the one that `--quantize` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import ConfigurationError
from common.settings import Quantize
from worker.model.quant.rounding import (
    CODEBOOK_BLOCK,
    INT4_GROUP,
    fp4_by_block,
    fp8_by_row,
    int4_by_group,
    int8_by_row,
    nf4_by_block,
)
from worker.model.quant.scheme import NOT_QUANTISED, Quantisation
from worker.model.quant.stored import stored_quantisation

MADE = {
    "int8": Quantisation("int8", make=int8_by_row, has_int8_embeddings=True),
    "int4": Quantisation("int4", make=int4_by_group, has_int8_embeddings=True, unit=INT4_GROUP),
    "fp8": Quantisation("fp8", make=fp8_by_row),
    "bitsandbytes": Quantisation("bitsandbytes", make=int8_by_row),
    "bitsandbytes-nf4": Quantisation("bitsandbytes-nf4", make=nf4_by_block, unit=CODEBOOK_BLOCK),
    "bitsandbytes-fp4": Quantisation("bitsandbytes-fp4", make=fp4_by_block, unit=CODEBOOK_BLOCK),
}
"""By the values of `--quantize` that need no quantised checkpoint."""


def choose_quantisation(option: Quantize | None, config: Mapping[str, Any]) -> Quantisation:
    """`config` is the parsed config.json.

    Raises:
        ConfigurationError: the option contradicts the checkpoint, or what the checkpoint says cannot run here.
    """
    stored = stored_quantisation(config)
    if stored is not None:
        if option not in (None, stored.name):
            raise ConfigurationError(
                f"--quantize {option} contradicts the checkpoint, which is quantised by {stored.name}; leave it out"
            )
        return stored
    if option in (None, "none"):
        return NOT_QUANTISED
    if option in MADE:
        return MADE[option]
    raise ConfigurationError(
        f"--quantize {option} needs a checkpoint in that format and this one is not quantised; on the way in are "
        f"possible {', '.join(MADE)}, and `inferfleet prepare --quantize gptq` writes a quantised one"
    )
