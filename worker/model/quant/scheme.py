"""What loading must know of quantisation: how matrices are stored, or how they are made of whole ones on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from worker.model.quant.linear import MakeProduct, linear_of
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.weights import Part, TensorSource


class Scheme(Protocol):
    """A format of checkpoints. `module` is a tensor's name without `.weight`.

    `unit` is a number of neighbouring columns that belong together; parts of ranks begin at multiples of it where the
    model allows.
    """

    @property
    def unit(self) -> int: ...

    def has(self, source: TensorSource, module: str) -> bool:
        """Whether this matrix is stored in few bits; others of the same checkpoint may not be."""

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        """`part` of a matrix. It says nothing of how formats lay out a matrix: its `is_transposed` does not count.

        Raises:
            ConfigurationError: naming a missing or misshapen tensor.
        """


MakeQuantised = Callable[[Tensor], QuantisedMatrix]
"""Of a matrix float32 [rows, columns]."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """`name` is what the card says. Matrices are stored by `scheme`, or `make` quantises them when they are read; with
    `has_int8_embeddings` embedding and head get 8 bits then. `unit` as in Scheme. `product` makes what multiplies,
    as the device has it. `notes` are sentences for who runs the model."""

    name: str = "none"
    scheme: Scheme | None = None
    make: MakeQuantised | None = None
    has_int8_embeddings: bool = False
    unit: int = 1
    product: MakeProduct = linear_of
    notes: tuple[str, ...] = ()


NOT_QUANTISED = Quantisation()
