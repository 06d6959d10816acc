"""The tool that compares models on a text, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from ops.bench import perplexity
from tests.support import tiny_models

TEXT = "".join(f"{number} times {number} is {number**2}.\n" for number in range(40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("model") / "llama")


def expected(folder: Path, windows: list[list[int]], counted: list[range]) -> float:
    """Perplexity by transformers; `counted` are places of tokens in windows."""
    reference, found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for ids, places in zip(windows, counted, strict=True):
        with torch.inference_mode():
            scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [float(scores[place - 1, ids[place]]) for place in places]
    return math.exp(-sum(found) / len(found))


def rows(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> list[dict[str, float]]:
    assert perplexity.main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out.startswith("| model | tokens | perplexity | of the first | divergence |")
    return json.loads((tmp_path / "found.json").read_text())


def test_a_text_is_cut_into_windows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    ids = tiny_models.tokenizer().encode(TEXT).ids
    windows = [ids[start : start + 100] for start in range(0, len(ids), 100)]
    arguments = ("--text", str(tmp_path / "text"), "--model", str(model), "--window", "100")
    whole, few = rows(capsys, tmp_path, *arguments, "--quantize", "int4")
    assert whole["tokens"] == few["tokens"] == len(ids) - len(windows)
    right, all_counted = [range(1, len(window)) for window in windows], expected(model, [ids[:100]], [range(1, 100)])
    assert whole["perplexity"] == pytest.approx(expected(model, windows, right), rel=1e-4)
    assert whole["perplexity"] != pytest.approx(all_counted, rel=1e-2), "another window is another number"
    assert (whole["of the first"], whole["divergence"]) == (1.0, 0.0)
    assert few["model"] == f"{model} int4" and few["divergence"] > 1e-3


def test_of_chats_the_answers_count(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, encode = ["<s>one and ", "two", " and three", "<|im_end|>"], tiny_models.tokenizer().encode
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    parts = [encode(text, add_special_tokens=False).ids for text in chat]
    ids, starts = sum(parts, []), [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    places = [*range(starts[1], starts[2]), *range(starts[3], starts[4])]
    arguments = ("--text", str(tmp_path / "chats.jsonl"), "--model", str(model), "--model", str(model))
    first, second = rows(capsys, tmp_path, *arguments)
    assert first == second and first["tokens"] == len(places) == 4
    assert first["perplexity"] == pytest.approx(expected(model, [ids], [places]), rel=1e-4)


def test_what_cannot_be_measured_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(SystemExit, match="model_type 'no such' is not supported"):
        perplexity.main(["--text", "x", "--model", str(tmp_path)])
