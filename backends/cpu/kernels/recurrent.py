"""The recurrence of an LSTM or GRU layer: all steps in one call.

Lanes are hidden units: a tile holds the sums of every gate for a few rows of the batch and a vector or two of units,
and finishes with the new state of those units. The last vector of units overlaps the one before it, so new states go to
memory of their own until all of a step are known. A stored weight stands in panels, one for each such tile: see
recurrent_panels.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.tiles import leading_dims, row_blocks
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Register,
    Vectors,
    branch,
    flat,
    kernel_function,
    parallel,
    serial,
)  # fmt: skip
from mcc.backends.cpu.vector_math import sigmoid, tanh

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.target import Target

FEWEST_MACS = 200_000  # of a step for two threads: about 7 us of one, whose weights come from the second cache
ROW_BLOCK = 32
NARROWEST = 4  # lanes of the narrowest vectors
MOST_ROWS = 3  # of a tile
PANEL_DIMS = 4  # of a weight in panels: panels, hidden, gates, units


@dataclass(frozen=True)
class RecurrentShape:
    """One recurrence.

    Attributes:
        dims: of the projected inputs.
        gates: 4 for LSTM, 3 for GRU.
        hidden: units.
        units: of a panel of the weight; None where it is not in panels.
        bias: whether the recurrence has one.
        reverse: whether it runs from the last step to the first.
        batch_first: [batch, steps, …] instead of [steps, batch, …].
    """

    dims: tuple[Any, Any, int]
    gates: int
    hidden: int
    units: int | None
    bias: bool
    reverse: bool
    batch_first: bool


def panel_units(target: Target, hidden: int, rows: int) -> int:
    """Units of a tile, for so many rows of a batch: alone, one needs the sums of two vectors in flight."""
    lanes = _lanes(target, hidden)
    return lanes * (2 if hidden >= 2 * lanes and (target.vector_registers == 32 or rows == 1) else 1)


def _lanes(target: Target, hidden: int) -> int:
    lanes = target.vector_lanes
    while lanes > hidden:
        lanes //= 2
    return lanes


def recurrent_function(shape: RecurrentShape, target: Target) -> tirx.PrimFunc:
    """A kernel over projected inputs, states, weight and bias, and the outputs: all steps, and the last states."""
    body = _Lstm(shape, target) if shape.gates == 4 else _Gru(shape, target)
    steps, batch, h = body.steps, body.batch, shape.hidden
    outer = (batch, steps) if shape.batch_first else (steps, batch)
    states = ("H", "C")[: body.states]
    parameters = [
        Parameter("P", (*outer, shape.gates * h), "float32"),
        *(Parameter(name, (batch, h), "float32") for name in states),
        Parameter("W", body.weight_dims, "float32"),
        *([Parameter("B", (shape.gates * h,), "float32")] if shape.bias else []),
        Parameter("Y", (*outer, h), "float32"),
        *(Parameter(f"{name}N", (batch, h), "float32") for name in states),
    ]
    return kernel_function("recurrent", parameters, body.emit).without_attr("global_symbol")


class _Recurrence:
    """Loops over steps, rows and units; subclasses know the gates."""

    states: int

    def __init__(self, shape: RecurrentShape, target: Target) -> None:
        self.shape = shape
        lanes = _lanes(target, shape.hidden)
        self.v = Vectors(target, lanes)
        first, second, _ = leading_dims(shape.dims)
        self.batch, self.steps = (first, second) if shape.batch_first else (second, first)
        self.width = shape.units or panel_units(target, shape.hidden, MOST_ROWS)
        self.blocks, self.vectors = -(-shape.hidden // self.width), self.width // lanes
        sums = target.vector_registers - self.vectors - 1  # registers, beside the weights and a state
        self.tile_rows = min(MOST_ROWS, max(1, sums // (shape.gates * self.vectors)))

    @property
    def weight_dims(self) -> tuple[int, ...]:
        """Of the weight as the kernel reads it."""
        h, gates = self.shape.hidden, self.shape.gates
        return (h, gates * h) if self.shape.units is None else (self.blocks, h, gates, self.width)

    def emit(self, projected: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        s, n = self.shape, self.batch * self.shape.hidden
        read = list(rest)
        initial = [flat(read.pop(0), n) for _ in range(self.states)]
        self.weight = flat(read.pop(0), math.prod(self.weight_dims))
        self.bias = read.pop(0) if s.bias else None
        outer = self.steps * self.batch
        self.projected, self.sequence = flat(projected, outer * s.gates * s.hidden), flat(read.pop(0), outer * s.hidden)
        self.last = [flat(buffer, n) for buffer in read]
        self.fresh = [B.alloc_buffer((n,), "float32", layout=None) for _ in range(self.states)]
        for source, target in zip(initial, self.last, strict=True):
            self._copy(source, target, n)
        with B.serial(0, self.steps) as t:
            self._step(self.steps - 1 - t if s.reverse else t)

    def _copy(self, source: Expression, target: Expression, size: Expression) -> None:
        v = self.v
        serial(tirx.floordiv(size, v.lanes), lambda i: v.store(target, i * v.lanes, v.load(source, i * v.lanes)))
        done = tirx.floordiv(size, v.lanes) * v.lanes
        serial(size - done, lambda i: B.buffer_store(target, source[done + i], [done + i]))

    def _step(self, t: Expression) -> None:
        s, blocks = self.shape, self.blocks
        rows = -(-self.batch // ROW_BLOCK) if isinstance(self.batch, int) else tirx.floordiv(
            self.batch + ROW_BLOCK - 1, ROW_BLOCK
        )  # fmt: skip

        def block(i: Expression) -> None:
            b, r = tirx.floormod(i, blocks), tirx.floordiv(i, blocks)
            row_blocks(self.batch, r, ROW_BLOCK, self.tile_rows, lambda row, count: self._tile(t, row, count, b))

        enough = self.batch * (s.hidden * s.hidden * s.gates) >= FEWEST_MACS
        branch(enough, lambda: parallel(rows * blocks, block), lambda: serial(rows * blocks, block))
        for source, target in zip(self.fresh, self.last, strict=True):
            self._copy(source, target, self.batch * s.hidden)

    def _row(self, t: Expression, row: Expression) -> Expression:
        return row * self.steps + t if self.shape.batch_first else t * self.batch + row

    def _tile(self, t: Expression, row: Expression, count: int, block: Expression) -> None:
        """New states of `count` rows from `row` and of a block of units."""
        s, v = self.shape, self.v
        first = B.Bind(tirx.min(block * self.width, s.hidden - self.width))
        if s.units is None:
            begin, of_gate = first, s.hidden
        else:
            begin, of_gate = B.Bind(block * (s.hidden * s.gates * self.width)), self.width
        sums = [v.registers(s.gates, self.vectors, "float32") for _ in range(count)]
        for gates in sums:
            for gate, registers in enumerate(gates):
                for j, register in enumerate(registers):
                    at = gate * s.hidden + first + j * v.lanes
                    register.set(v.constant(0.0) if self.bias is None else v.load(self.bias, at))
        with B.serial(0, s.hidden) as k:
            for gate in range(s.gates):
                at = B.Bind(begin + k * (s.gates * of_gate) + gate * of_gate)
                weights = [B.Bind(v.load(self.weight, at + j * v.lanes)) for j in range(self.vectors)]
                for i, gates in enumerate(sums):
                    state = v.splat(self.last[0][(row + i) * s.hidden + k])
                    for register, weight in zip(gates[gate], weights, strict=True):
                        register.set(v.fma(state, weight, register.get()))
        self._finish(t, row, first, sums)

    def _finish(self, t: Expression, row: Expression, first: Expression, sums: list[list[list[Register]]]) -> None:
        """Write the new states of rows from `row` and of units from `first`, from the sums of each row and gate."""
        s, v = self.shape, self.v
        for i, gates in enumerate(sums):
            place = B.Bind(self._row(t, row + i))
            for j in range(self.vectors):
                unit = first + j * v.lanes

                def from_input(gate: int, unit: Expression = unit, place: Expression = place) -> Expression:
                    return v.load(self.projected, (place * s.gates + gate) * s.hidden + unit)

                recurrent = [registers[j].get() for registers in gates]
                state = (row + i) * s.hidden + unit
                value = v.hold(self._new_state(recurrent, from_input, state))
                v.store(self.fresh[0], state, value)
                v.store(self.sequence, place * s.hidden + unit, value)

    def _new_state(
        self, recurrent: list[Expression], from_input: Callable[[int], Expression], state: Expression
    ) -> Expression:
        """The new hidden state of a vector of units; `state` is its index in the states."""
        raise NotImplementedError


class _Lstm(_Recurrence):
    states = 2

    def _new_state(
        self, recurrent: list[Expression], from_input: Callable[[int], Expression], state: Expression
    ) -> Expression:
        v = self.v
        i, f, g, o = (v.hold(r + from_input(gate)) for gate, r in enumerate(recurrent))
        kept = sigmoid(v, f) * v.load(self.last[1], state)
        cell = v.hold(v.fma(sigmoid(v, i), tanh(v, g), kept))
        v.store(self.fresh[1], state, cell)
        return sigmoid(v, o) * tanh(v, cell)


class _Gru(_Recurrence):
    states = 1

    def _new_state(
        self, recurrent: list[Expression], from_input: Callable[[int], Expression], state: Expression
    ) -> Expression:
        v = self.v
        r, z = (v.hold(sigmoid(v, v.hold(recurrent[gate] + from_input(gate)))) for gate in range(2))
        n = v.hold(tanh(v, v.hold(v.fma(r, recurrent[2], from_input(2)))))
        return v.fma(z, v.load(self.last[0], state) - n, n)
