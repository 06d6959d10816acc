"""From a model folder to its card, and one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.support.fake_engine import Vocabulary, ready
from tests.support.tiny_model import byte_tokenizer_json, write_tiny_model
from worker.announce import ModelFiles, find_model, make_card, read_model, served_name

READY = ready({}, Vocabulary(byte_tokenizer_json()), 8)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-llama")


def options(folder: Path, **fields: Any) -> WorkerSettings:
    return WorkerSettings(model_id=str(folder), load_format="dummy", **fields)


def read(folder: Path, **fields: Any) -> ModelFiles:
    return read_model(folder, options(folder, **fields))


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))


def test_the_card_says_what_gateways_need(folder: Path) -> None:
    change(folder / "generation_config.json", temperature=0.6, top_k=20)
    card = make_card(read(folder), READY, options(folder, served_model_name=["tiny", "alias"]))
    assert (card.served_name, card.aliases, card.architecture) == ("tiny", ("alias",), "LlamaForCausalLM")
    assert (card.bos_token, card.bos_token_id, card.eos_token) == ("<s>", 256, "</s>")
    assert card.eos_token_ids == (257, 260), "the list of generation_config"
    assert card.special_ids == (256, 257, 258, 259, 260)
    assert card.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert (card.max_total_tokens, card.dtype) == (READY.max_total_tokens, READY.dtype)


def test_the_engine_says_whether_there_is_an_encoder(folder: Path) -> None:
    assert not make_card(read(folder), READY, options(folder)).is_encoder_decoder
    ready = replace(READY, decoder_start_id=0, max_input_tokens=64)
    card = make_card(read(folder), ready, options(folder))
    assert (card.is_encoder_decoder, card.max_input_tokens) == (True, 64)


def test_the_lane_follows_whatever_changes_an_answer(folder: Path) -> None:
    settings = options(folder)
    lanes = {make_card(read(folder), READY, settings).lane}
    lanes.add(make_card(read(folder), READY, options(folder, served_model_name=["other"])).lane)
    lanes |= {make_card(read(folder), READY, options(folder, kv_cache_dtype=kind)).lane for kind in ("fp8", "fp8_e4m3")}
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + " ")
    lanes.add(make_card(read(folder), READY, settings).lane)
    assert len(lanes) == 4
    assert make_card(read(folder), READY, settings).lane in lanes


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([1, 2], 3, (1, 2)), (4, 3, (4,)), (None, 3, (3,)), (None, [5, 6], (5, 6)), (None, None, (257,))],
)
def test_eos_comes_from_the_first_place_that_says_it(
    folder: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    change(folder / "generation_config.json", eos_token_id=generation)
    change(folder / "config.json", eos_token_id=config)
    assert read(folder).eos_token_ids == expected


def test_templates_are_found_in_their_order(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert read(folder).chat_template == (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert read(folder).chat_template == "D"
    change(folder / "tokenizer_config.json", chat_template="plain")
    assert read(folder).chat_template == "plain"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": "other"}))
    assert read(folder, tokenizer_config_path=str(other)).chat_template == "other"
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine")
    assert read(folder, tokenizer_config_path=str(other), chat_template=str(mine)).chat_template == "mine"
    change(folder / "tokenizer_config.json", chat_template=None)
    assert read(folder).chat_template == ""


def test_names_default_to_the_folder_or_the_hub_id(folder: Path) -> None:
    assert served_name(options(folder)) == "tiny-llama"
    assert served_name(options(folder, served_model_name=["a", "b"])) == "a"
    assert served_name(WorkerSettings(model_id="owner/model")) == "owner/model"


def problem(folder: Path, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_model(find_model(WorkerSettings(model_id=str(folder), **fields)), WorkerSettings(**fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_pieces_are_named_with_the_fix(folder: Path, tmp_path: Path) -> None:
    assert "check --model-id" in problem(tmp_path / "nowhere")
    assert "no .safetensors" in problem(folder)
    assert "check --chat-template" in problem(folder, load_format="dummy", chat_template="/none.jinja")
    (folder / "generation_config.json").write_text("{")
    assert "cannot be read" in problem(folder, load_format="dummy")
    (folder / "config.json").unlink()
    assert "no config.json" in problem(folder, load_format="dummy")
    (folder / "tokenizer.json").write_text("[]")
    assert "not a tokenizer" in problem(folder, load_format="dummy")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in problem(folder, load_format="dummy")


def test_pickled_weights_are_not_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights are never loaded" in (said := problem(folder))
    assert f"`inferfleet prepare {folder}` converts them" in said
    assert f"prepare {folder} --revision v1`" in problem(folder, revision="v1")
    (folder / "model.safetensors").write_bytes(b"x")
    assert find_model(WorkerSettings(model_id=str(folder))) == folder


def test_downloads_ask_for_safetensors_only_and_obey_the_options(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(model_id: str, **fields: Any) -> Any:
        if fields.pop("dry_run", False):
            return []
        asked.append({"model_id": model_id} | fields)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (folder / "model.safetensors").write_bytes(b"x")
    find_model(WorkerSettings(model_id="owner/model", revision="v1", huggingface_hub_cache="/cache"))
    find_model(WorkerSettings(model_id="owner/model", load_format="dummy"))
    assert asked[0]["revision"] == "v1"
    assert asked[0]["cache_dir"] == "/cache"
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked[0]["allow_patterns"])
    assert "*.safetensors" not in asked[1]["allow_patterns"]
