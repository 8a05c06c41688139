"""Linear layers of several rows with a sparse weight in slabs of inputs: y = epilogue(x W^T + b); see slab_rows.py.

Integer codes go through the same loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mcc import ops
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.few_rows import ONE_VECTOR, narrow, several_rows, sparse_refusal
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.slab_rows import SlabRows, elements_of
from mcc.backends.cpu.kernels.tiles import parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.slabs import pack_slabs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target


@dataclass(frozen=True)
class SparseSlabs:
    """Single weights or blocks; float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_slabs"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear of several rows at all times, with such a weight, whose codes sum exactly."""
        reason = sparse_refusal(region) or narrow(region, target)
        if reason is None and several_rows(region, target) is None:
            return "it may have few rows, which are transposed for nothing"
        return reason

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Panels of a vector of outputs: tiles of rows are what registers hold."""
        del region, target
        return (ONE_VECTOR,)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        weight = region.weight.sparse
        assert isinstance(weight, SparseArrays)
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        rows = SlabRows(plan, weight)
        packed = pack_slabs(elements_of(weight), rows.cuts) | plan.float_starts() | plan.channel_arrays()

        def emit(x: Expression, *arrays: Expression) -> None:
            rows.emit(x, dict(zip(packed, arrays, strict=True)))

        return Lowered(plan.function(self.name, packed, emit), packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)
