"""Dense layers in bfloat16: y = epilogue(round(x) W^T + b), two products an instruction, summed in float32.

All rows are rounded first, in memory of the kernel's own, as pairs of neighbouring inputs in 32-bit words; then the
loops are those of `dense_int8` with words of two in place of four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.kernels.bfloat16 import PAIR, bits_of, decoded_element, multiplying, vector_bits_of
from mcc.backends.cpu.kernels.dense import dense_reference, dense_tile, pack_panels_of, tiles_of_words
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tile_registers import TILE
from mcc.backends.cpu.kernels.tiled_panels import TiledPanels
from mcc.backends.cpu.kernels.tiles import PanelWidth, shared_rows
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, flat, product, serial
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

BLOCK_ELEMENTS = 16384  # that one thread rounds at a time


@dataclass(frozen=True)
class DenseBfloat16:
    """float32 activations that the kernel rounds, weights stored as bfloat16."""

    name: str = "dense_bf16"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear that reads what is rounded to bfloat16, with a weight that is."""
        if not target.bfloat16:
            return f"{target} does not multiply bfloat16"
        return None if region.rounds else "weight and activations are not both rounded to bfloat16"

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """In tile registers where there are any, then as for float32."""
        return tiles_of_words(region, target, -(-region.weight.shape[1] // PAIR))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text; k goes in pairs, padded with zero weights."""
        plan = PanelPlan(region, Vectors(target), dense_tile(tile))
        bits = region.weight.dense
        assert bits is not None
        size = plan.padded_outputs - plan.outputs
        packed = {
            "weight": pack_panels_of(PAIR, bits, plan.width, target.vector_lanes),
            "bias": np.pad(channel_vectors(region)["bias"], (0, size)),
        }
        words = -(-plan.inputs // PAIR)

        def element(arrays: Mapping[str, Expression], output: Expression, k: Expression) -> Expression:
            first, width, lane = plan.place(output)
            word = first * words + tirx.floordiv(k, PAIR) * width + lane
            return decoded_element(arrays["weight"][word * PAIR + tirx.floormod(k, PAIR)])

        body = _Body(plan, tiled=tile == TILE)
        return Lowered(plan.function(self.name, packed, body.emit), packed, element)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Float64 sums of rounded values."""
        return dense_reference(region, source, operands)


class _Body:
    """Inner loops over pairs of inputs."""

    def __init__(self, plan: PanelPlan, *, tiled: bool) -> None:
        self.plan = plan
        self.tiled = tiled
        self.words = -(-plan.inputs // PAIR)

    def emit(self, x: Expression, weight: Expression, bias: Expression) -> None:
        """Emit the whole kernel."""
        plan, rows = self.plan, product(self.plan.leading)
        self.weight, self.bias = flat(weight, self.words * plan.padded_outputs, "int32"), bias
        if isinstance(rows, int) and rows == 0:
            return  # TVM has no buffer of nothing
        room = B.alloc_buffer((rows * self.words * PAIR,), "int16", layout=None)
        self.source = flat(room, rows * self.words, "int32")
        with multiplying():
            shared_rows(rows, max(1, BLOCK_ELEMENTS // plan.inputs), lambda r: self._round_row(x, room, r))
            if self.tiled:
                tiles = TiledPanels(plan, "float32", self.words)
                tiles.loops((self.source, self.weight, self.bias), self._finish, self._tile)
            else:
                plan.loops(self._tile)

    def _round_row(self, x: Expression, room: Expression, r: Expression) -> None:
        v, inputs = self.plan.vectors, self.plan.inputs
        row = B.Bind(T.cast(r, "int64"))
        start, target = B.Bind(row * inputs), B.Bind(row * (self.words * PAIR))
        serial(
            inputs // v.lanes,
            lambda i: v.store(room, target + i * v.lanes, vector_bits_of(v, v.load(x, start + i * v.lanes))),
        )
        for i in range(inputs // v.lanes * v.lanes, inputs):
            B.buffer_store(room, bits_of(x[start + i]), [target + i])
        if inputs % PAIR:
            B.buffer_store(room, T.int16(0), [target + inputs])

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        plan, v = self.plan, self.plan.vectors
        operands = (self.weight, self.source, first * self.words)
        sums = plan.sums_of_words((panel, width, first, count), self.bias, operands, self.words, v.dot2)
        for j in range(width.vectors):
            column = panel * plan.width + j * v.lanes
            rows = [first + i for i in range(count)]
            self._finish(column, width.used_lanes(j, v.lanes), rows, [row[j] for row in sums])

    def _finish(self, column: Expression, used: int, rows: Sequence[Expression], sums: Sequence[Register]) -> None:
        for row, total in zip(rows, sums, strict=True):
            self.plan.store(row, column, total.get(), used)
