"""Convolutions in bfloat16 with channels last: the loops of conv2d.py over pairs of input channels.

The image is rounded as it is copied with its padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tvm import tirx

from mcc import ops
from mcc.backends.cpu.kernels.bfloat16 import PAIR, multiplying
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv2d_loops import Convolution
from mcc.backends.cpu.kernels.conv_shape import conv_shape, conv_tiles
from mcc.backends.cpu.kernels.tile_registers import TILE
from mcc.backends.cpu.kernels.tiled_convolution import TiledConvolution, convolution_tiles
from mcc.backends.cpu.kernels.tiles import parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target


@dataclass(frozen=True)
class Conv2dBfloat16:
    """float32 activations that the kernel rounds, weights stored as bfloat16."""

    name: str = "conv2d_bf16"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes convolutions without groups that read what is rounded to bfloat16, with a weight that is."""
        if not target.bfloat16:
            return f"{target} does not multiply bfloat16"
        if not region.rounds:
            return "weight and activations are not both rounded to bfloat16"
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        return "it has groups" if shape.groups > 1 else None

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """In tile registers where there are any, then `conv_tiles`."""
        return (*convolution_tiles(region, target, PAIR), *conv_tiles(region, target))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        v = Vectors(target)
        body = _TiledConvolution(region, v) if tile == TILE else _Convolution(region, v, parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Float64 sums of rounded values."""
        return conv_reference(region, source, operands)


class _Convolution(Convolution):
    """Pairs of channels a word."""

    sum_dtype = "float32"
    word = PAIR
    reads_copy = True

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        with multiplying():
            super().loops()

    def plain_weight(self) -> NDArray[Any]:
        """As bits."""
        bits = self.region.weight.dense
        assert bits is not None
        return bits.reshape(*bits.shape[:2], *self.shape.kernel)

    @property
    def padding(self) -> Expression:
        return tirx.const(0, "int16")

    def start(self, index: Expression) -> Expression:
        return self.v.load(self.arrays["bias"], index)

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.dot2(total, value, weight)

    def finish(self, total: Expression, index: Expression) -> Expression:
        del index
        return total


class _TiledConvolution(TiledConvolution, _Convolution):
    first_sums = "bias"
