from __future__ import annotations

import pytest

from common.errors import ConfigurationError
from tests.support import tiny_models
from worker.model.families import FAMILIES, read_spec
from worker.model.families.multimodal import MULTIMODAL_FAMILIES
from worker.model.spec import Activation, QkNorm, Rope, RopeKind, Spec

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)


def spec(**differences) -> Spec:
    return read_spec(LLAMA | differences)[0]


def message(**differences) -> str:
    with pytest.raises(ConfigurationError) as caught:
        spec(**differences)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sizes_come_from_the_config():
    found = spec()
    assert (found.num_layers, found.hidden_size, found.num_heads, found.num_kv_heads) == (3, 64, 8, 2)
    assert (found.head_dim, found.ffn_size, found.vocab_size, found.max_positions) == (8, 80, 97, 512)
    assert (found.norm_eps, found.activation, found.windows) == (1e-5, Activation.SILU, (None,) * 3)
    assert found.scale == 8**-0.5
    assert spec(head_dim=32).head_dim == 32
    assert spec(num_key_value_heads=None).num_kv_heads == 8


def test_an_unknown_model_type_lists_the_supported():
    text = message(model_type="gpt9")
    assert "'gpt9'" in text
    assert all(name in text for name in FAMILIES)
    assert "None" in message(model_type=None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("residual_multiplier", 0.2), ("sliding_window", 128), ("new_thing", "yes")],
)
def test_a_key_that_nobody_understands_is_named(key, value):
    assert key in message(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", None),
        ("sliding_window", None),
        ("use_mrope", False),
        ("partial_rotary_factor", 1.0),
        ("torch_dtype", "bfloat16"),
        ("pretraining_tp", 1),
        ("architectures", ["LlamaForCausalLM"]),
        # what tools and old versions left in files of released models
        ("max_sequence_length", 2048),
        ("is_llama_config", True),
        ("transformers.js_config", {"kv_cache_dtype": {"fp16": "float16"}}),
        ("unsloth_fixed", True),
        ("unsloth_version", "2024.9"),
        ("_flash_attn_2_enabled", True),
        ("_attn_implementation", "eager"),
        ("max_new_tokens", 512),
    ],
)
def test_keys_that_say_nothing_pass(key, value):
    assert spec(**{key: value}) == spec()


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_no_family_overlooks_an_unknown_key(name):
    values = tiny_models.config_of(name).to_dict()
    assert read_spec(values)[0].model_type == values["model_type"]
    with pytest.raises(ConfigurationError, match="made_up=3"):
        read_spec(values | dict(made_up=3))


def test_every_family_has_a_tiny_model():
    # old names of falcon, whose configs transformers no longer writes, and models that also see
    others = {"RefinedWeb", "RefinedWebModel", *MULTIMODAL_FAMILIES}
    known = {tiny_models.config_of(name).model_type for name in tiny_models.CASES}
    assert known == set(FAMILIES) - others


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("vocab_size", 3.5),
        ("num_attention_heads", True),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("attention_bias", "yes"),
        ("hidden_act", "swiglu9"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rope_theta", "big"),
    ],
)
def test_wrong_values_are_named(key, value):
    assert key in message(**{key: value})


def rope(**differences) -> Rope | None:
    (found,) = set(spec(**differences).ropes)
    return found


def test_rope_of_old_and_new_files_is_the_same():
    expected = Rope(theta=5e5, kind=RopeKind.LLAMA3, factor=8.0, original_positions=128)
    assert rope(rope_theta=5e5, rope_scaling=LLAMA3 | dict(rope_type="llama3")) == expected
    assert rope(rope_parameters=LLAMA3 | dict(rope_type="llama3", rope_theta=5e5)) == expected
    assert rope(rope_theta=5e5, rope_parameters=LLAMA3 | dict(rope_type="llama3")) == expected
    linear = Rope(theta=10_000.0, kind=RopeKind.LINEAR, factor=4.0)
    assert rope(rope_scaling=dict(type="linear", factor=4.0)) == linear
    assert rope(rope_parameters=dict(rope_type="linear", factor=4.0)) == linear
    assert rope() == rope(rope_scaling=None, rope_theta=None) == Rope(theta=10_000.0)


@pytest.mark.parametrize("kind", ["mrope", 3, ["linear"]])
def test_other_ropes_are_refused_with_the_list(kind):
    text = message(rope_scaling=dict(rope_type=kind, factor=2.0))
    assert repr(kind) in text
    assert all(known in text for known in RopeKind)


def test_unknown_keys_inside_rope_are_named():
    assert "mrope_section" in message(rope_parameters=dict(rope_type="linear", factor=2.0, mrope_section=[1, 2]))
    assert "factor" in message(rope_parameters=dict(rope_type="linear"))


def test_windows_follow_each_familys_rule():
    assert spec(model_type="mistral", sliding_window=8).windows == (8, 8, 8)
    assert spec(model_type="mistral", sliding_window=None).windows == (None,) * 3
    assert spec(model_type="mistral").windows == (4096,) * 3
    assert "sliding_window" in message(model_type="mistral", sliding_window=-1)
    for model_type in ("qwen2", "qwen3"):
        options = dict(model_type=model_type, sliding_window=8, max_window_layers=2)
        assert spec(**options).windows == (None,) * 3
        assert spec(**options, use_sliding_window=True).windows == (None, None, 8)
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        assert spec(**options, use_sliding_window=True, layer_types=kinds).windows == (8, None, 8)
        assert "layer_types" in message(**options, use_sliding_window=True, layer_types=kinds[:2])


def test_biases_and_norms_follow_each_familys_rule():
    def switches(**options):
        found = spec(**options)
        return found.qkv_bias, found.out_bias, found.mlp_bias, found.qk_norm is QkNorm.HEAD

    assert switches() == (False, False, False, False)
    assert switches(attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert switches(model_type="mistral") == (False, False, False, False)
    assert switches(model_type="qwen2") == (True, False, False, False)
    assert switches(model_type="qwen3") == (False, False, False, True)
    assert switches(model_type="qwen3", attention_bias=True) == (True, True, False, True)
    assert spec(model_type="qwen3").head_dim == 128


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_what_transformers_writes_is_understood_also_with_all_its_defaults(name):
    config = tiny_models.config_of(name)
    assert read_spec(config.to_dict())[0] == read_spec(config.to_diff_dict())[0]
