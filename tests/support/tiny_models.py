"""Tiny random checkpoints of the supported families, made by transformers, with a byte-level tokenizer.

Weights are drawn so that every norm, bias and position matters: a forward pass that forgets one is visibly wrong.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biases_llama3": ("Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE)),
    "llama_linear_tied": ("Llama", dict(rope_parameters=LINEAR_ROPE, tie_word_embeddings=True)),
    "llama_mha_gelu": ("Llama", dict(num_key_value_heads=8, hidden_act="gelu_new", rms_norm_eps=1e-2)),
    "mistral_window_head_dim": ("Mistral", dict(head_dim=16, sliding_window=8)),
    "mistral_no_window": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2_late_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_biases_tied": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
}
"""Name -> (class prefix in transformers, differences from SIZES)."""


def build(name: str) -> Any:
    """The transformers model of a case, float32, eager attention, evaluation mode."""
    prefix, differences = CASES[name]
    return build_from(prefix, **differences)


def build_from(prefix: str, *, seed: int = 0, **differences: Any) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**SIZES | differences)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _draw(parameter_name, parameter)
    return model


def _draw(name: str, parameter: torch.Tensor) -> None:
    noise = torch.randn_like(parameter)
    if parameter.dim() == 1 and name.endswith("weight"):
        parameter.add_(noise * 0.3)
    elif parameter.dim() == 1:
        parameter.copy_(noise * 0.3)
    else:
        parameter.copy_(noise * (0.5 if "embed" in name else 0.15))


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
