"""Weights that are read later, asked for while the CPU multiplies.

When a layer is called its weights lie in memory, or in a cache far from the core, and the first tile that reads a panel
of them would wait for all of it, the others for nothing. So each tile asks, step by step, for its share of the panel
that comes next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.cpu.microkernel import Expression, Vectors

FEWEST_ROWS = 2  # of a tile; a single row reads its weights as fast as they come


@dataclass(frozen=True)
class NextPanel:
    """The panel of weights behind the one that tiles read.

    Attributes:
        weights: all of them, in words.
        size: how many words.
        first: where the panel begins.
        words: that one step of a tile takes from a panel.
        steps: of a tile.
    """

    weights: Expression
    size: Expression
    first: Expression
    words: int
    steps: Expression

    def share(self, v: Vectors, rows: tuple[Expression, int, Expression]) -> Callable[[Expression], None]:
        """What a tile does at each step, given its first row, how many it has, and how many all tiles have together.

        Nothing where so many rows share a panel that its weights count little.
        """
        _, count, total = rows
        if count < FEWEST_ROWS or (isinstance(total, int) and total > self.words * count):
            return lambda _: None
        begin, stride = self.words_of(rows)
        begin, lines = B.Bind(begin), -(-stride // v.lanes) if isinstance(stride, int) else 1

        def ask(k: Expression) -> None:
            for line in range(lines):
                v.prefetch(self.weights, begin + k * stride + line * v.lanes)

        return ask

    def words_of(self, rows: tuple[Expression, int, Expression]) -> tuple[Expression, Expression]:
        """Where such a tile's share begins, and how many words of it belong to each step."""
        first, count, total = rows
        if isinstance(total, int):
            stride: Expression = -(-self.words * count // total)
        else:
            total = tirx.max(total, 1)
            stride = tirx.floordiv(self.words * count + total - 1, total)
        # the last panel has none behind it, and asks for its own end
        last = tirx.max(0, self.size - stride * self.steps)
        return tirx.min(self.first + tirx.floordiv(first * (self.words * self.steps), total), last), stride
