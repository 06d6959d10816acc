"""The recipe of docs/adding.md adds a family at run time, whose checkpoint is Llama's under other names."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.worker.model.spoil import rewrite, tensors_of
from worker.model.families import FAMILIES, llama
from worker.model.families.base import Family

RECIPE = Path(__file__).parents[3] / "docs" / "adding.md"
TOLERANCE = 2e-5


def example() -> Family:
    section = RECIPE.read_text(encoding="utf-8").split("## A model family")[1].split("\n## ")[0]
    _, code, _ = section.split("```")
    names = dict(vars(llama))
    exec(textwrap.dedent("   " + code.removeprefix("python")), names)
    family: Family = names["ZEBRA"]
    return family


def renamed(name: str, family: Family) -> str:
    """What the family's checkpoints call a tensor of Llama's."""
    module, kind = name.rsplit(".", 1)
    for key in llama.LLAMA_NAMES:
        for layer in range(3):
            if llama.LLAMA_NAMES[key].format(i=layer) == module:
                return f"{family.candidates(key, layer, 0)[0]}.{kind}"
    raise AssertionError(f"{name} is none of Llama's")


@pytest.fixture()
def zebra(tiny, tmp_path) -> Path:
    """Llama's tiny checkpoint under the family's names and keys."""
    folder = Path(shutil.copytree(tiny("llama").folder, tmp_path / "zebra"))
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="zebra", is_striped=True)
    config["width"], config["stripes"] = config.pop("hidden_size"), config.pop("num_hidden_layers")
    (folder / "config.json").write_text(json.dumps(config))
    family = example()
    rewrite(folder, lambda tensors: [tensors.update({renamed(key, family): tensors.pop(key)}) for key in list(tensors)])
    assert "zebra.stripe.2.second_norm.weight" in tensors_of(folder)
    return folder


def error_of(model, folder: Path) -> float:
    return relative_error(paged_logits(load_decoder(folder), model.sequences)[0], model.logits)


def test_a_function_and_a_name_table_are_enough(tiny, zebra, monkeypatch):
    with pytest.raises(ConfigurationError, match="model_type 'zebra' is not supported"):
        load_decoder(zebra)
    monkeypatch.setitem(FAMILIES, "zebra", example())
    assert error_of(tiny("llama"), zebra) <= TOLERANCE


def test_a_wrong_name_table_is_noticed(tiny, zebra, monkeypatch):
    family = example()
    exchanged = {"attention_norm": family.names["mlp_norm"], "mlp_norm": family.names["attention_norm"]}
    monkeypatch.setitem(FAMILIES, "zebra", replace(family, names={**family.names, **exchanged}))
    assert error_of(tiny("llama"), zebra) > 10 * TOLERANCE


@pytest.mark.parametrize(("key", "value"), [("is_striped", False), ("stripes", 0), ("spots", 7)])
def test_what_the_new_family_does_not_know_is_named(zebra, monkeypatch, key, value):
    monkeypatch.setitem(FAMILIES, "zebra", example())
    config = json.loads((zebra / "config.json").read_text())
    (zebra / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigurationError, match=key):
        load_decoder(zebra)
