"""Weights that are read later, asked for while the CPU multiplies.

When a layer is called its weights lie in memory, or in a cache far from the core, and the first tile that reads a panel
of them would wait for all of it, the others for nothing. So each tile asks, step by step, for its share of the panel
that comes next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import at_least_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.cpu.microkernel import Expression, Vectors

FEWEST_ROWS = 2  # of a tile; a single row reads its weights as fast as they come
LINE_BYTES = 64


@dataclass(frozen=True)
class NextPanel:
    """The panel of weights behind the one that tiles read.

    Attributes:
        weights: all of them, in words of any type.
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

    def share(
        self, v: Vectors, rows: tuple[Expression, int, Expression], example: int = 1
    ) -> Callable[[Expression], None]:
        """What a tile does at each step, given its first row, how many it has, and how many all tiles have together.

        Nothing where so many rows share a panel that its weights count little. Where the number of all rows varies, a
        step asks for as many lines as the `example` wants.
        """
        _, count, total = rows
        example = max(count, total if isinstance(total, int) else example)
        if count < FEWEST_ROWS or example > self.words * count:
            return lambda _: None
        begin, stride = self.words_of(rows)
        begin, line = B.Bind(begin), LINE_BYTES // tvm.DataType(self.weights.dtype).itemsize
        lines = -(-self._words_of_a_step(count, example) // line)

        def ask(k: Expression) -> None:
            for n in range(lines):
                v.prefetch(self.weights, begin + k * stride + n * line)

        return ask

    def words_of(self, rows: tuple[Expression, int, Expression]) -> tuple[Expression, Expression]:
        """Where such a tile's share begins, and how many words of it belong to each step."""
        first, count, total = rows
        total = total if isinstance(total, int) else at_least_one(total)
        stride = self._words_of_a_step(count, total)
        # the last panel has none behind it, and asks for its own end
        last = tirx.max(0, self.size - stride * self.steps)
        before = tirx.floordiv(first * T.int64(self.words * self.steps), total)
        return tirx.min(self.first + before, last), stride

    def _words_of_a_step(self, count: int, total: Expression) -> Expression:
        """Of the next panel, for a tile of `count` of `total` rows."""
        return (self.words * count + total - 1) // total
