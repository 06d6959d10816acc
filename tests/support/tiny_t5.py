"""Tiny random encoder-decoders of the T5 lineage, made by transformers, with a byte-level tokenizer.

Weights are drawn so that every norm, bias and distance matters: a forward pass that forgets one is visibly wrong.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors

from tests.support import tiny_models

START_ID = tiny_models.NUM_BYTES + 4
EOS_ID = tiny_models.NUM_BYTES + 1
VOCAB_SIZE = tiny_models.VOCAB_SIZE + 3
"""Together with the width of the feed-forward network, what four ranks cannot share evenly."""

SIZES = dict(
    d_model=64,
    d_kv=8,
    d_ff=90,
    num_layers=2,
    num_heads=8,
    vocab_size=VOCAB_SIZE,
    decoder_start_token_id=START_ID,
    pad_token_id=START_ID + 1,
    eos_token_id=EOS_ID,
    n_positions=256,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {}),
    "flan": (
        "T5",
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3, num_heads=4, d_kv=16),
    ),
    "mt5": (
        "MT5",
        dict(
            num_layers=3,
            num_decoder_layers=1,
            num_heads=4,
            d_kv=24,
            layer_norm_epsilon=1e-2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
        ),
    ),
}
"""Name -> (class prefix in transformers, differences from SIZES). All but `t5` have a head of their own."""


@cache
def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a case, eager attention, evaluation mode."""
    prefix, differences = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**SIZES | differences)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval().float()
    if name != "t5":
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _draw(parameter_name, parameter)
    return model.to(dtype)


def _draw(name: str, parameter: torch.Tensor) -> None:
    noise = torch.randn_like(parameter)
    if parameter.dim() == 1:
        parameter.add_(noise * 0.3)
    elif "relative_attention_bias" in name:
        parameter.copy_(noise)
    elif "shared" in name:
        # weak, or a tied head says the last token again and again
        parameter.copy_(noise * 0.1)
    else:
        parameter.copy_(noise * (0.1 if name.endswith((".q.weight", ".k.weight")) else 0.15))


def save(name: str, folder: Path) -> Path:
    """Write case `name` as a complete model folder: config, safetensors, tokenizer."""
    build(name).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes, and `</s>` behind every text."""
    made = type(tiny_models.tokenizer()).from_str(tiny_models.tokenizer().to_str())
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS_ID)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
