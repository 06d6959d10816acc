"""What configs and checkpoints of the T5 lineage say, and what they may not say."""

from __future__ import annotations

import math
import operator
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from common.errors import ConfigurationError
from tests.support import tiny_t5
from tests.support.paged_t5 import load_t5
from tests.worker.model.spoil import change, rewrite, tensors_of
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.spec import Activation, T5Spec
from worker.model.t5 import load_t5_weights, t5_weight_bytes
from worker.model.weights import DummySource
from worker.parallel.shard import WHOLE, Shard

V1 = dict(
    model_type="t5",
    architectures=["T5ForConditionalGeneration"],
    d_ff=2048,
    d_kv=64,
    d_model=512,
    decoder_start_token_id=0,
    dropout_rate=0.1,
    eos_token_id=1,
    initializer_factor=1.0,
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-06,
    n_positions=512,
    num_heads=8,
    num_layers=6,
    output_past=True,
    pad_token_id=0,
    relative_attention_num_buckets=32,
    task_specific_params=dict(summarization=dict(num_beams=4)),
    vocab_size=32128,
)
FLAN = V1 | dict(
    d_ff=1024,
    dense_act_fn="gelu_new",
    feed_forward_proj="gated-gelu",
    is_gated_act=True,
    num_decoder_layers=8,
    num_heads=6,
    num_layers=8,
    relative_attention_max_distance=128,
    tie_word_embeddings=False,
    torch_dtype="float32",
)
MT5 = dict(
    model_type="mt5",
    d_ff=1024,
    d_kv=64,
    d_model=512,
    dropout_rate=0.1,
    feed_forward_proj="gated-gelu",
    num_decoder_layers=8,
    num_heads=6,
    num_layers=8,
    pad_token_id=0,
    tie_word_embeddings=False,
    vocab_size=250112,
)


def spec(values: dict, **differences) -> T5Spec:
    return read_spec(values | differences)[0]


def message(values: dict, **differences) -> str:
    with pytest.raises(ConfigurationError) as caught:
        spec(values, **differences)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Configs.


def test_what_tells_the_forms_apart():
    def form(found: T5Spec):
        return found.activation, found.is_gated, found.output_scale

    assert form(spec(V1)) == (Activation.RELU, False, 512**-0.5)
    assert form(spec(FLAN)) == (Activation.GELU_TANH, True, 1.0)
    assert form(spec(MT5)) == form(spec(MT5, tie_word_embeddings=True)) == (Activation.GELU_TANH, True, 1.0)
    older = {key: value for key, value in FLAN.items() if key not in ("dense_act_fn", "is_gated_act")}
    assert spec(older) == spec(FLAN)
    assert form(spec(older, feed_forward_proj="gated-silu")) == (Activation.SILU, True, 1.0)
    assert form(spec(older, feed_forward_proj="gelu")) == (Activation.GELU, False, 1.0)


def test_files_that_always_tie_say_apart_whether_they_scale():
    assert spec(V1, scale_decoder_outputs=False, tie_word_embeddings=True).output_scale == 1.0
    assert spec(V1, scale_decoder_outputs=True, tie_word_embeddings=True).output_scale == 512**-0.5


def test_sizes_come_from_the_config():
    found = spec(FLAN, num_layers=4)
    assert (found.num_encoder_layers, found.num_layers, found.num_heads, found.head_dim) == (4, 8, 6, 64)
    assert (found.hidden_size, found.ffn_size, found.vocab_size) == (512, 1024, 32128)
    assert (found.norm_eps, found.num_buckets, found.max_distance) == (1e-6, 32, 128)
    assert spec(V1).num_layers == 6
    assert spec(V1, n_positions=300).max_positions == 600
    assert not found.is_position_bound


def test_answers_start_with_the_start_token_or_else_the_padding():
    assert spec(V1, decoder_start_token_id=7).decoder_start_id == 7
    assert spec(MT5, pad_token_id=3).decoder_start_id == 3
    assert "decoder_start_token_id" in message(MT5, pad_token_id=None)
    assert "250112" in message(MT5, pad_token_id=250112)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("new_thing", 3),
        ("feed_forward_proj", "gated-maxout"),
        ("d_model", None),
        ("num_heads", 0),
        ("relative_attention_num_buckets", 2),
        ("relative_attention_max_distance", 1 << 30),
        ("relative_attention_max_distance", 16),
        ("tie_word_embeddings", "no"),
    ],
)
def test_what_nobody_understands_is_named(key, value):
    assert key in message(V1, **{key: value})


def test_other_feed_forward_networks_are_refused_with_the_list():
    text = message(V1, feed_forward_proj="gated-maxout")
    assert "'gated-maxout'" in text
    assert all(name in text for name in ("relu", "silu", "gelu_new", "gated-"))


def test_the_list_of_model_types_has_them():
    assert "mt5" in message(V1, model_type="gpt9")


@pytest.mark.parametrize("name", tiny_t5.CASES)
def test_what_transformers_writes_is_understood_also_with_all_its_defaults(name):
    prefix, differences = tiny_t5.CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**tiny_t5.SIZES | differences)
    assert spec(config.to_dict()) == spec(config.to_diff_dict())


# Weights.


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny_t5.save("flan", tmp_path_factory.mktemp("flan"))


@pytest.fixture()
def folder(saved, tmp_path) -> Path:
    """A copy of a checkpoint that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_t5(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_copies_of_the_embedding_and_unused_biases_pass(folder):
    expected = load_t5(folder)

    def edit(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)

    rewrite(folder, edit)
    assert torch.equal(load_t5(folder).weights.embed.weight, expected.weights.embed.weight)
    # a file that was made free of duplicates may have kept any one of the names
    rewrite(folder, lambda tensors: tensors.pop("shared.weight"))
    rewrite(folder, lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    assert "shared.weight" not in tensors_of(folder)
    assert torch.equal(load_t5(folder).weights.embed.weight, expected.weights.embed.weight)


def test_the_checkpoint_decides_whether_the_head_is_tied(folder):
    def is_tied() -> bool:
        weights = load_t5(folder).weights
        return weights.head.weight is weights.embed.weight

    assert not is_tied()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"].clone()}))
    assert is_tied()
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert is_tied()


def test_what_is_missing_or_superfluous_is_named(folder):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    whole = tensors_of(folder)
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert name in refusal(folder)
    rewrite(folder, lambda tensors: tensors.update({name: whole[name][:, 1:].contiguous()}))
    assert name in refusal(folder) and "shape" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.update({name: whole[name], "decoder.extra.weight": torch.ones(3)}))
    assert "decoder.extra.weight" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.pop("decoder.extra.weight"))
    change(folder, num_decoder_layers=2)
    assert "decoder.block.2" in refusal(folder)


def test_float16_is_refused(folder):
    text = refusal(folder, dtype=torch.float16)
    assert "--dtype float16" in text and "bfloat16" in text


def num_bytes(part) -> int:
    """Of all tensors in weights, however deep."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    if isinstance(part, list):
        return sum(num_bytes(each) for each in part)
    fields = getattr(part, "__dataclass_fields__", {})
    return sum(num_bytes(getattr(part, name)) for name in fields)


@pytest.mark.parametrize("shard", [WHOLE, Shard(0, 4), Shard(3, 4)])
def test_a_rank_takes_its_part_and_says_so_before(saved, shard):
    found, family = read_spec(read_config(saved))
    seen = []
    weights = load_t5_weights(
        found, family, Checkpoint(saved), torch.float32, shard, lambda done, total: seen.append((done, total))
    )
    said = t5_weight_bytes(found, family, Checkpoint(saved), torch.float32, shard)
    # by bucket when they are read, by distance afterwards
    biases = weights.encoder.bias.nbytes + weights.decoder.bias.nbytes
    by_bucket = biases * found.num_buckets // (2 * found.max_distance + 1)
    assert said == num_bytes(weights) - biases + by_bucket
    assert seen[-1] == (said, said)
    assert sorted(seen) == seen
    if shard is not WHOLE:
        assert said < 0.3 * t5_weight_bytes(found, family, Checkpoint(saved), torch.float32)


def test_each_layer_of_both_stacks_and_each_cross_attention_is_finished(saved):
    found, family = read_spec(read_config(saved))
    finished = []

    def finish(layer):
        finished.append(layer)
        return layer

    weights = load_t5_weights(found, family, Checkpoint(saved), torch.float32, finish=finish)
    expected = [*weights.encoder.layers, *weights.decoder.layers, *weights.crosses]
    assert len(expected) == found.num_encoder_layers + 2 * found.num_layers
    assert all(map(operator.is_, finished, expected)) and len(finished) == len(expected)


def test_dummy_weights_have_every_tensor(saved):
    found, family = read_spec(read_config(saved))
    source = DummySource(is_tied=True, head_name="lm_head")
    weights = load_t5_weights(found, family, source, torch.float32)
    assert weights.head.weight is weights.embed.weight
    assert torch.equal(weights.encoder.final_norm.weight, torch.ones(found.hidden_size))
    assert math.isclose(float(weights.crosses[0].kv.weight.std()), 0.02, rel_tol=0.1)
