"""Dense layers: y = epilogue(x W^T + b), float32 or int8 codes, any number of rows at run time.

W is packed in panels of `vectors` vectors of outputs, [panel][k][lanes], so that a step over k loads whole vectors;
x is read row-major, one broadcast a row. The last panel is narrower and its last vector may be partly used. int8
weights under float32 activations are converted in registers and scaled once at the end. Behind a relu a single row's
zeros are left out, with the weights they would meet: Kurtz et al.: Inducing and exploiting activation sparsity for fast
neural network inference. ICML 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.integer_sums import pairs_fit, sums_overflow, zero_sum_factor
from mcc.backends.cpu.kernels.packed_codes import PackedCodes, sum_arrays
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tile_registers import PAIR_OF_TILES, TILE, words_of_a_step
from mcc.backends.cpu.kernels.tiled_panels import FEWEST_ROWS, TiledPanels
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, branch, flat, product, serial
from mcc.backends.kernel import PER_TOKEN, Lowered, Region, apply_epilogue
from mcc.ops import extent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.backends.kernel import StoredWeight
    from mcc.target import Target


FEWEST_OUTPUTS = 64  # of a layer that leaves out inputs that are zero
# shares of active inputs above which all are taken: skipping through memory is slower than streaming, measured on Zen 4
MOST_ACTIVE, MOST_ACTIVE_FROM_MEMORY = 0.8, 0.25
CACHED = 16 << 20  # bytes of weights that stay in the last-level cache


@dataclass(frozen=True)
class DenseFloat:
    """float32 activations; weights float32, or int8 with a scale for each output."""

    name: str = "dense_f32"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a dense weight."""
        del target
        if region.activation is not None:
            return "the activations are quantized"
        return not_plain(region.weight)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Largest tiles that keep accumulators, weights and one broadcast in registers."""
        return dense_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        weight = region.weight
        assert weight.dense is not None
        packed = {"weight": pack_panels(weight.dense, plan.width, target.vector_lanes)}
        packed |= plan.channel_arrays()
        body = _FloatBody(plan, scaled=weight.scale is not None)

        def element(arrays: Mapping[str, Expression], output: Expression, k: Expression) -> Expression:
            first, width, lane = plan.place(output)
            value = T.cast(arrays["weight"][first * plan.inputs + k * width + lane], "float32")
            return value * arrays["scale"][output] if "scale" in arrays else value

        # with a requantize behind it, the scale may be in steps of that
        alone = weight.scale is None or not region.epilogue
        return Lowered(plan.function(self.name, packed, body.emit), packed, element if alone else None)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Float64 sums."""
        return dense_reference(region, source, operands)


@dataclass(frozen=True)
class DenseInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums, one float32 scale for each output."""

    name: str = "dense_int8"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a dense int8 weight and quantized activations."""
        del target
        if region.activation is None or region.activation.per_token or region.weight.scale is None:
            return "weight and activations are not both int8 with stored scales"
        return not_plain(region.weight) or sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """As for float, with registers left for what replaces `vpdpbusd`; tile registers where there are any."""
        inputs = region.weight.shape[1]
        return tiles_of_words(region, target, inputs // 4 if inputs % 4 == 0 else 0)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text; k goes in groups of four bytes, padded with zero weights."""
        return lower_integers(self.name, region, target, tile, IntegerBody)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return dense_reference(region, source, operands)


def lower_integers(name: str, region: Region, target: Target, tile: str, body: type[IntegerBody]) -> Lowered:
    """A kernel of int8 weights and codes of activations, which `body` reads or makes."""
    plan = PanelPlan(region, Vectors(target), dense_tile(tile))
    weight = region.weight
    assert weight.dense is not None
    packed = {"weight": pack_panels_of(4, weight.dense, plan.width, target.vector_lanes)}
    loops = body(plan, tiled=tile == TILE)
    packed |= loops.arrays()
    function, groups = plan.function(name, packed, loops.emit), loops.groups

    def element(arrays: Mapping[str, Expression], output: Expression, k: Expression) -> Expression:
        first, width, lane = plan.place(output)
        word = first * groups + tirx.floordiv(k, 4) * width + lane
        return T.cast(arrays["weight"][word * 4 + tirx.floormod(k, 4)], "float32") * arrays["scale"][output]

    # the scale is that of the weight alone
    alone = region.activation is PER_TOKEN and not region.epilogue
    return Lowered(function, packed, element if alone else None)


def zeros_expected(plan: PanelPlan) -> bool:
    """Whether to look for zeros in a single row pays: behind a relu half of it are, or more, and to look is K steps."""
    return plan.region.source.op in (ops.RELU, ops.RELU6) and plan.outputs >= FEWEST_OUTPUTS


def not_plain(weight: StoredWeight) -> str | None:
    """Why a weight is not dense with one scale for each output, or None if it is."""
    if weight.sparse is not None:
        return "the weight is sparse"
    if weight.dtype == "bfloat16":
        return "the weight is bfloat16"
    return "groups of the weight's inputs have scales of their own" if weight.grouped else None


def tiles_of_words(region: Region, target: Target, words: int) -> tuple[str, ...]:
    """The tile in tile registers, if the target has them and the `words` of a row fit some; then `dense_tiles`."""
    rows = region.source.shape[:-1]
    few = all(isinstance(s, int) for s in rows) and math.prod(map(extent, rows)) < FEWEST_ROWS
    tiled = target.tiles and not few and words_of_a_step(words)
    return (*((TILE,) if tiled else ()), *dense_tiles(region, target))


def dense_tile(text: str) -> TileShape:
    """A tile of `dense_tiles`; or, beside one in tile registers, that of few rows."""
    return TileShape(12, PAIR_OF_TILES) if text == TILE else parse_tile(text)


def dense_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles (rows x vectors) by register count; narrow ones where there are few outputs."""
    wide = (TileShape(8, 2), TileShape(6, 4), TileShape(12, 2))
    narrow = (TileShape(6, 2), TileShape(4, 2), TileShape(4, 3))
    wanted = wide if target.vector_registers == 32 else narrow
    if target.isa == "neon":
        wanted = (TileShape(6, 4), TileShape(8, 3), TileShape(8, 2))
    vectors = -(-region.weight.shape[0] // target.vector_lanes)
    narrowed = [TileShape(t.rows, min(t.vectors, vectors)) for t in wanted]
    return tuple(dict.fromkeys(str(t) for t in narrowed))


def pack_panels(weight: NDArray[Any], width: int, lanes: int) -> NDArray[Any]:
    """[out, in] -> panels [in][width] end to end, the last one as narrow as whole vectors allow, zeros beyond out."""
    outputs = weight.shape[0]
    padded = np.pad(weight, ((0, -outputs % lanes), (0, 0)))
    panels = [padded[start : start + width].T.reshape(-1) for start in range(0, len(padded), width)]
    return np.concatenate(panels) if panels else np.zeros(0, weight.dtype)


def pack_panels_of(size: int, weight: NDArray[Any], width: int, lanes: int) -> NDArray[Any]:
    """[out, in] -> panels [in / size][width][size], `in` padded with zeros to a multiple of `size`."""
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, -outputs % lanes), (0, -inputs % size)))
    panels = [
        padded[start : start + width].reshape(-1, padded.shape[1] // size, size).transpose(1, 0, 2).reshape(-1)
        for start in range(0, len(padded), width)
    ]
    return np.concatenate(panels)


def dense_reference(region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
    """The layer in NumPy: exact integers for codes, float64 sums for float."""
    weight = region.weight.decoded().reshape(region.weight.shape[0], -1)
    bias = np.float32(0) if region.bias is None else region.bias
    if region.activation is None:
        sums = region.as_read(source).astype(np.float64) @ weight.T.astype(np.float64)
        scaled = sums if region.weight.scale is None else sums * region.weight.scale
        return apply_epilogue((scaled + bias).astype(np.float32), region.epilogue, operands)
    assert region.weight.scale is not None
    exact = (source.astype(np.int64) - region.activation.zero_point) @ weight.T.astype(np.int64)
    scale = region.weight.scale * np.float32(region.activation.scale)
    return apply_epilogue((exact * scale.astype(np.float64) + bias).astype(np.float32), region.epilogue, operands)


class _FloatBody:
    """Inner loops over float32 activations."""

    def __init__(self, plan: PanelPlan, *, scaled: bool) -> None:
        self.plan = plan
        self.scaled = scaled

    def emit(self, x: Expression, weight: Expression, bias: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        plan = self.plan
        self.source, self.weight, self.bias, self.scale = x, weight, bias, rest[0] if self.scaled else None
        rows = product(plan.leading)
        if not zeros_expected(plan) or (isinstance(rows, int) and rows != 1):
            plan.loops(self._tile)
            return
        active = self._list_active(rows)
        plan.loops(self._tile, partial(self._tile, active=active))

    def _list_active(self, rows: Expression) -> tuple[Expression, Expression]:
        """Where a single row is not zero: other inputs are left out, and their weights not read, if they are many."""
        inputs, region = self.plan.inputs, self.plan.region
        assert region.weight.dense is not None
        share = MOST_ACTIVE if region.weight.dense.nbytes <= CACHED else MOST_ACTIVE_FROM_MEMORY
        places = B.alloc_buffer((inputs,), "int32", layout=None)
        number = B.alloc_buffer((1,), "int32", layout=None)

        def scan() -> None:
            B.buffer_store(number, T.int32(0), [0])
            with B.serial(0, inputs) as k:
                B.buffer_store(places, T.cast(k, "int32"), [number[0]])
                B.buffer_store(number, number[0] + T.cast(self.source[k] != T.float32(0), "int32"), [0])

            def all_of_them() -> None:
                serial(inputs, lambda k: B.buffer_store(places, T.cast(k, "int32"), [k]))
                B.buffer_store(number, T.int32(inputs), [0])

            branch(number[0] > round(share * inputs), all_of_them)

        branch(rows == 1, scan)
        return places, number

    def _tile(
        self,
        panel: Expression,
        width: PanelWidth,
        first: Expression,
        count: int,
        active: tuple[Expression, Expression] | None = None,
    ) -> None:
        plan, v, vectors = self.plan, self.plan.vectors, width.vectors
        chains = 2 if count * vectors <= 4 else 1  # FMAs in flight hide its latency of four cycles
        sums = [v.registers(count, vectors, "float32") for _ in range(chains)]
        for c, chain in enumerate(sums):
            for row in chain:
                for j, register in enumerate(row):
                    from_bias = c == 0 and not self.scaled
                    start = v.load(self.bias, panel * plan.width + j * v.lanes) if from_bias else v.constant(0.0)
                    register.set(start)

        ask = plan.ahead((panel, width, first, count), self.weight, plan.inputs)

        def step(k: Expression, chain: int) -> None:
            ask(k)
            base = panel * (plan.width * plan.inputs) + k * (vectors * v.lanes)
            loaded = [v.load(self.weight, base + j * v.lanes) for j in range(vectors)]
            w = [B.Bind(v.to_float(part) if self.scaled else part) for part in loaded]
            for i in range(count):
                a = B.Bind(v.splat(self.source[(first + i) * plan.inputs + k]))
                for j in range(vectors):
                    register = sums[chain][i][j]
                    register.set(v.fma(a, w[j], register.get()))

        self._steps(step, chains, active)
        self._finish((panel, width, first, count), sums)

    def _steps(
        self, step: Callable[[Expression, int], None], chains: int, active: tuple[Expression, Expression] | None
    ) -> None:
        """Every input, or the active ones, given to the chains in turn."""
        if active is None:
            inputs = self.plan.inputs

            def some(ko: Expression) -> None:
                for u in range(chains):
                    step(ko * chains + u, u)

            serial(inputs // chains, some)
            for k in range(inputs // chains * chains, inputs):
                step(k, 0)
            return
        places, number = active
        whole = B.Bind(tirx.floordiv(number[0], chains))
        with B.serial(0, whole) as ko:
            for u in range(chains):
                step(B.Bind(places[ko * chains + u]), u)
        with B.serial(0, number[0] - whole * chains) as k:
            step(B.Bind(places[whole * chains + k]), 0)

    def _finish(self, place: tuple[Expression, PanelWidth, Expression, int], sums: list[list[list[Register]]]) -> None:
        plan, v = self.plan, self.plan.vectors
        panel, width, first, count = place
        for j in range(width.vectors):
            column = panel * plan.width + j * v.lanes
            for i in range(count):
                value = sums[0][i][j].get()
                for chain in sums[1:]:
                    value = value + chain[i][j].get()
                if self.scaled:
                    value = v.fma(value, v.load(self.scale, column), v.load(self.bias, column))
                plan.store(first + i, column, value, width.used_lanes(j, v.lanes))


class IntegerBody:
    """Inner loops over uint8 activation codes."""

    def __init__(self, plan: PanelPlan, *, tiled: bool) -> None:
        self.plan = plan
        self.tiled = tiled
        self.groups = -(-plan.inputs // 4)
        self.packed_codes = PackedCodes.of(plan.region) if plan.outputs % plan.vectors.lanes == 0 else None

    @cached_property
    def bounded(self) -> bool:
        """See `Vectors.dot4`."""
        return pairs_fit(self.plan.region.weight.decoded())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Bias, product of scales, and what sums begin with, of every output of all panels."""
        weight, beyond = self.plan.region.weight, self.plan.padded_outputs - self.plan.outputs
        sums = weight.decoded().reshape(weight.shape[0], -1).sum(1, dtype=np.int64)
        start = zero_sum_factor(self.plan.region, self.plan.vectors.target) * sums
        made = sum_arrays(self.plan.region, self.packed_codes, start)
        return {key: np.pad(array, (0, beyond)) for key, array in made.items()}

    def emit(self, x: Expression, weight: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        self.bias, self.scale, self.start = rest
        self.words = flat(weight, self.groups * self.plan.padded_outputs, "int32")
        self.take(x, product(self.plan.leading))
        if self.tiled:
            tiles = TiledPanels(self.plan, "int32", self.groups)
            tiles.loops((self.code_words, self.words, self.start), self._finish, self._tile)
        else:
            self.plan.loops(self._tile)

    def take(self, x: Expression, rows: Expression) -> None:
        """Get the codes of all rows."""
        self.codes = x
        self.whole = self.plan.inputs % 4 == 0
        self.code_words = flat(x, rows * self.groups, "int32") if self.whole else self.codes

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        plan, v = self.plan, self.plan.vectors
        source, base = (self.code_words, first * self.groups) if self.whole else (self._padded_rows(first, count), 0)
        multiply = partial(v.dot4, bounded=self.bounded)
        operands = (self.words, source, base)
        sums = plan.sums_of_words((panel, width, first, count), self.start, operands, self.groups, multiply)
        for j in range(width.vectors):
            column = panel * plan.width + j * v.lanes
            rows = [first + i for i in range(count)]
            self._finish(column, width.used_lanes(j, v.lanes), rows, [row[j] for row in sums])

    def _finish(self, column: Expression, used: int, rows: Sequence[Expression], sums: Sequence[Register]) -> None:
        """Write the sums that some rows have of a vector of outputs."""
        plan, v = self.plan, self.plan.vectors
        gain, offset = B.Bind(v.load(self.scale, column)), B.Bind(v.load(self.bias, column))
        if self.packed_codes is not None:
            indices = [row * plan.outputs + column for row in rows]
            self.packed_codes.store(plan.epilogue, sums, (gain, offset), indices)
            return
        for row, total in zip(rows, sums, strict=True):
            plan.store(row, column, v.fma(self.scaled(row, v.to_float(total.get())), gain, offset), used)

    def scaled(self, row: Expression, total: Expression) -> Expression:
        """Sums of a row before the scale of outputs."""
        del row
        return total

    def _padded_rows(self, first: Expression, count: int) -> Expression:
        """A copy of `count` rows, each padded to whole words; the padding meets zero weights."""
        plan, width = self.plan, self.groups * 4
        room = B.alloc_buffer((count * width,), "uint8", scope="local", layout=None)
        for i in range(count):
            with B.serial(0, plan.inputs) as k:
                B.buffer_store(room, self.codes[(first + i) * plan.inputs + k], [i * width + k])
            for beyond in range(plan.inputs, width):
                B.buffer_store(room, T.uint8(0), [i * width + beyond])
        return flat(room, count * self.groups, "int32")
