"""Sparse linear layers of few rows, read one by one, or of any number: several are read by slabs then.

An artifact for any number of rows has two forms of such a weight; that for few rows is made of slabs when it is loaded:
see mcc/slabs.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.integer_sums import float_sums_inexact
from mcc.backends.cpu.kernels.slab_rows import SlabRows, elements_of
from mcc.backends.cpu.kernels.tiles import TileShape
from mcc.backends.cpu.microkernel import Expression, branch, parallel, product, serial
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.slabs import GROUP, PACKED, Derived, pack_slabs

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.cpu.kernels.panels import PanelPlan
    from mcc.backends.cpu.microkernel import Register
    from mcc.target import Target

ONE_VECTOR = str(TileShape(1, 1))  # of outputs are what panels hold
SERIAL_WEIGHTS = 150_000  # of a row: below some 30 us of work two threads cost more than they bring
# rows that blocks read faster one by one than in a tile (measured on a Zen 3; of 16 lanes before they read slabs)
FEW_OF_BLOCKS, FEW_OF_CHEAP_TILES = 6, 3
WIDE_LANES = 16


def sparse_refusal(region: Region) -> str | None:
    """Why no sparse kernel for linear layers takes a region, or None."""
    if not isinstance(region.weight.sparse, SparseArrays):
        return "the weight is dense" if region.weight.sparse is None else "of neighbouring weights a few are stored"
    if region.weight.grouped:
        return "groups of the weight's inputs have scales of their own"
    if region.activation is not None:
        if region.weight.scale is None or region.activation.per_token:
            return "activations are quantized per token, or the weight is not quantized"
        return float_sums_inexact(region)
    return None


def narrow(region: Region, target: Target) -> str | None:
    """Why rows are not transposed, or None."""
    return "its inputs do not fill a vector" if region.weight.shape[1] < target.vector_lanes else None


def rows_alone(region: Region, target: Target) -> int:
    """How many rows at most are read one by one, each by itself."""
    sparse = region.weight.sparse
    if not isinstance(sparse, SparseArrays) or sparse.block == (1, 1):
        return 1
    # a tile has a vector of rows at least, and widens each code for it
    costly = target.vector_lanes == WIDE_LANES or region.weight.dtype == "int8"
    return FEW_OF_BLOCKS if costly else FEW_OF_CHEAP_TILES


def several_rows(region: Region, target: Target) -> str | None:
    """Why a kernel for few rows, or any number, does not take a region, or None; no rows at all are few."""
    known = [size for size in region.source.shape[:-1] if isinstance(size, int)]
    if math.prod(known) > rows_alone(region, target):
        return "it has several rows"
    return None if len(known) == len(region.source.shape) - 1 else narrow(region, target)


class FewRows(ABC):
    """A kernel that reads a row by itself, and several, where their number is known at run time only, by slabs.

    Args:
        plan: of the layer, of panels of one vector.
        form: of the weight for few rows, one of `mcc.slabs.PACKED`.
    """

    def __init__(self, plan: PanelPlan, form: str) -> None:
        weight = plan.region.weight.sparse
        assert isinstance(weight, SparseArrays)
        self.plan, self.v, self.rows, self.derived = plan, plan.vectors, product(plan.leading), None
        self.small, self.most = weight.values.size < SERIAL_WEIGHTS, rows_alone(plan.region, plan.vectors.target)
        self.block, self.several = weight.block, SlabRows(plan, weight)
        if isinstance(self.rows, int):
            self.packed = PACKED[form](elements_of(weight), self.several.cuts)
        else:
            self.packed = pack_slabs(elements_of(weight), self.several.cuts)
            self.derived = Derived.of("slabs", form, self.several.cuts)
            self.packed |= self.derived.made(self.packed)
        self.packed |= plan.float_starts() | plan.channel_arrays()

    @abstractmethod
    def multiply(self) -> None:
        """Write the sums of all outputs' products with a row to `self.sums`.

        The row lies in `self.source`, float32, from `self.start` on.
        """

    def lowered(self, name: str) -> Lowered:
        """The kernel, of that name."""
        return Lowered(self.plan.function(name, self.packed, self._emit), self.packed, derived=self.derived)

    def _emit(self, x: Expression, *arrays: Expression) -> None:
        self.arrays = dict(zip(self.packed, arrays, strict=True))
        if isinstance(self.rows, int):
            serial(self.rows, lambda row: self._row(x, row))
            return
        left = tirx.floormod(self.rows, self.several.vectors * self.v.lanes)  # of whole tiles
        alone = self.v.held_integer(tirx.if_then_else(left <= self.most, left, 0))
        begin = self.v.held_integer(self.rows - alone)
        branch(begin > 0, lambda: self.several.emit(x, self.arrays, begin))
        serial(alone, lambda row: self._row(x, begin + row))

    def _row(self, x: Expression, row: Expression) -> None:
        self.source, self.start = x, T.cast(row, "int64") * self.plan.inputs
        if x.dtype == "uint8":
            self.source, self.start = self._floats(x, self.start), tirx.const(0, "int64")
        self.sums = B.alloc_buffer((-(-self.plan.outputs // GROUP) * GROUP,), "float32", layout=None)
        self.multiply()
        self.plan.finish_row(self.arrays, row, self.sums, 0)

    def _floats(self, codes: Expression, start: Expression) -> Expression:
        """A row of codes as float32."""
        v, inputs = self.v, self.plan.inputs
        room = B.alloc_buffer((-(-inputs // v.lanes) * v.lanes,), "float32", layout=None)
        whole = inputs // v.lanes
        serial(whole, lambda k: v.store(room, k * v.lanes, v.to_float(v.load(codes, start + k * v.lanes))))
        for k in range(whole * v.lanes, inputs):
            B.buffer_store(room, T.cast(codes[start + k], "float32"), [k])
        return room

    def shared(self, extent: Expression, body: Callable[[Expression], None]) -> None:
        """A loop that threads share where that pays."""
        (serial if self.small else parallel)(extent, body)

    def products_added(self, at: Expression, x: Expression, sums: Register) -> None:
        """Add the products of 16 stored weights, from `at` on, and the inputs they have."""
        w = tirx.BufferLoad(self.arrays["values"], [T.ramp(at, 1, GROUP)])
        w = w if self.arrays["values"].dtype == "float32" else T.cast(w, f"float32x{GROUP}")
        sums.set(tirx.call_llvm_pure_intrin(f"float32x{GROUP}", f"llvm.fma.v{GROUP}f32", w, x, sums.get()))
