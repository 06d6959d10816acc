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
from worker.model.spec import Spec

FAMILIES: dict[str, Family] = LLAMA_FAMILIES | MOE_FAMILIES | GPT_FAMILIES


def read_spec(values: Mapping[str, Any]) -> tuple[Spec, Family]:
    """The Spec of a parsed config.json and the family it belongs to.

    Raises:
        ConfigurationError: if the model type is unknown (lists the known ones), a value is wrong, or a key says
            something that nobody here understands.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigurationError(f"config.json: model_type {model_type!r} is not supported; supported are {known}")
    family, config = FAMILIES[model_type], ConfigReader(values)
    spec = family.build(config)
    config.finish()
    return spec, family
