"""Convolutions of codes with an unstructured sparse weight, channels last, by permuting bytes; see byte_windows.py.

What a pixel reads of one row of the image is a run of codes: all columns of the window side by side, or one by one
where they are apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import tvm.tirx.script.builder.ir as B

from mcc import ops
from mcc.backends.cpu.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.byte_windows import add_windows, refusal, row_tiles, steps_of
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv2d_loops import BYTES, Block, IntegerConvolution, Tile
from mcc.backends.cpu.kernels.conv_shape import conv_shape
from mcc.backends.cpu.kernels.tiles import TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

LARGEST_TILE = 14  # pixels


@dataclass(frozen=True)
class SparseCodesConv2d:
    """uint8 activation codes, int8 weight codes without their zeros; exact int32 sums."""

    name: str = "sparse_codes_conv2d"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes convolutions of one group and fixed size whose runs of codes fill a window."""
        if region.activation is None:
            return "the activations are not codes"
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        if shape.varies or shape.groups > 1:
            return "its height or width varies, or it has groups"
        side_by_side = codes_of_a_run(shape.inputs, shape.kernel, shape.dilation)
        return refusal(region.weight, target, side_by_side) or sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Pixels that share what they are permuted by."""
        del region
        return row_tiles(target, LARGEST_TILE)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _Windows(region, Vectors(target), parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return conv_reference(region, source, operands)


def codes_of_a_run(inputs: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> int:
    """How many of the codes that a pixel reads lie side by side; a sequence is an image of one row."""
    return inputs * (kernel[1] if dilation[1] == 1 and kernel[0] > 1 else 1)


class _Windows(IntegerConvolution):
    word = 1

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        super().__init__(region, vectors, tile)
        dense = self.vectors * self.v.lanes * self.taps
        self.fewest_macs = self.fewest_macs * dense // self.packed["weight"].size  # of those that are done

    def pack_weight(self) -> dict[str, NDArray[Any]]:
        """The steps."""
        steps = steps_of(self.v.target)
        assert steps is not None
        ordered = self.plain_weight()[self._lanes()]  # [vector, lane, in, kernel row, kernel column]
        return steps.pack(self._runs(ordered.transpose(3, 0, 1, 4, 2)), self.region.weight.sparse)

    def _runs(self, weight: NDArray[Any]) -> list[tuple[int, NDArray[Any]]]:
        """The runs of codes that a pixel reads, of weights [kernel row, vector, lane, kernel column, in]."""
        (rows, vectors, lanes, columns, inputs), (down, across) = weight.shape, self.shape.dilation
        joined = codes_of_a_run(inputs, self.shape.kernel, self.shape.dilation) // inputs
        return [
            (row * down * self.line + column * across * inputs, run.reshape(vectors, lanes, -1))
            for row in range(rows)
            for column in range(0, columns, joined)
            for run in [weight[row, :, :, column : column + joined]]
        ]

    def _band_bytes(self) -> Expression:
        return super()._band_bytes() // BYTES  # a word of one channel is otherwise a float

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        """See `Convolution`."""
        return self.x, self._first(n)

    def ahead(
        self, block: Block, place: tuple[Expression, Expression, int, int], weight: Expression, steps: int
    ) -> Callable[[Expression], None]:
        """Nothing: steps lie one behind the other, as the CPU expects."""
        del block, place, weight, steps
        return lambda _: None

    def accumulate(self, tile: Tile) -> None:
        """See `Convolution`."""
        rows = [B.Bind(tile.corner + self.pixel_offset(pixel)) for pixel in tile.pixels]
        add_windows(self.v, self.arrays, tile.vector, (tile.source, rows), [sums[0] for sums in tile.sums])
