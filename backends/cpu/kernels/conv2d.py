"""Convolutions: any kernel size, stride, dilation, padding and groups, NCHW in and out, fixed height and width.

Lanes are output channels: a tile holds a few neighbouring pixels times a few vectors of channels, and each input value
is broadcast, so NCHW needs no repacking on the way in beyond one padded copy of the image. Results are transposed to
NCHW from a small block of rows. int8 codes are copied four channels a word, so that one word meets `dot4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from mcc import ops
from mcc.backends.cpu.kernels.conv2d_loops import FloatConvolution, IntegerConvolution
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape, conv_tiles
from mcc.backends.cpu.kernels.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.tiles import parse_tile
from mcc.backends.cpu.microkernel import Vectors
from mcc.backends.kernel import Lowered, Region, apply_epilogue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.target import Target

FEWEST_CHANNELS = 8  # below that most lanes of a vector would idle: depthwise needs another kernel


def _refusal(region: Region) -> str | None:
    if region.weight.sparse is not None:
        return "there is no kernel for sparse convolution weights yet"
    shape = conv_shape(region)
    if isinstance(shape, str):
        return shape
    if shape.group_outputs < FEWEST_CHANNELS:
        return f"{shape.group_outputs} output channels a group would leave lanes idle"
    return None


@dataclass(frozen=True)
class Conv2dFloat:
    """float32 activations; weights float32, or int8 with a scale for each output channel."""

    name: str = "conv2d_f32"
    anchor: ClassVar[ops.Op] = ops.CONV2D

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes conv2d with at least 8 output channels a group."""
        del target
        return "the activations are quantized" if region.activation is not None else _refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `conv_tiles`."""
        return conv_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = FloatConvolution(region, Vectors(target), parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any]) -> NDArray[Any]:
        """Float64 sums."""
        return conv_reference(region, source)


@dataclass(frozen=True)
class Conv2dInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums."""

    name: str = "conv2d_int8"
    anchor: ClassVar[ops.Op] = ops.CONV2D

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes what `Conv2dFloat` takes, with int8 weights and activations."""
        del target
        if region.activation is None or region.weight.scale is None:
            return "weight and activations are not both int8"
        return _refusal(region) or sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `conv_tiles`."""
        return conv_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = IntegerConvolution(region, Vectors(target), parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any]) -> NDArray[Any]:
        """Exact integer sums."""
        return conv_reference(region, source)


def conv_reference(region: Region, source: NDArray[Any]) -> NDArray[Any]:
    """The convolution in float64 (exact for codes)."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    zero = 0 if region.activation is None else region.activation.zero_point
    x = torch.from_numpy(source.astype(np.float64) - zero)
    weight = torch.from_numpy(region.weight.decoded().astype(np.float64))
    sums = torch.nn.functional.conv2d(
        x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups
    ).numpy()
    scale = np.float32(1) if region.weight.scale is None else region.weight.scale
    if region.activation is not None:
        scale = scale * np.float32(region.activation.scale)
    bias = np.zeros(shape.outputs, np.float32) if region.bias is None else region.bias
    values = sums * np.reshape(scale, (-1, 1, 1)).astype(np.float64) + bias.reshape(-1, 1, 1)
    return apply_epilogue(values.astype(np.float32), region.epilogue)
