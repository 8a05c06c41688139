"""Tiles of output pixels for convolutions with channels first, and the planes of input that a tile reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mcc.backends.cpu.kernels.conv_shape import ConvShape, Pair, conv_shape
from mcc.backends.kernel import SparseArrays

if TYPE_CHECKING:
    from mcc.backends.kernel import Region, StoredWeight
    from mcc.target import Target

MOST_PIXELS = 128
HALF = 8  # lanes of vectors of 256 bits, of which a CPU with 512 may do as much a cycle, and waste less at the edges
FIRST_CACHE = 24 << 10  # bytes of the first-level cache for planes
SECOND_CACHE = 400_000  # bytes of the second one
FEWEST_WEIGHTS = 6  # of an output and a block of channels: what its sums are loaded and stored for
MOST_PLANES = 9  # of a channel, each of which is copied by code of its own
SAME_SETS = 1024  # bytes: channels so far apart, or a multiple, crowd into few sets of a cache


@dataclass(frozen=True)
class PixelTile:
    """A tile.

    Attributes:
        rows, columns: of output pixels.
        blocks: into which the input channels are cut.
        outputs: whose weights go by together.
        lanes: pixels of a vector.
        mode: "packed" planes; "aligned", where every tap across has planes of its own and every row begins a vector, so
            that no load crosses two lines of the cache; "in place", where the input is read as it lies.
    """

    rows: int
    columns: int
    blocks: int
    outputs: int
    lanes: int
    mode: str

    @property
    def aligned(self) -> bool:
        """See `mode`."""
        return self.mode == "aligned"

    @property
    def in_place(self) -> bool:
        """See `mode`."""
        return self.mode == "in place"

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}/{self.blocks}*{self.outputs} by {self.lanes} {self.mode}"

    @classmethod
    def parse(cls, text: str) -> PixelTile:
        """Read what `str` wrote."""
        rows, columns, blocks, outputs, lanes, mode = re.split(r"[x/*]| by | ", text, maxsplit=5)
        return cls(int(rows), int(columns), int(blocks), int(outputs), int(lanes), mode)


@dataclass(frozen=True)
class Planes:
    """The input of a tile: [channels][phases][shifts][rows][pitch] float32.

    Attributes:
        phases: rows of the image that a plane begins with, those of a stride or of each tap.
        shifts: the same of columns.
        rows: of a plane.
        pitch: of a row.
        channel: floats from one channel to the next.
        extent: pixels of the tile with the gaps between its rows, in whole vectors.
    """

    phases: tuple[int, ...]
    shifts: tuple[int, ...]
    rows: int
    pitch: int
    channel: int
    extent: int

    @classmethod
    def of(cls, tile: PixelTile, shape: ConvShape) -> Planes:
        """Those of a tile."""
        (downs, rights), (down, right), lanes = _taps(shape), shape.stride, tile.lanes
        apart = downs[-1] // down > (len(downs) - 1) * tile.rows  # more rows lie between the taps than they read
        phases = tuple(downs) if apart else tuple(sorted({d % down for d in downs}))
        shifts = tuple(rights) if tile.aligned else tuple(sorted({r % right for r in rights}))
        rows = tile.rows + (0 if apart else downs[-1] // down)
        pitch = _whole(tile.columns, lanes) if tile.aligned else tile.columns + rights[-1] // right
        extent = _whole((tile.rows - 1) * pitch + tile.columns, lanes)
        channel = _whole(len(phases) * len(shifts) * rows * pitch, lanes)
        return cls(phases, shifts, rows, pitch, prod(shape.image) if tile.in_place else channel, extent)

    def offset(self, tap: Pair, shape: ConvShape) -> int:
        """Where a tap of the window begins in a channel."""
        (down, right), (downs, rights) = shape.stride, _taps(shape)
        below, across = downs[tap[0]], rights[tap[1]]
        row, phase = (0, below) if self.phases == tuple(downs) else divmod(below, down)
        column, shift = (0, across) if self.shifts == tuple(rights) else divmod(across, right)
        plane = self.phases.index(phase) * len(self.shifts) + self.shifts.index(shift)
        return (plane * self.rows + row) * self.pitch + column


def _taps(shape: ConvShape) -> tuple[list[int], list[int]]:
    """How far down and right the window's taps are."""
    downs, rights = ([i * d for i in range(k)] for k, d in zip(shape.kernel, shape.dilation, strict=True))
    return downs, rights


def _whole(size: int, lanes: int) -> int:
    return -(-size // lanes) * lanes


def plane_shape(region: Region) -> ConvShape | str:
    """The sizes of a region's convolution, its image one row where no window and no stride needs two; or why none."""
    shape = conv_shape(region)
    if isinstance(shape, str) or shape.kernel != (1, 1) or shape.stride != (1, 1) or shape.pads:
        return shape
    return replace(shape, image=(1, prod(shape.image)))


def stored_elements(weight: StoredWeight) -> SparseArrays:
    """A convolution's weights one by one: those that a sparse one has, or all of a dense one."""
    if isinstance(weight.sparse, SparseArrays):
        return weight.sparse.by_element
    assert weight.dense is not None
    rows = weight.dense.reshape(len(weight.dense), -1)
    ends = np.arange(len(rows) + 1) * rows.shape[1]
    return SparseArrays(rows.reshape(-1), np.tile(np.arange(rows.shape[1]), len(rows)), ends)


def outputs_alike(weight: StoredWeight, count: int) -> bool:
    """Whether every `count` outputs, from the first on, have their weights at the same inputs."""
    sparse = weight.sparse
    return isinstance(sparse, SparseArrays) and count > 1 and sparse.block[0] % count == 0


def columns_copied(tile: PixelTile, shape: ConvShape, planes: Planes) -> list[int]:
    """How many columns of the image each plane has that some tile reads, where it has any."""
    width, counts = shape.result[1], []
    for left in {min(i * tile.columns, width - tile.columns) for i in range(-(-width // tile.columns))}:
        for shift in planes.shifts:
            begin = left * shape.stride[1] + shift - shape.before[1]
            inside = [c for c in range(planes.pitch) if 0 <= c * shape.stride[1] + begin < shape.image[1]]
            counts.append(len(inside))
    return [c for c in counts if c]


def pixel_tiles(region: Region, target: Target) -> tuple[PixelTile, ...]:
    """For each width of vectors and each mode the tile that is best by `_cost`, the best of all first."""
    shape = plane_shape(region)
    assert isinstance(shape, ConvShape)
    stored, registers = stored_elements(region.weight).values.size, target.vector_registers * 3 // 4
    alike = outputs_alike(region.weight, 4)
    widths = sorted({target.vector_lanes, min(target.vector_lanes, HALF)})
    found: list[tuple[float, PixelTile]] = []
    for lanes, mode in product(widths, _modes(region, shape)):
        tried = {}
        for vectors in range(1, min(MOST_PIXELS // lanes, registers // 4 if alike else registers) + 1):
            tile = _largest(shape, vectors, lanes, mode)
            if tile is None:
                continue
            if alike:
                tile = replace(tile, outputs=4)
            else:
                tile = replace(tile, outputs=4 if vectors == 1 else 2 if 2 * vectors <= registers else 1)
            for blocks in (1, 2, 4, 8, 16):
                if blocks == 1 or stored >= FEWEST_WEIGHTS * blocks * shape.outputs:
                    cut = replace(tile, blocks=blocks)
                    tried[cut] = _cost(cut, shape, stored)
        if tried:
            best = min(tried, key=tried.__getitem__)
            found.append((tried[best], best))
    return tuple(tile for _, tile in sorted(found, key=lambda pair: pair[0]))


def _modes(region: Region, shape: ConvShape) -> tuple[str, ...]:
    if shape.kernel[1] > 1:
        few = min(shape.stride[0], shape.kernel[0]) * shape.kernel[1] <= MOST_PLANES
        return ("packed", "aligned") if few else ("packed",)
    whole = shape.image[0] == 1 and shape.stride == (1, 1) and not shape.pads and region.activation is None
    return ("packed", "in place") if whole and shape.image[1] * 4 % SAME_SETS else ("packed",)


def _largest(shape: ConvShape, vectors: int, lanes: int, mode: str) -> PixelTile | None:
    """The most whole rows that fit, or else a part of one."""
    (height, width), pixels = shape.result, vectors * lanes
    if mode == "in place":
        return PixelTile(1, pixels, 1, 1, lanes, mode) if pixels <= width else None
    if width > pixels:
        return PixelTile(1, -(-width // -(-width // pixels)), 1, 1, lanes, mode)
    pitch = Planes.of(PixelTile(1, width, 1, 1, lanes, mode), shape).pitch
    rows = min(height, (pixels - width) // pitch + 1)
    return PixelTile(-(-height // -(-height // rows)), width, 1, 1, lanes, mode)


def _cost(tile: PixelTile, shape: ConvShape, stored: int) -> float:
    """Cycles, about. The numbers are fitted by least squares to 800 measured tiles of 23 layers on Zen 4."""
    planes, lanes = Planes.of(tile, shape), tile.lanes
    vectors = planes.extent // lanes
    pieces = prod(-(-r // t) for r, t in zip(shape.result, (tile.rows, tile.columns), strict=True))
    copied = 0 if tile.in_place else shape.inputs * planes.channel / lanes
    held = 4 * shape.inputs / tile.blocks * (planes.extent if tile.in_place else planes.channel)
    crossing = shape.kernel[1] > 1 if tile.mode == "packed" else tile.in_place and planes.channel % lanes > 0
    apart = 0 if tile.in_place else held * tile.blocks
    multiply = 1.36 + 0.37 * _beyond(held, FIRST_CACHE) + 0.75 * _beyond(apart, SECOND_CACHE) + 0.47 * crossing
    each = stored * multiply + shape.outputs * 4.6 * (tile.blocks > 1)
    half = lanes / 16
    calls = stored * 0.9 + shape.outputs * 7.65 * tile.blocks / tile.outputs
    cycles: float = pieces * (half * (vectors * each + 5.9 * copied) + calls)
    return cycles


def _beyond(size: float, cache: int) -> float:
    """How much of a size does not fit: 1 from twice the cache on."""
    return min(1.0, max(0.0, size / cache - 1))
