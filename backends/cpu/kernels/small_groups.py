"""Convolutions whose groups have fewer outputs than a vector has lanes: several groups share one.

Of each pixel the words of all these groups are loaded once; for every input channel of a group they are shuffled so
that each lane has its own group's. Joining the groups with zeros between them would multiply those zeros too. Groups
of 8 on vectors of 16 lanes had better be computed one by one, on vectors of 8: a shuffle of 512 bits costs as much as
a multiplication (measured: 77 percent of the peak, 50 where two groups share).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.conv2d_loops import Convolution, FloatConvolution, IntegerConvolution, Tile
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.microkernel import Expression, Vectors, serial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.kernel import Region
    from mcc.target import Target

NARROW = 8  # lanes of 256 bits


def group_vectors(region: Region, target: Target) -> Vectors:
    """Vectors for a region: of half the width where that is a group, since CPUs do two such at once."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    half = target.vector_lanes // 2
    return Vectors(target, half if shape.groups > 1 and shape.group_outputs == half == NARROW else None)


def shares_vectors(region: Region, lanes: int, word: int) -> bool:
    """Whether groups share vectors: a whole number of groups in each, their words no more than its lanes."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    passes, words = shape.passes(lanes), shape.group_inputs // word
    if passes.joined == 1 or passes.joined * shape.group_outputs != lanes or shape.group_inputs % word:
        return False
    return passes.joined * words <= lanes and words & (words - 1) == 0


class _SharedVectors(Convolution):
    """See the module's text."""

    def words_of_a_lane(self) -> int:
        return self.shape.group_inputs // self.word

    @property
    def pixel_words(self) -> int:
        return self.shape.inputs // self.word

    def first_word(self, number: Expression) -> Expression:
        return self.passes.first(number) * self.depth

    def lane_words(self) -> NDArray[Any]:
        shape, passes = self.shape, self.passes
        words = self.plain_weight().reshape(passes.groups, shape.group_outputs, self.depth, self.word, *shape.kernel)
        firsts = [passes.first(p) for p in range(passes.count)]
        by_pass = [words[first : first + passes.joined].reshape(1, self.v.lanes, *words.shape[2:]) for first in firsts]
        return np.stack(by_pass)

    def accumulate(self, tile: Tile) -> None:
        v, (rows, columns), (down, across) = self.v, self.shape.kernel, self.shape.dilation
        words = self.passes.joined * self.depth
        places = [[n * self.depth + c for n in range(self.passes.joined)] for c in range(self.depth)]
        lanes = [[place for place in by_group for _ in range(self.shape.group_outputs)] for by_group in places]

        def tap(row: Expression, column: Expression) -> None:
            step = (row * columns + column) * self.depth
            for c in range(self.depth):
                tile.ask(step + c)
            weights = [B.Bind(self.load_weight(tile.weight + (step + c) * v.lanes)) for c in range(self.depth)]
            begin = tile.corner + row * (down * self.line) + column * (across * self.pixel_words)
            for pixel, (total,) in zip(tile.pixels, tile.sums, strict=True):
                held = B.Bind(v.load(tile.source, begin + self.pixel_offset(pixel), words))
                for chosen, weight in zip(lanes, weights, strict=True):
                    value = B.Bind(tirx.Shuffle([held] * (v.lanes // words), chosen))  # it gives no more than it takes
                    total.set(self.multiply(total.get(), value, weight))

        serial(rows, lambda r: serial(columns, lambda c: tap(r, c)))


class FloatSmallGroups(_SharedVectors, FloatConvolution):
    """float32 values."""


class IntegerSmallGroups(_SharedVectors, IntegerConvolution):
    """Codes."""
