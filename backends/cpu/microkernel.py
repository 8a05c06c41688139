"""Vector code in TIR: what every kernel generator of the CPU backend is made of.

One source serves all instruction sets: a vector has `lanes` 32-bit lanes, `dot4` is one `vpdpbusd` with VNNI, one
`sdot` on ARM and an exact sequence elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import tvm
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target as TvmTarget

from mcc.target import host_features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.target import Target

Expression: TypeAlias = Any
"""A TIR expression, buffer or variable: TVM's Python has no types for them."""

OPAQUE = 8
# looks for parts of buffers that are not used: kernels have none, and with many accesses it takes most of compilation
NOT_FOR_KERNELS = ["s_tir.CompactBufferAllocation"]
LARGEST_ON_STACK = 1023  # bytes of a buffer; TVM wants them below 1024, and of global scope
# by 32-bit lanes
_RECIPROCALS = {4: "llvm.x86.sse.rcp.ps", 8: "llvm.x86.avx.rcp.ps.256", 16: "llvm.x86.avx512.rcp14.ps.512"}
_PACKS = {
    4: ("llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packuswb.128"),
    8: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"),
    16: ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"),
}  # fmt: skip
_PAIRS_OF_BYTES = {
    4: "llvm.x86.ssse3.pmadd.ub.sw.128", 8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512",
}  # fmt: skip
_PAIRS_OF_WORDS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def tvm_target(target: Target) -> TvmTarget:
    """TVM's name for a target."""
    return TvmTarget(
        {"kind": "llvm", "mtriple": f"{target.machine}-linux-gnu", "mcpu": target.llvm_cpu,
         "mattr": list(target.llvm_attributes), "opt-level": 3, "num-cores": 2}
    )  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel function.

    Attributes:
        name: in the function.
        shape: dims; a tirx.Var is read from the argument at run time.
        dtype: numpy name.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: str


def kernel_function(name: str, parameters: Sequence[Parameter], body: Callable[..., None]) -> tirx.PrimFunc:
    """Build a kernel: `body` is given one buffer a parameter and emits statements.

    The root block and the opaque pattern are what relax needs to leave the kernel alone; buffers are declared with the
    alignment of their element, so that a user's array can be read where it lies.
    """
    with IRBuilder() as builder, B.prim_func(is_private=False, s_tir=True):
        B.func_name(name)
        B.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        buffers = [
            B.arg(p.name, B.buffer(p.shape, p.dtype, align=tvm.DataType(p.dtype).itemsize, layout=None))
            for p in parameters
        ]
        with B.sblock("root"):
            B.reads([])
            B.writes([])
            body(*buffers)
    return builder.get()


def compiled_kernel(function: tirx.PrimFunc, target: Target) -> Any:
    """A kernel as a module of its own, to be timed."""
    host_features()  # which asks the system for tile registers
    with tvm.transform.PassContext(disabled_pass=NOT_FOR_KERNELS):
        return tvm.tirx.build(tvm.IRModule.from_expr(function), target=tvm_target(target))


def product(dims: Sequence[Any]) -> Expression:
    """The product of dims, constant or symbolic, as int32 arithmetic on indices wants it: int64."""
    result: Any = 1
    for dim in dims:
        result = dim * result
    return result


def at_least_one(size: Expression) -> Expression:
    """A divisor that may be zero where nothing is divided.

    By LLVM's maximum: TVM drops its own inside a loop that does not run then, and moves the division before the loop.
    """
    if isinstance(size, int | tirx.IntImm):
        return tirx.const(max(int(size), 1), "int64")
    return tirx.call_llvm_pure_intrin("int64", "llvm.smax.i64", T.cast(size, "int64"), tirx.const(1, "int64"))


def flat(buffer: Expression, size: Expression, dtype: str | None = None) -> Expression:
    """The buffer seen as one dim, possibly of another element type."""
    return B.decl_buffer((size,), dtype or buffer.dtype, data=buffer.data, layout=None)


def serial(extent: Any, body: Callable[[Expression], None]) -> None:
    """A loop; with a constant extent of one, the body alone."""
    if isinstance(extent, int) and extent <= 1:
        if extent == 1:
            body(0)
        return
    with B.serial(0, extent) as i:
        body(i)


def parallel(extent: Any, body: Callable[[Expression], None]) -> None:
    """A loop over the threads of the pool."""
    if isinstance(extent, int) and extent <= 1:
        serial(extent, body)
        return
    with B.parallel(0, extent) as i:
        body(i)


def branch(condition: Any, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """If, at compile time where the condition is known then."""
    if isinstance(condition, bool | tirx.IntImm):
        if bool(condition):
            then()
        elif otherwise is not None:
            otherwise()
        return
    with B.If(condition):
        with B.Then():
            then()
        if otherwise is not None:
            with B.Else():
                otherwise()


@dataclass(frozen=True)
class Register:
    """A vector that lives in a register.

    Attributes:
        pool: the local buffer it is a slice of.
        offset: of its first lane.
        lanes: of the vector.
    """

    pool: Expression
    offset: int
    lanes: int

    def get(self) -> Expression:
        """Its value."""
        return tirx.BufferLoad(self.pool, [T.ramp(self.offset, 1, self.lanes)])

    def set(self, value: Expression) -> None:
        """Change its value."""
        B.buffer_store(self.pool, value, [T.ramp(self.offset, 1, self.lanes)])


def shuffle(a: Expression, b: Expression, lanes: list[int]) -> Expression:
    """The chosen lanes of two vectors end to end."""
    return B.Bind(tirx.Shuffle([a, b], lanes))


def lane(vector: Expression, index: int) -> Expression:
    """One lane of a vector."""
    return tirx.Shuffle([vector], [index])


@dataclass(frozen=True)
class Vectors:
    """Vector instructions of a target.

    Attributes:
        target: whose.
        width: 32-bit lanes of a vector, where these are narrower than its registers.
    """

    target: Target
    width: int | None = None

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector."""
        return self.width or self.target.vector_lanes

    @property
    def neon(self) -> bool:
        """Whether they are ARM's."""
        return self.target.isa == "neon"

    def load(self, buffer: Expression, index: Expression, lanes: int | None = None) -> Expression:
        """`lanes` elements from `index`."""
        return tirx.BufferLoad(buffer, [T.ramp(index, 1, lanes or self.lanes)])

    def store(self, buffer: Expression, index: Expression, value: Expression, lanes: int | None = None) -> None:
        """Write a vector at `index`."""
        B.buffer_store(buffer, value, [T.ramp(index, 1, lanes or self.lanes)])

    def prefetch(self, buffer: Expression, index: Expression) -> None:
        """Ask for the line of an element that is read later, into the second level of the cache."""
        address = T.address_of(buffer[index])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, T.int32(0), T.int32(2), T.int32(1)))

    def splat(self, value: Expression) -> Expression:
        """A scalar in every lane."""
        return T.broadcast(value, self.lanes)

    def constant(self, value: float, dtype: str = "float32") -> Expression:
        """A number in every lane."""
        return self.splat(tirx.const(value, dtype))

    def fma(self, a: Expression, b: Expression, c: Expression) -> Expression:
        """A * b + c, rounded once."""
        n = self.lanes
        return tirx.call_llvm_pure_intrin(f"float32x{n}", f"llvm.fma.v{n}f32", a, b, c)

    def reciprocal(self, value: Expression) -> Expression:
        """1 / value within two units in the last place, for values that are finite: an estimate, then Newton's steps.

        A vector division keeps a CPU's multipliers waiting for some ten cycles.
        """
        if self.neon:
            return self.constant(1.0) / value
        value, n = self.hold(value), self.lanes
        kept = (self.constant(0.0), T.int16(-1)) if n == 16 else ()
        estimate = self.hold(tirx.call_llvm_pure_intrin(f"float32x{n}", _RECIPROCALS[n], value, *kept))
        for _ in range(1 if n == 16 else 2):
            error = self.fma(self.constant(0.0) - value, estimate, self.constant(1.0))
            estimate = self.hold(self.fma(estimate, error, estimate))
        return estimate

    def to_nearest_integer(self, value: Expression) -> Expression:
        """To int32, rounding half to even, in one instruction; the value must fit."""
        n = self.lanes
        name = "llvm.aarch64.neon.fcvtns" if self.neon else "llvm.lrint"
        return tirx.call_llvm_pure_intrin(f"int32x{n}", f"{name}.v{n}i32.v{n}f32", value)

    def round_half_even(self, value: Expression) -> Expression:
        """To the nearest integer, still float."""
        n = self.lanes
        return tirx.call_llvm_pure_intrin(f"float32x{n}", f"llvm.rint.v{n}f32", value)

    def to_float(self, value: Expression) -> Expression:
        """Integer lanes as float32."""
        return T.cast(value, f"float32x{self.lanes}")

    def registers(self, rows: int, columns: int, dtype: str, lanes: int | None = None) -> list[list[Register]]:
        """Accumulators, which LLVM keeps in registers.

        They are slices of buffers so small that TVM puts them on the stack; others come from its workspace allocator,
        and then a branch between two uses writes all of them to memory.
        """
        n = lanes or self.lanes
        count, most = rows * columns, LARGEST_ON_STACK // (4 * n)
        pools = [
            B.alloc_buffer((min(most, count - first) * n,), dtype, scope="global", layout=None)
            for first in range(0, count, most)
        ]
        held = [Register(pools[i // most], i % most * n, n) for i in range(count)]
        return [held[i * columns : (i + 1) * columns] for i in range(rows)]

    def hold(self, value: Expression) -> Expression:
        """The value in a register of its own.

        Like Bind, of which TVM's code generator writes every use out as the whole expression when it simplifies it.
        """
        ((register,),) = self.registers(1, 1, str(value.ty).split("x")[0])
        register.set(value)
        return register.get()

    def held_integer(self, value: Expression) -> Expression:
        """A size that is computed once, before loops: as `hold`, since simplifying divisions by it fails in TVM."""
        room = B.alloc_buffer((1,), "int64", scope="global", layout=None)
        B.buffer_store(room, T.cast(value, "int64"), [0])
        return room[0]

    def select(self, condition: Expression, then: Expression, otherwise: Expression) -> Expression:
        """Lane by lane, of two float32 vectors.

        TVM's own Select is simplified under its condition, with every bound variable in it written out: seconds for one
        that follows a function.
        """
        n = self.lanes
        name = f"llvm.vp.select.v{n}f32"
        return tirx.call_llvm_pure_intrin(f"float32x{n}", name, condition, then, otherwise, T.int32(n))

    def across(self, values: list[Expression], combine: Callable[[Expression, Expression], Expression]) -> Expression:
        """All lanes of a few vectors combined into one value."""
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [B.Bind(combine(*pair)) if len(pair) > 1 else pair[0] for pair in pairs]
        value, lanes = values[0], self.lanes
        while lanes > 1:
            lanes //= 2
            value = B.Bind(value)
            low, high = (tirx.Shuffle([value], list(range(start, start + lanes))) for start in (0, lanes))
            value = combine(low, high)
        return B.Bind(value)

    def transpose_tile(
        self,
        shape: tuple[int, int],
        load: Callable[[Expression, Expression, int], Expression],
        store: Callable[[Expression, Expression, int, Expression], None],
    ) -> None:
        """Transpose a tile of float32 square by square; the last ones along the first dim cover some of it once more.

        Args:
            shape: the second dim a multiple of the lanes, the first no less than they are.
            load: given where a square begins along either dim, the vector i that it is made of.
            store: given the same, takes the vector i of the transposed square.
        """
        (extent, width), n = shape, self.lanes

        def square(first: Expression, second: Expression) -> None:
            read = [B.Bind(load(first, second, i)) for i in range(n)]
            for i, turned in enumerate(self.transpose(read)):
                store(first, second, i, turned)

        serial(
            -(-extent // n),
            lambda b: serial(width // n, lambda t: square(tirx.min(b * n, extent - n), t * n)),
        )

    def transpose(self, rows: list[Expression]) -> list[Expression]:
        """Transpose a square block of float32: `lanes` vectors in, `lanes` vectors out, by shuffles of two."""
        n = self.lanes
        quads = range(0, n, 4)
        low = [j for q in quads for j in (q, n + q, q + 1, n + q + 1)]
        high = [j for q in quads for j in (q + 2, n + q + 2, q + 3, n + q + 3)]
        low_pairs = [j for q in quads for j in (q, q + 1, n + q, n + q + 1)]
        high_pairs = [j for q in quads for j in (q + 2, q + 3, n + q + 2, n + q + 3)]
        groups = []  # groups[g][c]: column c of each 4x4 block of rows 4g to 4g + 3
        for g in range(0, n, 4):
            a, b, c, d = rows[g : g + 4]
            ab, ab_high, cd, cd_high = shuffle(a, b, low), shuffle(a, b, high), shuffle(c, d, low), shuffle(c, d, high)
            groups.append(
                [shuffle(ab, cd, low_pairs), shuffle(ab, cd, high_pairs), shuffle(ab_high, cd_high, low_pairs),
                 shuffle(ab_high, cd_high, high_pairs)]
            )  # fmt: skip
        columns: list[Expression] = [None] * n
        for c in range(4):
            self._gather_blocks([group[c] for group in groups], c, columns)
        return columns

    def _gather_blocks(self, parts: list[Expression], column: int, columns: list[Expression]) -> None:
        """Collect the 4-lane blocks of `parts` into whole columns: number `column`, column + 4 and so on."""

        def blocks(*indices: int) -> list[int]:
            return [4 * i + j for i in indices for j in range(4)]

        if self.lanes == 4:
            columns[column] = parts[0]
            return
        if self.lanes == 8:
            columns[column] = shuffle(parts[0], parts[1], blocks(0, 2))
            columns[column + 4] = shuffle(parts[0], parts[1], blocks(1, 3))
            return
        even, odd = blocks(0, 2, 4, 6), blocks(1, 3, 5, 7)
        first_even, first_odd = shuffle(parts[0], parts[1], even), shuffle(parts[0], parts[1], odd)
        last_even, last_odd = shuffle(parts[2], parts[3], even), shuffle(parts[2], parts[3], odd)
        columns[column], columns[column + 8] = shuffle(first_even, last_even, even), shuffle(first_even, last_even, odd)
        columns[column + 4], columns[column + 12] = (
            shuffle(first_odd, last_odd, even),
            shuffle(first_odd, last_odd, odd),
        )

    def dot4(self, accumulator: Expression, unsigned: Expression, signed: Expression, *, bounded: bool) -> Expression:
        """Accumulator + the products of 4 unsigned and 4 signed bytes in each int32 lane, exactly.

        The unsigned bytes count less the target's `code_offset`.

        Args:
            accumulator: int32 lanes.
            unsigned: int32 lanes of four bytes.
            signed: the same.
            bounded: neighbouring signed bytes satisfy |w0| + |w1| <= 128, so that `vpmaddubsw` cannot saturate.
        """
        if self.neon:
            codes = tirx.bitwise_xor(unsigned, T.broadcast(T.int32(-0x7F7F7F80), self.lanes))  # 128 less, bytewise
            # the codes come second: of that operand the instruction takes a lane itself
            a, b = (T.reinterpret("int8x16", v) for v in (signed, codes))
            return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", accumulator, a, b)
        if self.target.exact_dot4:
            n = self.lanes
            a, b = (T.reinterpret(f"int8x{4 * n}", v) for v in (unsigned, signed))
            name = f"llvm.x86.avx512.vpdpbusd.{32 * n}"
            return tirx.call_llvm_pure_intrin(f"int32x{n}", name, accumulator, a, b)
        if bounded:
            return accumulator + self._pairs_of_bytes(unsigned, signed)
        (a0, a1), (b0, b1) = self._even_odd_unsigned(unsigned), self._even_odd_signed(signed)
        return accumulator + self.pairs_of_words(a0, b0) + self.pairs_of_words(a1, b1)

    def dot2(self, accumulator: Expression, a: Expression, b: Expression) -> Expression:
        """Add two products of bfloat16 to each float32 lane; pairs as int32 words, see kernels/bfloat16.py."""
        return T.call_pure_extern(f"float32x{self.lanes}", "mcc_dot2", accumulator, a, b)

    def pack_to_words(self, low: Expression, high: Expression) -> Expression:
        """Two vectors of int32 as one of int16, saturated; of each 128 bits the two parts follow one another."""
        if self.neon:
            a, b = (tirx.call_llvm_pure_intrin("int16x4", "llvm.aarch64.neon.sqxtn.v4i16", x) for x in (low, high))
            return shuffle(a, b, list(range(8)))
        return tirx.call_llvm_pure_intrin(f"int16x{2 * self.lanes}", _PACKS[self.lanes][0], low, high)

    def pack_low_words(self, low: Expression, high: Expression) -> Expression:
        """The low 16 bits of two vectors of int32 as words for `pack_to_codes`, which may already be held to codes."""
        n = 2 * self.lanes
        a, b = (T.reinterpret(f"int16x{n}", x) for x in (low, high))
        if self.neon:
            return shuffle(a, b, list(range(0, 2 * n, 2)))
        codes = T.reinterpret(f"int16x{n}", self.pack_to_codes(a, b))  # of the high words too, which are masked
        return T.bitwise_and(codes, T.broadcast(T.int16(255), n))

    def pack_to_codes(self, low: Expression, high: Expression) -> Expression:
        """Two vectors of int16 as one of uint8, saturated; of each 128 bits the two parts follow one another."""
        n = self.lanes
        if self.neon:
            a, b = (tirx.call_llvm_pure_intrin("uint8x8", "llvm.aarch64.neon.sqxtun.v8i8", x) for x in (low, high))
            return shuffle(a, b, list(range(16)))
        codes = tirx.call_llvm_pure_intrin(f"int8x{4 * n}", _PACKS[n][1], low, high)
        return T.reinterpret(f"uint8x{4 * n}", codes)

    def _pairs_of_bytes(self, unsigned: Expression, signed: Expression) -> Expression:
        n = self.lanes
        name = _PAIRS_OF_BYTES[n]
        a, b = (T.reinterpret(f"int8x{4 * n}", v) for v in (unsigned, signed))
        words = tirx.call_llvm_pure_intrin(f"int16x{2 * n}", name, a, b)
        return self.pairs_of_words(words, T.broadcast(T.int16(1), 2 * n))

    def pairs_of_words(self, a: Expression, b: Expression) -> Expression:
        """The sums of the two products of neighbouring words, in int32 lanes."""
        n = self.lanes
        name = _PAIRS_OF_WORDS[n]
        return tirx.call_llvm_pure_intrin(f"int32x{n}", name, a, b)

    def _even_odd_unsigned(self, value: Expression) -> tuple[Expression, Expression]:
        n = 2 * self.lanes
        halves = T.reinterpret(f"uint16x{n}", value)
        even = T.bitwise_and(halves, T.broadcast(T.uint16(255), n))
        odd = T.shift_right(halves, T.broadcast(T.uint16(8), n))
        return T.reinterpret(f"int16x{n}", even), T.reinterpret(f"int16x{n}", odd)

    def _even_odd_signed(self, value: Expression) -> tuple[Expression, Expression]:
        n = 2 * self.lanes
        halves, eight = T.reinterpret(f"int16x{n}", value), T.broadcast(T.int16(8), n)
        return T.shift_right(T.shift_left(halves, eight), eight), T.shift_right(halves, eight)
