"""Config files as released models have them: each is read to the last key, and its traps are what they should be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.errors import ConfigurationError
from worker.model.families import read_spec
from worker.model.spec import Activation, Norm, QkNorm, Residual, Rope, RopeKind, Spec

EVERY_FILE = dict(
    initializer_range=0.02, torch_dtype="bfloat16", transformers_version="4.40.0", use_cache=True, bos_token_id=1
)


def spec(architecture: str, model_type: str, **values: Any) -> Spec:
    values |= EVERY_FILE | dict(architectures=[architecture], model_type=model_type)
    found, _ = read_spec(values)
    with pytest.raises(ConfigurationError, match="made_up"):
        read_spec(values | dict(made_up=True))
    return found


def only_rope(found: Spec) -> Rope | None:
    (rope,) = set(found.ropes)
    return rope


def sizes(found: Spec) -> tuple[int, ...]:
    """(layers, hidden, heads, kv heads, head_dim, ffn, vocabulary, positions)"""
    return (
        *(found.num_layers, found.hidden_size, found.num_heads, found.num_kv_heads, found.head_dim),
        *(found.ffn_size, found.vocab_size, found.max_positions),
    )


def test_llama_3_2_1b():
    found = spec(
        "LlamaForCausalLM",
        "llama",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=[128001, 128008, 128009],
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=True,
        vocab_size=128256,
    )
    assert sizes(found) == (16, 2048, 32, 8, 64, 8192, 128256, 131072)
    assert only_rope(found) == Rope(theta=5e5, kind=RopeKind.LLAMA3, factor=32.0, original_positions=8192)
    assert (found.is_tied, found.qkv_bias, found.norm_eps) == (True, False, 1e-5)


def test_mistral_nemo_12b():
    found = spec(
        "MistralForCausalLM",
        "mistral",
        attention_dropout=0.0,
        eos_token_id=2,
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=14336,
        max_position_embeddings=131072,
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=131072,
    )
    assert sizes(found) == (40, 5120, 32, 8, 128, 14336, 131072, 131072)
    assert (found.windows, only_rope(found)) == ((None,) * 40, Rope(theta=1e6))


QWEN2_5 = dict(
    attention_dropout=0.0,
    eos_token_id=151645,
    hidden_act="silu",
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=32768,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=152064,
)


def test_qwen2_5_7b_with_and_without_yarn():
    found = spec("Qwen2ForCausalLM", "qwen2", **QWEN2_5)
    assert sizes(found) == (28, 3584, 28, 4, 128, 18944, 152064, 32768)
    assert (found.qkv_bias, found.out_bias, found.windows) == (True, False, (None,) * 28)
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    found = spec("Qwen2ForCausalLM", "qwen2", **QWEN2_5, rope_scaling=yarn)
    amplitude = 0.1 * math.log(4.0) + 1.0
    assert only_rope(found) == Rope(
        theta=1e6, kind=RopeKind.YARN, factor=4.0, original_positions=32768, amplitude=amplitude
    )
    assert found.max_positions == 131072


def test_gemma_2b():
    found = spec(
        "GemmaForCausalLM",
        "gemma",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=1,
        head_dim=256,
        hidden_act="gelu",
        hidden_size=2048,
        intermediate_size=16384,
        max_position_embeddings=8192,
        num_attention_heads=8,
        num_hidden_layers=18,
        num_key_value_heads=1,
        pad_token_id=0,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=10000.0,
        vocab_size=256000,
    )
    assert sizes(found) == (18, 2048, 8, 1, 256, 16384, 256000, 8192)
    assert (found.activation, found.norm_plus_one, found.is_tied) == (Activation.GELU_TANH, True, True)
    assert found.embedding_scale == 2048**0.5


def test_gemma_2_9b():
    found = spec(
        "Gemma2ForCausalLM",
        "gemma2",
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        eos_token_id=1,
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=3584,
        intermediate_size=14336,
        max_position_embeddings=8192,
        num_attention_heads=16,
        num_hidden_layers=42,
        num_key_value_heads=8,
        pad_token_id=0,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        sliding_window=4096,
        sliding_window_size=4096,
        vocab_size=256000,
    )
    assert sizes(found) == (42, 3584, 16, 8, 256, 14336, 256000, 8192)
    assert found.windows == (4096, None) * 21
    assert (found.attention_softcap, found.logit_softcap, found.scale) == (50.0, 30.0, 1 / 16)
    assert found.residual is Residual.SANDWICH


GEMMA_3_1B = dict(
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=None,
    cache_implementation="hybrid",
    eos_token_id=[1, 106],
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    pad_token_id=0,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)


def test_gemma_3_1b():
    found = spec("Gemma3ForCausalLM", "gemma3_text", **GEMMA_3_1B)
    assert sizes(found) == (26, 1152, 4, 1, 256, 6912, 262144, 32768)
    assert found.windows == (((512,) * 5 + (None,)) * 5)[:26]
    local, everywhere = Rope(theta=10_000.0), Rope(theta=1_000_000.0)
    assert found.ropes == tuple(local if window else everywhere for window in found.windows)
    assert (found.qk_norm, found.attention_softcap, found.logit_softcap) == (QkNorm.HEAD, None, None)


def test_gemma_3_of_new_files_is_the_same():
    values = {key: value for key, value in GEMMA_3_1B.items() if not key.startswith(("rope_", "sliding_window_p"))}
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    ropes = dict(
        full_attention=dict(rope_type="default", rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    new = values | dict(layer_types=kinds[:26], rope_parameters=ropes)
    assert spec("Gemma3ForCausalLM", "gemma3_text", **new) == spec("Gemma3ForCausalLM", "gemma3_text", **GEMMA_3_1B)
    with pytest.raises(ConfigurationError, match="full_attention: not supported.*alpha"):
        spec("", "gemma3_text", **new | dict(rope_parameters=ropes | dict(full_attention=dict(alpha=3))))
    with pytest.raises(ConfigurationError, match="rope_parameters: not supported.*rope_theta"):
        spec("", "gemma3_text", **new | dict(rope_parameters=dict(rope_theta=1e6)))


def test_gemma_3_4b_that_sees():
    found = spec(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        mm_tokens_per_image=256,
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        vision_config={"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    )
    assert sizes(found) == (34, 2560, 8, 4, 256, 10240, 262208, 131072)
    assert found.ropes[0] == Rope(theta=10_000.0)
    assert found.ropes[5] == Rope(theta=1_000_000.0, kind=RopeKind.LINEAR, factor=8.0)
    assert (found.windows[0], found.windows[5], found.is_tied) == (1024, None, True)


def test_mistral_small_3_1_24b_that_sees():
    text = {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    }
    outer = dict(
        image_token_index=10,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        spatial_merge_size=2,
        vision_config={"model_type": "pixtral"},
        vision_feature_layer=-1,
    )
    found = spec("Mistral3ForConditionalGeneration", "mistral3", text_config=text, **outer)
    assert sizes(found) == (40, 5120, 32, 8, 128, 32768, 131072, 131072)
    with pytest.raises(ConfigurationError, match="text_config: model_type must be 'mistral'.*'ministral3'"):
        spec("", "mistral3", text_config=text | {"model_type": "ministral3"}, **outer)
    with pytest.raises(ConfigurationError, match="text_config: not supported.*made_up"):
        spec("", "mistral3", text_config=text | {"made_up": 1}, **outer)


PHI_3_MINI = dict(
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    embd_pdrop=0.0,
    eos_token_id=32000,
    hidden_act="silu",
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    original_max_position_embeddings=4096,
    pad_token_id=32000,
    resid_pdrop=0.0,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    vocab_size=32064,
)


def test_phi_3_mini_4k():
    found = spec(
        "Phi3ForCausalLM",
        "phi3",
        **PHI_3_MINI,
        max_position_embeddings=4096,
        rope_scaling=None,
        sliding_window=2047,
    )
    assert sizes(found) == (32, 3072, 32, 32, 96, 8192, 32064, 4096)
    assert (found.windows, only_rope(found)) == ((2047,) * 32, Rope(theta=10_000.0))


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_phi_3_mini_128k(kind):
    short, long = [1.0 + pair / 100 for pair in range(48)], [1.0 + pair for pair in range(48)]
    found = spec(
        "Phi3ForCausalLM",
        "phi3",
        **PHI_3_MINI,
        max_position_embeddings=131072,
        rope_scaling={"long_factor": long, "short_factor": short, "type": kind},
        sliding_window=262144,
    )
    rope = only_rope(found)
    assert (rope.kind, rope.original_positions, rope.rotary_dim) == (RopeKind.LONGROPE, 4096, None)
    assert (rope.short_factors, rope.long_factors) == (tuple(short), tuple(long))
    assert rope.amplitude == pytest.approx(1.190238, abs=1e-6)
    assert found.max_positions == 131072


def test_phi_4_mini():
    values = PHI_3_MINI | dict(
        eos_token_id=199999,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=24,
        num_key_value_heads=8,
        partial_rotary_factor=0.75,
        rope_scaling={"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        sliding_window=262144,
        tie_word_embeddings=True,
        vocab_size=200064,
    )
    found = spec("Phi3ForCausalLM", "phi3", **values)
    assert sizes(found) == (32, 3072, 24, 8, 128, 8192, 200064, 131072)
    assert (only_rope(found).rotary_dim, found.is_tied) == (96, True)
    with pytest.raises(ConfigurationError, match="full_attn_mod"):
        spec("", "phi3", **values | dict(full_attn_mod=2))
    with pytest.raises(ConfigurationError, match="lm_head_bias"):
        spec("", "phi3", **values | dict(lm_head_bias=True))


def test_command_r():
    found = spec(
        "CohereForCausalLM",
        "cohere",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=255001,
        hidden_act="silu",
        hidden_size=8192,
        intermediate_size=22528,
        layer_norm_eps=1e-05,
        logit_scale=0.0625,
        max_position_embeddings=8192,
        model_max_length=131072,
        num_attention_heads=64,
        num_hidden_layers=40,
        num_key_value_heads=64,
        pad_token_id=0,
        pretraining_tp=1,
        rope_theta=8000000.0,
        tie_word_embeddings=True,
        use_qk_norm=False,
        vocab_size=256000,
    )
    assert sizes(found) == (40, 8192, 64, 64, 128, 22528, 256000, 131072)
    assert (found.norm, found.norm_bias, found.residual) == (Norm.LAYER, False, Residual.PARALLEL)
    assert (found.logit_scale, found.qk_norm, only_rope(found)) == (0.0625, QkNorm.NONE, Rope(theta=8e6))


def test_command_r7b():
    found = spec(
        "Cohere2ForCausalLM",
        "cohere2",
        attention_bias=False,
        attention_dropout=0.0,
        cache_implementation="hybrid",
        eos_token_id=255001,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        layer_norm_eps=1e-05,
        layer_switch=4,
        logit_scale=0.25,
        max_position_embeddings=132096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        order_of_interleaved_layers="local_attn_first",
        pad_token_id=0,
        position_embedding_type="rope_gptj",
        rope_scaling=None,
        rope_theta=50000,
        rotary_pct=1.0,
        sliding_window=4096,
        sliding_window_pattern=4,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=True,
        use_qk_norm=False,
        vocab_size=256000,
    )
    assert sizes(found) == (32, 4096, 32, 8, 128, 14336, 256000, 132096)
    assert found.windows == (4096, 4096, 4096, None) * 8
    assert found.ropes == (*(Rope(theta=50_000.0),) * 3, None) * 8
    assert (found.logit_scale, found.is_tied) == (0.25, True)


def test_granite_3_8b():
    found = spec(
        "GraniteForCausalLM",
        "granite",
        attention_bias=False,
        attention_dropout=0.1,
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        eos_token_id=0,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=12800,
        logits_scaling=16.0,
        max_position_embeddings=4096,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        pad_token_id=0,
        residual_multiplier=0.22,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000,
        tie_word_embeddings=True,
        vocab_size=49155,
    )
    assert sizes(found) == (40, 4096, 32, 8, 128, 12800, 49155, 4096)
    assert (found.scale, found.embedding_scale, found.residual_scale) == (1 / 128, 12.0, 0.22)
    assert found.logit_scale == 1 / 16


def test_olmo_2_7b():
    found = spec(
        "Olmo2ForCausalLM",
        "olmo2",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=100257,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=4096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=100277,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=500000,
        tie_word_embeddings=False,
        vocab_size=100352,
    )
    assert sizes(found) == (32, 4096, 32, 32, 128, 11008, 100352, 4096)
    assert (found.residual, found.qk_norm) == (Residual.OUTPUT, QkNorm.FULL)


def test_olmo_3_7b():
    yarn = {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    }
    found = spec(
        "Olmo3ForCausalLM",
        "olmo3",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=100257,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        max_position_embeddings=65536,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=100277,
        rms_norm_eps=1e-06,
        rope_scaling=yarn,
        rope_theta=500000,
        sliding_window=4096,
        tie_word_embeddings=False,
        vocab_size=100278,
    )
    assert sizes(found) == (32, 4096, 32, 32, 128, 11008, 100278, 65536)
    plain = Rope(theta=5e5)
    assert found.ropes[:3] == (plain,) * 3
    assert (found.ropes[3].kind, found.ropes[3].amplitude) == (RopeKind.YARN, yarn["attention_factor"])
    assert found.windows == (4096, 4096, 4096, None) * 8


def test_internlm3_8b():
    found = spec(
        "InternLM3ForCausalLM",
        "internlm3",
        attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_internlm3.InternLM3Config"},
        bias=False,
        eos_token_id=2,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=10240,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=48,
        num_key_value_heads=2,
        pad_token_id=2,
        qkv_bias=False,
        rms_norm_eps=1e-05,
        rope_scaling={"factor": 6.0, "rope_type": "dynamic"},
        rope_theta=50000000,
        tie_word_embeddings=False,
        vocab_size=128512,
    )
    rope = Rope(theta=5e7, kind=RopeKind.DYNAMIC, factor=6.0, original_positions=32768)
    assert (only_rope(found), found.max_positions, found.qkv_bias) == (rope, 6 * 32768, False)


def test_smollm3_3b():
    found = spec(
        "SmolLM3ForCausalLM",
        "smollm3",
        attention_bias=False,
        attention_dropout=0.0,
        eos_token_id=128012,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=11008,
        layer_types=["full_attention"] * 36,
        max_position_embeddings=65536,
        max_window_layers=28,
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=4,
        pad_token_id=128004,
        pretraining_tp=2,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
        vocab_size=128256,
    )
    assert sizes(found) == (36, 2048, 16, 4, 128, 11008, 128256, 65536)
    rope = Rope(theta=5e6)
    assert (found.ropes, found.windows) == ((rope, rope, rope, None) * 9, (None,) * 36)
    assert found.is_tied


def test_exaone_4_32b():
    values = dict(
        attention_dropout=0.0,
        eos_token_id=361,
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=27392,
        max_position_embeddings=131072,
        num_attention_heads=40,
        num_hidden_layers=64,
        num_key_value_heads=8,
        pad_token_id=0,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=1000000,
        sliding_window=4096,
        sliding_window_pattern="LLLG",
        tie_word_embeddings=False,
        vocab_size=102400,
    )
    found = spec("Exaone4ForCausalLM", "exaone4", **values)
    assert sizes(found) == (64, 5120, 40, 8, 128, 27392, 102400, 131072)
    assert found.windows == (4096, 4096, 4096, None) * 16
    assert [rope is None for rope in found.ropes] == [False, False, False, True] * 16
    assert found.ropes[0].kind is RopeKind.LLAMA3
    with pytest.raises(ConfigurationError, match="sliding_window_pattern"):
        spec("", "exaone4", **values | dict(sliding_window_pattern="LLGL"))


def test_mixtral_8x7b():
    found = spec(
        "MixtralForCausalLM",
        "mixtral",
        attention_dropout=0.0,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_experts_per_tok=2,
        num_hidden_layers=32,
        num_key_value_heads=8,
        num_local_experts=8,
        output_router_logits=False,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=32000,
    )
    assert sizes(found) == (32, 4096, 32, 8, 128, 14336, 32000, 32768)
    assert (found.moe.num_experts, found.moe.num_active, found.moe.ffn_size) == (8, 2, 14336)
    assert (found.moe.is_renormalised, found.moe.sparse_layers, found.moe.shared_ffn_size) == (True, (True,) * 32, 0)


def test_qwen1_5_moe_a2_7b():
    found = spec(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        attention_dropout=0.0,
        decoder_sparse_step=1,
        eos_token_id=151643,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=8192,
        max_window_layers=21,
        moe_intermediate_size=1408,
        norm_topk_prob=False,
        num_attention_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        num_hidden_layers=24,
        num_key_value_heads=16,
        output_router_logits=False,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        shared_expert_intermediate_size=5632,
        sliding_window=32768,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    moe = found.moe
    assert (moe.num_experts, moe.num_active, moe.ffn_size, moe.is_renormalised) == (60, 4, 1408, False)
    assert (moe.shared_ffn_size, moe.has_shared_gate, moe.sparse_layers) == (5632, True, (True,) * 24)
    assert (found.qkv_bias, found.out_bias, found.windows) == (True, False, (None,) * 24)


def test_qwen3_30b_a3b():
    found = spec(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        attention_bias=False,
        attention_dropout=0.0,
        decoder_sparse_step=1,
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=6144,
        max_position_embeddings=40960,
        max_window_layers=48,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_key_value_heads=4,
        output_router_logits=False,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    assert sizes(found) == (48, 2048, 32, 4, 128, 6144, 151936, 40960)
    moe = found.moe
    assert (moe.num_experts, moe.num_active, moe.ffn_size, moe.is_renormalised) == (128, 8, 768, True)
    assert (moe.shared_ffn_size, moe.has_shared_gate, found.qk_norm) == (0, False, QkNorm.HEAD)


def test_more_experts_for_a_token_than_there_are_is_refused():
    sizes = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=8, vocab_size=97)
    options = dict(max_position_embeddings=512, num_local_experts=2, num_experts_per_tok=3, **sizes)
    with pytest.raises(ConfigurationError, match="num_experts_per_tok 3"):
        spec("", "mixtral", **options)
