"""Sparse layers: y = epilogue(x W^T + b) with an unstructured sparse W, best at one row, any number at run time.

W is packed as SELL-16: outputs sorted by their number of non-zeros, in groups of 16; step s of a group holds the s-th
non-zero of each of its outputs, zeros where an output has fewer. One row of x: lanes are the 16 outputs, x gathered by
column. Many rows: lanes are rows of x, transposed tile by tile, so that one stored value meets a whole vector; layers
with blocks do so too, others are faster by slab_rows.py.
Monakov, Lokhmotov, Avetisyan: Automatically tuning sparse matrix-vector multiplication for GPU architectures. HiPEAC
2010.

Integer codes go through the same loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import channel_vectors, emit_epilogue, steps_after_scale
from mcc.backends.cpu.integer_sums import float_start, float_sums_inexact
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.tiles import leading_dims
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    branch,
    flat,
    kernel_function,
    lane,
    parallel,
    product,
    serial,
)  # fmt: skip
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

GROUP = 16
TILE_ROWS = (32, 64)
LARGEST_TILE = 1 << 18  # bytes: what a tile of 64 rows may take of the L2 cache, beside the weights
FEW_ROWS = 6  # up to this many rows left over, one gathered pass a row beats a tile


@dataclass(frozen=True)
class SparseDense:
    """Linear layers with a sparse weight: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_dense"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a sparse weight whose codes sum exactly."""
        del target
        if isinstance(region.weight.sparse, SparseArrays) and region.weight.sparse.block != (1, 1):
            return "the weight is stored in blocks"
        return operand_refusal(region) or sparse_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `sparse_tiles`."""
        return sparse_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = SparseBody(region, Vectors(target), int(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


def sparse_refusal(region: Region) -> str | None:
    """Why no sparse kernel for linear layers takes a region, or None."""
    if not isinstance(region.weight.sparse, SparseArrays):
        return "the weight is dense" if region.weight.sparse is None else "of neighbouring weights a few are stored"
    if region.weight.grouped:
        return "groups of the weight's inputs have scales of their own"
    if region.activation is not None:
        if region.weight.scale is None or region.activation.per_token:
            return "activations are quantized per token, or the weight is not quantized"
        return float_sums_inexact(region)
    return None


def operand_refusal(region: Region) -> str | None:
    """Why an epilogue that is given one value at a time cannot finish a region, or None."""
    return "its epilogue reads another value" if region.operands else None


def sparse_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Rows of a transposed tile: 64, which read a stored weight half as often, where that leaves it in the L2 cache."""
    size = math.prod(region.weight.shape[1:]) * TILE_ROWS[1] * 4
    tiles = TILE_ROWS[::-1] if target.vector_registers == 32 and size <= LARGEST_TILE else TILE_ROWS
    return tuple(map(str, tiles))


def pack_groups(weight: SparseArrays) -> dict[str, NDArray[Any]]:
    """SELL-16 arrays.

    Returns:
        values: [steps, 16] float32 or int8; columns: [steps, 16] uint16 or int32; group_starts: int32 [groups + 1], in
        steps; outputs: int32 [groups * 16], which output each lane is, the last repeated beyond the end.
    """
    counts = np.diff(weight.row_pointers)
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    padded = np.concatenate([order, np.repeat(order[-1:], -len(order) % GROUP)])
    starts = [0]
    values, columns = [], []
    for first in range(0, len(order), GROUP):
        lanes = order[first : first + GROUP]
        steps = int(counts[lanes].max(initial=0))
        group_values = np.zeros((steps, GROUP), weight.values.dtype)
        group_columns = np.zeros((steps, GROUP), weight.columns.dtype)
        for i, output in enumerate(lanes):
            kept = slice(weight.row_pointers[output], weight.row_pointers[output + 1])
            group_values[: counts[output], i] = weight.values[kept]
            group_columns[: counts[output], i] = weight.columns[kept]
        values.append(group_values)
        columns.append(group_columns)
        starts.append(starts[-1] + steps)
    if starts[-1] == 0:  # an all-zero layer: kernels take no empty arrays
        values, columns = [np.zeros((1, GROUP), weight.values.dtype)], [np.zeros((1, GROUP), weight.columns.dtype)]
    return {
        "values": np.concatenate(values).reshape(-1), "columns": np.concatenate(columns).reshape(-1),
        "group_starts": np.array(starts, np.int32), "outputs": padded,
    }  # fmt: skip


class SparseBody:
    """One sparse kernel."""

    def __init__(self, region: Region, vectors: Vectors, width: int) -> None:
        self.region, self.vectors, self.width = region, vectors, width
        weight = region.weight
        assert isinstance(weight.sparse, SparseArrays)
        self.outputs, self.inputs = weight.shape[0], math.prod(weight.shape[1:])
        self.groups = -(-self.outputs // GROUP)
        self.codes = region.activation is not None
        self.packed = self.pack(weight.sparse) | channel_vectors(region) | float_start(region)
        self.steps = steps_after_scale(region)
        self.leading = leading_dims(region.source.shape[:-1])
        self.rows = product(self.leading)

    def pack(self, weight: SparseArrays) -> dict[str, NDArray[Any]]:
        """The weight's arrays as the loops read them."""
        return pack_groups(weight)

    def function(self, name: str) -> tirx.PrimFunc:
        """The PrimFunc."""
        parameters = [
            Parameter("X", (*self.leading, self.inputs), "uint8" if self.codes else "float32"),
            *(Parameter(key, array.shape, array.dtype.name) for key, array in self.packed.items()),
            Parameter("Y", (*self.leading, self.outputs), self.region.output_dtype),
        ]
        return kernel_function(name, parameters, self._emit)

    def _emit(self, x: Expression, *rest: Expression) -> None:
        self.arrays = dict(zip(self.packed, rest[:-1], strict=True))
        self.x = flat(x, self.rows * self.inputs)
        self.y = flat(rest[-1], self.rows * self.outputs)
        rows = self.rows
        if isinstance(rows, int) and rows <= FEW_ROWS:
            serial(rows, self.one_row)
            return
        # the last tile repeats the last row: equal results are written twice
        tiles = tirx.floordiv(rows + self.width - 1 - FEW_ROWS, self.width)
        after = tirx.min(tiles * self.width, rows)
        in_tiles = partial(parallel, tiles, lambda t: self._tile(lambda r: tirx.min(t * self.width + r, rows - 1)))
        branch(tiles > 0, in_tiles)  # even an empty parallel loop wakes the threads
        serial(rows - after, lambda r: self.one_row(after + r))

    def finish(self, total: Expression, splat: Callable[[Expression], Expression]) -> Expression:
        """Scale and bias of a vector of sums; `splat` reads a per-output array."""
        v, arrays = self.vectors, self.arrays
        if "start" in arrays:
            total = total + splat(arrays["start"])
        if "scale" in arrays:
            return v.fma(total, splat(arrays["scale"]), splat(arrays["bias"]))
        return total + splat(arrays["bias"])

    def one_row(self, row: Expression) -> None:
        """Lanes are the outputs of a group; x is gathered."""
        arrays = self.arrays
        base = T.cast(row, "int64") * self.inputs
        source, start = (self.float_row(base), tirx.const(0, "int64")) if self.codes else (self.x, base)
        words = self._column_words()

        def step(at: Expression, register: Any) -> None:
            columns = self._columns(words, at)
            x = tirx.Shuffle([source[start + c] for c in columns], list(range(GROUP)))
            self.add_products(at * GROUP, x, register)

        def group(g: Expression) -> None:
            sums = self.vectors.registers(1, 2, "float32", GROUP)[0]
            for register in sums:
                register.set(T.broadcast(T.float32(0), GROUP))
            first = B.Bind(arrays["group_starts"][g])
            count = B.Bind(arrays["group_starts"][g + 1] - first)
            with B.serial(0, tirx.floordiv(count, 2)) as i:
                for u in range(2):
                    step(B.Bind(first + i * 2 + u), sums[u])
            with B.serial(0, tirx.floormod(count, 2)) as _:
                step(B.Bind(first + count - 1), sums[0])
            self._write_group(row, g, B.Bind(sums[0].get() + sums[1].get()))

        serial(self.groups, group)

    def add_products(self, at: Expression, x: Expression, register: Any) -> None:
        """Add the products of 16 stored weights, from `at` on, and the inputs they have."""
        w = tirx.BufferLoad(self.arrays["values"], [T.ramp(at, 1, GROUP)])
        w = w if self.arrays["values"].dtype == "float32" else T.cast(w, f"float32x{GROUP}")
        register.set(tirx.call_llvm_pure_intrin(f"float32x{GROUP}", f"llvm.fma.v{GROUP}f32", w, x, register.get()))

    def float_row(self, base: Expression) -> Expression:
        """A row of codes as float32."""
        n = self.vectors.lanes
        room = B.alloc_buffer((-(-self.inputs // n) * n,), "float32", layout=None)
        serial(
            self.inputs // n,
            lambda k: self.vectors.store(room, k * n, self.vectors.to_float(self.vectors.load(self.x, base + k * n))),
        )
        for k in range(self.inputs // n * n, self.inputs):
            B.buffer_store(room, T.cast(self.x[base + k], "float32"), [k])
        return room

    def _column_words(self) -> Expression:
        columns = self.arrays["columns"]
        if columns.dtype == "int32":
            return None
        return B.decl_buffer((self.packed["columns"].size // 4,), "uint64", data=columns.data, layout=None)

    def _columns(self, words: Expression, at: Expression) -> list[Expression]:
        """The 16 columns of a step, cut out of four 64-bit loads where they have 16 bits."""
        if words is None:
            return [T.cast(self.arrays["columns"][at * GROUP + i], "int64") for i in range(GROUP)]
        columns = []
        for q in range(GROUP // 4):
            word = B.Bind(words[at * (GROUP // 4) + q])
            for j in range(4):
                shifted = T.shift_right(word, T.uint64(16 * j)) if j else word
                part = shifted if j == 3 else T.bitwise_and(shifted, T.uint64(0xFFFF))
                columns.append(B.Bind(T.cast(T.cast(part, "int32"), "int64")))
        return columns

    def _write_group(self, row: Expression, g: Expression, total: Expression) -> None:
        """Scatter a group's lanes to the outputs they are, vector by vector of the target."""
        v, arrays = self.vectors, self.arrays
        for half in range(GROUP // v.lanes):
            outputs = [B.Bind(arrays["outputs"][g * GROUP + half * v.lanes + i]) for i in range(v.lanes)]
            lanes = list(range(half * v.lanes, (half + 1) * v.lanes))
            part = total if v.lanes == GROUP else tirx.Shuffle([total], lanes)

            def gathered(array: Expression, outputs: list[Expression] = outputs) -> Expression:
                return tirx.Shuffle([array[o] for o in outputs], list(range(v.lanes)))

            value = B.Bind(emit_epilogue(v, self.finish(part, gathered), self.steps))
            for i, position in enumerate(lanes):

                def write(i: int = i, value: Expression = value, outputs: list[Expression] = outputs) -> None:
                    B.buffer_store(self.y, lane(value, i), [T.cast(row, "int64") * self.outputs + outputs[i]])

                always = position < self.outputs - (self.groups - 1) * GROUP
                branch(True if always else g * GROUP + position < self.outputs, write)

    def _tile(self, row_of: Callable[[Expression], Expression]) -> None:
        """`width` rows at once: transpose x, multiply group by group, transpose back."""
        source = B.alloc_buffer((self.inputs * self.width,), "float32", layout=None)
        result = B.alloc_buffer((self.outputs * self.width,), "float32", layout=None)
        self._transpose_in(source, row_of)
        self.multiply(source, result)
        self._transpose_out(result, row_of)

    def _transpose_in(self, source: Expression, row_of: Callable[[Expression], Expression]) -> None:
        v, width = self.vectors, self.width
        if self.inputs >= v.lanes:
            v.transpose_tile(
                (self.inputs, width),
                lambda k, t, r: self._load_floats(T.cast(row_of(t + r), "int64") * self.inputs + k),
                lambda k, t, c, column: v.store(source, (k + c) * width + t, column),
            )
            return

        def element(r: Expression, k: Expression) -> None:
            value = self.x[T.cast(row_of(r), "int64") * self.inputs + k]
            B.buffer_store(source, T.cast(value, "float32"), [k * width + r])

        serial(width, lambda r: serial(self.inputs, lambda k: element(r, k)))

    def _load_floats(self, index: Expression) -> Expression:
        value = self.vectors.load(self.x, index)
        return self.vectors.to_float(value) if self.codes else value

    def multiply(self, source: Expression, result: Expression) -> None:
        v, arrays, width = self.vectors, self.arrays, self.width

        def output(g: Expression, i: Expression) -> None:
            sums = v.registers(1, width // v.lanes, "float32")[0]
            n = B.Bind(arrays["outputs"][g * GROUP + i])
            for register in sums:
                register.set(v.constant(0.0))
            first = B.Bind(arrays["group_starts"][g])
            with B.serial(0, arrays["group_starts"][g + 1] - first) as s:
                at = B.Bind((first + s) * GROUP + i)
                k = B.Bind(T.cast(arrays["columns"][at], "int32"))
                w = B.Bind(v.splat(T.cast(arrays["values"][at], "float32")))
                for t, register in enumerate(sums):
                    register.set(v.fma(v.load(source, k * width + t * v.lanes), w, register.get()))
            for t, register in enumerate(sums):
                total = self.finish(register.get(), lambda array: v.splat(array[n]))
                v.store(result, n * width + t * v.lanes, total)

        def group(g: Expression) -> None:
            with B.serial(0, tirx.min(self.outputs - g * GROUP, GROUP)) as i:
                output(g, i)

        serial(self.groups, group)

    def _transpose_out(self, result: Expression, row_of: Callable[[Expression], Expression]) -> None:
        v, width = self.vectors, self.width

        def write(n: Expression, t: Expression, c: int, column: Expression) -> None:
            place = B.Bind(T.cast(row_of(t + c), "int64") * self.outputs + n)
            v.store(self.y, place, emit_epilogue(v, column, self.steps))

        if self.outputs >= v.lanes:
            v.transpose_tile((self.outputs, width), lambda n, t, r: v.load(result, (n + r) * width + t), write)
            return

        def column(n: Expression, t: Expression) -> None:
            value = B.Bind(emit_epilogue(v, v.load(result, n * width + t), self.steps))
            for r in range(v.lanes):
                B.buffer_store(self.y, lane(value, r), [T.cast(row_of(t + r), "int64") * self.outputs + n])

        serial(self.outputs, lambda n: serial(width // v.lanes, lambda t: column(n, t * v.lanes)))
