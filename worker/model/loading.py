"""From named tensors to fused weights in the layout of the forward pass: a rank's part only, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from worker.model.families.base import Family, QkvLayout
from worker.model.lora import LoraSlots
from worker.model.moe import ListedExperts, StackedExperts
from worker.model.quant.linear import Int8Embedding, Int8Linear, SideBySide
from worker.model.quant.matrix import QuantisedMatrix, filled, stacked
from worker.model.quant.rounding import int8_by_row
from worker.model.quant.scheme import NOT_QUANTISED, MakeQuantised, Quantisation
from worker.model.spec import Moe, QkNorm, Residual, Rope, Spec
from worker.model.untouched import untouched_zeros
from worker.model.weights import (
    CPU,
    DecoderWeights,
    DenseEmbedding,
    DenseLinear,
    Embedding,
    Experts,
    LayerWeights,
    Linear,
    MlpWeights,
    MoeWeights,
    NormWeights,
    Part,
    TensorSource,
    num_bytes_of,
)
from worker.parallel.shard import WHOLE, Shard

ProgressFunction = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

WeightsType = TypeVar("WeightsType")


class Finish(Protocol):
    """What becomes of a layer when it has been read, and before the next one is."""

    def __call__(self, layer: WeightsType, /) -> WeightsType: ...


def as_read(layer: WeightsType, /) -> WeightsType:
    return layer


SAMPLE_ROWS = 16
MADE_ELEMENTS = 1 << 22
"""Of a matrix that are quantised at a time; a few copies of them in float32 are made on the way."""
LARGE_BYTES = 1 << 20
"""Of a tensor that gets pages of its own, since it may be let go as soon as another layout has been made of it."""


class _SizesOnly:
    """Says what another source would be asked for, and takes no memory."""

    device = torch.device("meta")

    def __init__(self, source: TensorSource) -> None:
        self.dtype, self.has, self.shape, self.whole = source.dtype, source.has, source.shape, source.whole

    def copy_into(self, name: str, target: Tensor, part: Part) -> None: ...

    def skip(self, name: str) -> None: ...

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None: ...


class _Zeros:
    """What another source has, all zero: a few rows of it tell what quantised ones will take."""

    device = CPU

    def __init__(self, source: TensorSource) -> None:
        self.dtype, self.has, self.skip = source.dtype, source.has, source.skip
        self.shape, self.whole = source.shape, source.whole

    def copy_into(self, name: str, target: Tensor, part: Part) -> None:
        target.zero_()

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """`part` of the tensor that our `key` stands for, in `layer`, of `expert`. With `order` int64 [rows] its rows come
    in that order."""

    key: str
    part: Part
    layer: int = 0
    expert: int = 0
    order: Tensor | None = None

    def rows_of(self, matrix: Tensor) -> Tensor:
        """Those of the whole of the stored tensor, or of what has the same rows."""
        rows = torch.cat([matrix[run.start : run.stop] for run in self.part.rows])
        return rows if self.order is None else rows[self.order]


@dataclass(slots=True)
class Builder:
    """Makes the fused weights of one rank of the parts that a source has."""

    family: Family
    source: TensorSource
    dtype: torch.dtype
    shard: Shard = WHOLE
    quantisation: Quantisation = NOT_QUANTISED
    on_progress: Callable[[int], None] = field(default=lambda num_bytes: None)
    adapters: LoraSlots | None = None
    finish: Finish = as_read

    def has(self, key: str) -> bool:
        return self._is_there(self.name(key))

    def name(self, key: str, layer: int = 0, expert: int = 0) -> str:
        """What the checkpoint calls it: the first of the family's names that is there, with its prefix or without."""
        names = self.family.candidates(key, layer, expert)
        return next(filter(self._is_there, names), names[0])

    def _is_there(self, name: str) -> bool:
        return self.source.has(name + ".weight") or self._is_stored_quantised(name)

    def _is_stored_quantised(self, name: str) -> bool:
        scheme = self.quantisation.scheme
        return scheme is not None and scheme.has(self.source, name)

    # Tensors.

    def fill(self, pieces: Sequence[Piece], kind: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor with the rows of all pieces, one below the other."""
        target = self._filled(pieces, kind, dtype or self.dtype)
        self.on_progress(num_bytes_of(target))
        return target

    def _filled(self, pieces: Sequence[Piece], kind: str, dtype: torch.dtype) -> Tensor:
        columns = pieces[0].part.columns
        num_rows = sum(piece.part.num_rows for piece in pieces)
        shape = (num_rows,) if columns is None else (num_rows, len(columns))
        target, start = self._empty(shape, dtype), 0
        for piece in pieces:
            rows = target[start : start + piece.part.num_rows]
            self.source.copy_into(f"{self._name_of(piece)}.{kind}", rows, piece.part)
            if piece.order is not None and not target.is_meta:
                rows.copy_(rows[piece.order])
            start += len(rows)
        return target

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        is_large = math.prod(shape) * dtype.itemsize >= LARGE_BYTES
        if is_large and self.source.device.type == "cpu":
            return untouched_zeros(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.source.device)

    def _name_of(self, piece: Piece) -> str:
        return self.name(piece.key, piece.layer, piece.expert)

    def vector(
        self, key: str, size: int, layer: int = 0, kind: str = "weight", dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.fill([Piece(key, Part((size,), [range(size)]), layer)], kind, dtype)

    def matrix(self, key: str, num_rows: int, num_columns: int, layer: int = 0) -> Tensor:
        """All of it, on every rank."""
        piece = Piece(key, self.part((num_rows, num_columns)), layer)
        if self._only_counts or not self._is_stored_quantised(self._name_of(piece)):
            return self.fill([piece])
        weight = self._quantised(piece).dequantised().to(self.dtype)
        self.on_progress(num_bytes_of(weight))
        return weight

    def part(self, shape: tuple[int, int], rows: Sequence[range] | None = None, columns: range | None = None) -> Part:
        """Of a matrix that families with transposed weights store the other way round; all of it by default."""
        everything = [range(shape[0])], range(shape[1])
        return Part(shape, rows or everything[0], columns or everything[1], self.family.is_transposed)

    def width(self, total: int) -> range:
        """The rank's part of an inner width, cut between groups of quantised columns where that is possible."""
        unit = self.quantisation.unit
        if total % unit or total // unit < self.shard.size:
            return self.shard.bounds(total)
        bounds = self.shard.bounds(total // unit)
        return range(bounds.start * unit, bounds.stop * unit)

    # Products.

    def linear(self, pieces: Sequence[Piece], bias: Tensor | None = None) -> Linear:
        """The product with the rows of all pieces, one below the other, which adapters may change."""
        base = self._fixed(pieces, bias)
        return base if self.adapters is None else self.adapters.wrap(base, pieces)

    def _fixed(self, pieces: Sequence[Piece], bias: Tensor | None = None) -> Linear:
        if self._only_counts and any(map(self._is_quantised, pieces)):
            return self._counted(pieces, bias)
        weights = self._weights(pieces)
        num_rows = [weight.shape[0] for weight in weights]
        biases = [None] * len(weights) if bias is None else torch.split(bias, num_rows)
        products = [self._product(*pair) for pair in zip(weights, biases, strict=True)]
        return products[0] if len(products) == 1 else SideBySide(tuple(products))

    def experts(self, pieces: Sequence[Sequence[Piece]]) -> Experts:
        """A product for each expert, with the rows of its pieces."""
        flat = [piece for own in pieces for piece in own]
        if any(map(self._is_quantised, flat)):
            return self._counted_experts(pieces) if self._only_counts else self._listed_experts(pieces)
        stacked = self.fill(flat)
        return StackedExperts(stacked.view(len(pieces), -1, stacked.shape[1]))

    def _listed_experts(self, pieces: Sequence[Sequence[Piece]]) -> ListedExperts:
        return ListedExperts(tuple(self._fixed(own) for own in pieces))

    def _counted_experts(self, pieces: Sequence[Sequence[Piece]]) -> ListedExperts:
        """All of one kind take what the first of them takes."""
        kinds = [tuple(map(self._is_quantised, own)) for own in pieces]
        num_bytes = {kind: self._bytes_by_samples(own) for kind, own in dict(zip(kinds, pieces, strict=True)).items()}
        self.on_progress(sum(num_bytes[kind] for kind in kinds))
        return ListedExperts(())

    def _is_quantised(self, piece: Piece) -> bool:
        return self.quantisation.make is not None or self._is_stored_quantised(self._name_of(piece))

    def _weights(self, pieces: Sequence[Piece]) -> list[Tensor | QuantisedMatrix]:
        """The rows of all pieces, as few matrices as their kinds allow."""
        weights: list[Tensor | QuantisedMatrix] = []
        for is_quantised, group in groupby(pieces, self._is_quantised):
            run = list(group)
            weights += stacked(map(self._quantised, run)) if is_quantised else [self.fill(run)]
        return weights

    @property
    def _only_counts(self) -> bool:
        return self.source.device.type == "meta"

    def _counted(
        self, pieces: Sequence[Piece], bias: Tensor | None, quantisation: Quantisation | None = None
    ) -> DenseLinear:
        self.on_progress(self._bytes_by_samples(pieces, quantisation))
        return DenseLinear(torch.empty(0, device=self.source.device), bias)

    def _bytes_by_samples(self, pieces: Sequence[Piece], quantisation: Quantisation | None = None) -> int:
        """What a product will take, which a few rows tell: arithmetic on the meta device would load a part of torch
        that is larger than small models."""
        sampler = Builder(self.family, _Zeros(self.source), self.dtype, quantisation=quantisation or self.quantisation)
        # what a product can do depends on the remainder of its rows
        sizes = [min(SAMPLE_ROWS + piece.part.num_rows % SAMPLE_ROWS, piece.part.num_rows) for piece in pieces]
        num_bytes = fewest = sampler._bytes_of_samples(pieces, sizes)
        for place, piece in enumerate(pieces):
            if rest := piece.part.num_rows - sizes[place]:
                more = [size + SAMPLE_ROWS * (place == other) for other, size in enumerate(sizes)]
                num_bytes += (sampler._bytes_of_samples(pieces, more) - fewest) * rest // SAMPLE_ROWS
        return num_bytes

    def _bytes_of_samples(self, pieces: Sequence[Piece], sizes: Sequence[int]) -> int:
        """What the products with so many rows of each piece take."""
        samples = [
            replace(piece, part=replace(piece.part, rows=first_rows(piece.part.rows, size)), order=None)
            for piece, size in zip(pieces, sizes, strict=True)
        ]
        return sum(self._product(weight, None).num_bytes for weight in self._weights(samples))

    def _quantised(self, piece: Piece) -> QuantisedMatrix:
        part, scheme = piece.part, self.quantisation.scheme
        assert part.columns is not None
        if scheme is not None:
            matrix = scheme.read(self.source, self._name_of(piece), part)
        else:
            matrix = self._made(piece, self.quantisation.make or int8_by_row).columns(part.columns)
        if len(part.columns) < part.shape[1]:
            matrix = matrix.only_used_groups()
        return matrix if piece.order is None else matrix.rows(piece.order)

    def _made(self, piece: Piece, make: MakeQuantised) -> QuantisedMatrix:
        """Out of whole rows, so that every number of ranks gets the same model; of some at a time, since they are wide
        on the way."""
        part = replace(piece.part, columns=range(piece.part.shape[1]))
        size = max(MADE_ELEMENTS // part.shape[1], 1)
        cuts = [run[start : start + size] for run in part.rows for start in range(0, len(run), size)]
        pieces = [replace(piece, part=replace(part, rows=[cut]), order=None) for cut in cuts]
        return filled((make(self._filled([each], "weight", torch.float32)) for each in pieces), part.num_rows)

    def _product(self, weight: Tensor | QuantisedMatrix, bias: Tensor | None) -> Linear:
        if isinstance(weight, Tensor):
            return DenseLinear(weight, bias)
        product = self.quantisation.product(weight, bias, self.dtype)
        self.on_progress(product.num_bytes - num_bytes_of(bias))
        return product

    def split_by_rows(
        self, keys: Sequence[str], shape: tuple[int, int], rows: range, layer: int, *, has_bias: bool
    ) -> Linear:
        """Products of one input, fused; the rank computes `rows` of every one's output."""
        vectors = [Piece(key, Part((shape[0],), [rows]), layer) for key in keys]
        pieces = [Piece(key, self.part(shape, [rows]), layer) for key in keys]
        return self.linear(pieces, self.fill(vectors, "bias") if has_bias else None)

    def split_by_columns(
        self, key: str, shape: tuple[int, int], columns: range, layer: int, *, has_bias: bool
    ) -> Linear:
        """A product whose partial results ranks add up; the first rank adds the bias."""
        if has_bias and self.shard.rank:
            self.source.skip(self.name(key, layer) + ".bias")
            has_bias = False
        bias = self.vector(key, shape[0], layer, "bias") if has_bias else None
        return self.linear([Piece(key, self.part(shape, None, columns), layer)], bias)

    # Vocabularies.

    def embedding(self, vocab_size: int, width: int) -> Embedding:
        """The rank's rows."""
        piece = self._vocabulary("embed", vocab_size, width)
        if not self.quantisation.has_int8_embeddings:
            return DenseEmbedding(self.fill([piece]))
        if self._only_counts:
            return DenseEmbedding(self._counted([piece], None, self._int8_by_row).weight)
        matrix = self._made(piece, int8_by_row)
        embedding = Int8Embedding(matrix.codes, matrix.scale[:, 0].to(self.dtype))
        self.on_progress(embedding.num_bytes)
        return embedding

    def head(self, vocab_size: int, width: int, embed: Embedding, bias: Tensor | None = None) -> Linear:
        """The rank's rows. Whether head and embedding are tied is decided by the checkpoint: without a tensor of its
        own the head is the embedding, and one with the same numbers shares its memory."""
        own = self._own_head(self._vocabulary("head", vocab_size, width), bias) if self.has("head") else None
        tied = self._tied_head(embed, bias)
        return tied if own is None or _is_equal(own, tied) else own

    @property
    def _int8_by_row(self) -> Quantisation:
        return replace(self.quantisation, scheme=None, make=int8_by_row)

    def _own_head(self, piece: Piece, bias: Tensor | None) -> Linear:
        if self._is_stored_quantised(self._name_of(piece)):
            return self._fixed([piece], bias)
        if not self.quantisation.has_int8_embeddings:
            return DenseLinear(self.fill([piece]), bias)
        if self._only_counts:
            return self._counted([piece], bias, self._int8_by_row)
        return self._product(self._made(piece, int8_by_row), bias)

    def _tied_head(self, embed: Embedding, bias: Tensor | None) -> Linear:
        if isinstance(embed, Int8Embedding):
            return self.quantisation.product(embed.matrix, bias, self.dtype)
        assert isinstance(embed, DenseEmbedding)
        return DenseLinear(embed.weight, bias)

    def _vocabulary(self, key: str, vocab_size: int, width: int) -> Piece:
        return Piece(key, Part((vocab_size, width), [self.shard.bounds(vocab_size)], range(width)))


def _is_equal(one: Linear, other: Linear) -> bool:
    if isinstance(one, DenseLinear) and isinstance(other, DenseLinear):
        return not one.weight.is_meta and torch.equal(one.weight, other.weight)
    if isinstance(one, Int8Linear) and isinstance(other, Int8Linear):
        is_equal = not one.codes.is_meta and torch.equal(one.codes, other.codes)
        return is_equal and torch.equal(one.scale, other.scale)
    return False


def first_rows(runs: Sequence[range], count: int) -> list[range]:
    """So many rows, counted from the first run on."""
    result: list[range] = []
    for run in runs:
        result += [run[:count]] if count else []
        count -= min(len(run), count)
    return result


def load_weights(
    spec: Spec,
    family: Family,
    source: TensorSource,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    on_progress: ProgressFunction | None = None,
    quantisation: Quantisation = NOT_QUANTISED,
    adapters: LoraSlots | None = None,
    finish: Finish = as_read,
) -> DecoderWeights:
    """Read one rank's weights as `dtype`, or as `quantisation` says, where the source wants them. `adapters` will
    know each layer. `finish` gets each layer, so that only one at a time is there as it is read.

    Raises:
        ConfigurationError: if a tensor is missing, misshapen or superfluous; the message names it.
    """
    builder = Builder(family, source, dtype, shard, quantisation, adapters=adapters, finish=finish)
    return load_with(partial(_load, spec), builder, on_progress)


def weight_bytes(
    spec: Spec,
    family: Family,
    source: TensorSource,
    dtype: torch.dtype,
    shard: Shard = WHOLE,
    quantisation: Quantisation = NOT_QUANTISED,
) -> int:
    """What `load_weights` will take, without taking it."""
    return bytes_of(partial(_load, spec), Builder(family, source, dtype, shard, quantisation))


def load_with(
    load: Callable[[Builder], WeightsType], builder: Builder, on_progress: ProgressFunction | None
) -> WeightsType:
    """What `load` makes with the builder, which reports its progress on the way."""
    if on_progress is not None:
        builder.on_progress = _running_total(bytes_of(load, builder), on_progress)
    return load(builder)


def bytes_of(load: Callable[[Builder], object], builder: Builder) -> int:
    """What `load` will take, without taking it."""
    total = 0

    def add(num_bytes: int) -> None:
        nonlocal total
        total += num_bytes

    load(replace(builder, source=_SizesOnly(builder.source), on_progress=add, adapters=None, finish=as_read))
    return total


def _running_total(total: int, on_progress: ProgressFunction) -> Callable[[int], None]:
    done = 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    return add


def _load(spec: Spec, builder: Builder) -> DecoderWeights:
    layers = (builder.finish(load_layer(spec, builder, layer)) for layer in range(spec.num_layers))
    weights = load_around(spec, builder, layers)
    builder.source.finish(builder.family.ignored, builder.family.foreign)
    return weights


def load_around(spec: Spec, builder: Builder, layers: Iterable[LayerWeights] = ()) -> DecoderWeights:
    """All that is not in layers, and `layers`."""
    width = spec.embedding_size or spec.hidden_size
    is_projected = spec.embedding_size is not None
    embed = builder.embedding(spec.vocab_size, width)
    return DecoderWeights(
        dtype=builder.dtype,
        embed=embed,
        positions=_load_positions(spec, builder),
        embedding_norm=_load_norm(spec, builder, "embedding_norm") if spec.embedding_norm else None,
        project_in=builder.matrix("project_in", spec.hidden_size, width) if is_projected else None,
        layers=list(layers),
        final_norm=_load_norm(spec, builder, "final_norm") if spec.final_norm else None,
        project_out=builder.matrix("project_out", width, spec.hidden_size) if is_projected else None,
        head=_load_head(spec, builder, embed, width),
    )


def _load_positions(spec: Spec, builder: Builder) -> Tensor | None:
    if spec.position_offset is None:
        return None
    # a table of learned positions is an embedding: stored upright also where matrices are transposed
    shape = (spec.max_positions + spec.position_offset, spec.hidden_size)
    return builder.fill([Piece("positions", Part(shape, [range(shape[0])], range(shape[1])))])


def _load_head(spec: Spec, builder: Builder, embed: Embedding, width: int) -> Linear:
    rows = [builder.shard.bounds(spec.vocab_size)]
    bias = builder.fill([Piece("head", Part((spec.vocab_size,), rows))], "bias") if spec.head_bias else None
    return builder.head(spec.vocab_size, width, embed, bias)


def load_layer(spec: Spec, builder: Builder, layer: int) -> LayerWeights:
    residual = spec.residual
    has_two_norms = residual is not Residual.PARALLEL and residual.has_input_norm
    return LayerWeights(
        attention_norm=_load_norm(spec, builder, "attention_norm", layer) if residual.has_input_norm else None,
        qkv=_load_qkv(spec, builder, layer),
        qk_norm=_load_qk_norm(spec, builder, layer) if spec.qk_norm is not QkNorm.NONE else None,
        out=_load_out(spec, builder, layer),
        attention_out_norm=_load_norm(spec, builder, "attention_out_norm", layer) if residual.has_output_norm else None,
        mlp_norm=_load_norm(spec, builder, "mlp_norm", layer) if has_two_norms else None,
        mlp=_load_mlp(spec, builder, layer),
        mlp_out_norm=_load_norm(spec, builder, "mlp_out_norm", layer) if residual.has_output_norm else None,
    )


def _load_norm(spec: Spec, builder: Builder, key: str, layer: int = 0) -> NormWeights:
    size = spec.hidden_size
    weight = builder.vector(key, size, layer, dtype=_norm_dtype(spec))
    if spec.norm_plus_one:
        weight += 1.0
    return NormWeights(weight, builder.vector(key, size, layer, "bias") if spec.norm_bias else None)


def _norm_dtype(spec: Spec) -> torch.dtype | None:
    """That of weights of norms, where it is not that of all weights."""
    return torch.float32 if spec.wide_norm else None


# Queries, keys and values.


def _load_qkv(spec: Spec, builder: Builder, layer: int) -> Linear:
    bias = builder.fill(_qkv_pieces(spec, builder, layer, None), "bias") if spec.qkv_bias else None
    return builder.linear(_qkv_pieces(spec, builder, layer, spec.hidden_size), bias)


def _qkv_pieces(spec: Spec, builder: Builder, layer: int, num_in: int | None) -> list[Piece]:
    """Rows of the rank's heads; `num_in` None for those of the bias."""
    queries, keys = builder.shard.heads(spec.num_heads), builder.shard.kv_heads(spec.num_kv_heads)
    layout, pieces = builder.family.qkv, []
    for which, heads, num_heads in (("q", queries, spec.num_heads), *((kv, keys, spec.num_kv_heads) for kv in "kv")):
        is_fused = layout is not QkvLayout.SEPARATE
        total = (spec.num_heads + 2 * spec.num_kv_heads if is_fused else num_heads) * spec.head_dim
        rows = _runs(stored_heads(layout, spec, which, heads), spec.head_dim)
        part = Part((total,), rows) if num_in is None else builder.part((total, num_in), rows)
        is_turned = builder.family.is_interleaved and which != "v"
        order = _halves_first(len(heads), spec.head_dim, spec.ropes[layer]) if is_turned else None
        pieces.append(Piece("qkv" if is_fused else which, part, layer, order=order))
    return pieces


def stored_heads(layout: QkvLayout, spec: Spec, which: str, heads: Iterable[int]) -> list[int]:
    """Where `heads` of queries ("q"), keys ("k") or values ("v") stand in the stored tensor, in units of heads."""
    if layout is QkvLayout.SEPARATE:
        return list(heads)
    if layout is QkvLayout.CONCATENATED:
        first = {"q": 0, "k": spec.num_heads, "v": spec.num_heads + spec.num_kv_heads}[which]
        return [first + head for head in heads]
    group = spec.num_heads // spec.num_kv_heads
    if which == "q":
        return [head // group * (group + 2) + head % group for head in heads]
    return [head * (group + 2) + group + (which == "v") for head in heads]


def _runs(heads: Sequence[int], head_dim: int) -> list[range]:
    """The rows of heads, neighbours in one run."""
    runs: list[range] = []
    for head in heads:
        rows = range(head * head_dim, (head + 1) * head_dim)
        if runs and runs[-1].stop == rows.start:
            rows = range(runs.pop().start, rows.stop)
        runs.append(rows)
    return runs


def _halves_first(num_heads: int, head_dim: int, rope: Rope | None) -> Tensor | None:
    """The order of the rows of so many heads in which rotating halves does what rotating neighbours did before."""
    if rope is None:
        return None
    size = rope.rotary_dim or head_dim
    order = torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2), torch.arange(size, head_dim)))
    return (torch.arange(num_heads)[:, None] * head_dim + order).flatten()


def _load_qk_norm(spec: Spec, builder: Builder, layer: int) -> NormWeights:
    weight = _qk_norm_heads(spec, builder, layer, "weight")
    return NormWeights(weight, _qk_norm_heads(spec, builder, layer, "bias") if spec.norm_bias else None)


def _qk_norm_heads(spec: Spec, builder: Builder, layer: int, kind: str) -> Tensor:
    """[query heads + key heads, head_dim] of the rank. Stored is one head for all, every head, or all in a row."""
    parts = []
    for key, num_heads, heads in (
        ("q_norm", spec.num_heads, builder.shard.heads(spec.num_heads)),
        ("k_norm", spec.num_kv_heads, builder.shard.kv_heads(spec.num_kv_heads)),
    ):
        if spec.qk_norm is QkNorm.FULL:
            rows = range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
            part = Part((num_heads * spec.head_dim,), [rows])
        elif builder.family.has_norm_per_head:
            part = Part((num_heads, spec.head_dim), [heads], range(spec.head_dim))
        else:
            part = Part((spec.head_dim,), [range(spec.head_dim)])
        stored = builder.fill([Piece(key, part, layer)], kind, _norm_dtype(spec))
        parts.append(stored.view(-1, spec.head_dim).expand(len(heads), -1))
    result = torch.cat(parts)
    if spec.norm_plus_one and kind == "weight":
        result += 1.0
    order = _halves_first(1, spec.head_dim, spec.ropes[layer]) if builder.family.is_interleaved else None
    return result if order is None or result.is_meta else result[:, order]


def _load_out(spec: Spec, builder: Builder, layer: int) -> Linear:
    heads = builder.shard.heads(spec.num_heads)
    columns = range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    shape = (spec.hidden_size, spec.num_heads * spec.head_dim)
    return builder.split_by_columns("out", shape, columns, layer, has_bias=spec.out_bias)


# The feed-forward network.


def _load_mlp(spec: Spec, builder: Builder, layer: int) -> MlpWeights | MoeWeights:
    if spec.moe is not None and spec.moe.sparse_layers[layer]:
        return _load_moe(spec, spec.moe, builder, layer)
    return _load_dense(spec, builder, layer)


def _load_dense(spec: Spec, builder: Builder, layer: int) -> MlpWeights:
    ffn, hidden = spec.ffn_size, spec.hidden_size
    mine = builder.width(ffn)
    down = builder.split_by_columns("down", (hidden, ffn), mine, layer, has_bias=spec.mlp_bias)
    if not spec.is_gated or "gate_up" not in builder.family.names:
        keys = ["gate", "up"] if spec.is_gated else ["up"]
        return MlpWeights(builder.split_by_rows(keys, (ffn, hidden), mine, layer, has_bias=spec.mlp_bias), down)
    rows = [mine, range(ffn + mine.start, ffn + mine.stop)]
    bias = builder.fill([Piece("gate_up", Part((2 * ffn,), rows), layer)], "bias") if spec.mlp_bias else None
    return MlpWeights(builder.linear([Piece("gate_up", builder.part((2 * ffn, hidden), rows), layer)], bias), down)


def _load_moe(spec: Spec, moe: Moe, builder: Builder, layer: int) -> MoeWeights:
    hidden, mine = spec.hidden_size, builder.width(moe.ffn_size)
    up_part = builder.part((moe.ffn_size, hidden), [mine])
    down_part = builder.part((hidden, moe.ffn_size), None, mine)
    experts = range(moe.num_experts)
    up = [[Piece(key, up_part, layer, expert) for key in ("expert_gate", "expert_up")] for expert in experts]
    return MoeWeights(
        router=builder.matrix("router", moe.num_experts, hidden, layer),
        up=builder.experts(up),
        down=builder.experts([[Piece("expert_down", down_part, layer, expert)] for expert in experts]),
        shared=_load_shared(moe, builder, hidden, layer) if moe.shared_ffn_size else None,
        shared_gate=builder.matrix("shared_gate", 1, hidden, layer) if moe.has_shared_gate else None,
    )


def _load_shared(moe: Moe, builder: Builder, hidden: int, layer: int) -> MlpWeights:
    size = moe.shared_ffn_size
    mine = builder.width(size)
    up = builder.split_by_rows(["shared_gate_proj", "shared_up"], (size, hidden), mine, layer, has_bias=False)
    return MlpWeights(up, builder.split_by_columns("shared_down", (hidden, size), mine, layer, has_bias=False))
