"""Linear layers of codes with an unstructured sparse weight, by permuting bytes: y = epilogue(x W^T + b), any rows.

Lanes are outputs, four non-zero weights of each in a register. A step has a window of 64 inputs, one register of a row:
a permutation brings to every byte of the register of weights the code that it multiplies, and one `dot4` adds 64
products. What is permuted, by which places and with which weights is the same for all rows of a tile. An output takes
its next four weights of the window, zeros where it has fewer, and windows move to the input that some output waits for;
they begin at multiples of half their size, so that most do not straddle a cache line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.dense import IntegerBody, dense_reference
from mcc.backends.cpu.kernels.dense_per_token import PerTokenBody, per_token_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, flat, product
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

WINDOW = 64  # inputs
APART = 32  # places that windows begin at
QUAD = 4  # weights of an output in a step
TILES = tuple(str(TileShape(rows, 1)) for rows in (12, 8, 16))
CHAINS = 4  # sums in flight that hide the latency of `dot4`
PERMUTE = "llvm.x86.avx512.permvar.qi.512"


@dataclass(frozen=True)
class SparseCodes:
    """uint8 activation codes with one scale, int8 weight codes without their zeros; exact int32 sums."""

    name: str = "sparse_codes"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight where a register's bytes can be permuted by another."""
        if region.activation is None or region.activation.per_token:
            return "the activations are not codes with one scale"
        return _refusal(region, target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows that share what they are permuted by."""
        del region, target
        return TILES

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        return _lower(self.name, _Windows(_plan(region, target, tile)))

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return dense_reference(region, source, operands)


@dataclass(frozen=True)
class SparsePerToken:
    """float32 activations quantized per token, int8 weight codes without their zeros; exact int32 sums."""

    name: str = "sparse_per_token"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """As for codes with one scale."""
        if region.activation is None or not region.activation.per_token:
            return "the activations are not codes with a scale for each token"
        return _refusal(region, target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """As for codes with one scale."""
        del region, target
        return TILES

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text; all rows become codes first."""
        return _lower(self.name, _PerTokenWindows(_plan(region, target, tile)))

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return per_token_reference(region, source, operands)


def _refusal(region: Region, target: Target) -> str | None:
    """Why no row's codes are permuted for a region, or None."""
    weight = region.weight
    if not isinstance(weight.sparse, SparseArrays) or weight.sparse.block != (1, 1):
        return "the weight is not stored without its single zeros"
    if weight.scale is None or weight.grouped:
        return "the weight is not int8 with a scale for each output"
    if not target.permutes_bytes:
        return f"{target} permutes no bytes"
    if weight.shape[1] < WINDOW:
        return f"it has fewer than {WINDOW} inputs"
    return sums_overflow(region)


def _plan(region: Region, target: Target, tile: str) -> PanelPlan:
    return PanelPlan(region, Vectors(target), parse_tile(tile))


def _lower(name: str, body: _Windows) -> Lowered:
    packed = body.arrays()
    return Lowered(body.plan.function(name, packed, partial(body.emit_named, tuple(packed))), packed)


def windows(weight: SparseArrays, outputs: int, inputs: int, lanes: int) -> dict[str, NDArray[Any]]:
    """What steps multiply, those of a vector of outputs after those of the one before.

    Returns:
        weights: int8 [steps, lanes, 4]; places: uint8 of that shape, inputs within the step's window; windows: int32
        [steps], the first input of each; first_steps: int32 [vectors + 1].
    """
    weights, places, firsts, ends = [], [], [], [0]
    for start in range(0, outputs, lanes):
        rows = range(start, min(start + lanes, outputs))
        columns, values = _padded_rows(weight, rows, lanes)
        taken, every = np.zeros(lanes, np.int64), np.arange(lanes)
        while (waiting := int(columns[every, taken].min())) < inputs:
            first = min(waiting // APART * APART, inputs - WINDOW)
            at = every[:, None], taken[:, None] + np.arange(QUAD)
            inside = columns[at] < first + WINDOW
            places.append(np.where(inside, columns[at] - first, 0).astype(np.uint8))
            weights.append(np.where(inside, values[at], 0).astype(np.int8))
            firsts.append(first)
            taken += inside.sum(1)
        ends.append(len(firsts))
    if not firsts:  # an all-zero layer: kernels take no empty arrays
        weights, places, firsts = [np.zeros((lanes, QUAD), np.int8)], [np.zeros((lanes, QUAD), np.uint8)], [0]
    return {
        "weights": np.stack(weights).reshape(-1), "places": np.stack(places).reshape(-1),
        "windows": np.array(firsts, np.int32), "first_steps": np.array(ends, np.int32),
    }  # fmt: skip


def _padded_rows(weight: SparseArrays, rows: range, lanes: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Columns and values of some outputs, and behind each one's last column ones beyond any input."""
    counts = np.diff(weight.row_pointers)[rows.start : rows.stop]
    shape = (lanes, int(counts.max(initial=0)) + QUAD)
    columns, values = np.full(shape, np.iinfo(np.int32).max, np.int64), np.zeros(shape, weight.values.dtype)
    for i, row in enumerate(rows):
        kept = slice(weight.row_pointers[row], weight.row_pointers[row + 1])
        columns[i, : counts[i]], values[i, : counts[i]] = weight.columns[kept], weight.values[kept]
    return columns, values


class _Windows(IntegerBody):
    """As dense int8, but for how sums are come by."""

    def __init__(self, plan: PanelPlan) -> None:
        super().__init__(plan, tiled=False)
        sparse = plan.region.weight.sparse
        assert isinstance(sparse, SparseArrays)
        self.steps = windows(sparse, plan.outputs, plan.inputs, plan.vectors.lanes)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Those of dense int8 and the steps."""
        return super().arrays() | self.steps

    def emit_named(self, names: tuple[str, ...], x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.named = dict(zip(names, arrays, strict=True))
        self.bias, self.scale, self.start = (self.named[key] for key in ("bias", "scale", "start"))
        self.take(x, product(self.plan.leading))
        self.plan.loops(self._tile)

    def take(self, x: Expression, rows: Expression) -> None:
        """Get the codes of all rows."""
        del rows
        self.codes, self.pitch = x, self.plan.inputs

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        """Some rows of a vector of outputs."""
        _plan, v = self.plan, self.plan.vectors
        chains = max(1, CHAINS // count)
        sums = v.registers(chains, count, "int32")
        start = B.Bind(v.load(self.start, panel * v.lanes))
        for c, chain in enumerate(sums):
            for register in chain:
                register.set(start if c == 0 else v.constant(0, "int32"))
        begin = B.Bind(self.named["first_steps"][panel])
        steps = B.Bind(self.named["first_steps"][panel + 1] - begin)
        whole = B.Bind(tirx.floordiv(steps, chains))
        with B.serial(0, whole) as s:
            for c, chain in enumerate(sums):
                self._step(begin + s * chains + c, first, chain)
        if chains > 1:
            with B.serial(0, steps - whole * chains) as s:
                self._step(begin + whole * chains + s, first, sums[0])
        for total, *others in zip(*sums, strict=True):
            for other in others:
                total.set(total.get() + other.get())
        rows = [first + i for i in range(count)]
        self._finish(panel * v.lanes, width.used_lanes(0, v.lanes), rows, sums[0])

    def _step(self, number: Expression, first: Expression, sums: list[Register]) -> None:
        """Add the products of one step for rows from `first` on."""
        v, size = self.plan.vectors, self.plan.vectors.lanes * QUAD
        at = B.Bind(T.cast(number, "int64"))
        window = B.Bind(T.cast(self.named["windows"][at], "int64"))
        places, weights = (B.Bind(v.load(self.named[key], at * size, size)) for key in ("places", "weights"))
        words, order = T.reinterpret(f"int32x{v.lanes}", weights), T.reinterpret(f"int8x{size}", places)
        for i, register in enumerate(sums):
            row = v.load(self.codes, T.cast(first + i, "int64") * self.pitch + window, size)
            chosen = tirx.call_llvm_pure_intrin(f"int8x{size}", PERMUTE, T.reinterpret(f"int8x{size}", row), order)
            codes = T.reinterpret(f"int32x{v.lanes}", chosen)
            register.set(v.dot4(register.get(), codes, words, bounded=True))


class _PerTokenWindows(_Windows, PerTokenBody):
    """The same, of codes that the kernel makes."""

    def take(self, x: Expression, rows: Expression) -> None:
        """Make the codes of all rows."""
        PerTokenBody.take(self, x, rows)
        self.pitch = self.groups * QUAD
        if self.code_words is not None:
            self.codes = flat(self.code_words, rows * self.pitch, "uint8")
