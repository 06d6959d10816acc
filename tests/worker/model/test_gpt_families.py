from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from common.errors import ConfigurationError
from tests.worker.model import hub_configs as hub
from worker.model.families import read_spec
from worker.model.loading import weight_bytes
from worker.model.spec import Activation, Norm, Residual, Rope, Spec
from worker.model.weights import DummySource


def spec(config, **differences) -> Spec:
    return read_spec(copy.deepcopy(config) | differences)[0]


def message(config, **differences) -> str:
    spec(config)
    with pytest.raises(ConfigurationError) as caught:
        spec(config, **differences)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turning(rotary_dim=None, theta=10_000.0):
    return Rope(theta=theta, rotary_dim=rotary_dim)


LAYER_SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
PARALLEL_TWO = Residual.PARALLEL_TWO_NORMS
FALCON_40B_SAYS = dict(sizes=(60, 8192, 128, 8, 64, 32768), residual=PARALLEL_TWO, qkv_bias=False, rope=turning())
FALCON_7B_SAYS = dict(sizes=(32, 4544, 71, 1, 64, 18176), residual=Residual.PARALLEL, mlp_bias=False, rope=turning())
FALCON_RW_SAYS = dict(
    sizes=(24, 2048, 32, 32, 64, 8192), residual=Residual.SEQUENTIAL, alibi_scale=0.125, out_bias=True, rope=None
)
CASES = {
    "gpt2": (hub.GPT2, dict(sizes=(12, 768, 12, 12, 64, 3072), position_offset=0, max_positions=1024)),
    "starcoder": (hub.STARCODER, dict(sizes=(40, 6144, 48, 1, 128, 24576), activation=Activation.GELU)),
    "starcoder2": (
        hub.STARCODER2_3B,
        dict(sizes=(30, 3072, 24, 2, 128, 12288), windows=(4096,) * 30, rope=turning(theta=999999.4420358813)),
    ),
    "bloom": (hub.BLOOM, dict(sizes=(70, 14336, 112, 112, 128, 57344), alibi_scale=1.0, embedding_norm=True)),
    "bloom-560m": (hub.SAVED_BLOOM_560M, dict(sizes=(24, 1024, 16, 16, 64, 4096), max_positions=2048)),
    "falcon-7b": (hub.FALCON_7B, FALCON_7B_SAYS),
    "falcon-40b": (hub.FALCON_40B, FALCON_40B_SAYS),
    "falcon-11b": (
        hub.FALCON_11B,
        dict(sizes=(60, 4096, 32, 8, 128, 16384), residual=Residual.PARALLEL, rope=turning(theta=500042.0)),
    ),
    "falcon-rw-1b": (hub.FALCON_RW_1B, FALCON_RW_SAYS),
    "old falcon-7b": (hub.old_falcon(hub.FALCON_7B, "RefinedWebModel"), FALCON_7B_SAYS),
    "old falcon-40b": (hub.old_falcon(hub.FALCON_40B, "RefinedWeb"), FALCON_40B_SAYS),
    "old falcon-rw-1b": (hub.old_falcon(hub.FALCON_RW_1B, "RefinedWebModel"), FALCON_RW_SAYS),
    "gpt-neox-20b": (
        hub.GPT_NEOX_20B,
        dict(
            sizes=(44, 6144, 64, 64, 96, 24576),
            residual=PARALLEL_TWO,
            activation=Activation.GELU_TANH,
            rope=turning(24),
        ),
    ),
    "pythia-70m": (hub.PYTHIA_70M, dict(sizes=(6, 512, 8, 8, 64, 2048), activation=Activation.GELU, rope=turning(16))),
    "gpt-j-6b": (hub.GPTJ_6B, dict(sizes=(28, 4096, 16, 16, 256, 16384), head_bias=True, rope=turning(64))),
    "gpt-neo-125m": (
        hub.GPT_NEO_125M,
        dict(sizes=(12, 768, 12, 12, 64, 3072), scale=1.0, windows=(None, 256) * 6, qkv_bias=False, out_bias=True),
    ),
    "opt-350m": (
        hub.OPT_350M,
        dict(
            sizes=(24, 1024, 16, 16, 64, 4096),
            residual=Residual.POST,
            position_offset=2,
            embedding_size=512,
            final_norm=False,
        ),
    ),
    "mpt-7b": (
        hub.MPT_7B,
        dict(sizes=(32, 4096, 32, 32, 128, 16384), alibi_scale=1.0, clip_qkv=None, norm_bias=False, out_bias=False),
    ),
    "phi-2": (
        hub.PHI_2,
        dict(sizes=(32, 2560, 32, 32, 80, 10240), residual=Residual.PARALLEL, head_bias=True, rope=turning(32)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_configs_of_the_hub_are_understood(name):
    config, expected = CASES[name]
    found = spec(config)
    expected = {"norm": Norm.LAYER, "norm_eps": 1e-5, "is_gated": False} | expected
    if "rope" in expected:
        expected["ropes"] = (expected.pop("rope"),) * found.num_layers
    sizes = dict(zip(LAYER_SIZES, expected.pop("sizes"), strict=True))
    assert {key: getattr(found, key) for key in sizes | expected} == sizes | expected


OLD_NOTES = [
    (hub.GPT2, dict(n_special=0, predict_special_tokens=True)),
    (hub.GPT2, dict(output_past=True)),
    (hub.GPT2, dict(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})),
    (hub.PYTHIA_70M, dict(custom_pipelines={"text-generation": {"impl": "instruct_pipeline.Pipeline"}})),
]
"""As in the medium, the largest and the distilled GPT-2, and in Dolly."""


@pytest.mark.parametrize(("config", "notes"), OLD_NOTES)
def test_notes_of_old_files_mean_nothing(config, notes):
    assert spec(config, **notes) == spec(config)


BILLIONS = {
    "gpt2": 0.124,
    "starcoder": 15.5,
    "starcoder2": 3.0,
    "bloom": 176.0,
    "bloom-560m": 0.56,
    "falcon-7b": 7.0,
    "falcon-40b": 40.0,
    "falcon-11b": 11.0,
    "falcon-rw-1b": 1.3,
    "gpt-neox-20b": 20.0,
    "pythia-70m": 0.07,
    "gpt-j-6b": 6.0,
    "gpt-neo-125m": 0.125,
    "opt-350m": 0.33,
    "mpt-7b": 6.7,
    "phi-2": 2.7,
}
"""Parameters as the makers round them."""


@pytest.mark.parametrize("name", BILLIONS)
def test_well_known_models_have_as_many_parameters_as_their_makers_say(name):
    found, family = read_spec(CASES[name][0])
    source = DummySource(is_tied=found.is_tied, head_name=family.candidates("head", 0, 0)[0])
    num_parameters = weight_bytes(found, family, source, torch.bfloat16) / 2
    assert num_parameters == pytest.approx(BILLIONS[name] * 1e9, rel=0.04)
    half = replace(found, num_layers=found.num_layers // 2)
    assert weight_bytes(half, family, source, torch.bfloat16) / 2 < 0.9 * num_parameters


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (hub.BLOOM, "apply_residual_connection_post_layernorm", True),
        (hub.BLOOM, "n_inner", 4096),
        (hub.FALCON_7B, "apply_residual_connection_post_layernorm", True),
        (hub.FALCON_7B, "num_ln_in_parallel_attn", 2),
        (hub.FALCON_RW_1B, "num_kv_heads", 4),
        (hub.FALCON_40B, "parallel_attn", False),
        (hub.FALCON_40B, "num_ln_in_parallel_attn", 3),
        (hub.GPT2, "scale_attn_by_inverse_layer_idx", True),
        (hub.GPT2, "reorder_and_upcast_attn", True),
        (hub.GPT2, "add_cross_attention", True),
        (hub.GPT2, "n_embd", None),
        (hub.GPT2, "n_layer", "12"),
        (hub.GPT2, "activation_function", "tanh"),
        (hub.STARCODER2_3B, "mlp_type", "gated"),
        (hub.STARCODER2_3B, "norm_type", "rms_norm"),
        (hub.STARCODER2_3B, "scale_attn_weights", False),
        (hub.GPTJ_6B, "rotary", False),
        (hub.GPTJ_6B, "rotary_dim", 63),
        (hub.GPTJ_6B, "rotary_dim", 512),
        (hub.GPT_NEO_125M, "attention_types", [[["global", "local"], 5]]),
        (hub.GPT_NEO_125M, "attention_types", [[["global", "far"], 6]]),
        (hub.GPT_NEO_125M, "attention_types", [[["global"], 10**12]]),
        (hub.GPT_NEO_125M, "attention_types", [[[["local"]], 12]]),
        (hub.GPT_NEO_125M, "attention_types", 3),
        (hub.GPT_NEO_125M, "attention_types", [["global", 2, 3]]),
        (hub.GPT_NEOX_20B, "rotary_pct", 0.27),
        (hub.OPT_350M, "layer_norm_elementwise_affine", False),
        (hub.MPT_7B, "no_bias", False),
        (hub.MPT_7B, "expansion_ratio", 3),
        (hub.MPT_7B, "logit_scale", "inv_sqrt_d_model"),
        (hub.MPT_7B, "norm_type", "rmsnorm"),
        (hub.MPT_7B, "attn_config", "torch"),
    ],
)
def test_what_this_version_lacks_is_named(config, key, value):
    assert key in message(config, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", False),
        ("alibi_bias_max", 16),
        ("attn_type", "multiquery_attention"),
        ("prefix_lm", True),
        ("qk_ln", True),
        ("clip_qkv", -1),
        ("softmax_scale", 0),
        ("rope", True),
    ],
)
def test_attention_of_mpt_that_this_version_lacks_is_named(key, value):
    text = message(hub.MPT_7B, attn_config=hub.MPT_7B["attn_config"] | {key: value})
    assert key in text
    assert "attn_config" in text


def test_switches_of_each_family_are_read():
    assert spec(hub.GPT2, scale_attn_weights=False).scale == 1.0
    assert spec(hub.STARCODER, multi_query=False).num_kv_heads == 48
    assert spec(hub.OPT_350M, do_layer_norm_before=True).final_norm
    assert not spec(hub.OPT_350M, do_layer_norm_before=True, _remove_final_layer_norm=True).final_norm
    assert spec(hub.OPT_350M, word_embed_proj_dim=1024).embedding_size is None
    assert not spec(hub.OPT_350M, enable_bias=False).qkv_bias
    attention = dict(clip_qkv=8, softmax_scale=0.1)
    assert (spec(hub.MPT_7B, attn_config=attention).clip_qkv, spec(hub.MPT_7B, attn_config=attention).scale) == (8, 0.1)
    assert spec(hub.GPT_NEOX_20B, use_parallel_residual=False).residual is Residual.SEQUENTIAL
    assert not spec(hub.GPT_NEOX_20B, attention_bias=False).out_bias
    assert spec(hub.GPT_NEOX_20B, attention_bias=False).mlp_bias
    assert spec(hub.STARCODER2_3B, sliding_window=None).windows == (None,) * 30
    assert spec(hub.FALCON_40B, num_ln_in_parallel_attn=1).residual is Residual.PARALLEL
    assert spec(hub.FALCON_7B, ff_factor=2).ffn_size == 2 * 4544
