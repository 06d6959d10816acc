"""What configurations and files of quantised checkpoints may not say: each is refused in one sentence with a name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from tests.support import quantised, tiny_models
from tests.support.paged import load_decoder
from tests.worker.model.spoil import change, rewrite
from worker.model.quant.scheme import Quantisation
from worker.model.quant.stored import METHODS, stored_quantisation

GROUPS = dict(strategy="group", group_size=32)
FORMS = {
    "gptq": quantised.gptq(4, 32, has_order=True),
    "awq": quantised.awq(16),
    "fp8": quantised.fp8((24, 48)),
    "fp8 by tensor": quantised.fp8(),
    "packed": quantised.compressed("pack-quantized", num_bits=4, symmetric=False, **GROUPS),
    "int8": quantised.compressed("int-quantized", inputs=dict(num_bits=8)),
    "nf4": quantised.bitsandbytes(is_nested=True),
    "llm_int8": quantised.bitsandbytes("int8"),
}
GPTQ, AWQ, FP8, PACKED, INT8, NF4 = (FORMS[name].config for name in ("gptq", "awq", "fp8", "packed", "int8", "nf4"))


def read(values: Any, **others: Any) -> Quantisation | None:
    return stored_quantisation(dict(model_type="llama", quantization_config=values) | others)


def refusal(values: Any, **others: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(values, **others)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def with_weights(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["config_groups"]["group_0"]["weights"] |= weights
    return changed


def test_the_card_says_which_format_it_is():
    names = [found.name for form in FORMS.values() if (found := read(form.config)) is not None]
    bits = ["bitsandbytes-nf4", "bitsandbytes"]
    assert names == ["gptq", "awq", "fp8", "fp8", "compressed-tensors", "compressed-tensors", *bits]
    fp4 = read(NF4 | dict(bnb_4bit_quant_type="fp4"))
    assert fp4 is not None and fp4.name == "bitsandbytes-fp4"


@pytest.mark.parametrize("values", [None, {}])
def test_a_config_that_says_nothing_is_of_whole_weights(values):
    assert read(values) is None
    assert stored_quantisation(dict(model_type="llama")) is None


def test_the_config_may_stand_in_older_and_in_inner_places():
    method = {key: value for key, value in PACKED.items() if key != "quant_method"}
    assert read(None, compression_config=method) == read(PACKED)
    assert read(None, text_config=dict(quantization_config=AWQ)) == read(AWQ)
    assert read(AWQ, text_config=dict(quantization_config=AWQ)) == read(AWQ)
    assert "must be the same" in refusal(AWQ, text_config=dict(quantization_config=GPTQ))
    older = {key: value for key, value in NF4.items() if key != "quant_method"}
    assert read(older) == read(NF4)


@pytest.mark.parametrize(
    "method",
    ["exl2", "marlin", "hqq", "aqlm", "quip", "torchao", "mxfp4", "eetq", "higgs", "modelopt", None, 4, ["gptq"]],
)
def test_other_methods_are_refused_with_the_list(method):
    text = refusal(dict(quant_method=method, bits=4))
    assert f"quant_method {method!r}" in text
    assert all(known in text for known in METHODS)


WRONG: list[tuple[dict[str, Any], str]] = [
    (GPTQ | dict(bits=3), "bits 3 is not supported; supported are 2, 4, 8"),
    (GPTQ | dict(bits=None), "bits None"),
    (GPTQ | dict(bits=True), "bits True"),
    (GPTQ | dict(group_size=0), "group_size must be an integer"),
    (GPTQ | dict(group_size=-2), "group_size must be an integer"),
    (GPTQ | dict(group_size="128"), "group_size must be an integer"),
    (GPTQ | dict(desc_act="yes"), "desc_act must be true or false"),
    (
        GPTQ | dict(checkpoint_format="marlin"),
        "checkpoint_format 'marlin' is not supported; supported are gptq, gptq_v2",
    ),
    (GPTQ | dict(is_marlin_format=True), "is_marlin_format=True"),
    (GPTQ | dict(pack_dtype="int8"), "pack_dtype must be 'int32'"),
    (GPTQ | dict(adapter=dict(rank=4)), "adapter="),
    (AWQ | dict(bits=3), "bits 3 is not supported; supported are 4"),
    (AWQ | dict(version="gemv"), "version 'gemv' is not supported; supported are gemm"),
    (AWQ | dict(version="marlin"), "version 'marlin'"),
    (AWQ | dict(version="exllama"), "version 'exllama'"),
    (AWQ | dict(backend="llm-awq"), "llm-awq"),
    (AWQ | dict(group_size=1 << 30), "group_size"),
    (AWQ | dict(pack_dtype="int16"), "pack_dtype must be 'int32'"),
    (AWQ | dict(data_type="mx_fp"), "data_type must be 'int'"),
    (GPTQ | dict(act_bits=8), "act_bits must be 16"),
    (FP8 | dict(weight_block_size=[128]), "weight_block_size must be two positive integers"),
    (FP8 | dict(weight_block_size=[0, 128]), "weight_block_size must be two positive integers"),
    (FP8 | dict(weight_block_size=128), "weight_block_size must be two positive integers"),
    (FP8 | dict(fmt="e3m4"), "fmt 'e3m4'"),
    (FP8 | dict(expert_dtype="fp4"), "expert_dtype"),
    (FP8 | dict(kv_cache_scheme="static"), "kv_cache_scheme"),
    (PACKED | dict(format="marlin-24"), "format 'marlin-24'"),
    (PACKED | dict(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
    (PACKED | dict(format="mixed-precision"), "format None"),
    (PACKED | dict(config_groups={}), "config_groups must have a group"),
    (PACKED | dict(config_groups=[1]), "config_groups must be an object"),
    (PACKED | dict(config_groups=dict(group_0=None)), "config_groups must have a group"),
    (PACKED | dict(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme"),
    (PACKED | dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparsity_config"),
    (PACKED | dict(transform_config=dict(config_groups=dict(R1={}))), "transform_config"),
    (with_weights(PACKED, num_bits=3), "num_bits 3"),
    (with_weights(PACKED, type="float", num_bits=4), "num_bits 4"),
    (with_weights(INT8, type="float", symmetric=False), "symmetric must be true for floats"),
    (with_weights(PACKED, strategy="tensor_group"), "strategy 'tensor_group'"),
    (with_weights(PACKED, strategy="channel"), "strategy channel does not go with group_size 32"),
    (with_weights(PACKED, group_size=None), "strategy group does not go with group_size None"),
    (with_weights(INT8, strategy="block"), "strategy block does not go"),
    (with_weights(INT8, block_structure=[128, 128]), "strategy channel does not go"),
    (with_weights(PACKED, dynamic=True), "dynamic must be False"),
    (with_weights(PACKED, actorder="sideways"), "actorder 'sideways'"),
    (with_weights(PACKED, is_mx=True), "is_mx"),
    (NF4 | dict(load_in_8bit=True), "either load_in_4bit or load_in_8bit"),
    (NF4 | dict(load_in_4bit=False), "either load_in_4bit or load_in_8bit"),
    (NF4 | dict(bnb_4bit_quant_type="nf3"), "bnb_4bit_quant_type 'nf3'"),
    (NF4 | dict(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_what_a_format_cannot_say_is_named(values, words):
    text = refusal(values)
    assert words in text
    assert text.startswith("config.json: quantization_config")


@pytest.mark.parametrize("values", [[1], "gptq", 4])
def test_a_config_that_is_no_object_is_refused(values):
    assert "must be an object" in refusal(values)


NOTES = dict(damp_percent=0.1, true_sequential=True, static_groups=False, model_name_or_path="x", meta={"by": ["a"]})


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        (GPTQ, NOTES | dict(quantizer="made-by-1.0", use_exllama=True, exllama_config={"version": 1}, sym=True)),
        (AWQ, dict(modules_to_not_convert=["lm_head"], do_fuse=False, fuse_max_seq_len=512, backend="autoawq")),
        (FP8, dict(modules_to_not_convert=["lm_head"], scale_fmt="ue8m0", fmt="e4m3")),
        (PACKED, dict(quantization_status="frozen", global_compression_ratio=1.5, version="0.9", kv_cache_scheme=None)),
        (PACKED, dict(sparsity_config=dict(format="dense", global_sparsity=0.1), transform_config={})),
        (NF4, dict(llm_int8_skip_modules=["lm_head"], llm_int8_threshold=6.0, bnb_4bit_compute_dtype="bfloat16")),
    ],
)
def test_notes_about_how_a_file_was_made_pass(values, notes):
    assert read(values | notes) == read(values)
    assert "made_up=3" in refusal(values | notes | dict(made_up=3))


TOOLS = dict(block_name_to_quantize=None, dataset=None, exllama_config=dict(version=1), use_cuda_fp16=False)
AUTO_ROUND = dict(
    dict(act_bits=16, autoround_version="0.4.6", bits=4, data_type="int", enable_quanted_input=True, group_size=128),
    **dict(iters=1000, low_gpu_mem_usage=True, lr=0.001, minmax_lr=0.001, provider="auto-round", seqlen=2048, sym=True),
)
W4A16 = dict(
    dict(actorder="weight", block_structure=None, dynamic=False, group_size=128, num_bits=4, observer="minmax"),
    **dict(observer_kwargs={}, strategy="group", symmetric=True, type="int"),
)
DYNAMIC_INPUTS = dict(dynamic=True, num_bits=8, strategy="token", symmetric=True, type="float")


def of_compressed_tensors(form: str, inputs: Any, weights: Any) -> dict[str, Any]:
    group = dict(input_activations=inputs, output_activations=None, targets=["Linear"], weights=weights)
    told = dict(config_groups=dict(group_0=group), format=form, ignore=["lm_head"], kv_cache_scheme=None)
    return told | dict(
        global_compression_ratio=1.4, quant_method="compressed-tensors", quantization_status="compressed"
    )


RELEASED: dict[str, tuple[dict[str, Any], str, int]] = {
    "AutoGPTQ": (
        dict(GPTQ, **NOTES, bits=4, group_size=128, desc_act=True, sym=True, model_file_base_name="model"),
        *("gptq", 128),
    ),
    "optimum": (
        dict(TOOLS, bits=8, group_size=128, quant_method="gptq", desc_act=False, use_exllama=True),
        "gptq",
        128,
    ),
    "GPTQModel": (
        dict(bits=4, checkpoint_format="gptq_v2", desc_act=False, group_size=-1, lm_head=True, pack_dtype="int32")
        | dict(meta=dict(quantizer=["x:1.0"], uri="x"), quant_method="gptq", sym=False, dynamic={"-:.*gate.*": {}}),
        *("gptq", 8),
    ),
    "GPTQ by AutoRound": (
        dict(AUTO_ROUND, damp_percent=0.01, desc_act=False, lm_head=False, quant_method="gptq", true_sequential=False),
        *("gptq", 128),
    ),
    "AWQ by AutoRound": (
        dict(AUTO_ROUND, modules_to_not_convert=["lm_head"], quant_method="awq", version="gemm", zero_point=True),
        *("awq", 128),
    ),
    "AWQ by GPTQModel": (
        dict(bits=4, checkpoint_format="gemm", desc_act=False, dynamic={"-:.*gate$": {}}, format="gemm", group_size=128)
        | dict(lm_head=False, meta=dict(quantizer=["x:5.7"], uri="x"), method="awq", pack_dtype="int32", sym=False)
        | dict(quant_method="awq", version="gemm", zero_point=True),
        *("awq", 128),
    ),
    "AutoAWQ": (
        dict(bits=4, group_size=128, modules_to_not_convert=None, quant_method="awq", version="gemm", zero_point=True),
        *("awq", 128),
    ),
    "fine-grained fp8": (
        dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
        *("fp8", 128),
    ),
    "AutoFP8": (dict(activation_scheme="static", ignored_layers=["lm_head"], quant_method="fp8"), "fp8", 1),
    "FBGEMM": (
        dict(activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"], quant_method="fbgemm_fp8"),
        *("fp8", 1),
    ),
    "W4A16": (of_compressed_tensors("pack-quantized", None, W4A16), "compressed-tensors", 128),
    "W8A8": (
        of_compressed_tensors("float-quantized", DYNAMIC_INPUTS, dict(num_bits=8, type="float", strategy="channel")),
        *("compressed-tensors", 1),
    ),
    "bitsandbytes": (
        dict(
            _load_in_4bit=True, _load_in_8bit=False, load_in_4bit=True, load_in_8bit=False, quant_method="bitsandbytes"
        )
        | dict(bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="uint8", bnb_4bit_quant_type="nf4")
        | dict(bnb_4bit_use_double_quant=True, llm_int8_has_fp16_weight=False, llm_int8_threshold=6.0),
        *("bitsandbytes-nf4", 64),
    ),
}
"""As tools write them, with the name and the columns that belong together."""


@pytest.mark.parametrize("name", RELEASED)
def test_what_tools_write_is_understood(name):
    values, called, unit = RELEASED[name]
    found = read(values)
    assert found is not None
    assert (found.name, found.unit) == (called, unit)
    assert bool(found.notes) == (name in ("fine-grained fp8", "AutoFP8", "FBGEMM", "W8A8"))


BAD: list[Any] = [
    *(None, True, False, 0, -1, 3, 7, 0.5, math.nan, 10**12, 10**400),
    *("", "64", "x" * 10_000, [], [0], [None], [128, 128], {}, {"a": {}}),
]


def places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *place) for place in places(value))


def changed(values: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(values)
    target = result
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return result


def is_read(values: dict[str, Any]) -> bool:
    try:
        found = read(values)
    except ConfigurationError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
        return False
    assert found is not None and found.scheme is not None and found.scheme.unit >= 1
    return True


@pytest.mark.parametrize("name", FORMS)
def test_each_key_with_each_bad_value_is_read_or_refused(name):
    values = FORMS[name].config
    outcomes = [is_read(changed(values, place, bad)) for place in places(values) for bad in BAD]
    assert {True, False} == set(outcomes)


# Files.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("base")
    tiny_models.build_from("Llama", num_hidden_layers=1).save_pretrained(base)
    return {name: quantised.save(base, tmp_path_factory.mktemp("form"), form)[0] for name, form in FORMS.items()}


DOWN = "model.layers.0.mlp.down_proj"
Change = Callable[[Tensor], Tensor]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1].contiguous()


def as_float(tensor: Tensor) -> Tensor:
    return tensor.float()


def text(value: Any) -> Change:
    return lambda tensor: torch.tensor(
        list(value if isinstance(value, bytes) else json.dumps(value).encode()), dtype=torch.uint8
    )


SPOILED: list[tuple[str, str, Change | None, str]] = [
    ("gptq", ".qzeros", None, r"qzeros is missing"),
    ("gptq", ".scales", None, r"scales is missing"),
    ("gptq", ".g_idx", None, r"g_idx is missing"),
    ("gptq", ".qweight", None, r"down_proj.weight is missing"),
    ("gptq", ".qweight", shorter, r"qweight has shape \[9, 64\], but config.json asks for \[10, 64\]"),
    ("gptq", ".qweight", as_float, r"qweight is stored as F32, but config.json asks for I32"),
    ("gptq", ".scales", Tensor.int, r"scales is stored as I32, but config.json asks for F64 or F32"),
    ("gptq", ".scales", shorter, r"scales has shape \[2, 64\]"),
    ("gptq", ".qzeros", shorter, r"qzeros has shape \[2, 8\]"),
    ("gptq", ".g_idx", lambda order: order + 1, r"g_idx must hold numbers of groups from 0 to 2"),
    ("gptq", ".g_idx", lambda order: order - 1, r"g_idx must hold numbers of groups from 0 to 2"),
    ("gptq", ".g_idx", shorter, r"g_idx must be I32 with shape \[80\]"),
    ("gptq", ".g_idx", Tensor.long, r"g_idx must be I32"),
    ("awq", ".qzeros", None, r"qzeros is missing"),
    ("awq", ".qweight", lambda words: words.t().contiguous(), r"qweight has shape \[8, 80\]"),
    ("fp8", ".weight_scale_inv", shorter, r"weight_scale_inv has shape \[2, 2\]"),
    ("fp8", ".weight_scale_inv", None, r"down_proj.weight is stored as F8_E4M3, but config.json asks for F64 or F32"),
    ("fp8", ".weight", as_float, r"down_proj.weight is stored as F32, but config.json asks for F8_E4M3"),
    ("fp8 by tensor", ".weight_scale", lambda scale: scale.repeat(3), r"weight_scale has shape \[3\].* or 64"),
    ("packed", ".weight_packed", None, r"weight_packed is missing"),
    ("packed", ".weight_zero_point", None, r"weight_zero_point is missing"),
    ("packed", ".weight_scale", shorter, r"weight_scale has shape \[63, 3\]"),
    ("int8", ".weight", lambda codes: codes.to(torch.uint8), r"weight is stored as U8, but config.json asks for I8"),
    ("int8", ".weight_scale", lambda scale: scale.repeat(1, 2), r"weight_scale has shape \[64, 2\]"),
    ("nf4", ".weight.quant_map", None, r"quant_map is missing"),
    ("nf4", ".weight.absmax", shorter, r"absmax has shape \[79\]"),
    ("nf4", ".weight.absmax", as_float, r"absmax is stored as F32, but config.json asks for U8"),
    ("nf4", ".weight.nested_quant_map", None, r"nested_quant_map is missing"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", None, r"bitsandbytes__nf4 is missing"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", text(b"{"), r"bitsandbytes__nf4 must hold a JSON object"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", text([1, 2]), r"bitsandbytes__nf4 must hold a JSON object"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", text(dict(blocksize=0)), r"blocksize must be an integer"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", text(dict(nested_offset="1")), r"nested_offset must be a number"),
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", text(b" " * 5000), r"text of 4096 bytes at most"),
    ("llm_int8", ".SCB", None, r"down_proj.weight is stored as I8, but config.json asks for F64 or F32"),
    ("llm_int8", ".SCB", shorter, r"SCB has shape \[63\]"),
    ("llm_int8", ".weight_format", lambda number: number + 1, r"weight_format must be 0"),
]


@pytest.mark.parametrize(
    ("name", "ending", "spoil", "words"), SPOILED, ids=[f"{n}{e}: {w[:30]}" for n, e, _, w in SPOILED]
)
def test_a_tensor_that_does_not_fit_is_named(folders, name, ending, spoil, words):
    path = folders[name] / "model.safetensors"
    whole = path.read_bytes()
    load_decoder(folders[name])

    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(DOWN + ending)
        if spoil is not None:
            tensors[DOWN + ending] = spoil(tensor)

    try:
        rewrite(folders[name], edit)
        with pytest.raises(ConfigurationError, match=words) as caught:
            load_decoder(folders[name])
    finally:
        path.write_bytes(whole)
    assert DOWN in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_format_is_left_over(folders):
    path = folders["awq"] / "model.safetensors"
    whole = path.read_bytes()
    try:
        rewrite(folders["awq"], lambda tensors: tensors.update({f"{DOWN}.g_idx": torch.zeros(80, dtype=torch.int32)}))
        with pytest.raises(ConfigurationError, match=rf"no place in the model.*{DOWN}\.g_idx"):
            load_decoder(folders["awq"])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gptq", GPTQ | dict(group_size=64), r"scales has shape \[2, 64\], but config.json asks for \[1, 64\]"),
        ("gptq", GPTQ | dict(bits=8), r"qweight has shape \[8, 64\], but config.json asks for \[16, 64\]"),
        ("gptq", AWQ, r"qweight has shape \[8, 64\], but config.json asks for \[64, 8\]"),
        (
            "gptq",
            FP8,
            r"q_proj.weight is missing; there is .*q_proj.qweight in its place, of which the quantization_config",
        ),
        ("gptq", None, r"q_proj.weight is missing; there is .*q_proj.qweight in its place"),
        ("fp8", FP8 | dict(weight_block_size=[128, 128]), r"weight_scale_inv has shape \[3, 2\]"),
        ("packed", INT8, r"q_proj.*weight_scale has shape|q_proj.weight is missing"),
        ("nf4", NF4 | dict(bnb_4bit_quant_type="fp4"), r"bitsandbytes__fp4 is missing"),
        ("llm_int8", None, r"q_proj.weight is stored as I8"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(folders, name, config, words):
    path = folders[name] / "config.json"
    whole = path.read_bytes()
    try:
        change(folders[name], quantization_config=config)
        with pytest.raises(ConfigurationError, match=words):
            load_decoder(folders[name])
    finally:
        path.write_bytes(whole)


def test_bits_and_groups_of_a_modules_own_must_be_possible(folders):
    path = folders["gptq"] / "model.safetensors"
    whole, config = path.read_bytes(), (folders["gptq"] / "config.json").read_bytes()
    try:
        change(folders["gptq"], quantization_config=GPTQ | dict(dynamic={"+:.*": dict(bits=3)}))
        with pytest.raises(
            ConfigurationError, match=rf"tensors {DOWN}.qweight \[10, 64\] and .scales \[3, 64\] are no 80"
        ):
            load_decoder(folders["gptq"])
    finally:
        path.write_bytes(whole)
        (folders["gptq"] / "config.json").write_bytes(config)


def test_one_rank_needs_no_more_than_the_file_has(folders):
    """A truncated file is refused before anything is read."""
    path = folders["awq"] / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-7])
        with pytest.raises(ConfigurationError, match="shorter than its header says"):
            load_decoder(folders["awq"])
    finally:
        path.write_bytes(whole)
