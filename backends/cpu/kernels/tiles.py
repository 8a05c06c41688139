"""Register tiles, and loops over rows whose number is known at run time only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx

from mcc.backends.cpu.microkernel import Expression, branch, parallel, serial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class TileShape:
    """A register tile.

    Attributes:
        rows: output rows (or pixels) held at once.
        vectors: vectors of outputs held for each.
    """

    rows: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors}"


@dataclass(frozen=True)
class PanelWidth:
    """How wide a panel of outputs is; the last one may be narrower.

    Attributes:
        vectors: vectors of outputs it has.
        outputs: outputs it has: its last vector may be partly used.
    """

    vectors: int
    outputs: int

    def used_lanes(self, vector: int, lanes: int) -> int:
        """Lanes of vector number `vector` that hold outputs."""
        return min(lanes, self.outputs - vector * lanes)


def panel_widths(outputs: int, tile: TileShape, lanes: int) -> tuple[int, PanelWidth, PanelWidth | None]:
    """How many full panels `outputs` fill, how wide those are, and the panel of what is left."""
    width = tile.vectors * lanes
    left = outputs % width
    tail = PanelWidth(-(-left // lanes), left) if left else None
    return outputs // width, PanelWidth(tile.vectors, width), tail


def parse_tile(text: str) -> TileShape:
    """Read what `str(TileShape)` wrote."""
    rows, _, vectors = text.partition("x")
    return TileShape(int(rows), int(vectors))


def loop_for(macs: Any, fewest: int, images: Any = 1) -> Callable[[Any, Callable[[Expression], None]], None]:
    """A loop over threads where `images` times `macs` is work for them: to wake one takes a few microseconds."""
    if isinstance(macs, int) and macs >= fewest:
        return parallel
    if isinstance(macs, int) and images == 1:
        return serial

    def loop(extent: Any, body: Callable[[Expression], None]) -> None:
        enough = images * macs >= fewest
        branch(enough, lambda: parallel(extent, body), lambda: serial(extent, body))

    return loop


def shared_rows(rows: Expression, block: Expression, row: Callable[[Expression], None]) -> None:
    """Rows by themselves, in blocks that threads share where there is more than one."""
    count = tirx.floordiv(rows + block - 1, block)

    def some_rows(b: Expression) -> None:
        serial(tirx.min(block, rows - b * block), lambda r: row(b * block + r))

    branch(count > 1, lambda: parallel(count, some_rows), lambda: serial(rows, row))


def leading_dims(dims: Sequence[Any]) -> tuple[Any, ...]:
    """Dims of a kernel's buffer: constants as they are, symbolic ones as fresh variables read at run time."""
    return tuple(d if isinstance(d, int) else tirx.Var(f"d{i}", "int64") for i, d in enumerate(dims))


def alike_dims(operands: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """As `leading_dims`, of several buffers: equal symbols become one variable."""
    variables: dict[str, tirx.Var] = {}

    def known(dim: Any) -> Any:
        return dim if isinstance(dim, int) else variables.setdefault(str(dim), tirx.Var(f"d{len(variables)}", "int64"))

    return [tuple(map(known, dims)) for dims in operands]


def row_blocks(
    rows: Any,
    block: Expression,
    block_rows: int,
    tile_rows: int,
    emit: Callable[[Expression, int], None],
) -> None:
    """Cover rows [block * block_rows, (block + 1) * block_rows) with `emit(first row, count)`; see `cover`."""
    start = block * block_rows
    if isinstance(rows, int) and rows <= block_rows:
        cover(rows, tile_rows, emit)
        return
    cover(tirx.min(rows - start, block_rows), tile_rows, lambda first, count: emit(start + first, count))


def cover(extent: Any, size: int, emit: Callable[[Expression, int], None]) -> None:
    """Cover an extent with `emit(first, count)`, counts no larger than `size`.

    A constant extent is cut evenly: 13 rows by 6 give 5, 4, 4, with no slow tail. Of another one whole tiles go in a
    loop; what is left goes in tiles of …, 4, 2 and 1, chosen by the bits of its number.
    """
    if isinstance(extent, int):
        for first, number, count in balanced(extent, size):
            serial(number, lambda t, f=first, n=count: emit(f + t * n, n))  # type: ignore[misc]
        return
    whole = tirx.floordiv(extent, size)
    serial(whole, lambda t: emit(t * size, size))
    left, done, part = extent - whole * size, whole * size, 1
    while part * 2 < size:
        part *= 2
    while part >= 1 and size > 1:
        bit = tirx.floormod(tirx.floordiv(left, part), 2)
        before = tirx.floordiv(left, part * 2) * (part * 2)
        branch(bit == 1, lambda p=part, b=before: emit(done + b, p))  # type: ignore[misc]
        part //= 2


def balanced(extent: int, largest: int) -> list[tuple[int, int, int]]:
    """Cut an extent into nearly equal pieces: (first, number, size), 13 by 6 giving one of 5 and two of 4."""
    if extent == 0:
        return []
    count = -(-extent // largest)
    low, high = divmod(extent, count)
    pieces = [(0, high, low + 1), (high * (low + 1), count - high, low)]
    return [piece for piece in pieces if piece[1]]
