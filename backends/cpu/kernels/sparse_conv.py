"""Sparse convolutions with channels first: one stored weight meets whole vectors of neighbouring pixels.

The rows of input that a tile of output pixels reads are copied to planes with their padding: of each channel one for
each phase of the stride. There the pixels of a tile lie end to end, rows and the gaps between them, so that every tap
of the window is an offset: y[n] += w * planes[offset(k, tap) + pixel]. The sums of a tile stay in registers while an
output's weights go by, a block of channels that the first cache holds after another.

Elsen, Dukhan, Gale, Simonyan: Fast sparse convnets. CVPR 2020, which has 1 x 1 convolutions; Park et al.: Faster CNNs
with direct sparse convolutions and guided pruning. ICLR 2017, which has the offsets. Integer codes go through the same
loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import Epilogue, channel_vectors
from mcc.backends.cpu.integer_sums import float_codes_refusal, float_start
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.pixel_tiles import (
    PixelTile,
    Planes,
    columns_copied,
    outputs_alike,
    pixel_tiles,
    plane_shape,
    stored_elements,
)
from mcc.backends.cpu.kernels.tiles import leading_dims, loop_for
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, branch, flat, kernel_function, serial
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

FEWEST_MACS = 250_000  # for two threads, of the weights that are stored
SHARED = 4  # pieces of work of one image, of which outputs make up what tiles of pixels lack


@dataclass(frozen=True)
class SparseConv2d:
    """Convolutions with a sparse weight: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_conv2d"
    anchor: ClassVar[ops.Op] = ops.CONV2D

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes a fixed height and width, and codes that sum exactly."""
        del target
        shape = plane_shape(region)
        if isinstance(shape, str):
            return shape
        if not isinstance(region.weight.sparse, SparseArrays):
            return "the weight is dense"
        return float_codes_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See pixel_tiles.py."""
        return tuple(map(str, pixel_tiles(region, target)))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        pixels = PixelTile.parse(tile)
        body = _Body(region, Vectors(target, pixels.lanes), pixels)
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As of any convolution."""
        last = [np.moveaxis(a, 1, 3) for a in (source, *operands)]
        return np.ascontiguousarray(np.moveaxis(conv_reference(region, last[0], last[1:]), 3, 1))


@dataclass(frozen=True)
class DepthwisePlanes(SparseConv2d):
    """Convolutions of single channels in float between sparse ones: every weight is one that is stored."""

    name: str = "depthwise_planes"

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes a fixed height and width, and dense weights."""
        del target
        shape = plane_shape(region)
        if isinstance(shape, str):
            return shape
        if not shape.depthwise or region.weight.dense is None:
            return "outputs read several channels, or the weight is sparse"
        return "the activations are quantized" if region.activation is not None else None


class _Body:
    """One kernel."""

    def __init__(self, region: Region, vectors: Vectors, tile: PixelTile) -> None:
        shape, stored = plane_shape(region), stored_elements(region.weight)
        assert isinstance(shape, ConvShape)
        self.region, self.vectors, self.shape, self.tile = region, vectors, shape, tile
        self.planes = Planes.of(tile, shape)
        self.size = -(-(shape.inputs * self.planes.channel) // vectors.lanes) * vectors.lanes + self.planes.extent
        narrowest = min(columns_copied(tile, shape, self.planes), default=1)
        self.copied_lanes = min(1 << narrowest.bit_length() - 1, vectors.lanes)
        self.unit = max(1, int(np.gcd.reduce(self._tap_offsets())))
        pieces = math.prod(-(-r // t) for r, t in zip(shape.result, (tile.rows, tile.columns), strict=True))
        chunks = min(-(-SHARED // pieces), -(-shape.outputs // tile.outputs))
        self.each = -(-shape.outputs // (chunks * tile.outputs)) * tile.outputs
        self.chunks = -(-shape.outputs // self.each)
        self.alike = outputs_alike(region.weight, tile.outputs)
        self.packed = self._pack(stored) | channel_vectors(region) | float_start(region)
        (self.batch,) = leading_dims(region.source.shape[:1])

    def _pack(self, sparse: SparseArrays) -> dict[str, NDArray[Any]]:
        """The weights in the order in which they are read.

        For each chunk of outputs and each block of channels, its outputs sorted by how many weights they have, and cut
        into sets of `tile.outputs`: step s of a set holds the s-th weight of each of its outputs, zeros at the end.

        Returns:
            values: [steps, outputs of a set]; offsets: the same, where in the planes a weight's pixels begin, in units,
            or one a step where the outputs of a set are alike;
            starts: int32, in steps, [chunks * blocks * sets + 1]; order: int32, which output of the chunk each of a set
            is.
        """
        shape, tile, taps = self.shape, self.tile, math.prod(self.shape.kernel)
        rows = np.repeat(np.arange(shape.outputs), np.diff(sparse.row_pointers))
        columns = sparse.columns.astype(np.int64) + rows // shape.group_outputs * (shape.group_inputs * taps)
        block = columns // (-(-shape.inputs // tile.blocks) * taps)
        starts, order, kept, owners = [0], [], [], []
        for chunk in range(self.chunks):
            for b in range(tile.blocks):
                here = np.flatnonzero((rows // self.each == chunk) & (block == b))
                ends = np.searchsorted(rows[here], chunk * self.each + np.arange(self.each + 1))
                counts = np.diff(ends)
                ranked = np.arange(self.each) if self.alike else np.argsort(-counts, kind="stable")
                order.append(ranked)
                for first in range(0, self.each, tile.outputs):
                    some = ranked[first : first + tile.outputs]
                    steps = np.full((counts[some].max(), tile.outputs), -1)
                    for i, output in enumerate(some):
                        steps[: counts[output], i] = here[ends[output] : ends[output + 1]]
                    kept.append(steps)
                    owners.append(np.tile(np.minimum(chunk * self.each + some, shape.outputs - 1), len(steps)))
                    starts.append(starts[-1] + len(steps))
        if starts[-1] == 0:  # kernels take no empty arrays
            kept.append(np.full((1, tile.outputs), -1))
            owners.append(np.zeros(tile.outputs, np.int64))
        at = np.concatenate(kept).reshape(-1)
        offsets = self._tap_offsets() // self.unit
        narrow = np.uint16 if offsets.max() < 1 << 16 else np.int32
        values = np.append(sparse.values, 0)  # what -1 stands for
        # where no weight is, an input of the output's own group is multiplied by zero
        owner = np.concatenate(owners) // shape.group_outputs * (shape.group_inputs * taps)
        read = offsets[np.where(at < 0, owner, np.append(columns, 0)[at])].astype(narrow)
        return {
            "values": values[at].astype(sparse.values.dtype), "offsets": read[:: tile.outputs] if self.alike else read,
            "starts": np.array(starts, np.int32), "order": np.concatenate(order).astype(np.int32),
        }  # fmt: skip

    def _tap_offsets(self) -> NDArray[np.int64]:
        """Where each tap of each channel begins in the planes, [in * height * width]."""
        shape, planes = self.shape, self.planes
        taps = [planes.offset((d, r), shape) for d in range(shape.kernel[0]) for r in range(shape.kernel[1])]
        return np.add.outer(np.arange(shape.inputs) * planes.channel, taps).reshape(-1)

    def function(self, name: str) -> tirx.PrimFunc:
        """The PrimFunc."""
        whole = conv_shape(self.region)
        assert isinstance(whole, ConvShape)
        result = (self.batch, whole.outputs, *whole.result)
        parameters = [
            Parameter("X", (self.batch, whole.inputs, *whole.image), self.region.source_dtype),
            *(Parameter(f"A{i}", result, dtype) for i, dtype in enumerate(self.region.operand_dtypes)),
            *(Parameter(key, array.shape, array.dtype.name) for key, array in self.packed.items()),
            Parameter("Y", result, self.region.output_dtype),
        ]
        return kernel_function(name, parameters, self._emit)

    def _emit(self, x: Expression, *rest: Expression) -> None:
        shape, tile, count = self.shape, self.tile, len(self.region.operands)
        self.arrays = dict(zip(self.packed, rest[count:-1], strict=True))
        self.x = flat(x, self.batch * (shape.inputs * math.prod(shape.image)))
        size = self.batch * (shape.outputs * math.prod(shape.result))
        operands, y = [flat(a, size) for a in rest[:count]], flat(rest[-1], size)
        self.epilogue = Epilogue(self.vectors, self.region, operands, y)
        height, width = shape.result
        bands, strips = -(-height // tile.rows), -(-width // tile.columns)

        def piece(i: Expression) -> None:
            # the last tiles overlap the ones before them: equal results are written twice
            left = B.Bind(tirx.min(tirx.floormod(i, strips) * tile.columns, width - tile.columns))
            band = tirx.floormod(tirx.floordiv(i, strips), bands)
            top = B.Bind(tirx.min(band * tile.rows, height - tile.rows))
            chunk = B.Bind(T.cast(tirx.floormod(tirx.floordiv(i, strips * bands), self.chunks), "int32"))
            image = B.Bind(T.cast(tirx.floordiv(i, strips * bands * self.chunks), "int64"))
            self._tile(image, (top, left), chunk)

        macs = self.packed["values"].size * math.prod(shape.result)
        loop_for(macs, FEWEST_MACS, self.batch)(self.batch * (bands * strips * self.chunks), piece)

    def _tile(self, image: Expression, corner: tuple[Expression, Expression], chunk: Expression) -> None:
        """The outputs of a chunk for the tile of pixels that begins at `corner`."""
        tile, extent, each = self.tile, self.planes.extent, self.each
        source, base = self.x, image * (self.shape.inputs * math.prod(self.shape.image)) + corner[1]
        if not tile.in_place:
            source, base = B.alloc_buffer((self.size,), "float32", layout=None), tirx.const(0, "int64")
            self._copy_planes(source, image, corner, chunk)
        sets = each // tile.outputs
        held, lanes = each if tile.blocks > 1 else tile.outputs, self.vectors.lanes
        beyond = (tile.rows - 1) * self.planes.pitch + -(-tile.columns // lanes) * lanes - extent  # is read, not used
        sums = B.alloc_buffer((extent * held + max(0, beyond),), "float32", layout=None)

        def write(local: Expression, place: Expression) -> None:
            n = B.Bind(chunk * each + local)
            whole = self.shape.outputs % each == 0
            branch(whole or n < self.shape.outputs, lambda: self._write(image, corner, sums, place, n))

        for block in range(tile.blocks):

            def some(i: Expression, block: int = block) -> None:
                number = B.Bind((chunk * tile.blocks + block) * sets + i)
                outputs = [B.Bind(self.arrays["order"][number * tile.outputs + o]) for o in range(tile.outputs)]
                places = [(n if tile.blocks > 1 else o) * extent for o, n in enumerate(outputs)]
                self._sum((source, base), number, sums, places, fresh=block == 0)
                if tile.blocks == 1:
                    for n, place in zip(outputs, places, strict=True):
                        write(n, place)

            serial(sets, some)
        if tile.blocks > 1:
            serial(each, lambda n: write(n, n * extent))

    def _sum(
        self,
        planes: tuple[Expression, Expression],
        number: Expression,
        sums: Expression,
        places: list[Any],
        *,
        fresh: bool,
    ) -> None:
        """Add the products of a set's weights, for all pixels of the tile; `planes`: an array, and where they begin."""
        source, base = planes
        v, arrays, width = self.vectors, self.arrays, self.tile.outputs
        registers = v.registers(width, self.planes.extent // v.lanes, "float32")
        for row, place in zip(registers, places, strict=True):
            for t, register in enumerate(row):
                register.set(v.constant(0.0) if fresh else v.load(sums, place + t * v.lanes))
        start = B.Bind(arrays["starts"][number])

        def pixels(at: Expression) -> list[Expression]:
            begin = B.Bind(base + T.cast(arrays["offsets"][at], "int64") * self.unit)
            return [v.load(source, begin + t * v.lanes) for t in range(len(registers[0]))]

        with B.serial(0, arrays["starts"][number + 1] - start) as s:
            held = [B.Bind(x) for x in pixels(start + s)] if self.alike else []
            for o, row in enumerate(registers):
                at = (start + s) * width + o
                loaded = held or pixels(at)
                w = B.Bind(v.splat(T.cast(arrays["values"][at], "float32")))
                for x, register in zip(loaded, row, strict=True):
                    register.set(v.fma(x, w, register.get()))
        for row, place in zip(registers, places, strict=True):
            for t, register in enumerate(row):
                v.store(sums, place + t * v.lanes, register.get())

    def _write(
        self, image: Expression, corner: tuple[Expression, Expression], sums: Expression, place: Any, n: Expression
    ) -> None:
        """The tile's pixels without the gaps, scaled, through the epilogue, to where they lie in the output."""
        v, arrays, tile, planes = self.vectors, self.arrays, self.tile, self.planes
        pixels = tile.rows * tile.columns
        line, begin = sums, place
        if tile.rows > 1 and planes.pitch > tile.columns:
            line, begin = B.alloc_buffer((pixels + v.lanes,), "float32", layout=None), 0
            for r in range(tile.rows):  # beyond a row's end is written what the next row covers
                for c in range(0, tile.columns, v.lanes):
                    v.store(line, r * tile.columns + c, v.load(sums, place + r * planes.pitch + c))
        bias = B.Bind(v.splat(arrays["bias"][n]))
        scale = B.Bind(v.splat(arrays["scale"][n])) if "scale" in arrays else None
        start = B.Bind(v.splat(arrays["start"][n])) if "start" in arrays else None
        height, width = self.shape.result
        plane = image * (self.shape.outputs * height * width) + T.cast(n, "int64") * (height * width)
        to = B.Bind(plane + corner[0] * width + corner[1])

        def vector(i: Expression, used: int) -> None:
            value = v.load(line, begin + i)
            value = value if start is None else value + start
            value = value + bias if scale is None else v.fma(value, scale, bias)
            self.epilogue.store(value, to + i, used)

        for i in range(0, pixels, v.lanes):
            vector(min(i, max(pixels - v.lanes, 0)), min(v.lanes, pixels))

    def _copy_planes(
        self, planes: Expression, image: Expression, corner: tuple[Expression, Expression], chunk: Expression
    ) -> None:
        """What the chunk's outputs read for the tile, as float32, zero beyond the image, or the code of zero."""
        shape, at, v, activation = self.shape, self.planes, self.vectors, self.region.activation
        outside = v.constant(0.0 if activation is None else float(activation.zero_point))
        source = B.Bind(image * (shape.inputs * math.prod(shape.image)))

        def channel(k: Expression) -> None:
            if shape.pads:
                serial(at.channel // v.lanes, lambda i: v.store(planes, k * at.channel + i * v.lanes, outside))
            begin = B.Bind(source + k * math.prod(shape.image))
            for p, phase in enumerate(at.phases):
                for s, shift in enumerate(at.shifts):
                    place = k * at.channel + (p * len(at.shifts) + s) * (at.rows * at.pitch)
                    self._copy_plane(planes, place, begin, corner, (phase, shift))

        if shape.groups == 1:
            serial(shape.inputs, channel)
            return
        last = tirx.min((chunk + 1) * self.each, shape.outputs) - 1
        first, end = (tirx.floordiv(n, shape.group_outputs) for n in (chunk * self.each, last))
        start = B.Bind(first * shape.group_inputs)
        serial((end + 1) * shape.group_inputs - start, lambda k: channel(start + k))

    def _copy_plane(
        self, planes: Expression, plane: Expression, source: Expression, corner: tuple[Any, Any], phase: tuple[int, int]
    ) -> None:
        """One plane of one channel."""
        shape, at, (down, right) = self.shape, self.planes, self.shape.stride
        # column c of the plane is column c * right + shift of the image, where that has one
        shift = corner[1] * right + (phase[1] - shape.before[1])
        begin = B.Bind(tirx.max(0, tirx.floordiv(right - 1 - shift, right)))
        end = B.Bind(tirx.min(at.pitch, tirx.floordiv(shape.image[1] - 1 - shift, right) + 1))

        def row(r: Expression) -> None:
            y = B.Bind((corner[0] + r) * down + (phase[0] - shape.before[0]))

            def copy() -> None:
                begins = source + y * shape.image[1] + shift + begin * right
                self._copy_row(planes, plane + r * at.pitch + begin, begins, end - begin, right)

            branch(tirx.all(y >= 0, y < shape.image[0]), copy)

        serial(at.rows, row)

    def _copy_row(self, planes: Expression, to: Expression, begin: Expression, count: Expression, stride: int) -> None:
        """`count` floats, from every `stride`-th element."""
        to, begin = B.Bind(to), B.Bind(T.cast(begin, "int64"))
        lanes = self.copied_lanes if stride <= 2 else 1
        if lanes == 1:
            serial(count, lambda c: B.buffer_store(planes, T.cast(self.x[begin + c * stride], "float32"), [to + c]))
            return

        def piece(i: Expression) -> None:
            c = B.Bind(tirx.min(i * lanes, count - lanes))  # the last piece overlaps the one before it
            value = self.vectors.load(self.x, begin + c * stride, lanes)
            if stride == 2:
                # from one element earlier, so that nothing beyond the row is read
                more = self.vectors.load(self.x, begin + c * 2 + (lanes - 1), lanes)
                value = tirx.Shuffle([value, more], [*range(0, lanes, 2), *range(lanes + 1, 2 * lanes, 2)])
            self.vectors.store(planes, to + c, T.cast(value, f"float32x{lanes}"), lanes)

        serial(tirx.floordiv(count + (lanes - 1), lanes), piece)
