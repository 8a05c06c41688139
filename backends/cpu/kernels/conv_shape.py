"""The sizes of a convolution, and the register tiles that suit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcc.backends.cpu.kernels.tiles import TileShape
from mcc.backends.relax.emitter import tuple_of

if TYPE_CHECKING:
    from mcc.backends.kernel import Region
    from mcc.target import Target


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution; pairs are height, width."""

    inputs: int
    outputs: int
    groups: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def group_inputs(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of a group."""
        return self.outputs // self.groups

    @property
    def padded(self) -> tuple[int, int]:
        """The image with its padding."""
        return self.image[0] + 2 * self.padding[0], self.image[1] + 2 * self.padding[1]

    @property
    def result(self) -> tuple[int, int]:
        """The output image."""
        height, width = (
            (p - d * (k - 1) - 1) // s + 1
            for p, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width


def conv_shape(region: Region) -> ConvShape | str:
    """The sizes of a region's convolution, or why it has none."""
    dims = region.source.shape
    if len(dims) != 4 or not all(isinstance(s, int) for s in dims[1:]):
        return "its height, width or channels vary, or it has no batch dim"
    anchor, weight = region.anchor, region.weight.shape
    stride, padding, dilation = (_pair(anchor.argument(i, default)) for i, default in ((3, 1), (4, 0), (5, 1)))
    return ConvShape(
        int(dims[1]), weight[0], int(anchor.argument(6, 1)), (int(dims[2]), int(dims[3])), (weight[2], weight[3]),
        stride, padding, dilation,
    )  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    first, second = tuple_of(value, 2)
    return first, second


def conv_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles (pixels x vectors) that fill the registers; no wider than the channels or the row."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    room = 28 if target.vector_registers == 32 else 12
    most = -(-shape.group_outputs // target.vector_lanes)
    tiles = []
    for vectors in (4, 3, 2, 1) if target.vector_registers == 32 else (2, 3, 1):
        if vectors <= most:
            pixels = min(room // vectors, 14, shape.result[1])
            tiles.append(str(TileShape(pixels, vectors)))
    return tuple(dict.fromkeys(tiles))
