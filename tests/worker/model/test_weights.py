from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigurationError
from tests.worker.model.spoil import change, rewrite, tensors_of
from worker.model.checkpoint import Checkpoint, find_files
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.loading import load_weights, weight_bytes
from worker.model.weights import DummySource


def load(folder: Path, dtype: torch.dtype = torch.float32, on_progress=None):
    spec, family = read_spec(read_config(folder))
    return load_weights(spec, family, Checkpoint(folder), dtype, on_progress=on_progress)


def split(folder: Path) -> None:
    """The same checkpoint in two files with an index."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_parts_are_fused_in_order(folder):
    stored, weights = tensors_of(folder), load(folder)
    prefix = "model.layers.1."
    qkv = torch.cat([stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(weights.layers[1].qkv.weight, qkv)
    gate_up = torch.cat([stored[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(weights.layers[1].mlp.up.weight, gate_up)
    assert torch.equal(weights.head.weight, stored["lm_head.weight"])


def test_an_index_of_files_gives_the_same_weights(folder):
    before = load(folder)
    split(folder)
    assert len(find_files(folder)) == 2
    after = load(folder)
    for layer, other in zip(before.layers, after.layers):
        assert torch.equal(layer.qkv.weight, other.qkv.weight)
        assert torch.equal(layer.mlp.down.weight, other.mlp.down.weight)


def test_every_tensor_is_converted(folder):
    stored, weights = tensors_of(folder), load(folder, torch.bfloat16)
    assert stored["model.norm.weight"].dtype is torch.float32
    assert torch.equal(weights.final_norm.weight, stored["model.norm.weight"].bfloat16())
    assert torch.equal(weights.layers[0].out.weight, stored["model.layers.0.self_attn.o_proj.weight"].bfloat16())


def test_progress_counts_every_byte_once(folder):
    seen = []
    load(folder, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 20
    assert seen[-1] == (total, total)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
            "model.layers.2.mlp.up_proj.weight is missing",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}), r"model.norm.weight has shape \[63\]"),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias"),
        (lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.ones(3)}), "no place in the model"),
    ],
)
def test_what_does_not_fit_the_config_is_named(folder, edit, words):
    load(folder)
    rewrite(folder, edit)
    with pytest.raises(ConfigurationError, match=words):
        load(folder)


def test_buffers_that_follow_from_the_config_are_ignored(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)


def test_the_checkpoint_decides_whether_the_head_is_tied(folder):
    assert load(folder).head.weight is not load(folder).embed.weight
    change(folder, tie_word_embeddings=True)
    assert torch.equal(load(folder).head.weight, tensors_of(folder)["lm_head.weight"]), "a different head was ignored"
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    weights = load(folder)
    assert weights.head.weight is weights.embed.weight
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    change(folder, tie_word_embeddings=False)
    weights = load(folder)
    assert weights.head.weight is weights.embed.weight


def test_a_layer_is_finished_before_anything_of_the_next_is_read(folder):
    spec, family = read_spec(read_config(folder))
    source, read, finished = DummySource(is_tied=False, head_name="lm_head"), [], []
    copy = source.copy_into

    def copy_into(name, target, part):
        read.append(name)
        copy(name, target, part)

    def finish(layer):
        finished.append({name for name in read if name.startswith("model.layers.")})
        read.clear()
        return replace(layer, mlp_out_norm=layer.attention_norm)

    source.copy_into = copy_into
    weights = load_weights(spec, family, source, torch.float32, finish=finish)
    assert len(finished) == len(weights.layers) > 1
    for number, names in enumerate(finished):
        assert len(names) > 5 and all(name.startswith(f"model.layers.{number}.") for name in names)
    assert all(layer.mlp_out_norm is layer.attention_norm for layer in weights.layers), "what is finished was dropped"


def test_dummy_weights_are_the_same_every_time(folder):
    spec, family = read_spec(read_config(folder))
    seen = []

    def dummy() -> DummySource:
        return DummySource(is_tied=False, head_name="lm_head")

    one = load_weights(spec, family, dummy(), torch.float32, on_progress=lambda *progress: seen.append(progress))
    other = load_weights(spec, family, dummy(), torch.float32)
    assert torch.equal(one.layers[2].qkv.weight, other.layers[2].qkv.weight)
    assert not torch.equal(one.layers[2].qkv.weight, one.layers[1].qkv.weight)
    assert 0.015 < float(one.embed.weight.std()) < 0.025
    assert one.head.weight is not one.embed.weight
    total = weight_bytes(spec, family, dummy(), torch.float32)
    assert seen[-1] == (total, total)


def test_the_size_of_the_weights_is_known_before_they_are_read(folder):
    spec, family = read_spec(read_config(folder))
    stored = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert weight_bytes(spec, family, Checkpoint(folder), torch.float32) == stored
    assert weight_bytes(spec, family, Checkpoint(folder), torch.bfloat16) == stored // 2
