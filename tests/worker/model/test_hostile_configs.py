"""Whatever stands in config.json: it is read, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.errors import ConfigurationError
from tests.support import tiny_models, tiny_t5
from tests.worker.model import hub_configs
from worker.model import rope
from worker.model.config import MAX_SIZE, read_config
from worker.model.families import FAMILIES, read_spec
from worker.model.families.t5 import T5_FAMILIES
from worker.model.spec import Spec

BAD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 0.5, -0.5, math.nan, math.inf, 1e-300, 1e300, 2**31, 10**12, 10**400),
    *("", "64", "x" * 10_000, [], [0], [None], [[]], ["sliding_attention"], {}, {"rope_type": []}),
]
OPTIONAL = ("head_dim", "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window")
"""Keys that not every file has."""


def _with_text(model_type: str, inner: str) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": tiny_models.config_of(inner).to_dict()}


def _valid() -> dict[str, dict[str, Any]]:
    """At least one config of every model type."""
    tiny = {name: tiny_models.config_of(name).to_dict() for name in tiny_models.CASES}
    falcons = {"RefinedWeb": hub_configs.FALCON_40B, "RefinedWebModel": hub_configs.FALCON_7B}
    old = {name: hub_configs.old_falcon(values, name) for name, values in falcons.items()}
    encoders = {name: tiny_t5.build(name).config.to_dict() for name in tiny_t5.CASES}
    seeing = {
        "seeing gemma": _with_text("gemma3", "gemma3"),
        "seeing mistral": _with_text("mistral3", "mistral_no_window"),
    }
    return tiny | old | encoders | seeing | {"mpt-7b": hub_configs.MPT_7B}


VALID = _valid()


def test_every_model_type_is_tried():
    assert {values["model_type"] for values in VALID.values()} == set(FAMILIES | T5_FAMILIES)


def _places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every key, those of objects inside too."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *place) for place in _places(value))


def _changed(values: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(values)
    target = result
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return result


def is_read(values: dict[str, Any]) -> bool:
    try:
        spec, _ = read_spec(values)
    except ConfigurationError as refusal:
        assert str(refusal).startswith("config.json")
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 800
        return False
    assert_usable(spec)
    return True


def assert_usable(spec: Any) -> None:
    if not isinstance(spec, Spec):
        return
    assert len(spec.windows) == len(spec.ropes) == spec.num_layers
    assert spec.num_heads % spec.num_kv_heads == 0
    factors = (spec.scale, spec.norm_eps, spec.embedding_scale, spec.residual_scale, spec.logit_scale)
    assert all(0 < factor < math.inf for factor in factors)
    for turning in filter(None, set(spec.ropes)):
        frequencies = rope.inverse_frequencies(turning, spec.head_dim, 2 * spec.max_positions)
        assert torch.isfinite(frequencies).all() and math.isfinite(turning.amplitude)


@pytest.mark.parametrize("name", VALID)
def test_each_key_with_each_bad_value_is_read_or_refused(name):
    values = VALID[name]
    assert is_read(values)
    places = {*_places(values), *((key,) for key in OPTIONAL)} - {("model_type",)}
    outcomes = [is_read(_changed(values, place, bad)) for place in sorted(places) for bad in BAD]
    assert True in outcomes
    assert False in outcomes


def test_any_other_model_type_is_refused():
    assert not any(is_read(VALID["llama"] | dict(model_type=bad)) for bad in BAD)


LLAMA = VALID["llama"]
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (LLAMA | dict(num_hidden_layers=1025), "num_hidden_layers must be an integer from 1 to 1024, not 1025"),
        (LLAMA | dict(hidden_size=MAX_SIZE + 1), "hidden_size must be an integer"),
        (LLAMA | dict(rms_norm_eps=1e-21), "rms_norm_eps must be a positive number"),
        (LLAMA | dict(hidden_act=["silu"]), "hidden_act"),
        (LLAMA | dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4.0)), "low_freq_factor must be below"),
        (VALID["gpt2"] | dict(n_layer=10**9), "n_layer must be an integer from 1 to 1024, not 1000000000"),
        (VALID["mixtral"] | dict(num_local_experts=10**9), "num_local_experts must be an integer from 1 to 1024"),
        (VALID["mistral_no_window"] | dict(sliding_window=True), "sliding_window must be a positive integer or null"),
    ],
)
def test_what_a_model_cannot_have_is_named(values, words):
    with pytest.raises(ConfigurationError, match=words):
        read_spec(values)


def test_null_stands_for_the_default():
    assert read_spec(LLAMA | dict(hidden_act=None, rms_norm_eps=LLAMA["rms_norm_eps"])) == read_spec(LLAMA)


def test_windows_from_the_first_layer_on_are_zero_layers_without():
    options = dict(use_sliding_window=True, sliding_window=8, layer_types=None, max_window_layers=0)
    assert read_spec(VALID["qwen2"] | options)[0].windows == (8,) * 3


@pytest.mark.parametrize("head_dim", [2, 4])
def test_the_smallest_heads_turn_too(head_dim):
    spec, _ = read_spec(LLAMA | dict(head_dim=head_dim, rope_parameters=dict(rope_type="dynamic", factor=2.0)))
    frequencies = rope.inverse_frequencies(spec.ropes[0], head_dim, 2000)
    assert len(frequencies) == head_dim // 2
    assert float(frequencies[0]) == 1.0


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, f'{{"vocab_size": {"9" * 5000}}}', "{" * 9])
def test_files_that_are_no_config_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_spec(read_config(tmp_path)) == read_spec(LLAMA)
