"""Frequencies and amplitude of every kind of rope, against the functions of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.paged import load_decoder, paged_logits, relative_error
from worker.model.config import stretch_rope
from worker.model.families import read_spec
from worker.model.rope import angles, both_ways, inverse_frequencies, rotate
from worker.model.spec import Rope, Spec

SIZES = dict(
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=1,
    intermediate_size=64,
    vocab_size=97,
    max_position_embeddings=4096,
)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=1024)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=512,
)
LONG = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0 + 0.01 * pair for pair in range(24)],
    long_factor=[1.0 + 2.0 * pair for pair in range(24)],
)
PHI = dict(partial_rotary_factor=0.75, original_max_position_embeddings=1024)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.5))),
    "dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=3.0))),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "yarn": ("Llama", dict(rope_parameters=YARN)),
    "yarn_betas": ("Llama", dict(rope_parameters=YARN | dict(beta_fast=16, beta_slow=2))),
    "yarn_untruncated": ("Llama", dict(rope_parameters=YARN | dict(truncate=False))),
    "yarn_one_place": ("Llama", dict(rope_parameters=YARN | dict(beta_fast=4, beta_slow=4, truncate=False))),
    "yarn_attention_factor": ("Llama", dict(rope_parameters=YARN | dict(attention_factor=1.75))),
    "yarn_mscales": ("Llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.2))),
    "yarn_one_mscale": ("Llama", dict(rope_parameters=YARN | dict(mscale=0.7))),
    "yarn_shrunk": ("Llama", dict(rope_parameters=YARN | dict(factor=0.5))),
    "longrope": ("Phi3", dict(rope_parameters=LONG, **PHI)),
    "longrope_factor": ("Phi3", dict(rope_parameters=LONG | dict(factor=32.0), **PHI)),
    "longrope_amplitude": ("Phi3", dict(rope_parameters=LONG | dict(attention_factor=1.5), **PHI)),
    "longrope_not_longer": ("Phi3", dict(rope_parameters=LONG, **PHI | dict(original_max_position_embeddings=4096))),
}
LENGTHS = [1000, 1024, 1025, 4096, 9000]


def config_of(name: str) -> Any:
    prefix, differences = CASES[name]
    # transformers writes into what it is given
    return getattr(transformers, f"{prefix}Config")(pad_token_id=0, **SIZES | copy.deepcopy(differences))


def spec_and_rope(values: dict[str, Any]) -> tuple[Spec, Rope]:
    spec = read_spec(values)[0]
    (rope,) = set(spec.ropes)
    return spec, rope


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_amplitude_are_those_of_transformers(name, length):
    config = config_of(name)
    spec, rope = spec_and_rope(config.to_dict())
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"), seq_len=length)
    got = inverse_frequencies(rope, spec.head_dim, length)
    assert rope.amplitude == pytest.approx(amplitude, rel=1e-12)
    torch.testing.assert_close(got, frequencies, rtol=1e-6, atol=0)
    plain = inverse_frequencies(Rope(theta=rope.theta, rotary_dim=rope.rotary_dim), spec.head_dim, length)
    differs = not torch.allclose(plain, frequencies, rtol=1e-6, atol=0)
    assert differs or (name, length) in [("dynamic", length) for length in LENGTHS[:4]]


@pytest.mark.parametrize("name", CASES)
def test_older_files_say_the_same_with_other_keys(name):
    values = config_of(name).to_dict()
    parameters = dict(values.pop("rope_parameters"))
    theta, share = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor", None)
    old = values | dict(rope_theta=theta, rope_scaling=parameters | dict(type=parameters.pop("rope_type")))
    if share is not None:
        old |= dict(partial_rotary_factor=share)
    assert spec_and_rope(old) == spec_and_rope(config_of(name).to_dict())
    old["rope_theta"] = theta / 2
    assert spec_and_rope(old) != spec_and_rope(config_of(name).to_dict())


def test_the_first_name_of_longrope_is_known():
    values = config_of("longrope").to_dict()
    values["rope_parameters"]["rope_type"] = "su"
    assert spec_and_rope(values) == spec_and_rope(config_of("longrope").to_dict())


@pytest.mark.parametrize(
    ("name", "positions"),
    [("linear", 4096), ("dynamic", 12288), ("llama3", 4096), ("yarn", 4096), ("longrope_factor", 4096)],
)
def test_a_stretched_rope_reaches_further_where_the_file_counts_the_unstretched(name, positions):
    assert spec_and_rope(config_of(name).to_dict())[0].max_positions == positions
    if name == "yarn":
        assert spec_and_rope(config_of(name).to_dict() | dict(max_position_embeddings=1024))[0].max_positions == 4096


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("yarn", dict(factor="four"), "factor"),
        ("yarn", dict(beta_fast=-1), "beta_fast"),
        ("yarn", dict(truncate=1), "truncate"),
        ("yarn", dict(short_factor=[1.0]), "short_factor"),
        ("longrope", dict(short_factor=[1.0] * 23), "24 numbers"),
        ("longrope", dict(long_factor=[1.0] * 23 + ["x"]), "long_factor"),
        ("longrope", dict(long_factor=None), "long_factor"),
        ("dynamic", dict(alpha=1000.0), "alpha"),
        ("linear", dict(rope_theta=1.0), "rope_theta"),
    ],
)
def test_wrong_numbers_are_named(name, change, part):
    values = config_of(name).to_dict()
    values["rope_parameters"] |= change
    with pytest.raises(ConfigurationError, match=part):
        read_spec(values)


def test_two_forms_in_one_file_must_agree():
    values = config_of("linear").to_dict()
    twice = values | dict(rope_scaling=dict(rope_type="linear", factor=2.5))
    assert spec_and_rope(twice) == spec_and_rope(values)
    with pytest.raises(ConfigurationError, match="rope_parameters"):
        read_spec(values | dict(rope_scaling=dict(type="linear", factor=2.0)))
    with pytest.raises(ConfigurationError, match="must be an object"):
        read_spec(values | dict(rope_parameters="linear"))


# What the command line says.


@pytest.mark.parametrize(("kind", "factor", "positions"), [("linear", 2.5, 10240), ("dynamic", 3.0, 4096)])
@pytest.mark.parametrize("name", ["llama3", "yarn", "longrope"])
def test_options_replace_what_a_file_says(name, kind, factor, positions):
    values = config_of(name).to_dict()
    found, rope = spec_and_rope(stretch_rope(values, kind, factor))
    before = spec_and_rope(values)[1]
    assert (rope.kind, rope.factor, rope.theta, rope.rotary_dim) == (kind, factor, before.theta, before.rotary_dim)
    assert found.max_positions == (positions if kind == "linear" else 3 * positions)
    asked_for = dict(rope_type=kind, rope_theta=before.theta, factor=factor)
    if name != "longrope":
        assert (found, rope) == spec_and_rope(
            values | dict(max_position_embeddings=positions, rope_parameters=asked_for)
        )


def test_options_reach_the_text_of_models_that_see():
    inner = dict(rope_theta=5.0, max_position_embeddings=64)
    stretched = stretch_rope(dict(text_config=inner), "linear", 2.0)
    assert stretched["text_config"]["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert stretched["text_config"]["max_position_embeddings"] == 128


def test_ropes_by_kind_of_layer_have_no_options():
    values = tiny_models.config_of("gemma3").to_dict()
    with pytest.raises(ConfigurationError, match="--rope-scaling and --rope-factor need"):
        stretch_rope(values, "linear", 2.0)


# Kinds that depend on a length take one for all sequences.

DYNAMIC = dict(rope_type="dynamic", rope_theta=100.0, factor=4.0)
LONG_TINY = dict(rope_type="longrope", rope_theta=100.0, short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 6.0])
BY_LENGTH = {
    "dynamic": ("Llama", dict(max_position_embeddings=16, rope_parameters=DYNAMIC)),
    "longrope": (
        "Phi3",
        dict(max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=LONG_TINY),
    ),
}


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_longest_sequence_decides_for_all(tmp_path, name, length):
    prefix, differences = BY_LENGTH[name]
    reference = tiny_models.build_from(prefix, **copy.deepcopy(differences))
    reference.save_pretrained(tmp_path)
    ids = torch.randint(tiny_models.VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = [reference(ids[None]).logits[0]]

    def error(max_length: int) -> float:
        decoder = load_decoder(tmp_path, max_length=max_length)
        return relative_error(paged_logits(decoder, [ids.tolist()])[0], expected)

    assert error(length) <= 1e-5
    assert error(52 - length) > 1e-3


# How heads turn.


@pytest.mark.parametrize("rotary_dim", [64, 48])
def test_narrow_heads_turn_in_float32_also_far_out(rotary_dim):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((4, 3, 64), generator=generator).bfloat16()
    positions, frequencies = torch.tensor([0, 5, 70_001, 131_071]), 1e4 ** (-torch.arange(rotary_dim // 2) / 24)
    radians = (positions.float()[:, None, None] * frequencies).double()
    first, second = x.double()[..., :rotary_dim].chunk(2, -1)
    turned = (first * radians.cos() - second * radians.sin(), second * radians.cos() + first * radians.sin())
    expected = torch.cat((*turned, x[..., rotary_dim:].double()), -1)
    assert torch.equal(rotate(x, *angles(positions, both_ways(frequencies), torch.float32, 1.0)), expected.bfloat16())
    assert not torch.equal(
        rotate(x, *angles(positions, both_ways(frequencies), torch.bfloat16, 1.0)), expected.bfloat16()
    )
    got = rotate(x.double(), *angles(positions, both_ways(frequencies), torch.float64, 2.0))[..., :rotary_dim]
    assert float((got - 2 * expected[..., :rotary_dim]).abs().max()) < 1e-6
