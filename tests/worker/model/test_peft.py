"""Reading adapters in PEFT's format: what is understood, and what is refused with which words."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.adapters import DEFAULTS, PREFIX, slots_of, write_adapter
from worker.model.lora import LoraSlots
from worker.model.peft import StoredAdapter, read_adapter, read_lora_config

WRITTEN_BY_PEFT = dict(
    DEFAULTS,
    r=4,
    lora_alpha=16,
    alora_invocation_tokens=None,
    arrow_config=None,
    auto_mapping=None,
    corda_config=None,
    ensure_weight_tying=False,
    eva_config=None,
    exclude_modules=None,
    kasa_config=None,
    layer_replication=None,
    layers_pattern=None,
    layers_to_transform=None,
    loftq_config={},
    lora_bias=False,
    lora_ga_config=None,
    megatron_config=None,
    megatron_core="megatron.core",
    monteclora_config=None,
    peft_version="0.21.2",
    qalora_group_size=16,
    revision=None,
    target_modules=["q_proj", "v_proj"],
    target_parameters=None,
    trainable_token_indices=None,
    use_bdlora=None,
    use_qalora=False,
    velora_config=None,
)
"""Every key that version 0.21 writes."""
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def slots() -> LoraSlots:
    return slots_of("qwen2_moe")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.shared_expert.down_proj"]
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_models.build("qwen2_moe"), modules, rank=4)


@pytest.fixture()
def folder(pristine, tmp_path) -> Path:
    """A copy of an adapter that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


@pytest.fixture()
def read(folder, slots) -> Callable[..., StoredAdapter]:
    return lambda max_rank=64: read_adapter(folder, slots.targets, max_rank)


def change(folder: Path, **config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_a_good_adapter_is_read(read):
    adapter = read()
    assert (adapter.rank, len(adapter.digest), len(adapter.pairs)) == (4, 32, 2)
    assert int(adapter.digest, 16) >= 0
    first, second = adapter.changes(torch.float32)
    assert (first.a.shape, first.b.shape) == ((4, 64), (64, 4))
    assert first.target.name == "model.layers.0.self_attn.q_proj"
    assert second.b.shape == (64, 4)


def test_all_that_peft_writes_is_understood():
    config = read_lora_config(WRITTEN_BY_PEFT)
    assert config.scale("model.layers.0.self_attn.q_proj", 4) == 16 / 4
    assert config.covers("model.layers.7.self_attn.v_proj")
    assert not config.covers("model.layers.7.self_attn.k_proj")


@pytest.mark.parametrize(
    ("fields", "rank", "scale"),
    [
        (dict(lora_alpha=8), 4, 2.0),
        (dict(lora_alpha=8.5), 4, 2.125),
        (dict(lora_alpha=8, use_rslora=True), 4, 4.0),
        (dict(lora_alpha=8, use_rslora=True), 5, 8 / math.sqrt(5)),
        (dict(lora_alpha=8, alpha_pattern={"q_proj": 3}), 4, 0.75),
        (dict(lora_alpha=8, alpha_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5}), 4, 0.75),
        (dict(lora_alpha=8, alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj$": 3}), 4, 0.75),
        (dict(lora_alpha=8, alpha_pattern={"0.self_attn.q_proj": 3}), 4, 0.75),
        (dict(lora_alpha=8, alpha_pattern={"_proj": 3, "attn.q_proj": 3}), 4, 2.0),
        (dict(lora_alpha=8, alpha_pattern={"^q_proj": 3, "^layers.0.self_attn.q_proj": 5}), 4, 2.0),
        (dict(lora_alpha=8, alpha_pattern={"q_proj": 3, "q_proj$": 5}), 4, 0.75),
    ],
)
def test_the_scale_is_that_of_the_config(fields, rank, scale):
    config = read_lora_config(WRITTEN_BY_PEFT | fields)
    assert config.scale("model.layers.0.self_attn.q_proj", rank) == pytest.approx(scale)


BAD_CONFIGS = [
    (dict(peft_type="ADALORA"), "peft_type must be 'LORA' in this version, not 'ADALORA'"),
    (dict(peft_type=["LORA"]), "peft_type must be 'LORA'"),
    (dict(bias="all"), "bias must be 'none' in this version, not 'all'"),
    (dict(bias="lora_only"), "bias must be 'none'"),
    (dict(use_dora=True), "not supported in adapters: use_dora=True"),
    (dict(modules_to_save=["lm_head"]), r"not supported in adapters: modules_to_save=\['lm_head'\]"),
    (dict(lora_bias=True), "lora_bias=True"),
    (dict(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters="),
    (dict(trainable_token_indices=[1]), "trainable_token_indices="),
    (dict(layer_replication=[[0, 2]]), "layer_replication="),
    (dict(alora_invocation_tokens=[7]), "alora_invocation_tokens="),
    (dict(use_qalora=True), "use_qalora=True"),
    (dict(use_bdlora={"a": 1}, kasa_config={"b": 1}), "kasa_config=.*, use_bdlora="),
    (dict(something_new=3), "not supported in adapters: something_new=3"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changed the base model too"),
    (dict(init_lora_weights="olora"), "changed the base model too"),
    (dict(init_lora_weights={"a": 1}), "changed the base model too"),
    (dict(r=0), "r must be an integer from 1"),
    (dict(r="8"), "r must be an integer"),
    (dict(r=None), "r must be an integer"),
    (dict(r=10**30), "r must be an integer"),
    (dict(lora_alpha=0), "lora_alpha must be a positive number"),
    (dict(lora_alpha=float("nan")), "lora_alpha must be a positive number"),
    (dict(lora_alpha=-1), "lora_alpha must be a positive number"),
    (dict(lora_alpha=True), "lora_alpha must be a positive number"),
    (dict(lora_alpha=10**400), "lora_alpha must be a positive number"),
    (dict(use_rslora="yes"), "use_rslora must be true or false"),
    (dict(rank_pattern=[1]), "rank_pattern must be an object"),
    (dict(rank_pattern={"a": "b"}), "rank_pattern must give positive integers"),
    (dict(rank_pattern={"a": -1}), "rank_pattern must give positive integers"),
    (dict(rank_pattern={str(n): 1 for n in range(3000)}), "rank_pattern must be an object of 2048 modules at most"),
    (dict(alpha_pattern={"a": None}), "alpha_pattern: a must be a positive number"),
    (dict(alpha_pattern={"(a+)+$": 1}), r"alpha_pattern '\(a\+\)\+\$' must be a module's name or the end of one"),
    (dict(alpha_pattern={".*": 1}), "must be a module's name"),
    (dict(alpha_pattern={"": 1}), "must be a module's name"),
    (dict(target_modules=7), "target_modules must be a string or a list"),
    (dict(target_modules=[None]), "target_modules must be a string or a list"),
    (dict(target_modules=["a"] * 3000), "target_modules must be a string or a list of 2048 names at most"),
    (dict(layers_to_transform="all"), "layers_to_transform must be numbers of layers"),
    (dict(layers_to_transform=[True]), "layers_to_transform must be numbers of layers"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_CONFIGS)
def test_configs_that_mean_something_else_are_refused_by_name(folder, read, fields, words):
    read()
    change(folder, **fields)
    with pytest.raises(ConfigurationError, match=words) as caught:
        read()
    assert str(caught.value).startswith("adapter_config.json: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1", "is not valid JSON"),
        ("[" * 10_000, "is not valid JSON"),
        (f'{{"r": {"9" * 5000}}}', "is not valid JSON"),
        ('{"\\ud800": 1}', "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "r must be an integer"),
        (" " * 5_000_000, "is larger than"),
    ],
)
def test_files_that_are_no_configs_are_refused(folder, read, content, words):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        read()


def test_a_folder_without_an_adapter_says_what_is_missing(folder, read, slots):
    with pytest.raises(ConfigurationError, match="is not an adapter in PEFT's format: it has no adapter_config.json"):
        read_adapter(folder / "nowhere", slots.targets, 64)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"only pickled weights \(adapter_model.bin\), which are never loaded"):
        read()
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ConfigurationError, match="has no adapter_model.safetensors"):
        read()


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def added(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


MAY_NOT = "is for a module that this model does not have or that adapters may not change; they may change down_proj, "
BAD_TENSORS = [
    (added(f"{Q}.lora_A.weight", 4, 63), rf"{Q}.lora_A.weight has shape \[4, 63\], but .* \[4, 64\]"),
    (added(f"{Q}.lora_B.weight", 63, 4), rf"{Q}.lora_B.weight has shape \[63, 4\], but .* \[64, 4\]"),
    (added(f"{Q}.lora_B.weight", 64, 3), rf"{Q}.lora_B.weight has shape \[64, 3\], but .* \[64, 4\]"),
    (added(f"{Q}.lora_B.weight", 4, 64), rf"{Q}.lora_B.weight has shape \[4, 64\]"),
    (added(f"{Q}.lora_A.weight", 256), rf"{Q}.lora_A.weight has shape \[256\]"),
    (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), f"{Q}.lora_A.weight is missing; A and B belong together"),
    (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), f"{Q}.lora_B.weight is missing; A and B belong together"),
    (lambda tensors: tensors.clear(), "holds no tensors"),
    (lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}), "is no A or B of LoRA"),
    (lambda tensors: tensors.update({f"{Q}.lora_B.bias": torch.zeros(64)}), "lora_B.bias is no A or B of LoRA"),
    (lambda tensors: tensors.update({f"{PREFIX}model.norm.weight": torch.zeros(64)}), "is no A or B of LoRA"),
    (
        lambda tensors: tensors.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(4, 272)}),
        "embed_tokens.lora_embedding_A is no A or B of LoRA",
    ),
    *(
        (added(f"{PREFIX}{module}.lora_A.weight", 4, 64), rf"{module}.lora_A.weight {MAY_NOT}")
        for module in (
            "lm_head",
            "model.layers.99.self_attn.q_proj",
            "model.layers.0.mlp.gate",
            "model.layers.1.mlp.experts.0.up_proj",
            "model.layers.1.mlp.shared_expert_gate",
            "layers.0.self_attn.q_proj",
        )
    ),
    (
        lambda tensors: tensors.update({f"{Q}.lora_A.weight": tensors[f"{Q}.lora_A.weight"].to(torch.float8_e4m3fn)}),
        f"{Q}.lora_A.weight is stored as F8_E4M3, not as",
    ),
    (
        lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.zeros((64, 4), dtype=torch.int64)}),
        "is stored as I64",
    ),
]


@pytest.mark.parametrize(("edit", "words"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(folder, read, edit, words):
    read()
    rewrite(folder, edit)
    with pytest.raises(ConfigurationError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_ranks_are_those_that_the_config_names_and_not_above_the_limit(folder, read):
    assert read(max_rank=4).rank == 4
    with pytest.raises(ConfigurationError, match="has rank 4, more than the 3 of --max-lora-rank"):
        read(max_rank=3)
    change(folder, r=8)
    with pytest.raises(ConfigurationError, match="has rank 4, which adapter_config.json does not name"):
        read()
    change(folder, rank_pattern={"q_proj": 4, "down_proj": 4})
    assert read().rank == 4


def test_tensors_are_of_modules_that_the_config_names(folder, read):
    for fields in (dict(target_modules=["k_proj"]), dict(layers_to_transform=[2]), dict(layers_to_transform=1)):
        change(folder, target_modules="all-linear", layers_to_transform=None)
        read()
        change(folder, **fields)
        with pytest.raises(ConfigurationError, match="is of a module that adapter_config.json does not name"):
            read()
    change(folder, target_modules=["q_proj", "shared_expert.down_proj"], layers_to_transform=[0, 1])
    assert len(read().pairs) == 2


def test_two_names_for_one_matrix_are_one_too_many(tmp_path):
    slots, name = slots_of("bloom"), "h.0.self_attention.dense"
    folder = write_adapter(tmp_path, tiny_models.build("bloom"), [f"transformer.{name}"])
    assert len(read_adapter(folder, slots.targets, 64).pairs) == 1
    for side in "AB":
        rewrite(folder, renamed(f"{PREFIX}transformer.{name}.lora_{side}.weight", f"{PREFIX}{name}.lora_{side}.weight"))
    assert len(read_adapter(folder, slots.targets, 64).pairs) == 1, (
        "without the prefix, as models without a head have it"
    )
    again = {f"{PREFIX}transformer.{name}.lora_A.weight": torch.zeros(4, 64)}
    again[f"{PREFIX}transformer.{name}.lora_B.weight"] = torch.zeros(64, 4)
    rewrite(folder, lambda tensors: tensors.update(again))
    with pytest.raises(ConfigurationError, match="two pairs for the same matrix"):
        read_adapter(folder, slots.targets, 64)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[:-10],
        lambda whole: whole[:40],
        lambda whole: b"",
        lambda whole: b"\xff" * 100,
        lambda whole: whole[:8] + b"[" * (len(whole) - 8),
        lambda whole: whole.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
    ],
)
def test_damaged_weights_are_refused(folder, read, spoil):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    assert spoil(whole) != whole
    path.write_bytes(spoil(whole))
    with pytest.raises(ConfigurationError, match="safetensors"):
        read()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("side", "AB")
def test_what_is_no_number_in_the_type_of_the_model_is_refused_when_it_is_read(folder, read, side, value):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        wide = tensors[f"{Q}.lora_{side}.weight"].double()
        wide[1, 2] = value
        tensors[f"{Q}.lora_{side}.weight"] = wide

    rewrite(folder, edit)
    with pytest.raises(ConfigurationError, match=rf"q_proj.lora_{side}.weight is not finite"):
        list(read().changes(torch.float32))


def test_the_digest_changes_with_config_and_weights_and_nothing_else(folder, read, slots, tmp_path):
    first = read().digest
    assert read_adapter(Path(shutil.copytree(folder, tmp_path / "copy")), slots.targets, 64).digest == first
    change(folder, lora_alpha=9)
    second = read().digest
    rewrite(folder, lambda tensors: tensors[f"{Q}.lora_A.weight"].add_(1))
    assert len({first, second, read().digest}) == 3
