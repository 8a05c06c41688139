"""Sparse convolutions with channels last: the loops of `sparse_dense` over what each output pixel reads.

A tile of output pixels gathers its patch, transposed: for every input channel and tap a vector of pixels. One stored
weight then meets whole vectors, as in Elsen, Dukhan, Gale, Simonyan: Fast sparse convnets. CVPR 2020, which has 1 x 1
convolutions. Taps beyond the image read zero, or its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.integer_sums import float_codes_refusal
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.sparse import SparseBody, sparse_tiles
from mcc.backends.cpu.kernels.tiles import leading_dims, loop_for
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, kernel_function, serial
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

FEWEST_MACS = 250_000  # for two threads, of the weights that are stored


@dataclass(frozen=True)
class SparseConv2d:
    """Ungrouped convolutions with a sparse weight: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_conv2d"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes one group, at least a vector of outputs, and codes that sum exactly."""
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        if region.weight.sparse is None:
            return "the weight is dense"
        if shape.groups != 1:
            return "it has groups"
        if shape.outputs < target.vector_lanes:
            return "it has fewer outputs than a vector"
        return float_codes_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Pixels of a tile, see `sparse_tiles`."""
        return sparse_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _Body(region, Vectors(target), int(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As of any convolution."""
        return conv_reference(region, source, operands)


class _Body(SparseBody):
    def __init__(self, region: Region, vectors: Vectors, width: int) -> None:
        super().__init__(region, vectors, width)
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        self.shape = shape
        self.taps = shape.kernel[0] * shape.kernel[1]
        (self.batch,) = leading_dims(region.source.shape[:1])
        self.rows = self.batch * (shape.result[0] * shape.result[1])

    def function(self, name: str) -> tirx.PrimFunc:
        """The PrimFunc."""
        shape, result = self.shape, (self.batch, *self.shape.result, self.shape.outputs)
        parameters = [
            Parameter("X", (self.batch, *shape.image, shape.inputs), self.region.source_dtype),
            *(Parameter(f"A{i}", result, dtype) for i, dtype in enumerate(self.region.operand_dtypes)),
            *(Parameter(key, array.shape, array.dtype.name) for key, array in self.packed.items()),
            Parameter("Y", result, self.region.output_dtype),
        ]
        return kernel_function(name, parameters, self._emit)

    def _emit(self, x: Expression, *rest: Expression) -> None:
        count, shape = len(self.region.operands), self.shape
        self.arrays = dict(zip(self.packed, rest[count:-1], strict=True))
        self.x = flat(x, self.batch * (shape.image[0] * shape.image[1] * shape.inputs))
        size = self.rows * self.outputs
        self.y, self.operands = flat(rest[-1], size), [flat(a, size) for a in rest[:count]]
        nonzeros = self.packed["values"].size * shape.result[0] * shape.result[1]
        # the last tile repeats the last pixel: equal results are written twice
        loop_for(nonzeros, FEWEST_MACS, self.batch)(
            tirx.floordiv(self.rows + self.width - 1, self.width),
            lambda t: self._tile(lambda r: tirx.min(t * self.width + r, self.rows - 1)),
        )

    def _transpose_in(self, source: Expression, row_of: Any) -> None:
        shape = self.shape
        tops, lefts, images = (B.alloc_buffer((self.width,), "int32", layout=None) for _ in range(3))

        def place(r: Expression) -> None:
            row = B.Bind(T.cast(row_of(r), "int32"))
            pixel = B.Bind(tirx.floormod(row, shape.result[0] * shape.result[1]))
            B.buffer_store(images, tirx.floordiv(row, shape.result[0] * shape.result[1]) * shape.image[0], [r])
            top, left = tirx.floordiv(pixel, shape.result[1]), tirx.floormod(pixel, shape.result[1])
            B.buffer_store(tops, top * shape.stride[0] - shape.before[0], [r])
            B.buffer_store(lefts, left * shape.stride[1] - shape.before[1], [r])

        serial(self.width, place)
        copy = self._copy_vectors if shape.inputs >= self.vectors.lanes else self._copy_elements

        def tap(i: Expression) -> None:
            down = B.Bind(tirx.floordiv(i, shape.kernel[1]) * shape.dilation[0])
            right = B.Bind(tirx.floormod(i, shape.kernel[1]) * shape.dilation[1])
            copy(source, i, lambda r: self._pixel((tops[r] + down, lefts[r] + right), images[r]))

        serial(self.taps, tap)

    def _pixel(self, at: tuple[Expression, Expression], image: Expression) -> tuple[Expression, Expression]:
        """Where the channels of an input pixel start, and whether it lies in the image; beyond it the nearest one."""
        height, width = self.shape.image
        top, left = B.Bind(at[0]), B.Bind(at[1])
        inside = B.Bind(tirx.all(top >= 0, top < height, left >= 0, left < width))
        row, column = (tirx.min(tirx.max(i, 0), n - 1) for i, n in ((top, height), (left, width)))
        start = (T.cast(image, "int64") + row) * width + column
        return B.Bind(start * self.shape.inputs), inside

    @property
    def _outside(self) -> float:
        """What stands for zero beyond the image."""
        return 0.0 if self.region.activation is None else float(self.region.activation.zero_point)

    def _copy_vectors(self, source: Expression, tap: Expression, pixel: Any) -> None:
        """A block of channels by a block of pixels at a time, transposed in registers."""
        v, inputs = self.vectors, self.shape.inputs
        last = inputs - v.lanes  # the last block overlaps the one before it

        def pixels(t: Expression) -> None:
            places = [pixel(t * v.lanes + r) for r in range(v.lanes)]

            def channels(b: Expression) -> None:
                k = B.Bind(tirx.min(b * v.lanes, last))
                rows = []
                for start, inside in places:
                    value = self._load_floats(start + k)
                    if self.shape.pads:
                        value = tirx.if_then_else(inside, value, v.constant(self._outside))
                    rows.append(B.Bind(value))
                for c, column in enumerate(v.transpose(rows)):
                    v.store(source, ((k + c) * self.taps + tap) * self.width + t * v.lanes, column)

            serial(-(-inputs // v.lanes), channels)

        serial(self.width // v.lanes, pixels)

    def _copy_elements(self, source: Expression, tap: Expression, pixel: Any) -> None:
        def one(r: Expression) -> None:
            start, inside = pixel(r)

            def channel(k: Expression) -> None:
                value = T.cast(self.x[start + k], "float32")
                value = tirx.if_then_else(inside, value, T.float32(self._outside)) if self.shape.pads else value
                B.buffer_store(source, value, [(k * self.taps + tap) * self.width + r])

            serial(self.shape.inputs, channel)

        serial(self.width, one)
