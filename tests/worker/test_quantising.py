"""`inferfleet prepare --quantize`: it writes what the formats say, whatever stopped it, for every kind of model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigurationError
from common.settings import PrepareSettings
from tests.support import paged_t5, quantised, tiny_models, tiny_t5
from tests.support.hub_server import HubServer
from tests.support.paged import load_decoder, paged_logits, relative_error
from worker import calibration, quantised_files, quantising, shards
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.quant.calibrated import nearest
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.stored import stored_quantisation
from worker.model.quant.writing import as_gptq
from worker.model.weights import Part
from worker.prepare import STATE_NAME, Screen, prepare

TEXT = "".join(f"{number} times {number} is {number**2}.\n" for number in range(99))
SEQUENCES = [tiny_models.tokenizer().encode(TEXT[:160], add_special_tokens=False).ids]
SAME = 1e-5
"""Relative error of logits in float32 where nothing but the order of sums differs."""


class Shown(list[str]):
    """Collects what is said; past `stop_after` bytes somebody presses Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after, self.shown = stop_after, [("", 0, 0)]

    def show(self, word: str, done: int, total: int) -> None:
        assert word != self.shown[-1][0] or self.shown[-1][1] <= done
        assert done <= total
        self.shown.append((word, done, total))
        if self.stop_after is not None and done > self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models by name, each written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        save = tiny_t5.save if name in tiny_t5.CASES else tiny_models.save
        return root / name if (root / name).is_dir() else save(name, root / name)

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(model: Path, output: Path, scheme: str, shown: Shown | None = None, **fields: Any) -> Path:
    shown = Shown() if shown is None else shown
    settings = PrepareSettings(model=str(model), output=str(output), quantize=scheme, **fields)
    options = prepare(settings, Screen(shown.append, shown.show), shard_bytes=100_000)
    assert options == ["--model-id", str(output.resolve())]
    return output


def problem(*arguments: Any, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        run(*arguments, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(folder: Path) -> list[torch.Tensor]:
    return paged_logits(load_decoder(folder), SEQUENCES)[0]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square of the differences of logits."""
    return float((torch.cat(found) - torch.cat(expected)).square().mean().sqrt())


def assert_matrices_are_read_as_the_format_says(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """What a worker computes with are the very numbers of the definition."""
    config = read_config(folder)
    quantisation, checkpoint = stored_quantisation(config), Checkpoint(folder)
    assert quantisation is not None and quantisation.scheme is not None
    for name, numbers in expected.items():
        part = calibration.whole(Part(numbers.shape, []))
        found = quantisation.scheme.read(checkpoint, name, part).dequantised()
        assert torch.equal(found, torch.from_numpy(numbers.astype(np.float32))), name


GPTQ_MODELS = [
    *("llama_biases_llama3", "phi3", "cohere", "olmo2", "gemma2"),
    *("gpt2", "falcon_40b", "gptj", "opt_350m", "bloom"),
]


@pytest.mark.parametrize("name", GPTQ_MODELS)
def test_gptq_knows_the_matrices_of_every_kind_of_model(
    models: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Residual forms, fused, transposed and interleaved matrices: each is read as it was meant, and has seen its own
    inputs, for on such a text the model is nearer to what it was than with the nearest codes."""
    source, options = models(name), dict(bits=8, group_size=-1, calibration=text)
    made = run(source, tmp_path / "made", "gptq", **options)
    spec, family = read_spec(json.loads((source / "config.json").read_text()))
    numbers = quantised.dense_twin(made, tmp_path / "dense", 8, is_transposed=family.is_transposed)
    assert len(numbers) >= 4 * spec.num_layers
    assert_matrices_are_read_as_the_format_says(made, numbers)
    whole, found = logits(source), logits(made)
    assert relative_error(found, logits(tmp_path / "dense")) < SAME
    monkeypatch.setattr(quantised_files, "gptq", lambda weight, hessian, grid, has_order: nearest(weight, grid))
    rounded = logits(run(source, tmp_path / "rounded", "gptq", **options))
    assert 0 < distance(found, whole) < 0.9 * distance(rounded, whole)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "qwen2_moe", "gpt2", "t5"])
def test_nearest_codes_are_written_of_every_matrix(models: Any, tmp_path: Path, name: str, scheme: str) -> None:
    """Of experts and encoders too; not of routers, embeddings and heads."""
    fields, num_bits = ({}, 8) if scheme == "int8" else (dict(group_size=-1), 4)
    made = run(models(name), tmp_path / "made", scheme, **fields)
    spec, family = read_spec(json.loads((models(name) / "config.json").read_text()))
    numbers = quantised.dense_twin(made, tmp_path / "dense", num_bits, is_transposed=family.is_transposed)
    assert_matrices_are_read_as_the_format_says(made, numbers)
    before, after = (load_file(folder / "model.safetensors") for folder in (models(name), tmp_path / "dense"))
    assert after.keys() == before.keys()
    for tensor_name, tensor in before.items():
        module, step = tensor_name.removesuffix(".weight"), 1 / (127.5 if scheme == "int8" else 7.5)
        if module not in numbers:
            assert torch.equal(after[tensor_name], tensor)
            continue
        is_row = 1 if not family.is_transposed else 0
        bound = tensor.abs().amax(is_row, keepdim=True) * step / 2
        assert ((after[tensor_name] - tensor).abs() <= bound * 1.001).all(), tensor_name
    ignored = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head"} <= set(ignored) and not set(ignored) & numbers.keys()
    matrices = {tensor_name.removesuffix(".weight") for tensor_name, tensor in before.items() if tensor.dim() == 2}
    assert matrices - numbers.keys() <= set(ignored)
    kinds = {"mixtral": ["experts.1.w2"], "qwen2_moe": ["experts.1.down_proj", "shared_expert.up_proj"]}
    kinds |= {"t5": ["encoder.block.1", "EncDecAttention.k"], "gpt2": ["c_attn"], "qwen2": ["q_proj"]}
    assert all(any(kind in module for module in numbers) for kind in kinds[name])
    assert all(part not in module for module in numbers for part in ("embed", "wte", "shared.", "router", "mlp.gate."))


def test_a_quantised_model_serves_as_its_numbers_say(models: Any, tmp_path: Path) -> None:
    for name, scheme, fields, num_bits in (("mixtral", "int4", dict(group_size=-1), 4), ("qwen2", "int8", {}, 8)):
        made = run(models(name), tmp_path / name, scheme, **fields)
        quantised.dense_twin(made, tmp_path / f"{name}-dense", num_bits)
        assert relative_error(logits(made), logits(tmp_path / f"{name}-dense")) < SAME
    made = run(models("t5"), tmp_path / "t5", "int8")
    quantised.dense_twin(made, tmp_path / "t5-dense", 8)
    pairs = [paged_t5.Pair(list(range(3, 30)), [5, 6, 7])]
    both = [paged_t5.paged_logits(paged_t5.load_t5(folder), pairs)[0] for folder in (made, tmp_path / "t5-dense")]
    assert relative_error(*both) < SAME


def with_plain_zeros(matrix: QuantisedMatrix, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    assert matrix.zero is not None
    return as_gptq(replace(matrix, zero=matrix.zero + 1), dtype)


def with_columns_backwards(matrix: QuantisedMatrix, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return as_gptq(replace(matrix, codes=matrix.codes.flip(1)), dtype)


@pytest.mark.parametrize("write", [with_plain_zeros, with_columns_backwards])
def test_what_is_written_wrongly_stands_for_another_model(
    models: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    options = dict(bits=8, group_size=-1, calibration=text)
    right = run(models("qwen2"), tmp_path / "right", "gptq", **options)
    monkeypatch.setattr(quantising, "as_gptq", write)
    wrong = run(models("qwen2"), tmp_path / "wrong", "gptq", **options)
    whole, (near, far) = logits(models("qwen2")), map(logits, (right, wrong))
    assert distance(far, whole) > 4 * distance(near, whole)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("has_order", [False, True], ids=["in order", "act-order"])
def test_what_was_stopped_becomes_what_a_single_run_makes(
    models: Any, text: str, tmp_path: Path, has_order: bool
) -> None:
    """Wherever it was stopped: bit by bit."""
    source, options = models("qwen2"), dict(bits=4, group_size=-1, calibration=text, desc_act=has_order)
    single = files_of(run(source, tmp_path / "single", "gptq", shown := Shown(), **options))
    total = shown.shown[-1][2]
    assert shown.shown[-1] == ("quantising", total, total) and len(shown.shown) > 20
    assert shown[0] == "calibrating with 1536 tokens: 3 times 512" and shown[-1].startswith("quantised ")
    output = tmp_path / "stopped"
    stops = [total * share // 10 for share in (2, 5, 5, 8)]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(source, output, "gptq", Shown(stop), **options)
        assert (output / STATE_NAME).exists() and not (output / shards.INDEX_NAME).exists()
        with pytest.raises(ConfigurationError, match="finish `inferfleet prepare`"):
            Checkpoint(output)
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert len(written) > 2
    run(source, output, "gptq", shown := Shown(), **options)
    assert shown.shown[1][1] > total // 2, "what there was is not made again"
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert files_of(output) == single
    assert run(source, output, "gptq", shown := Shown(), **options)
    assert shown == [f"{output} has this model quantised so already: there is nothing to do"]


def test_without_the_inputs_of_the_next_layer_it_begins_anew(models: Any, text: str, tmp_path: Path) -> None:
    source, options = models("qwen2"), dict(bits=8, group_size=-1, calibration=text)
    single = files_of(run(source, tmp_path / "single", "gptq", shown := Shown(), **options))
    output, total = tmp_path / "stopped", shown.shown[-1][1]
    with pytest.raises(KeyboardInterrupt):
        run(source, output, "gptq", Shown(total * 7 // 10), **options)
    (states,) = output.glob("*.states")
    states.write_bytes(states.read_bytes()[:-1])
    run(source, output, "gptq", shown := Shown(), **options)
    assert shown.shown[1][1] < total // 2
    assert files_of(output) == single


def test_later_layers_see_what_earlier_ones_have_become(
    models: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(bits=2, group_size=-1, calibration=text)
    made = quantised.stored_tensors(run(models("qwen2"), tmp_path / "made", "gptq", **options))
    monkeypatch.setattr(calibration.Watched, "replace", lambda self, numbers: None)
    other = quantised.stored_tensors(run(models("qwen2"), tmp_path / "other", "gptq", **options))
    is_same = {name: torch.equal(made[name], other[name]) for name in made if name.endswith("qweight")}
    assert all(same for name, same in is_same.items() if ".layers.0." in name)
    assert not any(same for name, same in is_same.items() if ".layers.1." in name)


def test_nearest_codes_go_on_too(models: Any, tmp_path: Path) -> None:
    source = models("mixtral")
    single = files_of(run(source, tmp_path / "single", "int8", shown := Shown()))
    output, total = tmp_path / "stopped", shown.shown[-1][1]
    with pytest.raises(KeyboardInterrupt):
        run(source, output, "int8", Shown(total // 2))
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert 0 < len(written) < len([name for name in single if name.endswith(".safetensors")])
    run(source, output, "int8")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert files_of(output) == single


def test_work_with_other_options_or_text_is_not_mixed(models: Any, text: str, tmp_path: Path) -> None:
    source, output = models("qwen2"), tmp_path / "output"
    options = dict(group_size=-1, calibration=text)
    with pytest.raises(KeyboardInterrupt):
        run(source, output, "gptq", Shown(100_000), **options)
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "more")
    before, sentence = files_of(output), "was begun with other options, text or weights; give those again, or choose "
    assert sentence in problem(source, output, "gptq", bits=8, **options)
    assert sentence in problem(source, output, "gptq", group_size=-1, calibration=str(other))
    assert sentence in problem(source, output, "int8")
    bare = Path(shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json")))
    with pytest.raises(ConfigurationError, match=sentence):
        prepare(PrepareSettings(model=str(bare), output=str(output)), Screen(list().append, lambda *_: None))
    assert files_of(output) == before
    run(source, output, "gptq", **options)
    assert "holds something else" in problem(source, output, "gptq", bits=8, **options)
    assert "holds something else" in problem(source, output, "gptq", group_size=-1, calibration=str(other))


def rewritten(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


def test_what_cannot_be_quantised_is_said_in_a_sentence(models: Any, text: str, tmp_path: Path) -> None:
    source, output = models("qwen2"), tmp_path / "output"
    assert (
        problem(source, source, "int8") == "--output is the folder of the model itself, over which nothing is written"
    )
    made = run(source, tmp_path / "made", "int8")
    expected = f"{made} is quantised already, by compressed-tensors; quantise the model that it was made of"
    assert problem(made, output, "int4", group_size=-1) == expected
    assert problem(source, output, "int4", group_size=64) == (
        "model.layers.0.mlp.down_proj has 80 columns, which groups of 64 do not divide; --group-size may be -1"
    )
    assert problem(models("mixtral"), output, "gptq", calibration=text) == (
        "--quantize gptq is for models without experts, of which mixtral has 4, most with too little of the text to go "
        "by; choose int8 or int4"
    )
    assert problem(models("t5"), output, "gptq", calibration=text) == (
        "--quantize gptq is for decoders, and t5 has an encoder too; choose int8 or int4"
    )
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    incomplete = Path(shutil.copytree(source, tmp_path / "incomplete"))
    save_file(tensors, incomplete / "model.safetensors")
    sentence = "tensor model.layers.1.mlp.up_proj.weight is missing; the checkpoint is incomplete"
    assert problem(incomplete, output, "int8") == f"{incomplete}: {sentence}"
    pickled = Path(shutil.copytree(source, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert problem(pickled, output, "int8") == (
        f"{pickled} has no safetensors to quantise; where it has pickled weights, `inferfleet prepare {pickled}` "
        "converts them first"
    )
    assert not output.exists()


def test_a_text_that_will_not_do_is_said_in_a_sentence(models: Any, tmp_path: Path) -> None:
    source, output, path = models("qwen2"), tmp_path / "output", tmp_path / "text"

    def said(**fields: Any) -> str:
        return problem(source, output, "gptq", group_size=-1, calibration=str(path), **fields)

    assert said() == f"--calibration {path}: No such file or directory"
    path.mkdir()
    assert said() == f"--calibration {path} is not a file"
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    assert said() == f"--calibration {path} is not UTF-8 text"
    path.write_bytes(bytes(calibration.MAX_TEXT_BYTES + 1))
    assert said() == f"--calibration {path} has 16.0 MiB, of which 16.0 MiB would do; cut it"
    path.write_text("short")
    assert said() == "the text of --calibration has 5 tokens; 512 are the least"
    path.write_text(TEXT + "<|im_start|>")
    small = rewritten(source, tmp_path / "small", vocab_size=20)
    tensors = load_file(source / "model.safetensors")
    rows = {name: tensor[:20] if "embed" in name or "lm_head" in name else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in rows.items()}, small / "model.safetensors")
    said_of_it = problem(small, output, "gptq", group_size=-1, calibration=str(path))
    assert said_of_it == f"{small}: tokenizer.json has more tokens than the model"
    (small / "tokenizer.json").write_text("{}")
    assert "/tokenizer.json is not a tokenizer: " in problem(
        small, output, "gptq", calibration=str(path), group_size=-1
    )
    (small / "tokenizer.json").unlink()
    assert problem(small, output, "gptq", group_size=-1, calibration=str(path)) == (
        f"{small} has no tokenizer.json for the text of --calibration; `inferfleet prepare {small}` makes one first"
    )
    assert not output.exists()


def test_weights_that_are_no_numbers_are_said(models: Any, text: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("qwen2"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    spoilt = tensors | {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] / 0}
    save_file(spoilt, source / "model.safetensors")
    expected = "model.layers.1.mlp.up_proj.weight holds what is no number; download the model again"
    assert problem(source, tmp_path / "int8", "int8") == expected
    norm = tensors["model.layers.1.input_layernorm.weight"] * 1e30
    save_file(tensors | {"model.layers.1.input_layernorm.weight": norm}, source / "model.safetensors")
    assert problem(source, tmp_path / "gptq", "gptq", group_size=-1, calibration=text) == (
        "model.layers.1.self_attn.q_proj gets inputs that are no numbers when the model reads the text of --calibration"
    )


def test_room_is_looked_for_first(models: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = models("qwen2"), dict(group_size=-1, calibration=text)
    monkeypatch.setattr(shards, "free_bytes", lambda _: 100_000)
    assert problem(source, tmp_path / "a", "gptq", **options).startswith("the quantised weights need ")
    monkeypatch.undo()
    monkeypatch.setattr(quantised_files, "available_bytes", lambda: 1000)
    said = problem(source, tmp_path / "b", "gptq", **options)
    assert "tokens of text need about" in said and said.endswith("choose fewer --calibration-tokens, or free memory")


def test_a_model_of_a_hub_is_quantised_and_its_pickles_are_not_fetched(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(models("qwen2"))
    pickled = {name: data for name, data in files.items() if not name.endswith("safetensors")}
    with HubServer({"owner/safe": files, "owner/pickled": pickled | {"pytorch_model.bin": b"old"}}) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        run("owner/safe", tmp_path / "made", "int8")
        assert files_of(tmp_path / "made") == files_of(run(models("qwen2"), tmp_path / "local", "int8"))
        assert "`inferfleet prepare owner/pickled` converts them first" in problem(
            "owner/pickled", tmp_path / "x", "int8"
        )
        assert not [path for path, _ in hub.requested if path.endswith(".bin")]
