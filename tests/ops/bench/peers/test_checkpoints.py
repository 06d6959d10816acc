"""Checkpoints for all peers: readable tokens, the same weights in every type, and in llama.cpp's own file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from common.errors import ConfigurationError
from ops.bench.peers import checkpoints, gguf_file
from ops.bench.peers.checkpoints import NUM_UNSAID, SHAPES, checkpoint, gguf_of, weight_shapes
from ops.bench.peers.environments import Environment


def test_shapes_have_as_many_parameters_as_their_names_say():
    for name, millions in (("125m", 125), ("443m", 443)):
        assert round(sum(map(math.prod, weight_shapes(SHAPES[name]).values())) / 1e6) == millions


def test_a_checkpoint_is_written_once_and_its_bfloat16_is_its_float32_rounded(folders: dict[str, Path]):
    wide, narrow = (load_file(folders[dtype] / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert set(wide) == set(weight_shapes(SHAPES["small"]))
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)
    head = wide["lm_head.weight"]
    assert not head[:NUM_UNSAID].any() and head[NUM_UNSAID:].all()
    assert json.loads((folders["bfloat16"] / "config.json").read_text())["dtype"] == "bfloat16"
    before = (folders["float32"] / "config.json").stat().st_mtime_ns
    assert checkpoint("small", "float32", folders["float32"].parent) == folders["float32"]
    assert (folders["float32"] / "config.json").stat().st_mtime_ns == before


def test_every_id_that_a_model_says_is_a_readable_text_and_syllables_are_read_back(folders: dict[str, Path]):
    tokenizer = Tokenizer.from_file(str(folders["float32"] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 700
    texts = [tokenizer.decode([number]) for number in range(NUM_UNSAID, 700)]
    assert len(set(texts)) == len(texts) and all(text.isalpha() for text in texts)
    assert tokenizer.decode(tokenizer.encode("baba buca, dö!").ids) == "baba buca, dö!"
    assert len(tokenizer.encode("babu").ids) == 1


def test_the_full_vocabulary_has_32000_different_words():
    words = checkpoints.vocabulary(checkpoints.syllable_merges(32000 - NUM_UNSAID))
    assert len(words) == 32000 and "Ġbaba" in words and "bababa" in words


def test_a_query_in_pairs_turns_as_llama_cpp_turns_it():
    rows = np.random.default_rng(3).standard_normal((2 * 6, 5)).astype(np.float32)
    angles = np.array([0.3, 1.1, 2.0])
    turned = _turned(rows, angles, lambda size: (np.arange(size // 2), np.arange(size // 2) + size // 2))
    pairs = _turned(gguf_file.in_pairs(rows, 2), angles, lambda size: (np.arange(0, size, 2), np.arange(1, size, 2)))
    np.testing.assert_allclose(pairs, gguf_file.in_pairs(turned, 2), rtol=1e-6)
    unchanged = _turned(rows, angles, lambda size: (np.arange(0, size, 2), np.arange(1, size, 2)))
    assert not np.allclose(unchanged, turned), "rows as they were would have been seen"


def _turned(rows: Any, angles: Any, places: Any) -> Any:
    """Rope on [2 heads * 6, columns]; `places` are the two rows of every turn."""
    heads = rows.reshape(2, 6, -1)
    first, second = places(6)
    result, cosine, sine = heads.copy(), np.cos(angles)[:, None], np.sin(angles)[:, None]
    result[:, first] = heads[:, first] * cosine - heads[:, second] * sine
    result[:, second] = heads[:, second] * cosine + heads[:, first] * sine
    return result.reshape(rows.shape)


class Writer:
    """Stands for the one of the package gguf, which is in llama.cpp's environment alone."""

    made: Writer

    def __init__(self, file: Path, architecture: str) -> None:
        Writer.made = self
        self.architecture, self.tensors, self.said = architecture, {}, {}

    def add_tensor(self, name: str, value: Any, raw_dtype: Any = None) -> None:
        self.tensors[name] = (value, raw_dtype)

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.said.__setitem__(name, values)


def test_the_file_for_llama_cpp_has_all_weights_under_its_names(folders: dict[str, Path], monkeypatch):
    kinds = SimpleNamespace(CONTROL="control", NORMAL="normal")
    module = SimpleNamespace(GGUFWriter=Writer, TokenType=kinds, GGMLQuantizationType=SimpleNamespace(BF16="bf16"))
    monkeypatch.setitem(sys.modules, "gguf", module)
    gguf_file.write(folders["bfloat16"], folders["bfloat16"] / "unused")
    made, weights = Writer.made, load_file(folders["bfloat16"] / "model.safetensors")

    def bits(name: str) -> Any:
        return weights[name].view(torch.uint16).tolist()

    assert len(made.tensors) == len(weights)
    (down, kind), (queries, _) = made.tensors["blk.1.ffn_down.weight"], made.tensors["blk.0.attn_q.weight"]
    assert kind == "bf16" and down.view(np.uint16).tolist() == bits("model.layers.1.mlp.down_proj.weight")
    assert queries.view(np.uint16)[1].tolist() == bits("model.layers.0.self_attn.q_proj.weight")[4]
    value, kind = made.tensors["output_norm.weight"]
    assert (kind, value.dtype) == (None, np.float32) and (value == 1).all()
    assert made.said["add_head_count_kv"] == (2,) and made.said["add_add_bos_token"] == (False,)
    (words,), (types,), (merges,) = (made.said[f"add_token_{name}"] for name in ("list", "types", "merges"))
    assert words[:3] == ["<unk>", "<s>", "</s>"] and len(words) == len(types) == 700 and types.count("control") == 3
    assert merges[0] == "b a" and len(merges) == 700 - NUM_UNSAID


def test_what_cannot_be_written_for_llama_cpp_is_one_sentence(folders: dict[str, Path], monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "No module named gguf")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(ConfigurationError, match="no GGUF can be made of .*: No module named gguf"):
        gguf_of(folders["float32"], Environment(Path("python"), {}, None))
