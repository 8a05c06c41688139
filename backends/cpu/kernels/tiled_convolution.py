"""Convolutions in tile registers: blocks of two tiles of pixels by two of output channels.

The rows of a tile are pixels beside each other, as far apart in memory as the stride moves them, and a step multiplies
channels, or channels of neighbouring taps, that lie side by side. Two tiles of a block lie beside each other, or, where
the image has an odd number of tiles across, below each other. Images of single pixels are one row of all of these.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.conv2d_loops import FEWEST_MACS, Block, Convolution, IntegerConvolution
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.small_groups import shares_vectors
from mcc.backends.cpu.kernels.tile_registers import (
    BLOCK_ROWS,
    PAIR_OF_TILES,
    TILE,
    TILE_ROWS,
    TileRegisters,
    in_pairs,
    words_of_a_step,
)
from mcc.backends.cpu.kernels.tiles import TileShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.cpu.microkernel import Expression, Register, Vectors
    from mcc.backends.kernel import Region
    from mcc.target import Target

FEWEST_PIXELS = 8  # of an image
NARROW = 13  # columns of an image, fewer than which leave too many rows of a tile empty


def convolution_tiles(region: Region, target: Target, word: int) -> tuple[str, ...]:
    """The tile in tile registers, if the target has them and the region suits them; a word holds `word` channels."""
    if not target.tiles:
        return ()
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    passes = shape.passes(target.vector_lanes)
    run = -(-passes.joined * shape.group_inputs // word)
    if passes.count == 1 and shape.dilation[1] == 1:
        run *= shape.kernel[1]
    if math.prod(shape.result) < FEWEST_PIXELS or shares_vectors(region, target.vector_lanes, word):
        return ()
    return (TILE,) if words_of_a_step(run) else ()


class TiledConvolution(Convolution):
    """The loops; subclasses say what their sums are, see `Convolution`."""

    fewest_macs = 8 * FEWEST_MACS
    first_sums: str

    def __init__(self, region: Region, vectors: Vectors) -> None:
        super().__init__(region, vectors, TileShape(BLOCK_ROWS, PAIR_OF_TILES))
        step = words_of_a_step(self.runs()[-1][0])
        assert step is not None
        self.step = step

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        if self.shape.varies:
            # TVM divides by it, whether or not there is anything to do
            self.columns = self.v.held_integer(tirx.max(1, in_pairs(self.shape.result[1])))
        self.registers = TileRegisters(self.v, self.sum_dtype, self.columns, self.step)
        super().loops()

    def as_computed(self) -> ConvShape:
        """See `PackedConvolution`."""
        shape = self.whole
        if shape.varies or shape.kernel != (1, 1) or shape.stride != (1, 1) or shape.pads or shape.image[1] >= NARROW:
            return shape
        return replace(shape, image=(1, math.prod(shape.image)))

    def tile_size(self) -> tuple[int, int]:
        """Columns of one tile, and rows of a block."""
        height, width = self.shape.result
        if self.shape.varies:
            self.beside = True
            return TILE_ROWS, 1
        across = -(-width // TILE_ROWS)
        self.beside = height == 1 or across % PAIR_OF_TILES == 0
        return (in_pairs(width), 1) if self.beside else (-(-width // across), PAIR_OF_TILES)

    def shared(self, loop: Callable[..., None]) -> Callable[..., None]:
        """See `Convolution`."""
        return self.registers.shared(loop)

    def band(self, n: Expression, source: tuple[Expression, Expression], block: Block, r: Any) -> None:
        """See `Convolution`."""
        step = self.columns * (PAIR_OF_TILES if self.beside else 1)
        self.registers.blocks(
            -(-self.shape.result[1] // step),
            lambda t: self._sums(source, block, (r * self.rows, t * step)),
            lambda t: self._write(n, block, (r * self.rows, t * step)),
        )

    def _first_pixels(self, row: Expression, column: Expression) -> list[tuple[Expression, Expression]]:
        """Of the tiles of a block; those beyond the image begin where it ends, and compute some pixels again."""
        height, width = self.shape.result
        across, down = (self.columns, 0) if self.beside else (0, 1)
        return [
            (tirx.min(row + i * down, height - 1), tirx.min(column + i * across, width - self.columns))
            for i in range(PAIR_OF_TILES)
        ]

    def _first_lanes(self, block: Block) -> list[Expression]:
        vector = self.first_vector(block)
        return [(vector + j) * self.v.lanes for j in range(block.vectors)]

    def _sums(self, source: tuple[Expression, Expression], block: Block, place: tuple[Expression, Expression]) -> None:
        v, shape = self.v, self.shape
        corners = [B.Bind(self.corner(source, block.number, *first)) for first in self._first_pixels(*place)]
        lanes = self._first_lanes(block)
        weight, outputs = B.Bind(lanes[0] * self.taps), block.vectors * v.lanes
        extents = (1, PAIR_OF_TILES * self.columns) if self.beside else (PAIR_OF_TILES, self.columns)
        ask = self.ahead(block, (*place, *extents), weight, self.taps // self.step)

        def steps(multiply: Callable[..., None]) -> None:
            def one(at: Expression, begin: Expression) -> None:
                ask(at)
                pixels = [(source[0], corner + begin) for corner in corners]
                multiply(pixels, (self.weights, weight + at * (self.step * outputs)))

            self.over_window(self.step, one)

        begin = [(self.arrays[self.first_sums], lane) for lane in lanes]
        self.registers.multiply(begin, steps, (shape.stride[1] * self.pixel_words, outputs))

    def _write(self, n: Expression, block: Block, place: tuple[Expression, Expression]) -> None:
        firsts = [B.Bind(self.first_output(n, *first)) for first in self._first_pixels(*place)]

        def write(places: list[tuple[int, Expression]], sums: Callable[[int], list[Register]]) -> None:
            for j, lane in enumerate(self._first_lanes(block)):
                channel = self.channel(block.number, block.within, j)
                self.write(lane, sums(j), [firsts[tile] + channel + x * self.shape.outputs for tile, x in places])

        self.registers.vectors(write)


class TiledIntegerConvolution(TiledConvolution, IntegerConvolution):
    """uint8 codes, four input channels a word."""

    first_sums = "start"
