"""What the matrices of a model see when it reads a text: the model is run layer by layer, all of the text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import ConfigurationError
from worker.attention import Batch
from worker.attention.cpu import CpuAttention
from worker.model.decoder import Decoder, Step
from worker.model.loading import Builder, Piece, bytes_of, load_around, load_layer
from worker.model.moe import ListedExperts
from worker.model.spec import Spec
from worker.model.weights import DenseLinear, Experts, LayerWeights, Linear, Part
from worker.runner.memory import readable

MAX_TEXT_BYTES = 16 << 20
TEXT_PIECE = 1 << 14
"""Characters that are tokenised together, up to the end of a line."""
MIN_TOKENS, MAX_SEQUENCE_TOKENS = 512, 2048
BLOCK_SIZE = 64
NUM_FACTORS = 3
"""Matrices of the size of a hessian that GPTQ has besides it."""

OnStep = Callable[[int, int], None]
"""Called with steps done and steps in all."""


# Text.


def read_text(path: Path) -> str:
    """Raises ConfigurationError if it is no file of UTF-8 text, or larger than what is tokenised at once."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ConfigurationError(f"--calibration {path} is not a file")
        if size > MAX_TEXT_BYTES:
            limit = readable(MAX_TEXT_BYTES)
            raise ConfigurationError(f"--calibration {path} has {readable(size)}, of which {limit} would do; cut it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--calibration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--calibration {path} is not UTF-8 text") from error


def sequences_of(text: str, tokenizer: Tokenizer, max_tokens: int, max_length: int) -> Tensor:
    """int64 [n, length]: parts of the text, spread evenly over it and as long as the model and `max_tokens` allow.

    Raises:
        ConfigurationError: the text is too short to say anything.
    """
    encodings = tokenizer.encode_batch(list(_pieces(text)), add_special_tokens=False)
    ids = [token for encoding in encodings for token in encoding.ids]
    if len(ids) < MIN_TOKENS:
        raise ConfigurationError(f"the text of --calibration has {len(ids)} tokens; {MIN_TOKENS} are the least")
    max_tokens = min(max_tokens, len(ids))
    length = min(max_tokens, max_length, MAX_SEQUENCE_TOKENS)
    count = max_tokens // length
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


def _pieces(text: str) -> Iterable[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + TEXT_PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


# Products.


@dataclass(eq=False)
class Watched:
    """A product with matrices of the checkpoint, fused from `pieces`. `parts` are these matrices, whole, by the names
    of their modules; `hessian` float32 [in, in] is X^T X of all inputs X so far, while it is not None."""

    product: Linear
    pieces: list[tuple[str, Piece]]
    hessian: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.product.num_bytes

    @property
    def parts(self) -> dict[str, Part]:
        return {name: whole(piece.part) for name, piece in self.pieces}

    @property
    def num_columns(self) -> int:
        return self.pieces[0][1].part.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        if self.hessian is not None:
            flat = x.reshape(-1, x.shape[-1]).float()
            self.hessian.addmm_(flat.t(), flat)
        return self.product(x)

    def replace(self, numbers: Mapping[str, Tensor]) -> None:
        """Go on with other matrices, by the names of their modules."""
        assert isinstance(self.product, DenseLinear)
        rows = [piece.rows_of(numbers[name]) for name, piece in self.pieces]
        self.product.weight.copy_(torch.cat(rows))


def whole(part: Part) -> Part:
    num_rows, num_columns = part.shape
    return Part(part.shape, [range(num_rows)], range(num_columns), part.is_transposed)


@dataclass(slots=True)
class WatchingBuilder(Builder):
    """Gives products that can be watched; `watched` has all of them."""

    watched: list[Watched] = field(default_factory=list)

    def linear(self, pieces: Sequence[Piece], bias: Tensor | None = None) -> Linear:
        # super() does not find its class in dataclasses with slots
        names = [self.name(piece.key, piece.layer, piece.expert) for piece in pieces]
        watched = Watched(Builder.linear(self, pieces, bias), list(zip(names, pieces, strict=True)))
        self.watched.append(watched)
        return watched

    def experts(self, pieces: Sequence[Sequence[Piece]]) -> Experts:
        return ListedExperts(tuple(self.linear(own) for own in pieces))


def matrices_of(load: Callable[[Builder], object], builder: Builder) -> dict[str, Part]:
    """What `load` takes for products, whole, by the names of modules; nothing is read."""
    watching = WatchingBuilder(builder.family, builder.source, builder.dtype)
    bytes_of(load, watching)
    return {name: part for watched in watching.watched for name, part in watched.parts.items()}


def bytes_to_read(spec: Spec, builder: Builder, num_tokens: int) -> int:
    """About the memory that a Reader takes, and GPTQ with what it has watched."""
    watching = WatchingBuilder(builder.family, builder.source, builder.dtype)
    num_bytes = bytes_of(partial(load_around, spec), watching) + bytes_of(partial(load_layer, spec, layer=0), watching)
    hessians = [each.num_columns**2 * torch.float32.itemsize for each in watching.watched]
    states = num_tokens * spec.hidden_size * builder.dtype.itemsize
    return num_bytes + sum(hessians) + NUM_FACTORS * max(hessians) + states


# Layers.


class Reader:
    """Reads sequences layer by layer. `states` [n, length, hidden] are what the next layer sees.

    Memory: one layer, embedding and head, all states, and keys and values of one sequence in one layer.
    """

    def __init__(self, spec: Spec, builder: Builder) -> None:
        self._spec, self._builder = spec, builder
        self._decoder = Decoder(spec, load_around(spec, builder), CpuAttention())
        self.states = torch.empty(0)

    def begin(self, sequences: Tensor) -> None:
        """`sequences` int64 [n, length]."""
        positions = torch.arange(sequences.shape[1])
        self.states = torch.empty((*sequences.shape, self._spec.hidden_size), dtype=self._decoder.dtype)
        for states, tokens in zip(self.states, sequences, strict=True):
            states.copy_(self._decoder.embed(tokens, positions))

    def load(self, layer: int) -> tuple[LayerWeights, list[Watched]]:
        builder = WatchingBuilder(self._builder.family, self._builder.source, self._builder.dtype)
        return load_layer(self._spec, builder, layer), builder.watched

    def watch(self, weights: LayerWeights, watched: Sequence[Watched], layer: int, on_step: OnStep) -> None:
        """Let the products of a layer see all sequences; the states stay as they are."""
        for each in watched:
            each.hessian = torch.zeros(each.num_columns, each.num_columns)
        self._read(weights, layer, on_step, is_kept=False)

    def advance(self, weights: LayerWeights, layer: int, on_step: OnStep) -> None:
        self._read(weights, layer, on_step, is_kept=True)

    def _read(self, weights: LayerWeights, layer: int, on_step: OnStep, *, is_kept: bool) -> None:
        step, run = self._step(), partial(self._decoder.run_layer, weights=weights, layer=layer)
        for number, states in enumerate(self.states):
            after = run(states, step=step)
            if is_kept:
                states.copy_(after)
            on_step(number + 1, len(self.states))

    def _step(self) -> Step:
        """That of one sequence: sequences are alike, and the layers may all use the same pages, one after the other."""
        length, zero = self.states.shape[1], np.zeros(1, np.int64)
        positions, table = torch.arange(length), np.arange(-(-length // BLOCK_SIZE))[None]
        num_layers, num_heads, head_dim = self._decoder.page_shape
        pages = torch.zeros((1, 2, table.size, BLOCK_SIZE, num_heads, head_dim), dtype=self._decoder.dtype)
        batch = Batch(zero + length, zero, table, positions)
        return self._decoder.begin(positions, batch, pages.expand(num_layers, -1, -1, -1, -1, -1))
