"""The sizes of a convolution with channels last, and the register tiles that suit them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tvm import tirx

from mcc import ops
from mcc.backends.cpu.kernels.tiles import TileShape
from mcc.backends.cpu.microkernel import Expression, product
from mcc.backends.relax.emitter import tuple_of
from mcc.ops import extent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.kernel import Region
    from mcc.target import Target

Pair = tuple[int, int]
Extents: TypeAlias = tuple[Any, Any]
"""Height and width of an image: integers, or expressions of what is known at run time only."""


@dataclass(frozen=True)
class Passes:
    """Groups that are computed together, so that their outputs fill a vector; the last ones overlap those before.

    Attributes:
        groups: of the convolution.
        joined: groups of a pass.
    """

    groups: int
    joined: int

    @property
    def count(self) -> int:
        """How many passes there are."""
        return -(-self.groups // self.joined)

    def first(self, number: Expression) -> Expression:
        """The first group of a pass."""
        if self.groups % self.joined == 0:
            return number * self.joined
        least = min if isinstance(number, int) else tirx.min
        return least(number * self.joined, self.groups - self.joined)

    def joined_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Weights [out, in / groups, …] as [pass, its outputs, its inputs, …]: zero where two groups do not meet."""
        outputs, inputs = len(weight) // self.groups, weight.shape[1]
        wide = np.zeros((self.count, self.joined * outputs, self.joined * inputs, *weight.shape[2:]), weight.dtype)
        for number in range(self.count):
            for i in range(self.joined):
                group = self.first(number) + i
                rows, columns = slice(i * outputs, (i + 1) * outputs), slice(i * inputs, (i + 1) * inputs)
                wide[number, rows, columns] = weight[group * outputs : (group + 1) * outputs]
        return wide


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution; pairs are height, width.

    Attributes:
        image: of the source; where it varies, as in the example inputs, or as expressions inside a kernel.
        varies: whether its height or width does.
    """

    inputs: int
    outputs: int
    groups: int
    image: Extents
    kernel: Pair
    stride: Pair
    before: Pair
    after: Pair
    dilation: Pair
    varies: bool = False

    @property
    def group_inputs(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of a group."""
        return self.outputs // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone."""
        return self.groups > 1 and self.groups == self.inputs == self.outputs

    @property
    def padded(self) -> Extents:
        """The image with its padding."""
        height, width = (i + b + a for i, b, a in zip(self.image, self.before, self.after, strict=True))
        return height, width

    @property
    def pads(self) -> bool:
        """Whether there is any padding."""
        return any((*self.before, *self.after))

    @property
    def result(self) -> Extents:
        """The output image."""
        height, width = (
            (p - d * (k - 1) - 1) // s + 1
            for p, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    @property
    def macs(self) -> Expression:
        """Multiply-accumulates of one image, in the direct form."""
        return product(self.result) * (self.outputs * self.group_inputs * math.prod(self.kernel))

    def rows_read(self, count: Expression) -> Expression:
        """Rows of the padded image that `count` rows of output read, first to last."""
        return (count - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def passes(self, lanes: int) -> Passes:
        """So many groups at once that they have a vector of outputs."""
        return Passes(self.groups, min(self.groups, -(-lanes // self.group_outputs)))

    def upright(self) -> ConvShape:
        """A sequence, which is an image of one row, as one of one column: it is cut into rows."""
        if (
            not (isinstance(self.image[0], int) and self.image[0] == 1)
            or self.kernel[0] != 1
            or self.before[0]
            or self.after[0]
        ):
            return self
        names = ("image", "kernel", "stride", "before", "after", "dilation")
        return replace(self, **{name: getattr(self, name)[::-1] for name in names})


def conv_shape(region: Region) -> ConvShape | str:
    """The sizes of a region's convolution, channels first or last, or why it has none."""
    dims = region.source.shape
    if len(dims) != 4:
        return "it has no batch dimension"
    anchor, weight = region.anchor, region.weight.shape
    stride, padding, dilation = (tuple_of(anchor.argument(i, d), 2) for i, d in ((3, 1), (4, 0), (5, 1)))
    first = anchor.op is ops.CONV2D
    channels, height, width = (dims[i] for i in ((1, 2, 3) if first else (3, 1, 2)))
    if not isinstance(channels, int):
        return "its channels vary"
    top, left, bottom, right = padding * 2 if first else anchor.argument(4)
    return ConvShape(
        channels, weight[0], int(anchor.argument(6, 1)), (extent(height), extent(width)), (weight[2], weight[3]),
        (stride[0], stride[1]), (top, left), (bottom, right), (dilation[0], dilation[1]),
        not (isinstance(height, int) and isinstance(width, int)),
    )  # fmt: skip


_MANY = ((14, 2), (7, 4), (6, 4), (9, 3), (14, 1))
_FEW = ((6, 2), (4, 3), (5, 2), (12, 1))
_NEON = ((6, 4), (8, 3), (12, 2), (12, 1))  # an instruction there takes no operand from memory


def conv_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles (pixels x vectors) that fill the registers, no wider than the channels or the image."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    outputs = shape.passes(target.vector_lanes).joined * shape.group_outputs
    vectors = -(-outputs // target.vector_lanes)
    many = target.vector_registers == 32
    wanted = _NEON if target.isa == "neon" else _MANY if many else _FEW
    tiles = []
    for pixels, wide in wanted:
        if wide <= vectors and (vectors % wide == 0 or vectors > 2 * wide):
            tiles.append(str(TileShape(min(pixels, math.prod(shape.result)), wide)))
    if not tiles:
        tiles.append(str(TileShape(min(14 if many else 12, math.prod(shape.result)), 1)))
    return tuple(dict.fromkeys(tiles))
