"""Depthwise convolutions of codes with channels last: `dot4` takes four pixels of a channel at once.

There are three forms, which the tuner chooses from: two read the image where it lies, one a padded copy in cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcc import ops
from mcc.backends.cpu.integer_sums import pairs_fit, sums_overflow
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.depthwise_direct import DirectBody, HalvesBody
from mcc.backends.cpu.kernels.depthwise_padded import PaddedBody
from mcc.backends.cpu.kernels.quads import QUAD
from mcc.backends.cpu.microkernel import Vectors
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

WIDEST_KERNEL = 9
FEWEST_CHANNELS = 16
BODIES = {"": DirectBody, "halves": HalvesBody, "padded": PaddedBody}


@dataclass(frozen=True)
class DepthwiseInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums."""

    name: str = "depthwise_int8"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes depthwise convolutions whose taps lie side by side."""
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        if region.weight.sparse is not None or region.activation is None or region.weight.scale is None:
            return "weight and activations are not both dense int8"
        if not shape.depthwise or shape.inputs < FEWEST_CHANNELS:
            return f"it is not depthwise, or has fewer channels than {FEWEST_CHANNELS}"
        if shape.dilation[1] != 1 or shape.kernel[1] > WIDEST_KERNEL:
            return f"its taps are apart, or more than {WIDEST_KERNEL} in a row"
        if not target.exact_dot4 and not _pairs_fit(region.weight.decoded()):
            return "neighbouring weights are too large for the CPU's 16-bit sums"
        return sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows times columns of output that a tile holds, and its form."""
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        strided, wide = shape.stride[1] > 1, shape.kernel[1] >= QUAD
        if target.vector_registers != 32:
            wanted = ["2x2", "1x2", "padded 2x2"] if strided else ["padded 2x2", "2x2", "padded 1x2", "1x2"]
        elif strided:
            wanted = ["halves 2x2", "padded 2x2" if wide else "2x2", "1x4", "1x2"]
        elif wide:
            wanted = ["padded 4x2", "padded 3x2", "1x4", "padded 2x2"]
        else:
            wanted = ["padded 4x2", "2x2", "padded 3x2", "1x4"]
        if shape.varies:  # of a wide kernel a tile is much code, twice
            wanted = ["1x2"] if wide else [text for text in wanted if not text.startswith("padded")]
        return tuple(dict.fromkeys(_within(text, shape.result) for text in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the texts of the two modules."""
        form, size = tile.split() if " " in tile else ("", tile)
        rows, _, columns = size.partition("x")
        body = BODIES[form](region, Vectors(target), (int(rows), int(columns)))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As of any convolution."""
        return conv_reference(region, source, operands)


def _within(tile: str, result: tuple[int, int]) -> str:
    """A tile no larger than the output image."""
    form, _, size = tile.rpartition(" ")
    rows, columns = (min(int(n), extent) for n, extent in zip(size.split("x"), result, strict=True))
    return f"{form} {rows}x{columns}".strip()


def _pairs_fit(weight: NDArray[np.int8]) -> bool:
    """Whether products of neighbouring taps fit, from whichever tap a quad begins."""
    rows = weight.reshape(-1, weight.shape[-1])
    return pairs_fit(rows) and pairs_fit(np.pad(rows, [(0, 0), (1, 0)]))
