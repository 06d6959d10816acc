"""A model folder without weights: configuration and a byte-level tokenizer of 256 bytes and a few special tokens."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer_json() -> bytes:
    """A tokenizer.json in which token id == byte value, and special tokens come after."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    special = [
        {
            "id": 256 + index,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, text in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "ignore_merges": False}
    parts = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(parts, ensure_ascii=False).encode()


def write_tiny_model(folder: Path) -> Path:
    """Write everything but weights; the fake engine needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer_json())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 261, "eos_token_id": 257}
    tokenizer = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "model_max_length": 4096}
    generation = {"eos_token_id": [257, 260], "bos_token_id": 256}
    contents = {"config": config, "tokenizer_config": tokenizer, "generation_config": generation}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
