"""How checkpoints of the other lineages name and lay out their tensors, against transformers' own modules."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.paged import load_decoder, paged_logits
from tests.worker.model.hub_configs import old_falcon
from tests.worker.model.spoil import rewrite, tensors_of
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.families.base import QkvLayout
from worker.model.loading import stored_heads

FUSED = [
    "bloom",
    "falcon_7b",
    "falcon_40b",
    "falcon_rw",
    "gpt2",
    "gpt_bigcode_mha",
    "gpt_bigcode_mqa",
    "gpt_neox",
    "mpt",
]


class Operands(TorchFunctionMode):
    """Records what the first attention after `is_on` multiplies: queries and keys, then values."""

    def __init__(self) -> None:
        self.is_on, self.found = False, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_on:
            self._record(function, args, kwargs)
        return function(*args, **kwargs)

    def _record(self, function, args, kwargs) -> None:
        if function is F.scaled_dot_product_attention:
            self.found += args[:3]
        elif function.__name__ == "baddbmm":
            self.found += [kwargs["batch1"], kwargs["batch2"].transpose(-1, -2)]
        elif function.__name__ in ("matmul", "__matmul__", "bmm") and args[1].dim() > 2:
            self.found += [args[1]] if self.found else [args[0], args[1].transpose(-1, -2)]


def own_split(model, name: str) -> list[torch.Tensor]:
    """Queries, keys and values [heads, head_dim] of one token that transformers makes of the fused module's output
    0, 1, 2 ..."""
    operands = Operands()

    def count(module, inputs, output):
        operands.is_on = True
        return torch.arange(output.shape[-1], dtype=output.dtype).expand_as(output)

    model.get_submodule(name).register_forward_hook(count)
    with torch.no_grad(), operands:
        model(torch.tensor([[5]]))
    # at position 0 rope turns nothing
    return [operand.reshape(-1, operand.shape[-1]) for operand in operands.found[:3]]


@pytest.mark.parametrize("name", FUSED)
def test_heads_stand_where_transformers_splits_them(name):
    spec, family = read_spec(tiny_models.config_of(name).to_dict())
    assert family.qkv is not QkvLayout.SEPARATE
    found = own_split(tiny_models.build(name), family.candidates("qkv", 0, 0)[0])
    for which, rows, count in zip("qkv", found, (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), strict=True):
        # some repeat keys and values for each query
        rows = rows[:: len(rows) // count]
        heads = rows[:, 0].long() // spec.head_dim
        assert torch.equal(rows.long(), heads[:, None] * spec.head_dim + torch.arange(spec.head_dim))
        assert heads.tolist() == stored_heads(family.qkv, spec, which, range(count))


def test_layouts_differ_where_keys_have_several_heads():
    spec = replace(read_spec(tiny_models.config_of("bloom").to_dict())[0], num_heads=8)
    for num_kv_heads, is_same in ((8, False), (2, False), (1, True)):
        grouped, concatenated = (
            [
                stored_heads(layout, replace(spec, num_kv_heads=num_kv_heads), which, range(count))
                for which, count in (("q", 8), ("k", num_kv_heads), ("v", num_kv_heads))
            ]
            for layout in (QkvLayout.GROUPED, QkvLayout.CONCATENATED)
        )
        assert sorted(sum(grouped, [])) == sorted(sum(concatenated, [])) == list(range(8 + 2 * num_kv_heads))
        assert (grouped == concatenated) == is_same


def copy_of(model, folder: Path) -> Path:
    return Path(shutil.copytree(model.folder, folder / "model"))


def logits_of(folder: Path, sequences) -> torch.Tensor:
    return torch.cat(paged_logits(load_decoder(folder), sequences)[0])


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gpt2", "transformer."),
        ("bloom", "transformer."),
        ("falcon_40b", "transformer."),
        ("gpt_bigcode_mqa", "transformer."),
        ("gpt_neo", "transformer."),
        ("gptj", "transformer."),
        ("mpt", "transformer."),
        ("opt", "model."),
        ("opt_350m", "model."),
    ],
)
def test_names_without_their_prefix_mean_the_same(tiny, tmp_path, name, prefix):
    model = tiny(name)
    folder, sequences = copy_of(model, tmp_path), model.sequences[2:]

    def strip(tensors):
        names = [key for key in tensors if key.startswith(prefix)]
        assert len(names) >= len(tensors) - 2
        for key in names:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)

    expected = logits_of(folder, sequences)
    rewrite(folder, strip)
    assert not any(key.startswith(prefix) for key in tensors_of(folder))
    assert torch.equal(logits_of(folder, sequences), expected)


BUFFERS = {
    "gpt2": ("transformer.h.{i}.attn", ("bias", "masked_bias")),
    "gpt_bigcode_mha": ("transformer.h.{i}.attn", ("bias", "masked_bias")),
    "gptj": ("transformer.h.{i}.attn", ("bias", "masked_bias")),
    "gpt_neo": ("transformer.h.{i}.attn.attention", ("bias", "masked_bias")),
    "gpt_neox": ("gpt_neox.layers.{i}.attention", ("bias", "masked_bias", "rotary_emb.inv_freq")),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_masks_of_old_checkpoints_are_passed_over(tiny, tmp_path, name):
    model, (module, endings) = tiny(name), BUFFERS[name]
    folder, sequences = copy_of(model, tmp_path), model.sequences[2:]
    buffers = {f"{module.format(i=i)}.{ending}": torch.ones(1, 1, 8, 8) for i in range(3) for ending in endings}
    expected = logits_of(folder, sequences)
    assert not buffers.keys() & tensors_of(folder).keys()
    rewrite(folder, lambda tensors: tensors.update(buffers))
    assert torch.equal(logits_of(folder, sequences), expected)


def test_no_bias_passes_for_a_mask(tiny, tmp_path):
    folder = copy_of(tiny("gpt2"), tmp_path)
    name = "transformer.h.{}.attn.c_attn.bias"
    rewrite(folder, lambda tensors: tensors.update({name.format(3): torch.ones(192)}))
    with pytest.raises(ConfigurationError, match=r"no place in the model.*h\.3\.attn\.c_attn\.bias"):
        load_decoder(folder)
    rewrite(folder, lambda tensors: [tensors.pop(name.format(layer)) for layer in (3, 1)])
    with pytest.raises(ConfigurationError, match=r"h\.1\.attn\.c_attn\.bias is missing"):
        load_decoder(folder)


def test_the_head_of_gpt_neox_has_two_names(tiny, tmp_path):
    model = tiny("gpt_neox")
    folder, sequences = copy_of(model, tmp_path), model.sequences[2:]
    expected = logits_of(folder, sequences)
    (old,) = {"embed_out.weight", "lm_head.weight"} & tensors_of(folder).keys()
    (new,) = {"embed_out.weight", "lm_head.weight"} - {old}
    rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))
    assert torch.equal(logits_of(folder, sequences), expected)


def test_a_checkpoint_of_old_falcon_is_read(tiny, tmp_path):
    model = tiny("falcon_40b")
    folder, sequences = copy_of(model, tmp_path), model.sequences[2:]
    expected = logits_of(folder, sequences)
    old = old_falcon(read_config(folder), "RefinedWeb")
    assert old["n_head_kv"] == 2
    assert "new_decoder_architecture" not in old
    (folder / "config.json").write_text(json.dumps(old))
    assert torch.equal(logits_of(folder, sequences), expected)
