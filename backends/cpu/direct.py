"""A second way into small artifacts: all kernel calls as one function, beside what TVM's virtual machine runs.

The machine makes a call's outputs, checks its inputs and looks up weights, which takes a microsecond and more, as long
as a small network itself. The caller can do that once for all calls of equal shapes. So this function takes inputs
and a table of where weights, workspace and outputs lie, and calls one kernel after the other. Inputs are the addresses
of numpy arrays to it, which cost least to hand over; that they are such arrays, of the right dtype and shape, costs the
function a few loads and Python more than a small layer. See mcc/small_calls.py.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any

import tvm
import tvm.tirx.script.builder.ir as B
from tvm import relax, tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder

from mcc.artifact import ALIGNMENT, ARRAY_WORDS, CONTIGUOUS_ALIGNED, DIRECT, DIRECT_ALONE, SMALL_CALL
from mcc.backends.cpu.memory_plan import IN_STORAGE, STORAGE, bindings_of, is_call, is_kernel
from mcc.backends.cpu.microkernel import product

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# some hundred kernels: TVM and LLVM take longer by their square, and beyond 1,000 bindings TVM overflows its stack
MOST_BINDINGS = 600
_HOLD_STATEMENTS = ("body", "block", "init", "then_case", "else_case")
_KERNEL_CALLS = "kernel_calls"
_ALONE, _VIEW = "relax.builtin.alloc_tensor", "relax.reshape"


def direct_functions(module: tvm.IRModule) -> list[tirx.PrimFunc]:
    """What `main`, its memory planned, does, and what checks a call's inputs before; none where calls are large.

    The second is for the caller. It takes a table, the dims of inputs that may vary, where the object of each input
    lies, and the number of the call's outputs in their slabs. The table has addresses, int64: of the class of arrays,
    of each input's dtype, of all weights, then of all of the workspace, then of a slab for each output. It gives 1, or
    0 and does nothing where an input is no array as it has to be. Its name says whether its kernels use several
    threads.
    """
    main = module["main"]
    bindings = bindings_of(main)
    writer = _Writer(module, main, bindings)
    return [writer.kernel_calls(), writer.checked()] if len(bindings) <= MOST_BINDINGS and writer.can() else []


class _Writer:
    """Writes the functions of one module."""

    def __init__(self, module: tvm.IRModule, main: Any, bindings: Sequence[Any]) -> None:
        self.module, self.bindings = module, bindings
        *self.inputs, self.weights, self.workspace = main.params
        self.values = {b.var: b.value for b in bindings}
        self.kernels = [b.value for b in bindings if is_kernel(b.value)]
        result = main.body.body
        fields = self.values.get(result, result)
        self.results = list(fields.fields) if isinstance(fields, relax.Tuple) else [result]
        self.outputs = [self._root(r) for r in self.results]
        self.buffers: dict[Any, Any] = {}

    @property
    def _first_output(self) -> int:
        """Where in the table the outputs' slabs stand."""
        return 1 + len(self.inputs) + len(self.weights.ty.fields) + len(self.workspace.ty.fields)

    def _root(self, variable: Any) -> Any:
        """The variable whose memory another one is, or a view of."""
        value: Any = self.values.get(variable)
        while isinstance(value, relax.Var) or is_call(value, _VIEW):
            variable = value if isinstance(value, relax.Var) else value.args[0]
            value = self.values.get(variable)
        return variable

    def can(self) -> bool:
        """Whether a call may be small, outputs have memory of their own, and nothing but kernels is called."""
        own = len(set(self.outputs)) == len(self.outputs) and all(
            is_call(self.values.get(o), _ALONE) for o in self.outputs
        )
        if not own or not all(isinstance(d, tirx.IntImm | tirx.Var) for i in self.inputs for d in _dims(i.ty)):
            return False
        small = sum(_least_bytes(v.ty) for v in (*self.inputs, *self.results)) <= SMALL_CALL
        return small and all(self._knows(b, b.value) for b in self.bindings)

    def _knows(self, binding: Any, value: Any) -> bool:
        if isinstance(binding, relax.MatchCast):
            return False
        if isinstance(value, relax.TupleGetItem):
            return value.tuple_value in {self.weights, self.workspace}
        if is_kernel(value):
            return all(isinstance(a, relax.Var) for a in value.args)
        if is_call(value, _ALONE):
            return binding.var in set(self.outputs)
        if is_call(value, STORAGE):  # one of fixed size would lie on the stack, less aligned
            return not isinstance(value.args[0].values[0], tirx.IntImm)
        return isinstance(value, relax.Var | relax.Tuple) or is_call(value, IN_STORAGE) or is_call(value, _VIEW)

    def checked(self) -> tirx.PrimFunc:
        """The function that checks and calls the other: one that returns early frees none of its memory."""
        name = DIRECT if any(_shares_work(self.module[k.op]) for k in self.kernels) else DIRECT_ALONE
        with IRBuilder() as builder, _function(name):
            table, dims, objects, number = self._arguments()
            with B.sblock("root"):
                B.reads([])
                B.writes([])
                self._check([_array_of(place) for place in objects], dims, table)
                given = [size for sizes in dims for size in sizes if isinstance(size, tirx.Var)]
                B.evaluate(tirx.call_cpacked(_KERNEL_CALLS, table, *given, *objects, number, _nothing()))
                B.Return(tirx.const(1, "int64"))
        return builder.get()

    def kernel_calls(self) -> tirx.PrimFunc:
        """The function that calls the kernels."""
        with IRBuilder() as builder, _function(_KERNEL_CALLS):
            table, _, objects, number = self._arguments()
            with B.sblock("root"):
                B.reads([])
                B.writes([])
                for variable, place in zip(self.inputs, objects, strict=True):
                    self.buffers[variable] = _at(_array_of(place)[ARRAY_WORDS["values"]], variable.ty)
                for i, variable in enumerate(self.outputs):
                    slab = B.Bind(table[self._first_output + i])
                    self.buffers[variable] = _at(slab + number * _slab_bytes(variable.ty), variable.ty)
                for binding in self.bindings:
                    self._bind(binding.var, binding.value, table)
        return builder.get()

    def _arguments(self) -> tuple[Any, list[list[Any]], list[Any], Any]:
        """Add the arguments: table, dims of each input, numbers or arguments, the inputs' objects, outputs' number."""
        table = B.arg("table", B.buffer((self._first_output + len(self.outputs),), "int64", layout=None))
        dims = self._add_dims()
        names = [*(f"input{i}" for i in range(len(self.inputs))), "number"]
        *objects, number = (B.arg(name, tirx.Var(name, "int64")) for name in names)
        return table, dims, objects, number

    def _check(self, arrays: Sequence[Any], dims: Sequence[Sequence[Any]], table: Any) -> None:
        """Return 0 unless inputs are arrays, which is looked at first; each reads what the one before found there."""
        _return_unless([array[ARRAY_WORDS["type"]] == table[0] for array in arrays])
        fields = []
        for i, (array, sizes) in enumerate(zip(arrays, dims, strict=True)):
            rank = tirx.bitwise_and(array[ARRAY_WORDS["rank"]], tirx.const(0xFFFFFFFF, "int64"))
            readable = tirx.bitwise_and(array[ARRAY_WORDS["flags"]], CONTIGUOUS_ALIGNED) == CONTIGUOUS_ALIGNED
            fields += [array[ARRAY_WORDS["dtype"]] == table[1 + i], rank == len(sizes), readable]
        _return_unless(fields)
        given = [(_words(a[ARRAY_WORDS["dims"]], len(sizes)), sizes) for a, sizes in zip(arrays, dims, strict=True)]
        _return_unless([words[axis] == size for words, sizes in given for axis, size in enumerate(sizes)])

    def _add_dims(self) -> list[list[Any]]:
        """Add an argument for every dim of an input that may vary; the dims of all inputs are numbers or these."""
        seen: set[Any] = set()
        found: list[list[Any]] = []
        for i, variable in enumerate(self.inputs):
            found.append([])
            for axis, dim in enumerate(_dims(variable.ty)):
                size = dim
                if isinstance(dim, tirx.Var):
                    name = f"input{i}_dim{axis}"
                    size = B.arg(name, tirx.Var(name, "int64") if dim in seen else dim)
                    seen.add(dim)
                found[-1].append(size)
        return found

    def _bind(self, variable: Any, value: Any, table: Any) -> None:
        if isinstance(value, relax.Tuple) or is_call(value, _ALONE):
            return
        if is_kernel(value):
            # an argument that is no tensor is a dim
            B.evaluate(tirx.call_cpacked(value.op.name_hint, *(self.buffers.get(a, a) for a in value.args), _nothing()))
        elif isinstance(value, relax.Var):
            self.buffers[variable] = self.buffers[value]
        elif isinstance(value, relax.TupleGetItem):
            first = 0 if value.tuple_value.same_as(self.weights) else len(self.weights.ty.fields)
            self.buffers[variable] = _at(table[1 + len(self.inputs) + first + value.index], variable.ty)
        elif is_call(value, STORAGE):
            self.buffers[variable] = B.alloc_buffer(tuple(value.args[0].values), "uint8", layout=None)
        else:
            self.buffers[variable] = _seen_as(self.buffers[value.args[0]].data, variable.ty)


def _shares_work(statement: Any) -> bool:
    """Whether a loop in a statement, or in a kernel, is run by several threads."""
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        return True
    inner = (getattr(statement, name, None) for name in _HOLD_STATEMENTS)
    return any(_shares_work(s) for s in (*getattr(statement, "seq", ()), *inner) if s is not None)


def _dims(kind: Any) -> tuple[Any, ...]:
    return tuple(kind.shape.values)


def _seen_as(data: Any, kind: Any) -> Any:
    """What a pointer points to, as a tensor of that type."""
    return B.decl_buffer(_dims(kind), str(kind.dtype), data=data, layout=None)


def _at(address: Any, kind: Any) -> Any:
    """The memory at an address, as a tensor of that type."""
    return _seen_as(B.Bind(tirx.reinterpret(_pointer(str(kind.dtype)), address)), kind)


def _array_of(place: Any) -> Any:
    """The numpy array at an address, as words."""
    return _words(place, max(ARRAY_WORDS.values()) + 1)


def _words(address: Any, count: int) -> Any:
    """So many words at an address; one at least, as there is no buffer of none."""
    data = B.Bind(tirx.reinterpret(_pointer("int64"), address))
    return B.decl_buffer((max(count, 1),), "int64", data=data, layout=None)


def _return_unless(conditions: Sequence[Any]) -> None:
    """Return 0 unless all hold."""
    with B.If(tirx.Not(reduce(tirx.And, conditions, tirx.const(1, "bool")))), B.Then():
        B.Return(tirx.const(0, "int64"))


@contextmanager
def _function(name: str) -> Iterator[None]:
    with B.prim_func(is_private=False, s_tir=True):
        B.func_name(name)
        B.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        yield


def _nothing() -> Any:
    return tirx.reinterpret("handle", tirx.const(0, "uint64"))


def _pointer(dtype: str) -> PointerType:
    return PointerType(PrimType(dtype), "global")


def _slab_bytes(kind: Any) -> Any:
    """Bytes from an output to the next in its slab."""
    size = product(_dims(kind)) * int(tvm.DataType(str(kind.dtype)).itemsize)
    return tirx.floordiv(tirx.const(ALIGNMENT - 1, "int64") + size, ALIGNMENT) * ALIGNMENT


def _least_bytes(kind: Any) -> int:
    """Of a tensor, dims of unknown size taken as one."""
    known = [int(d) for d in _dims(kind) if isinstance(d, tirx.IntImm)]
    return math.prod(known) * int(tvm.DataType(str(kind.dtype)).itemsize)
