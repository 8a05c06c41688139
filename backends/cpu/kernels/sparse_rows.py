"""Linear layers of few rows with an unstructured sparse weight, by permuting inputs: y = epilogue(x W^T + b).

Lanes are outputs. Two registers hold a window of 32 inputs of a row; one permutation brings to every lane the input
that its weight has. To gather these one by one, as for rows whose number is known at run time only, takes two to five
times as long. See windows.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.kernels.windows import Steps
from mcc.backends.cpu.microkernel import Expression, Register, Vectors
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

LANES = 16
WINDOW = 2 * LANES
STEPS = Steps(WINDOW, LANES, 1)
MOST_ROWS = 6
CHAINS = 4  # multiply-adds in flight that hide their latency
PERMUTE = "llvm.x86.avx512.vpermi2var.ps.512"


@dataclass(frozen=True)
class SparseRows:
    """float32 activations of few rows; weights without their zeros, float32 or int8 with a scale for each output."""

    name: str = "sparse_rows"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight where two registers can be permuted by a third."""
        if not isinstance(region.weight.sparse, SparseArrays) or region.weight.sparse.block != (1, 1):
            return "the weight is not stored by single elements"
        if region.activation is not None or region.weight.grouped:
            return "activations are quantized, or groups of the weight's inputs have scales of their own"
        return unpermuted(region.weight.shape[1], region.source.shape[:-1], target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """All rows at once, so that places and weights are read once."""
        del target
        return (str(TileShape(math.prod(map(int, region.source.shape[:-1])), 1)),)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


def unpermuted(inputs: int, rows: Sequence[Any], target: Target) -> str | None:
    """Why rows of floats are not permuted, or None."""
    if target.vector_lanes != LANES:
        return f"{target} permutes no two registers of floats"
    if inputs < WINDOW:
        return f"it has fewer than {WINDOW} inputs"
    if not all(isinstance(size, int) for size in rows) or not 0 < math.prod(rows) <= MOST_ROWS:
        return f"its rows are none, more than {MOST_ROWS}, or known at run time only"
    return None


class _Body:
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        self.plan, self.v = plan, plan.vectors
        weight = np.pad(plan.region.weight.decoded(), ((0, plan.padded_outputs - plan.outputs), (0, 0)))
        steps = STEPS.pack([(0, weight.reshape(-1, LANES, plan.inputs))], plan.region.weight.sparse)
        self.packed = steps | plan.channel_arrays()
        plan.products = self.packed["weight"].size

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.x, self.arrays = x, dict(zip(self.packed, arrays, strict=True))
        self.plan.loops(self._tile)

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        """All steps of a vector of outputs."""
        v = self.v
        chains = v.registers(max(1, CHAINS // count), count, "float32")
        for register in (r for chain in chains for r in chain):
            register.set(v.constant(0.0))
        STEPS.emit(self.arrays, panel, chains, partial(self._step, first))
        self.plan.finish(self.arrays, first, panel * LANES, chains[0], width.used_lanes(0, LANES))

    def _step(self, first: Expression, number: Expression, sums: Sequence[Register]) -> None:
        """Add the products of a step to the sums of all rows."""
        v, arrays = self.v, self.arrays
        at = B.Bind(T.cast(number, "int64"))
        window = B.Bind(T.cast(arrays["windows"][at], "int64"))
        stored = v.load(arrays["weight"], at * LANES)
        weight = B.Bind(stored if arrays["weight"].dtype == "float32" else v.to_float(stored))
        places = B.Bind(T.cast(v.load(arrays["places"], at * LANES), f"int32x{LANES}"))
        for i, register in enumerate(sums):
            begin = T.cast(first + i, "int64") * self.plan.inputs + window
            low, high = (v.load(self.x, begin + part) for part in (0, LANES))
            chosen = tirx.call_llvm_pure_intrin(f"float32x{LANES}", PERMUTE, low, places, high)
            register.set(v.fma(chosen, weight, register.get()))
