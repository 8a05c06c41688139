"""Linear layers with an unstructured sparse weight in slabs of inputs: y = epilogue(x W^T + b); see slab_rows.py.

Integer codes go through the same loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcc import ops
from mcc.backends.cpu.integer_sums import float_start
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.slab_rows import SlabRows
from mcc.backends.cpu.kernels.sparse import sparse_refusal
from mcc.backends.cpu.kernels.tiles import TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.ops import extent
from mcc.slabs import Elements, pack_slabs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

ONE_VECTOR = str(TileShape(1, 1))


@dataclass(frozen=True)
class SparseSlabs:
    """More than one row, or any number; float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_slabs"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear of more than one row with such a weight, whose codes sum exactly."""
        sparse = region.weight.sparse
        if isinstance(sparse, SparseArrays) and sparse.block != (1, 1):
            return "the weight is stored in blocks"
        if math.prod(map(extent, region.source.shape[:-1])) <= 1:
            return "a single row, or none, is transposed for nothing"
        if region.weight.shape[1] < target.vector_lanes:
            return "its inputs do not fill a vector"
        return sparse_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Panels of a vector of outputs: tiles of rows are what registers hold."""
        del region, target
        return (ONE_VECTOR,)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        weight = region.weight.sparse
        assert isinstance(weight, SparseArrays)
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        rows = SlabRows(plan, weight.values.size)
        outputs = np.repeat(np.arange(plan.outputs), np.diff(weight.row_pointers))
        elements = Elements(weight.values, outputs, weight.columns.astype(np.int64))
        beyond = plan.padded_outputs - plan.outputs
        start = {key: np.pad(array, (0, beyond)) for key, array in float_start(region).items()}
        packed = pack_slabs(elements, rows.cuts) | start | plan.channel_arrays()

        def emit(x: Expression, *arrays: Expression) -> None:
            rows.emit(x, dict(zip(packed, arrays, strict=True)))

        return Lowered(plan.function(self.name, packed, emit), packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)
