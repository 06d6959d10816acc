from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import ConfigurationError
from tests.worker.model.spoil import change, rewrite
from worker.model.checkpoint import Checkpoint, find_files, weights_digest
from worker.model.config import read_config
from worker.model.weights import Part


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_checkpoints_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigurationError, match="pickled weights, which are never loaded") as caught:
        find_files(folder)
    assert f"`inferfleet prepare {folder}` converts them" in str(caught.value)


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"no model\.safetensors"):
        find_files(folder)


def test_a_single_file_of_another_name_is_found(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert [path.name for path in find_files(folder)] == ["weights.safetensors"]


def test_consolidated_weights_are_left_alone(folder):
    for name in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    assert [path.name for path in find_files(folder)] == ["model.safetensors"]
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert [path.name for path in find_files(folder)] == ["weights.safetensors"]
    (folder / "weights.safetensors").rename(folder / "shard.safetensors")
    index = {"weight_map": {"any": "shard.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in find_files(folder)] == ["shard.safetensors"]
    (folder / "model.safetensors.index.json").unlink()
    (folder / "shard.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="weights in their maker's own layout only"):
        find_files(folder)


@pytest.mark.parametrize("name", ["model-00002-of-00012.safetensors", "model-1-of-2.safetensors"])
def test_one_of_several_files_is_no_model(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigurationError, match=f"has {name} but neither model.safetensors nor"):
        find_files(folder)
    (folder / name).rename(folder / "model-00001-of-00001.safetensors")
    assert len(find_files(folder)) == 1


def test_damaged_files_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    Checkpoint(folder)
    for spoiled in (whole[:-100], whole[:50], b"", b"\xff" * 100, whole[:8] + b"{" * (len(whole) - 8)):
        path.write_bytes(spoiled)
        with pytest.raises(ConfigurationError, match="safetensors"):
            Checkpoint(folder)


ENTRY = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize(
    "header",
    [
        *("[" * 10_000, f'{{"a": {"9" * 5000}}}', "[]", '{"a": 1}', '{"__metadata__": 1, "a": []}'),
        *(json.dumps({"a": ENTRY | change}) for change in ({"dtype": ["F32"]}, {"dtype": None}, {"shape": 2})),
        *(json.dumps({"a": ENTRY | {"shape": shape}}) for shape in ([None], ["2"], None)),
        *(json.dumps({"a": ENTRY | {"data_offsets": place}}) for place in ([0], ["0", "8"], [8, 0], [-8, 0], {}, "08")),
    ],
)
def test_headers_that_describe_no_tensors_are_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ConfigurationError, match="not a safetensors file"):
        Checkpoint(tmp_path)
    header = json.dumps({"a.weight": ENTRY})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    assert Checkpoint(tmp_path).dtype is torch.float32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "not an index"),
        ("[1", "not an index"),
        ("[" * 10_000, "not an index"),
        (f'{{"weight_map": {"9" * 5000}}}', "not an index"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors of the index is missing"),
    ],
)
def test_wrong_indexes_are_refused(folder, content, words):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        find_files(folder)


def test_integers_are_not_a_type_to_run(folder):
    assert Checkpoint(folder).dtype is torch.float32
    rewrite(folder, lambda tensors: tensors.update({"big.weight": torch.zeros(200_000, dtype=torch.int32)}))
    assert Checkpoint(folder).dtype is torch.float32
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name != "big.weight"])
    with pytest.raises(ConfigurationError, match="I32"):
        _ = Checkpoint(folder).dtype


def test_scales_are_not_the_type_of_a_quantised_model(folder):
    def quantise(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].half()
            tensors[name + "_scale"] = torch.ones(2 * tensors[name].numel())

    rewrite(folder, quantise)
    assert Checkpoint(folder).dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_a_tensor_of_a_type_that_was_not_asked_for_is_named(folder, dtype):
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    checkpoint, part = Checkpoint(folder), Part((64,), [range(64)])
    checkpoint.copy_into(name, torch.empty(64, dtype=dtype), part)
    for wanted in (torch.float32, torch.bfloat16, torch.int8):
        with pytest.raises(ConfigurationError, match=f"{name} is stored as .* config.json asks for"):
            checkpoint.copy_into(name, torch.empty(64, dtype=wanted), part)


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8])
def test_masks_are_not_the_type_of_a_small_model(folder, mask):
    size = Checkpoint(folder).num_bytes
    rewrite(folder, lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(2 * size, dtype=mask)}))
    assert Checkpoint(folder).dtype is torch.float32


def test_a_checkpoint_of_nothing_but_masks_has_no_type(folder):
    rewrite(folder, lambda tensors: tensors.clear())
    with pytest.raises(ConfigurationError, match="holds no weights"):
        _ = Checkpoint(folder).dtype
    rewrite(folder, lambda tensors: tensors.update({"mask": torch.ones(9, dtype=torch.bool)}))
    with pytest.raises(ConfigurationError, match="holds no weights"):
        _ = Checkpoint(folder).dtype


def digest(folder: Path) -> str:
    return weights_digest(read_config(folder), find_files(folder))


def test_the_fingerprint_changes_with_config_weights_and_nothing_else(folder, tmp_path):
    first = digest(folder)
    assert digest(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    change(folder, rms_norm_eps=0.5)
    second = digest(folder)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert len({first, second, digest(folder)}) == 3


def test_the_fingerprint_reads_little_of_a_large_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(5_000_000_000)
    before = weights_digest({}, [path])
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert weights_digest({}, [path]) != before
