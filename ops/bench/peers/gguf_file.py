"""A Llama checkpoint as the file that llama.cpp reads. Runs in its environment.

python -m ops.bench.peers.gguf_file FOLDER FILE
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight there."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def in_pairs(rows: Any, num_heads: int) -> Any:
    """Rows [heads * size, ...] of a query or key whose rope turns (i, i + size / 2), for one that turns (2i, 2i + 1).

    llama.cpp's `llama` architecture has the second kind, Meta's original one.
    """
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors(path: Path) -> dict[str, tuple[str, Any]]:
    """By name: type and numbers, those of BF16 as uint16. safetensors' format is a JSON header, then bytes."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    kinds: dict[str, Any] = {"F32": np.float32, "BF16": np.uint16}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], data[first:last].view(kinds[entry["dtype"]]).reshape(entry["shape"]))
    return found


def as_float32(kind: str, rows: Any) -> Any:
    return rows if kind == "F32" else (rows.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path, file: Path) -> None:
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    add_shape(writer, config)
    add_vocabulary(writer, folder, gguf.TokenType)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, (kind, rows) in tensors(folder / "model.safetensors").items():
        part = name.split(".")[-2]
        rows = in_pairs(rows, heads[part]) if part in heads else rows
        if rows.ndim == 1 or kind == "F32":
            writer.add_tensor(name_of(name), np.ascontiguousarray(as_float32(kind, rows)))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name_of(name), np.ascontiguousarray(rows).view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: Any, folder: Path, kinds: Any) -> None:
    """The byte-level BPE of the folder's tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, special = tokenizer["model"]["vocab"], {entry["id"] for entry in tokenizer["added_tokens"]}
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([kinds.CONTROL if number in special else kinds.NORMAL for number in range(len(words))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
