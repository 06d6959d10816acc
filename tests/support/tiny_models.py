"""Tiny random checkpoints of the supported families, made by transformers, with a byte-level tokenizer.

Weights are drawn so that every norm, bias and position matters: a forward pass that forgets one is visibly wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.support import tiny_gpt, tiny_llama

NUM_BYTES = 256
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS) + 12
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES = dict(
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=512,
    bos_token_id=NUM_BYTES,
    eos_token_id=NUM_BYTES + 1,
    pad_token_id=None,
)
DEVIATIONS = dict(embedding=0.5, matrix=0.15, bias=0.3)
TIED_DEVIATION = 0.2
"""Of embeddings that are heads too: with larger ones a model says every token it sees once more."""

CASES: dict[str, tuple[str, dict[str, Any]]] = tiny_llama.CASES | tiny_gpt.CASES
"""Name -> (class prefix in transformers, differences from SIZES)."""


def build(name: str) -> Any:
    """The transformers model of a case, float32, evaluation mode."""
    prefix, differences = CASES[name]
    attention = "sdpa" if name in tiny_gpt.SDPA_CASES else "eager"
    drawn = tiny_gpt.DEVIATIONS if name in tiny_gpt.CASES else DEVIATIONS
    return build_from(prefix, attention=attention, deviations=drawn, **differences)


def build_from(
    prefix: str,
    *,
    seed: int = 0,
    attention: str = "eager",
    deviations: Mapping[str, float] = DEVIATIONS,
    **differences: Any,
) -> Any:
    config = config_from(prefix, **differences)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embedding = TIED_DEVIATION if is_tied else deviations["embedding"]
    # what a model multiplies its embeddings by would drown its layers
    scale = config.hidden_size**0.5 if prefix.startswith("Gemma") else getattr(config, "embedding_multiplier", 1.0)
    deviations = {**deviations, "embedding": embedding / scale}
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _draw(parameter_name, parameter, deviations)
    return model


def config_of(name: str) -> Any:
    """The transformers configuration of a case."""
    prefix, differences = CASES[name]
    return config_from(prefix, **differences)


def config_from(prefix: str, **differences: Any) -> Any:
    own = tiny_gpt.OWN_KEYS.get(prefix, {})
    named = {own.get(key, key): value for key, value in (SIZES | differences).items()}
    named.pop(None, None)
    return getattr(transformers, f"{prefix}Config")(**named)


def _draw(name: str, parameter: torch.Tensor, deviations: Mapping[str, float]) -> None:
    noise = torch.randn_like(parameter)
    if parameter.dim() == 1 and name.endswith("weight"):
        parameter.add_(noise * 0.3)
    elif parameter.dim() == 1:
        parameter.copy_(noise * deviations["bias"])
    else:
        is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
        parameter.copy_(noise * deviations["embedding" if is_embedding else "matrix"])


def save(name: str, folder: Path) -> Path:
    """Write case `name` as a complete model folder: config, safetensors, tokenizer, chat template."""
    build(name).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """One token per byte, then the special tokens; `<s>` is put before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL_TOKENS)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", NUM_BYTES)]
    )
    return made


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": SIZES["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
