"""Models that also see, read as what they are for text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from worker.model.config import ConfigReader
from worker.model.families.base import Family
from worker.model.families.llama import LLAMA_FAMILIES
from worker.model.families.norms import NORMS_FAMILIES
from worker.model.spec import AnySpec

FOREIGN = ("vision_tower.", "multi_modal_projector.")


def _text_of(model_type: str, inner: Family, text_type: str, **assumed: Any) -> Family:
    """The family `inner` inside of `model_type`; `assumed` holds where its `text_config` says nothing."""

    def build(config: ConfigReader) -> AnySpec:
        config.ignore("vision_config", "image_token_index", "image_token_id", "tie_word_embeddings")
        config.ignore("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
        config.ignore("projector_hidden_act", "vision_feature_layer", "spatial_merge_size", "multimodal_projector_bias")
        text = config.section("text_config")
        text.require(model_type=text_type)
        text.assume(**assumed)
        return replace(inner.build(text), model_type=model_type)

    names = {key: _names_inside(name) for key, name in inner.names.items() if isinstance(name, str)}
    return replace(inner, build=build, names=names, foreign=(*FOREIGN, *(f"model.{part}" for part in FOREIGN)))


def _names_inside(name: str) -> tuple[str, ...]:
    """Older files have the whole text model behind a prefix, newer ones its body inside of `model`."""
    return f"language_model.{name}", name.replace("model.", "model.language_model.", 1)


MULTIMODAL_FAMILIES: dict[str, Family] = {
    # the released files say of their text part only what is not like this
    "gemma3": _text_of(
        "gemma3",
        NORMS_FAMILIES["gemma3_text"],
        "gemma3_text",
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        max_position_embeddings=131_072,
    ),
    "mistral3": _text_of("mistral3", LLAMA_FAMILIES["mistral"], "mistral", sliding_window=None),
}
