"""The text part of models that also see, against the whole model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from common.errors import ConfigurationError
from tests.support import tiny_models
from tests.support.paged import load_decoder, paged_logits, relative_error
from tests.worker.model.spoil import change, rewrite, tensors_of

TEXT = {key: value for key, value in tiny_models.SIZES.items() if not key.endswith("token_id")} | dict(head_dim=16)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
CASES = {
    "Gemma3": dict(text_config=TEXT | dict(sliding_window=8), vision_config=VISION, mm_tokens_per_image=4),
    "Mistral3": dict(
        text_config=TEXT | dict(model_type="mistral", sliding_window=None),
        vision_config=VISION | dict(model_type="pixtral", head_dim=8),
    ),
}


def with_new_names(tensors: dict[str, torch.Tensor]) -> None:
    """Later files have everything inside of `model` but the head."""
    for name in list(tensors):
        inner = name.replace("language_model.model.", "language_model.")
        new = "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{inner}"
        tensors[new] = tensors.pop(name)


@pytest.fixture(params=CASES)
def model(request, tmp_path) -> Any:
    config = getattr(transformers, f"{request.param}Config")(**CASES[request.param])
    torch.manual_seed(0)
    made = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval().float()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    made.save_pretrained(tmp_path)
    return made


@pytest.mark.parametrize("has_new_names", [False, True])
def test_text_gets_the_same_logits_without_the_eyes(model, tmp_path, has_new_names):
    assert any(name.startswith("vision_tower.") for name in tensors_of(tmp_path))
    if has_new_names:
        rewrite(tmp_path, with_new_names)
    ids = torch.randint(tiny_models.VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = [model(ids[None]).logits[0]]

    def error() -> float:
        return relative_error(paged_logits(load_decoder(tmp_path), [ids.tolist()])[0], expected)

    assert error() <= 1e-5
    change(tmp_path, text_config=model.config.text_config.to_dict() | dict(sliding_window=3))
    assert error() > 1e-3


def test_other_tensors_are_still_missed(model, tmp_path):
    rewrite(tmp_path, lambda tensors: tensors.update(**{"language_model.extra.weight": torch.zeros(3)}))
    with pytest.raises(ConfigurationError, match="language_model.extra.weight"):
        load_decoder(tmp_path)
