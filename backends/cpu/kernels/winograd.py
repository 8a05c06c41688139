"""3x3 convolutions of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead of 36.

Tiles of 4x4 input pixels are transformed, 16 small matrix products over the channels follow, and their results are
transformed to 2x2 output pixels. Lanes are channels throughout. A block of tiles stays in cache; the last blocks of
tiles and of outputs overlap those before. Sums are those of the direct form up to rounding, in float32 a few units in
the last place more; an infinity in the input makes NaNs of all pixels of its tiles. Weights take 16 / 9 of the memory.
Lavin, Gray: Fast algorithms for convolutional neural networks. CVPR 2016, section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.kernels.ahead import NextPanel
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody
from mcc.backends.cpu.kernels.tiles import TileShape, balanced, loop_for, parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors, branch, serial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.kernel import Region
    from mcc.target import Target

PREFIX = "winograd "
FEWEST_CHANNELS = 32
POINTS = 16
FEWEST_PIXELS = 64  # of the output; below, reading the larger weights takes longer than what is saved
# of transformed input that a block of tiles has: few where the weights stay in the second level of the cache beside
# it, many where each block reads them from further away
FEW_BYTES, MANY_BYTES = 256 << 10, 1 << 20
FEWEST_BLOCKS = 4  # from here on threads take blocks of tiles, not parts of one
FEWEST_MACS = 600_000  # of an image, in the direct form, for two threads
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def winograd_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles of a block and register tile for a region, few and many; none where it has no such form."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    fits = (shape.kernel, shape.stride, shape.dilation, shape.groups) == ((3, 3), (1, 1), (1, 1), 1)
    enough = min(shape.inputs, shape.outputs) >= FEWEST_CHANNELS and math.prod(shape.result) >= FEWEST_PIXELS
    if not fits or not enough or shape.varies or region.weight.scale is not None:
        return ()
    register = TileShape(14 if target.vector_registers == 32 else 6, 2)
    size = register.rows * POINTS * shape.inputs * 4
    count = math.prod(-(-s // 2) for s in shape.result)
    blocks = [-(-count // (n * register.rows)) for n in (max(1, FEW_BYTES // size), -(-MANY_BYTES // size))]
    return tuple(dict.fromkeys(f"{PREFIX}{-(-count // n)} {register}" for n in blocks))


class WinogradConvolution(ConvolutionBody):
    """The loops of one such convolution, by the text of its tile: tiles of a block, and the register tile."""

    def __init__(self, region: Region, vectors: Vectors, text: str) -> None:
        super().__init__(region, vectors)
        size, register = text.removeprefix(PREFIX).split()
        self.tile, shape = parse_tile(register), self.shape
        self.width = min(self.tile.vectors * vectors.lanes, shape.outputs // vectors.lanes * vectors.lanes)
        self.grid = tuple(-(-s // 2) for s in shape.result)
        self.count = int(size)  # tiles of a block
        self.tile_blocks = -(-self.grid[0] * self.grid[1] // self.count)
        self.output_blocks = -(-shape.outputs // self.width)
        self.packed: dict[str, NDArray[Any]] = {
            "weight": self._transformed(region.weight.decoded()), **channel_vectors(region)
        }  # fmt: skip

    def _transformed(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """[out, in, 3, 3] as [block of outputs][point][in][output of the block]."""
        points = np.einsum("ik,ockl,jl->ijco", _G, weight.astype(np.float64), _G, optimize=True)
        flat_points = points.reshape(POINTS, self.shape.inputs, self.shape.outputs).astype(np.float32)
        last = self.shape.outputs - self.width
        starts = [min(b * self.width, last) for b in range(self.output_blocks)]
        return np.concatenate([flat_points[:, :, s : s + self.width].reshape(-1) for s in starts])

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        loop = loop_for(self.shape.macs, FEWEST_MACS)
        outer, inner = (loop, serial) if self.tile_blocks >= FEWEST_BLOCKS else (serial, loop)
        outer(self.batch * self.tile_blocks, lambda i: self._block(i, inner))

    def _block(self, i: Expression, loop: Any) -> None:
        n, b = tirx.floordiv(i, self.tile_blocks), tirx.floormod(i, self.tile_blocks)
        n = B.Bind(T.cast(n, "int64"))
        first = B.Bind(T.cast(tirx.min(b * self.count, self.grid[0] * self.grid[1] - self.count), "int64"))
        room = B.alloc_buffer((POINTS * self.count * self.shape.inputs,), "float32", layout=None)
        loop(self.count, lambda t: self._transform(n, first + t, t, room))
        loop(self.output_blocks, lambda o: self._outputs(n, first, o, room))

    def _transform(self, n: Expression, p: Expression, t: Expression, room: Expression) -> None:
        """Tile number `p` of the image, as number `t` of the block."""
        shape, v = self.shape, self.v
        (height, width), inputs = shape.image, shape.inputs
        y = B.Bind(tirx.floordiv(p, self.grid[1]) * 2 - shape.before[0])
        x = B.Bind(tirx.floormod(p, self.grid[1]) * 2 - shape.before[1])

        def channels(inside: bool) -> None:  # noqa: FBT001
            def some(c: Expression) -> None:
                first = B.Bind(tirx.min(c * v.lanes, inputs - v.lanes))

                def pixel(i: int, j: int) -> Expression:
                    if inside:
                        return v.load(self.x, ((n * height + y + i) * width + x + j) * inputs + first)
                    here = tirx.all(y + i >= 0, y + i < height, x + j >= 0, x + j < width)
                    row, column = (
                        tirx.max(0, tirx.min(at, extent - 1)) for at, extent in ((y + i, height), (x + j, width))
                    )
                    held = v.load(self.x, ((n * height + row) * width + column) * inputs + first)
                    return tirx.Select(here, held, v.constant(0.0))

                rows = [_input_row([v.hold(pixel(i, j)) for j in range(4)]) for i in range(4)]
                held = [[v.hold(e) for e in row] for row in rows]
                for j in range(4):
                    for i, value in enumerate(_input_row([held[k][j] for k in range(4)])):
                        v.store(room, ((i * 4 + j) * self.count + t) * inputs + first, value)

            serial(-(-inputs // v.lanes), some)

        inside = tirx.all(y >= 0, y + 3 < height, x >= 0, x + 3 < width)
        branch(inside, lambda: channels(True), lambda: channels(False))

    def _outputs(self, n: Expression, first: Expression, o: Expression, room: Expression) -> None:
        """One block of outputs of all tiles of a block."""
        products = B.alloc_buffer((POINTS * self.count * self.width,), "float32", layout=None)
        channel = B.Bind(T.cast(tirx.min(o * self.width, self.shape.outputs - self.width), "int64"))

        def point(e: Expression) -> None:
            for start, number, rows in balanced(self.count, self.tile.rows):
                serial(number, lambda r, s=start, m=rows: self._products(e, o, (s + r * m, m), (room, products)))  # type: ignore[misc]

        serial(POINTS, point)
        serial(self.count, lambda t: self._finish(n, first + t, t, channel, products))

    def _products(
        self, e: Expression, o: Expression, rows: tuple[Expression, int], buffers: tuple[Expression, Expression]
    ) -> None:
        """Rows (tiles) times the weights of point `e`: a register tile."""
        v, inputs, (first, count), (room, products) = self.v, self.shape.inputs, rows, buffers
        vectors = self.width // v.lanes
        sums = v.registers(count, vectors, "float32")
        for row in sums:
            for register in row:
                register.set(v.constant(0.0))
        weights = B.Bind(T.cast(o * POINTS + e, "int64") * (inputs * self.width))
        start = B.Bind(T.cast(e * self.count + first, "int64"))
        size = self.packed["weight"].size
        following = NextPanel(self.arrays["weight"], size, weights + inputs * self.width, self.width, inputs)
        ask = following.share(v, (first, count, self.count))
        with B.serial(0, inputs) as k:
            ask(k)
            w = [B.Bind(v.load(self.arrays["weight"], weights + k * self.width + j * v.lanes)) for j in range(vectors)]
            for i, row in enumerate(sums):
                value = B.Bind(v.splat(room[(start + i) * inputs + k]))
                for register, part in zip(row, w, strict=True):
                    register.set(v.fma(value, part, register.get()))
        for i, row in enumerate(sums):
            for j, register in enumerate(row):
                v.store(products, (start + i) * self.width + j * v.lanes, register.get())

    def _finish(self, n: Expression, p: Expression, t: Expression, channel: Expression, products: Expression) -> None:
        """The 2x2 outputs of a tile; where the output's size is odd, not all of them exist."""
        v, (height, width) = self.v, self.shape.result
        y, x = B.Bind(tirx.floordiv(p, self.grid[1]) * 2), B.Bind(tirx.floormod(p, self.grid[1]) * 2)
        for j in range(self.width // v.lanes):
            bias = B.Bind(v.load(self.arrays["bias"], channel + j * v.lanes))
            at = [
                [v.hold(v.load(products, ((r * 4 + c) * self.count + t) * self.width + j * v.lanes)) for c in range(4)]
                for r in range(4)
            ]
            rows = [[v.hold(e) for e in _output_row(row)] for row in at]
            for c in range(2):
                for r, value in enumerate(_output_row([row[c] for row in rows])):
                    index = ((n * height + y + r) * width + x + c) * self.shape.outputs + channel + j * v.lanes
                    done = v.hold(value + bias)

                    def store(value: Expression = done, index: Expression = index) -> None:
                        self.epilogue.store(value, index, v.lanes)

                    exists = tirx.all(y + r < height, x + c < width)
                    branch(True if (r, c) == (0, 0) else exists, store)


def _input_row(d: list[Expression]) -> list[Expression]:
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_row(m: list[Expression]) -> list[Expression]:
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
