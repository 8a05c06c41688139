"""What a kernel is: a generator from a region and a tile to TIR, with its packing and its NumPy reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mcc.fixed_point import LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.graph import Node
    from mcc.ops import Op
    from mcc.slabs import Derived
    from mcc.target import Target


@dataclass(frozen=True)
class QuantizedInput:
    """How a kernel has its activations as unsigned 8-bit codes.

    Attributes:
        scale: of the codes.
        zero_point: of the codes.
        per_token: the kernel reads float32 and makes the codes itself: the largest |x| of a row gets the code
            zero_point + PER_TOKEN_LIMIT. `scale` is 1: that of each row comes on top of it.
        fraction_bits: values are rescaled as `mcc.fixed_point.rescale` says, to so many bits behind the point; None
            where they are not.
    """

    scale: float
    zero_point: int
    per_token: bool = False
    fraction_bits: int | None = None


PER_TOKEN_LIMIT = 127
PER_TOKEN = QuantizedInput(1.0, PER_TOKEN_LIMIT + 1, per_token=True)


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


@dataclass(frozen=True)
class Activation:
    """A function of one value: "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "hardsigmoid" or "hardswish"."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Join:
    """Another node's value of the same shape: float32, or uint8 codes where `activation` says how to read them."""

    operand: Node
    activation: QuantizedInput | None = None


@dataclass(frozen=True)
class Add(Join):
    """x + the other value."""

    def __str__(self) -> str:
        return "add"


@dataclass(frozen=True)
class Multiply(Join):
    """x * the other value."""

    def __str__(self) -> str:
        return "mul"


@dataclass(frozen=True)
class Scale:
    """x * a number."""

    factor: float

    def __str__(self) -> str:
        return "scale"


@dataclass(frozen=True)
class Rescale:
    """x * a number, exact, rounded and held to bounds as `mcc.fixed_point.rescale` has it."""

    factor: float
    fraction_bits: int

    def __str__(self) -> str:
        return "rescale"


@dataclass(frozen=True, eq=False)
class RescaleSums:
    """x * the factor of its output; comes first, on sums of integers.

    Attributes:
        factors: float32 [out].
        fraction_bits: as `mcc.fixed_point.rescale` has it; None for what float32 rounds the product to.
    """

    factors: NDArray[np.float32]
    fraction_bits: int | None

    def __str__(self) -> str:
        return "rescale"


EpilogueStep = Relu | Clamp | Activation | Add | Multiply | Scale | Rescale | RescaleSums | Requantize


def output_dtype(steps: Sequence[EpilogueStep]) -> str:
    """What such steps give: codes where the last one requantizes."""
    return "uint8" if steps and isinstance(steps[-1], Requantize) else "float32"


@dataclass(frozen=True)
class SparseArrays:
    """A weight without its zeros, as `mcc.sparse_formats.SparseRows` has it."""

    values: NDArray[Any]
    columns: NDArray[Any]
    row_pointers: NDArray[Any]
    block: tuple[int, int] = (1, 1)

    @property
    def by_element(self) -> SparseArrays:
        """The same in blocks of one element: compressed sparse rows."""
        height, width = self.block
        if self.block == (1, 1):
            return self
        counts = np.diff(self.row_pointers)
        inputs = self.columns.astype(np.int64)[:, None] * width + np.arange(width)
        cuts = self.row_pointers[1:-1]
        values = np.split(self.values.reshape(-1, height, width), cuts)
        return SparseArrays(
            np.concatenate([v.transpose(1, 0, 2).reshape(-1) for v in values]),
            np.concatenate([np.tile(c.reshape(-1), height) for c in np.split(inputs, cuts)]).astype(np.int32),
            np.concatenate([[0], np.repeat(counts * width, height).cumsum()]).astype(np.int32),
        )


@dataclass(frozen=True)
class NofMArrays:
    """A weight of which every few inputs have N of M stored, as `mcc.sparse_formats.NofM` has it."""

    values: NDArray[Any]
    places: NDArray[np.int8]
    among: int

    @property
    def kept(self) -> int:
        """Elements stored of a group."""
        return int(self.values.shape[2])

    def decoded(self) -> NDArray[Any]:
        """The dense matrix."""
        dense = np.zeros((*self.values.shape[:2], self.among), self.values.dtype)
        np.put_along_axis(dense, self.places.astype(np.int64), self.values, 2)
        return dense.reshape(len(dense), -1)


@dataclass(frozen=True)
class StoredWeight:
    """A region's weight as the graph stores it.

    Attributes:
        name: of the tensor in the model.
        shape: of the dense weight, [out, in / groups, …].
        dense: float32 values, int8 codes or, int16, the bits of bfloat16, [out, in / groups, …]; None where it is
            sparse.
        sparse: the sparse form; None where it is dense.
        scale: of codes, float32 [out]; or, for groups of a row's inputs, float16 or float32 [out, groups]; None for
            float values.
        zero_point: of groups, int8 or float16 [out, groups]; None where all are zero.
        bits: of a code as the graph stores it.
        table: float32 [entries, size], of which codes, from -entries / 2 on, stand for rows: values of `size`
            neighbouring inputs in units of the scale; `dense` is [out, in / size] then. None where codes are numbers.
    """

    name: str
    shape: tuple[int, ...]
    dense: NDArray[Any] | None
    sparse: SparseArrays | NofMArrays | None
    scale: NDArray[Any] | None
    zero_point: NDArray[Any] | None = None
    bits: int = 8
    table: NDArray[Any] | None = None

    @property
    def span(self) -> int:
        """Inputs that share a code."""
        return 1 if self.table is None else int(self.table.shape[1])

    @property
    def grouped(self) -> bool:
        """Whether groups of a row's inputs have scales of their own."""
        return self.scale is not None and self.scale.ndim == 2

    @property
    def group_size(self) -> int:
        """Inputs of a group, where the weight is grouped."""
        assert self.scale is not None
        return self.shape[1] // int(self.scale.shape[1])

    @property
    def dtype(self) -> str:
        """Element type: float32, int8 or bfloat16."""
        stored = self.dense if self.dense is not None else self.sparse.values if self.sparse is not None else None
        assert stored is not None
        return "bfloat16" if stored.dtype == np.int16 else str(stored.dtype)

    @property
    def text(self) -> str:
        """The format in words, for the report."""
        kind = self.dtype if self.bits == 8 else "binary" if self.bits == 1 else f"int{self.bits}"
        if self.table is not None:
            kind = f"{self.bits}-bit codes of a table" + (" of pairs" if self.span > 1 else "")
        if self.grouped:
            kind += f" in groups of {self.group_size}"
        if self.sparse is None:
            return kind
        if isinstance(self.sparse, NofMArrays):
            return f"{self.sparse.kept}:{self.sparse.among} of {kind}"
        height, width = self.sparse.block
        return f"sparse {kind}" + ("" if height * width == 1 else f" in blocks of {height}x{width}")

    @cached_property
    def largest_row(self) -> int:
        """The largest sum of absolute codes that an output has."""
        rows = self.decoded().reshape(self.shape[0], -1)
        return int(np.abs(rows.astype(np.int64)).sum(1).max(initial=0))

    @property
    def in_scales(self) -> NDArray[Any]:
        """What grouped codes stand for, [out, in] in units of their groups' scales."""
        assert self.dense is not None
        if self.table is not None:
            return self.table[self.dense.astype(np.int64) + len(self.table) // 2].reshape(self.shape)
        zeros = 0 if self.zero_point is None else self.zero_point.repeat(self.group_size, 1)
        return np.asarray(self.dense - np.float64(zeros))

    def decoded(self) -> NDArray[Any]:
        """The dense codes or values."""
        if self.sparse is None:
            assert self.dense is not None
            return from_bfloat16(self.dense) if self.dtype == "bfloat16" else self.dense
        if isinstance(self.sparse, NofMArrays):
            return self.sparse.decoded()
        sparse = self.sparse.by_element
        dense = np.zeros((self.shape[0], int(np.prod(self.shape[1:]))), sparse.values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(sparse.row_pointers))
        dense[rows, sparse.columns] = sparse.values
        return dense.reshape(self.shape)


@dataclass(frozen=True)
class Region:
    """An anchor op with what a kernel does after it.

    Attributes:
        anchor: the linear or convolution node.
        source: the node whose value the kernel reads: float32, or uint8 codes where `activation` has one scale.
        output: the node whose value the kernel gives.
        weight: as stored.
        bias: float32 [out], or None.
        activation: how the codes it reads are to be understood; None for float32.
        epilogue: what follows the anchor, in order; a Requantize comes last.
        inner: the nodes that the region runs besides its output.
        rounds: whether the kernel rounds what it reads to bfloat16.
    """

    anchor: Node
    source: Node
    output: Node
    weight: StoredWeight
    bias: NDArray[np.float32] | None
    activation: QuantizedInput | None
    epilogue: tuple[EpilogueStep, ...]
    inner: tuple[Node, ...] = ()
    rounds: bool = False

    @property
    def rescale(self) -> RescaleSums | None:
        """The fixed-point multiplication of the sums, which are integers then, if there is one."""
        first = self.epilogue[0] if self.epilogue else None
        return first if isinstance(first, RescaleSums) else None

    @property
    def joins(self) -> tuple[Join, ...]:
        """The steps that read another value, in order."""
        return tuple(step for step in self.epilogue if isinstance(step, Join))

    @property
    def operands(self) -> tuple[Node, ...]:
        """What the epilogue reads besides the sums, in order."""
        return tuple(step.operand for step in self.joins)

    @property
    def operand_dtypes(self) -> tuple[str, ...]:
        """Element types of `operands`."""
        return tuple("float32" if step.activation is None else "uint8" for step in self.joins)

    @property
    def source_dtype(self) -> str:
        """Of the value the kernel reads."""
        return "float32" if self.activation is None or self.activation.per_token else "uint8"

    @property
    def output_dtype(self) -> str:
        """Of the value the kernel gives."""
        return output_dtype(self.epilogue)

    def as_read(self, source: NDArray[Any]) -> NDArray[Any]:
        """Values that the kernel reads as it multiplies them."""
        return from_bfloat16(to_bfloat16(source)) if self.rounds else source

    @property
    def text(self) -> str:
        """The op with its epilogue, for the report."""
        assert self.anchor.op is not None
        first = ("quantize per token",) if self.activation is not None and self.activation.per_token else ()
        first = ("round to bfloat16",) if self.rounds else first
        return " + ".join((*first, self.anchor.op.name, *map(str, self.epilogue)))


@dataclass(frozen=True)
class Lowered:
    """A kernel made for a region.

    Attributes:
        function: the PrimFunc: parameters are the source, the epilogue's operands and the packed arrays in order, then
            the output.
        packed: arrays the kernel reads, by name, in the order of its parameters.
        element: an expression for the weight's value at an output and an input, from those arrays; None where the
            kernel does not offer it. Embeddings that are tied to the layer read their rows by it.
        derived: which of the packed arrays are made from others when an artifact is loaded, or None.
    """

    function: Any
    packed: Mapping[str, NDArray[Any]]
    element: Callable[[Mapping[str, Any], Any, Any], Any] | None = None
    derived: Derived | None = None


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

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """The same in NumPy: float64 sums for float32, exact integers for codes."""


def apply_epilogue(
    values: NDArray[Any], steps: tuple[EpilogueStep, ...], operands: Sequence[NDArray[Any]] = ()
) -> NDArray[Any]:
    """An epilogue in NumPy."""
    others = iter(operands)
    for step in steps:
        match step:
            case Activation(name):
                values = _FUNCTIONS[name](values.astype(np.float64)).astype(np.float32)
            case Scale(factor):
                values = values * np.float32(factor)
            case RescaleSums(factors, fraction_bits) | Rescale(factors, fraction_bits):
                values = rescaled(values, factors, fraction_bits)
            case Join(_, activation):
                other = next(others)
                if activation is not None:
                    codes = other.astype(np.float32) - np.float32(activation.zero_point)
                    other = rescaled(codes, np.float32(activation.scale), activation.fraction_bits)
                values = values + other if isinstance(step, Add) else values * other
            case Relu():
                values = np.maximum(values, 0)
            case Clamp(low, high):
                values = np.clip(values, low, high)
            case Requantize(scale, zero_point, low, high):
                codes = np.rint(values * np.float32(1 / scale)) + zero_point
                values = np.clip(codes, low, high).astype(np.uint8)
    return values


def rescaled(values: NDArray[Any], factors: Any, fraction_bits: int | None) -> NDArray[Any]:
    """Products as `mcc.fixed_point.rescale` has them, outputs last; None for float32 ones."""
    if fraction_bits is None:
        return np.asarray(values * factors)
    exact = values.astype(np.float64) * np.float32(factors).astype(np.float64) * 2.0**fraction_bits
    return np.clip(np.rint(exact) / 2.0**fraction_bits, -LARGEST, LARGEST).astype(np.float32) + np.float32(0)


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.int16]:
    """The bits of float32 rounded to bfloat16, half to even; for what is no NaN."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.int16)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 values of bits of bfloat16."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x * (0.5 + 0.5 * np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))


_FUNCTIONS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "sigmoid": _sigmoid, "silu": lambda x: x * _sigmoid(x), "tanh": np.tanh, "gelu": _gelu,
    "gelu_tanh": lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}  # fmt: skip
