"""Convolutions with channels last: any kernel size, stride, dilation, padding and groups, height and width.

Lanes are output channels. A tile of pixels times a few vectors stays in registers while it runs over the kernel's
window and the input channels, each input value broadcast; the source is read as it lies, or through one padded copy.
Where the channels of a group are no multiple of a vector, the last vector overlaps the one before it, so that every
store is whole. Groups with fewer outputs than a vector share one (small_groups.py), or are joined, with zeros between
them, where they fill none. int8 codes are read four channels a word, which `dot4` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from mcc import ops
from mcc.backends.cpu.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.conv2d_loops import FloatConvolution, IntegerConvolution
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape, conv_tiles
from mcc.backends.cpu.kernels.small_groups import FloatSmallGroups, IntegerSmallGroups, group_vectors, shares_vectors
from mcc.backends.cpu.kernels.tile_registers import TILE
from mcc.backends.cpu.kernels.tiled_convolution import TiledIntegerConvolution, convolution_tiles
from mcc.backends.cpu.kernels.tiles import parse_tile
from mcc.backends.cpu.kernels.winograd import PREFIX, WinogradConvolution, winograd_tiles
from mcc.backends.cpu.microkernel import Vectors
from mcc.backends.kernel import Lowered, Region, apply_epilogue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target


def _refusal(region: Region) -> str | None:
    if region.weight.sparse is not None:
        return "the weight is sparse"
    if region.rounds:
        return "the weight is bfloat16"
    shape = conv_shape(region)
    return shape if isinstance(shape, str) else None


@dataclass(frozen=True)
class Conv2dFloat:
    """float32 activations; weights float32, or int8 with a scale for each output channel."""

    name: str = "conv2d_f32"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes every conv2d of a fixed number of channels."""
        del target
        return "the activations are quantized" if region.activation is not None else _refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Those of Winograd's form where it has one, then `conv_tiles`."""
        return (*winograd_tiles(region, target), *conv_tiles(region, target))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text, and winograd.py."""
        if tile.startswith(PREFIX):
            fast = WinogradConvolution(region, Vectors(target), tile)
            return Lowered(fast.function(self.name), fast.packed)
        vectors = group_vectors(region, target)
        form = FloatSmallGroups if shares_vectors(region, vectors.lanes, FloatSmallGroups.word) else FloatConvolution
        body = form(region, vectors, parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Float64 sums."""
        return conv_reference(region, source, operands)


@dataclass(frozen=True)
class Conv2dInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums."""

    name: str = "conv2d_int8"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes what `Conv2dFloat` takes, with int8 weights and activations."""
        del target
        if region.activation is None or region.weight.scale is None:
            return "weight and activations are not both int8"
        return _refusal(region) or sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """In tile registers where there are any, then `conv_tiles`."""
        return (*convolution_tiles(region, target, IntegerConvolution.word), *conv_tiles(region, target))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        if tile == TILE:
            tiled = TiledIntegerConvolution(region, Vectors(target))
            return Lowered(tiled.function(self.name), tiled.packed)
        vectors = group_vectors(region, target)
        shared = shares_vectors(region, vectors.lanes, IntegerSmallGroups.word)
        body = (IntegerSmallGroups if shared else IntegerConvolution)(region, vectors, parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return conv_reference(region, source, operands)


def conv_reference(region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
    """The convolution in float64 (exact for codes)."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    zero = 0 if region.activation is None else region.activation.zero_point
    x = torch.from_numpy(region.as_read(source).astype(np.float64) - zero).permute(0, 3, 1, 2)
    x = torch.nn.functional.pad(x, [shape.before[1], shape.after[1], shape.before[0], shape.after[0]])
    weight = torch.from_numpy(region.weight.decoded().astype(np.float64))
    sums = torch.nn.functional.conv2d(x, weight, None, shape.stride, 0, shape.dilation, shape.groups)
    scale = np.float32(1) if region.weight.scale is None else region.weight.scale
    if region.activation is not None:
        scale = scale * np.float32(region.activation.scale)
    bias = np.zeros(shape.outputs, np.float32) if region.bias is None else region.bias
    values = sums.permute(0, 2, 3, 1).numpy() * scale.astype(np.float64) + bias
    return apply_epilogue(values.astype(np.float32), region.epilogue, operands)
