"""Checkpoints that every peer can load: random weights, and a tokenizer that makes readable text of its ids."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigurationError
from ops.bench.peers.environments import Environment

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SPECIAL = ("<unk>", "<s>", "</s>")
CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
SPACE = "Ġ"
"""A space in the alphabet of byte-level BPE."""
NUM_UNSAID = len(SPECIAL) + 256
"""Ids below are special tokens and lone bytes: the head's rows for them are zero, so that no greedy choice is one."""
SEED, SPREAD = 5, 0.02
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "head_dim": 64,
    "max_position_embeddings": 5120,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "125m": COMMON
    | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    },
    "443m": COMMON
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
    },
}
DTYPES = {"bfloat16": 2, "float32": 4}
"""Bytes of an element."""


def checkpoint(shape: str, dtype: str, folder: Path) -> Path:
    """FOLDER/SHAPE-DTYPE with one of `SHAPES`, written unless it is there. Weights in bfloat16 are the float32 ones,
    rounded."""
    home = folder / f"{shape}-{dtype}"
    if not home.exists():
        _write(SHAPES[shape], dtype, home)
    return home


def gguf_of(checkpoint: Path, environment: Environment) -> Path:
    """The same weights and tokenizer as llama.cpp reads them, in a file of the checkpoint's folder. `environment` is
    that of llama.cpp.

    Raises:
        ConfigurationError: it cannot be written.
    """
    file = checkpoint / "model.gguf"
    if not file.exists():
        partial = checkpoint / "model.gguf.partial"
        words = [str(environment.python), "-m", "ops.bench.peers.gguf_file", str(checkpoint), str(partial)]
        variables = os.environ | environment.variables | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigurationError(f"no GGUF can be made of {checkpoint}: {done.stderr[-500:]}")
        partial.rename(file)
    return file


def _write(config: Mapping[str, Any], dtype: str, home: Path) -> None:
    import torch
    from safetensors.torch import save_file

    partial = home.with_name(home.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=1))
    weights = {name: value.to(getattr(torch, dtype)) for name, value in _weights(config)}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(partial, config["vocab_size"], config["max_position_embeddings"])
    partial.rename(home)


def _weights(config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for name, shape in weight_shapes(config).items():
        value = torch.randn(shape, generator=generator) * SPREAD if len(shape) > 1 else torch.ones(shape)
        if name == "lm_head.weight":
            value[:NUM_UNSAID] = 0
        yield name, value


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    in_layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def syllable_merges(number: int) -> list[tuple[str, str]]:
    """So many merges of byte-level BPE, each of which makes one new word: syllables such as `ba`, pairs of them, both
    with a space before, then three of them."""
    ones = [(consonant, vowel) for consonant in CONSONANTS for vowel in VOWELS]
    syllables = ["".join(pair) for pair in ones]
    pairs = list(itertools.product(syllables, syllables))
    words = ["".join(pair) for pair in pairs]
    longer = itertools.product(words, syllables)
    merges = itertools.chain(
        ones, pairs, ((SPACE, syllable) for syllable in syllables), ((SPACE, word) for word in words), longer
    )
    return list(itertools.islice(merges, number))


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids: special tokens, the 256 bytes, then what the merges make."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    return {word: number for number, word in enumerate(words)}


def write_tokenizer(folder: Path, size: int, longest: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = syllable_merges(size - NUM_UNSAID)
    tokenizer = Tokenizer(models.BPE(vocabulary(merges), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
