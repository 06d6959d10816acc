"""The architectures that run here, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import ConfigurationError
from worker.model.config import ConfigReader
from worker.model.families.base import Family
from worker.model.families.gpt import GPT_FAMILIES
from worker.model.families.llama import LLAMA_FAMILIES
from worker.model.families.moe import MOE_FAMILIES
from worker.model.families.multimodal import MULTIMODAL_FAMILIES
from worker.model.families.norms import NORMS_FAMILIES
from worker.model.families.t5 import T5_FAMILIES
from worker.model.spec import AnySpec

FAMILIES: dict[str, Family] = LLAMA_FAMILIES | NORMS_FAMILIES | MOE_FAMILIES | MULTIMODAL_FAMILIES | GPT_FAMILIES
"""Decoders; encoder-decoders are beside them."""


def read_spec(values: Mapping[str, Any]) -> tuple[AnySpec, Family]:
    """The spec of a parsed config.json and the family it belongs to.

    Raises:
        ConfigurationError: if the model type is unknown (lists the known ones), a value is wrong, or a key says
            something that nobody here understands.
    """
    model_type, families = values.get("model_type"), FAMILIES | T5_FAMILIES
    if not isinstance(model_type, str) or model_type not in families:
        known = ", ".join(sorted(families))
        raise ConfigurationError(f"config.json: model_type {model_type!r:.60} is not supported; supported are {known}")
    family, config = families[model_type], ConfigReader(values)
    spec = family.build(config)
    config.finish()
    return spec, family
