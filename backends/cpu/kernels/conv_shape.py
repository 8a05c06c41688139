"""The sizes of a convolution with channels last, and the register tiles that suit them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mcc import ops
from mcc.backends.cpu.kernels.tiles import TileShape
from mcc.backends.relax.emitter import tuple_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.kernel import Region
    from mcc.target import Target

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution; pairs are height, width."""

    inputs: int
    outputs: int
    groups: int
    image: Pair
    kernel: Pair
    stride: Pair
    before: Pair
    after: Pair
    dilation: Pair

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
    def padded(self) -> Pair:
        """The image with its padding."""
        height, width = (i + b + a for i, b, a in zip(self.image, self.before, self.after, strict=True))
        return height, width

    @property
    def pads(self) -> bool:
        """Whether there is any padding."""
        return self.padded != self.image

    @property
    def result(self) -> Pair:
        """The output image."""
        height, width = (
            (p - d * (k - 1) - 1) // s + 1
            for p, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, in the direct form."""
        return math.prod(self.result) * self.outputs * self.group_inputs * math.prod(self.kernel)

    def rows_read(self, count: int) -> int:
        """Rows of the padded image that `count` rows of output read, first to last."""
        return (count - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def merged(self, lanes: int) -> ConvShape:
        """The same convolution with groups joined until one has a vector of outputs; see `merge_groups`."""
        groups = self.groups
        while groups > 1 and self.outputs // groups < lanes:
            groups = next(g for g in range(groups - 1, 0, -1) if self.groups % g == 0)
        return replace(self, groups=groups)


def merge_groups(weight: NDArray[Any], groups: int, merged: int) -> NDArray[Any]:
    """Weights [out, in / groups, …] of `groups` as those of `merged` groups: zeros where two groups do not meet."""
    if groups == merged:
        return weight
    outputs, inputs = weight.shape[:2]
    joined, per_group = groups // merged, outputs // groups
    wide = np.zeros((outputs, inputs * joined, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        place = group % joined * inputs
        wide[rows, place : place + inputs] = weight[rows]
    return wide


def conv_shape(region: Region) -> ConvShape | str:
    """The sizes of a region's convolution, channels first or last, or why it has none."""
    dims = region.source.shape
    if len(dims) != 4:
        return "it has no batch dimension"
    if not all(isinstance(s, int) for s in dims[1:]):
        return "its height, width or channels vary"
    anchor, weight = region.anchor, region.weight.shape
    stride, padding, dilation = (tuple_of(anchor.argument(i, d), 2) for i, d in ((3, 1), (4, 0), (5, 1)))
    first = anchor.op is ops.CONV2D
    channels, height, width = (int(dims[i]) for i in ((1, 2, 3) if first else (3, 1, 2)))
    top, left, bottom, right = padding * 2 if first else anchor.argument(4)
    return ConvShape(
        channels, weight[0], int(anchor.argument(6, 1)), (height, width), (weight[2], weight[3]),
        (stride[0], stride[1]), (top, left), (bottom, right), (dilation[0], dilation[1]),
    )  # fmt: skip


_MANY = ((14, 2), (7, 4), (6, 4), (9, 3), (14, 1))
_FEW = ((6, 2), (4, 3), (5, 2), (12, 1))
_NEON = ((6, 4), (8, 3), (12, 2), (12, 1))  # an instruction there takes no operand from memory


def conv_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles (pixels x vectors) that fill the registers, no wider than the channels or the image."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    outputs = shape.merged(target.vector_lanes).group_outputs
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
