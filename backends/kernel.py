"""What a kernel is: a generator from a region and a tile to TIR, with its packing and its NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mcc.graph import Node
    from mcc.ops import Op
    from mcc.target import Target


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""

    def __str__(self) -> str:
        return "relu"


@dataclass(frozen=True)
class Clamp:
    """min(max(x, low), high)."""

    low: float
    high: float

    def __str__(self) -> str:
        return "clamp"


@dataclass(frozen=True)
class Requantize:
    """clamp(round(x / scale) + zero_point, low, high) as unsigned 8-bit codes."""

    scale: float
    zero_point: int
    low: int
    high: int

    def __str__(self) -> str:
        return "requantize"


EpilogueStep = Relu | Clamp | Requantize


@dataclass(frozen=True)
class SparseArrays:
    """A compressed-sparse-row weight, as `mcc.formats.SparseRows` has it."""

    values: NDArray[Any]
    columns: NDArray[Any]
    row_pointers: NDArray[Any]


@dataclass(frozen=True)
class StoredWeight:
    """A region's weight as the graph stores it.

    Attributes:
        name: of the tensor in the model.
        shape: of the dense weight, [out, in / groups, …].
        dense: float32 values or int8 codes, [out, in / groups, …]; None where it is sparse.
        sparse: the sparse form; None where it is dense.
        scale: float32 [out] of int8 codes; None for float values.
    """

    name: str
    shape: tuple[int, ...]
    dense: NDArray[Any] | None
    sparse: SparseArrays | None
    scale: NDArray[np.float32] | None

    @property
    def dtype(self) -> str:
        """Element type: float32 or int8."""
        stored = self.dense if self.dense is not None else self.sparse.values if self.sparse is not None else None
        assert stored is not None
        return str(stored.dtype)

    @property
    def text(self) -> str:
        """The format in words, for the report."""
        return ("sparse " if self.sparse is not None else "") + self.dtype

    def decoded(self) -> NDArray[Any]:
        """The dense codes or values."""
        if self.sparse is None:
            assert self.dense is not None
            return self.dense
        dense = np.zeros((self.shape[0], int(np.prod(self.shape[1:]))), self.sparse.values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse.row_pointers))
        dense[rows, self.sparse.columns] = self.sparse.values
        return dense.reshape(self.shape)


@dataclass(frozen=True)
class QuantizedInput:
    """Scale and zero point of unsigned 8-bit activation codes."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Region:
    """An anchor op with what a kernel does after it.

    Attributes:
        anchor: the linear or convolution node.
        source: the node whose value the kernel reads: float32, or uint8 codes where `activation` is set.
        output: the node whose value the kernel gives.
        weight: as stored.
        bias: float32 [out], or None.
        activation: how the codes it reads are to be understood; None for float32.
        epilogue: what follows the anchor, in order; a Requantize comes last.
    """

    anchor: Node
    source: Node
    output: Node
    weight: StoredWeight
    bias: NDArray[np.float32] | None
    activation: QuantizedInput | None
    epilogue: tuple[EpilogueStep, ...]

    @property
    def output_dtype(self) -> str:
        """Of the value the kernel gives."""
        return "uint8" if self.epilogue and isinstance(self.epilogue[-1], Requantize) else "float32"

    @property
    def text(self) -> str:
        """The op with its epilogue, for the report."""
        assert self.anchor.op is not None
        return " + ".join((self.anchor.op.name, *map(str, self.epilogue)))


@dataclass(frozen=True)
class Lowered:
    """A kernel made for a region.

    Attributes:
        function: the PrimFunc: parameters are the source, the packed arrays in order, then the output.
        packed: arrays the kernel reads, by name, in the order of its parameters.
    """

    function: Any
    packed: Mapping[str, NDArray[Any]]


class Kernel(Protocol):
    """A family of kernels."""

    @property
    def name(self) -> str:
        """In reports and in the tuner's cache."""

    @property
    def anchor(self) -> Op:
        """The op it runs."""

    def refuses(self, region: Region, target: Target) -> str | None:
        """Why the kernel cannot take this region, or None if it can."""

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Tiles worth trying, the one the model of the machine ranks first at the front."""

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """Make the function and pack the weights."""

    def reference(self, region: Region, source: NDArray[Any]) -> NDArray[Any]:
        """The same in NumPy: float64 sums for float32, exact integers for codes."""


def apply_epilogue(values: NDArray[Any], steps: tuple[EpilogueStep, ...]) -> NDArray[Any]:
    """An epilogue in NumPy."""
    for step in steps:
        match step:
            case Relu():
                values = np.maximum(values, 0)
            case Clamp(low, high):
                values = np.clip(values, low, high)
            case Requantize(scale, zero_point, low, high):
                codes = np.rint(values * np.float32(1 / scale)) + zero_point
                values = np.clip(codes, low, high).astype(np.uint8)
    return values
