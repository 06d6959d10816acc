"""The demo model by GPTQ at 4 bits in groups of 64: on held-out text it is nearly what it was, and rounding is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.settings import PrepareSettings
from ops.bench.perplexity import load, measure, passage
from ops.demo_model.texts import calibration_text, held_out_chats
from tests.support import quantised
from tests.support.fleet import DEMO_MODEL
from worker import quantised_files
from worker.calibration import whole
from worker.model.checkpoint import Checkpoint
from worker.model.config import read_config
from worker.model.quant.calibrated import gptq, nearest
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.stored import stored_quantisation
from worker.model.weights import Part
from worker.prepare import Screen, prepare

NUM_CHATS = 14
TOKENS = 8192


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(calibration_text(), encoding="utf-8")
    return path


def quantise(output: Path, text: Path, round_by: Callable[..., QuantisedMatrix] = gptq) -> Path:
    options = dict(quantize="gptq", bits=4, group_size=64, calibration=str(text), calibration_tokens=TOKENS)
    settings = PrepareSettings.model_validate(dict(model=str(DEMO_MODEL), output=str(output)) | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_files, "gptq", round_by)
        prepare(settings, Screen(list().append, lambda *_: None))
    return output


def to_the_nearest(weight: Tensor, hessian: Tensor, grid: Any, *, has_order: bool) -> QuantisedMatrix:
    return nearest(weight, grid)


class OfAnotherProduct:
    """GPTQ by what the last product of the same width has seen."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def __call__(self, weight: Tensor, hessian: Tensor, grid: Any, *, has_order: bool) -> QuantisedMatrix:
        other = self.seen.get(len(hessian), hessian.flip(0, 1))
        self.seen[len(hessian)] = hessian
        return gptq(weight, other, grid)


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise(tmp_path_factory.mktemp("made") / "gptq", text)


def test_it_is_read_as_the_numbers_of_the_formats_definition(made: Path, tmp_path: Path) -> None:
    config = read_config(made)
    own = config["quantization_config"]
    assert (own["bits"], own["group_size"], own["sym"], own["checkpoint_format"]) == (4, 64, True, "gptq")
    numbers, quantisation = quantised.dense_twin(made, tmp_path / "dense", 4), stored_quantisation(config)
    assert len(numbers) == 6 * 7 and numbers["model.layers.5.mlp.down_proj"].shape == (256, 704)
    assert quantisation is not None and quantisation.scheme is not None
    checkpoint, wrong = Checkpoint(made), 0
    for name, expected in numbers.items():
        part = whole(Part(expected.shape, []))
        found = quantisation.scheme.read(checkpoint, name, part).dequantised()
        assert torch.equal(found, torch.from_numpy(expected.astype(np.float32))), name
        wrong += torch.equal(found, torch.from_numpy(expected[:, ::-1].astype(np.float32)))
    assert not wrong


def test_perplexity_is_that_of_the_whole_model_and_rounding_to_the_nearest_is_worse(
    made: Path, text: Path, tmp_path: Path
) -> None:
    """Perplexity may be better by luck, divergence may not: so much do the scores of wrong inputs show."""
    rounded = quantise(tmp_path / "nearest", text, to_the_nearest)
    wrong = quantise(tmp_path / "wrong", text, OfAnotherProduct())
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    chats = [passage(chat, tokenizer) for chat in held_out_chats()[:NUM_CHATS]]
    devices = [load(folder) for folder in (DEMO_MODEL, made, rounded, wrong)]
    assert {device.model.dtype for device in devices} == {torch.bfloat16}
    torch.set_num_threads(1)
    first, by_gptq, by_nearest, by_wrong = measure(devices, chats)
    assert first.num_tokens > 3000 and first.divergence == 0
    assert 0.97 < by_gptq.perplexity / first.perplexity < 1.03
    assert by_nearest.perplexity > max(by_gptq.perplexity, 1.004 * first.perplexity)
    assert by_gptq.divergence < 0.6 * by_nearest.divergence
    assert by_wrong.divergence > 1.2 * by_nearest.divergence
