"""Pickled checkpoints become safetensors with the same tensors; nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import ConfigurationError
from worker import shards
from worker.conversion import convert, find_pickles, plan, read_pickle
from worker.model.checkpoint import find_files
from worker.shards import INDEX_NAME, SINGLE_NAME, shard_names

BLOCK = 40_000
"""Bytes of each of the large tensors below."""


def state() -> dict[str, Tensor]:
    """Tensors of several types, shapes and layouts; the head is the embedding."""
    randomness = torch.Generator().manual_seed(3)
    made = {f"layers.{i}.weight": torch.randn(100, 100, generator=randomness) for i in range(4)}
    embedding = torch.randn(50, 200, generator=randomness)
    views = {"wide.0": torch.randn(6, 8, generator=randomness)}
    views |= {"wide.t": views["wide.0"].t(), "wide.part": views["wide.0"][2:4], "wide.columns": views["wide.0"][:, ::3]}
    small = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "mask": torch.tensor([True, False, True])}
    types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8]
    small |= {f"as.{dtype}": torch.arange(7).to(dtype) for dtype in types}
    head = {"lm_head.weight": embedding, "model.embed.weight": embedding}
    return {"odd": torch.arange(3, dtype=torch.uint8), **made, **head, **views, **small}


def lines_to(lines: list[str]) -> Callable[[str], None]:
    return lines.append


def be_silent(*_: Any) -> None:
    pass


def converted(
    sources: list[Path], target: Path, *, shard_bytes: int = 10**9, on_progress: Any = be_silent, resumed: bool = False
) -> dict[str, Tensor]:
    target.mkdir(exist_ok=True)
    convert(plan(sources, shard_bytes, be_silent), target, on_progress, is_resumed=resumed)
    return stored(target)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the library that others read them with."""
    found = {}
    for path in find_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_all_tensors_are_equal_and_shared_ones_are_written_once(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state(), path, _use_new_zipfile_serialization=is_zip)
    seen: list[tuple[int, int]] = []
    found = converted([path], tmp_path / "to", on_progress=lambda done, total: seen.append((done, total)))
    assert_same(found, without_head(state()))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.numel() * tensor.itemsize for tensor in found.values())
    with safe_open(tmp_path / "to" / SINGLE_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "lm_head.weight": "model.embed.weight"}
    wrong = state()
    wrong["layers.2.weight"][5, 5] += 1
    with pytest.raises(AssertionError, match=r"layers\.2\.weight"):
        assert_same(found, without_head(wrong))


def test_equal_tensors_that_are_not_shared_stay_two(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    tensors = {"lm_head.weight": torch.ones(3, 3), "model.embed.weight": torch.ones(3, 3)}
    torch.save(tensors, path)
    assert_same(converted([path], tmp_path / "to"), tensors)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["lm_head.weight", "transformer.wte.weight"], "transformer.wte.weight"),
        (["embed_out.weight", "gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        (["lm_head.weight", "encoder.embed_tokens.weight", "shared.weight"], "shared.weight"),
        (["output.weight", "model.tok_embeddings.weight"], "model.tok_embeddings.weight"),
    ],
)
def test_of_shared_tensors_the_embedding_is_kept(tmp_path: Path, names: list[str], kept: str) -> None:
    tensor = torch.ones(3, 3)
    torch.save(dict.fromkeys(names, tensor), tmp_path / "pytorch_model.bin")
    assert list(converted([tmp_path / "pytorch_model.bin"], tmp_path / "to")) == [kept]


def test_large_models_are_cut_into_shards(tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    layers = {name: tensor for name, tensor in state().items() if name.startswith("layers")}
    torch.save(layers, first)
    torch.save({"model.embed.weight": torch.ones(10, 10)}, second)
    found = converted([first, second], tmp_path / "to", shard_bytes=2 * BLOCK)
    assert_same(found, layers | {"model.embed.weight": torch.ones(10, 10)})
    files = find_files(tmp_path / "to")
    assert [path.name for path in files] == shard_names(3)
    index = json.loads((tmp_path / "to" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 4 * BLOCK + 400
    assert index["weight_map"]["layers.2.weight"] == "model-00002-of-00003.safetensors"
    one_each = plan([first], 1, be_silent)
    assert [shard.num_bytes for shard in one_each] == [BLOCK] * 4, "a tensor is never cut"


@pytest.mark.parametrize("wrapping", [["state_dict"], ["model"], ["model", "state_dict"]])
def test_wrapped_states_are_found(tmp_path: Path, wrapping: list[str]) -> None:
    content: Any = {"a": torch.ones(2), "version": 3, 7: torch.ones(1)}
    for word in wrapping:
        content = {word: content, "epoch": 12}
    torch.save(content, tmp_path / "model.pt")
    lines: list[str] = []
    assert list(read_pickle(tmp_path / "model.pt", lines_to(lines))) == ["a"]
    assert lines == ["model.pt: 2 entries that are no tensors are left out, such as version"]


class Evil:
    """Unpickled as usual it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Harmless:
    pass


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    torch.save({"a": torch.ones(2), "b": Evil(proof)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin needs posix\.mkdir to be loaded, and code"):
        plan([path], 100, be_silent)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "it would have been"


def damaged(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def script(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def sparse(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.save({"a": torch.ones(2, 2).to_sparse()}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: torch.save({"a": Harmless()}, path), r"needs tests\.worker\.test_conversion\.Harmless"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "needs torch.nn.modules.linear.Linear"),
        (script, "is a TorchScript program"),
        (damaged, "or it is damaged: download it again"),
        (lambda path: path.write_bytes(b""), "or it is damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "or it is damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": [1]}, protocol=4)), "or it is damaged"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no tensors by name"),
        (lambda path: torch.save({"optimizer": {"step": 3}}, path), "holds no tensors by name"),
        (sparse, "tensor a is sparse_coo, which is not converted"),
        (lambda path: torch.save({"a": torch.ones(1, dtype=torch.complex64)}, path), "tensor a is complex64"),
        (lambda path: torch.save({"a": torch.ones(1, device="meta")}, path), "tensor a"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    make(path)
    with pytest.raises(ConfigurationError, match=words) as caught:
        plan([path], 100, be_silent)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        torch.save({"same": torch.ones(2)}, path)
    with pytest.raises(ConfigurationError, match=r"tensor same is in a\.bin and in b\.bin"):
        plan(paths, 100, be_silent)


def stop_after(num_bytes: int) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done >= num_bytes:
            raise KeyboardInterrupt

    return show


def test_what_was_stopped_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    source, target = tmp_path / "pytorch_model.bin", tmp_path / "to"
    layers = {name: tensor for name, tensor in state().items() if name.startswith("layers")}
    torch.save(layers, source)
    with pytest.raises(KeyboardInterrupt):
        converted([source], target, shard_bytes=BLOCK, on_progress=stop_after(2 * BLOCK))
    names = shard_names(4)
    assert [path.name for path in target.iterdir()] == names[:1], "the half-written second one is gone, no index"
    first = target / names[0]
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    (target / f"{names[1]}.part").write_bytes(b"what a killed one leaves")
    (target / names[2]).write_bytes(first.read_bytes()[:-1])
    seen: list[int] = []
    found = converted([source], target, shard_bytes=BLOCK, on_progress=lambda done, _: seen.append(done), resumed=True)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert seen == [2 * BLOCK, 3 * BLOCK, 4 * BLOCK]
    assert_same(found, layers)
    assert sorted(path.name for path in target.iterdir()) == sorted([*names, INDEX_NAME])
    converted([source], target, shard_bytes=BLOCK, resumed=False)
    assert first.stat().st_ino != before[0], "what is not resumed is written anew"


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    monkeypatch.setattr(shards, "free_bytes", lambda _: 3999)
    with pytest.raises(ConfigurationError, match=r"need 3\.9 KiB more in .*, where 3\.9 KiB are free"):
        converted([path], tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    monkeypatch.setattr(shards, "free_bytes", lambda _: 4000)
    converted([path], tmp_path / "to")


def test_the_pickles_of_a_model_are_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither model\.safetensors nor pickled weights \(\*\.bin, "):
        find_pickles(tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "weights.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in find_pickles(tmp_path)] == ["weights.pth"]
    (tmp_path / "more.pt").touch()
    with pytest.raises(ConfigurationError, match=r"has more\.pt, weights\.pth but no pytorch_model\.bin\.index\.json"):
        find_pickles(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert [path.name for path in find_pickles(tmp_path)] == ["pytorch_model.bin"]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = {"weight_map": {"b": names[1], "a": names[0], "c": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / names[0]).touch()
    with pytest.raises(ConfigurationError, match=f"{names[1]} of the index is missing"):
        find_pickles(tmp_path)
    (tmp_path / names[1]).touch()
    assert [path.name for path in find_pickles(tmp_path)] == names
