"""Which format the weights of a checkpoint are stored in, from what its config.json says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import ConfigurationError
from worker.model.config import STORAGE, ConfigReader
from worker.model.quant.awq import awq
from worker.model.quant.bitsandbytes import bitsandbytes
from worker.model.quant.compressed import compressed
from worker.model.quant.fp8 import fp8
from worker.model.quant.gptq import gptq
from worker.model.quant.scheme import Quantisation

METHODS: dict[str, Callable[[ConfigReader], Quantisation]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "compressed-tensors": compressed,
    "bitsandbytes": bitsandbytes,
}
"""By `quant_method`."""


def stored_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """How a parsed config.json says that matrices are stored; None if it says nothing.

    Raises:
        ConfigurationError: if the method is unknown (lists the known ones), a value is wrong, or a key says something
            that nobody here understands.
    """
    found = _sections(config)
    if not found:
        return None
    name, values = found[0]
    if any(other != values for _, other in found):
        raise ConfigurationError(f"config.json: {' and '.join(name for name, _ in found)} must be the same")
    method = _method(values, name)
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigurationError(
            f"config.json: {name}: quant_method {method!r:.60} is not supported; supported are {known}"
        )
    reader = ConfigReader(values, f"config.json: {name}")
    quantisation = METHODS[method](reader)
    reader.finish()
    return quantisation


def _sections(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All places that say something, in models with several parts also the one that is run."""
    text = config.get("text_config")
    places = {name: config.get(name) for name in STORAGE}
    places |= {f"text_config: {name}": text.get(name) for name in STORAGE} if isinstance(text, dict) else {}
    for name, values in places.items():
        if values and not isinstance(values, dict):
            raise ConfigurationError(f"config.json: {name} must be an object, not {values!r:.60}")
    return [(name, values) for name, values in places.items() if values]


def _method(values: Mapping[str, Any], name: str) -> Any:
    """Older files say it by the place alone, or by a switch."""
    if values.get("quant_method") is None and name.endswith("compression_config"):
        return "compressed-tensors"
    if values.get("quant_method") is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return "bitsandbytes"
    return values.get("quant_method")
