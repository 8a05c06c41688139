"""A second way into small artifacts: all kernel calls as one function, beside what TVM's virtual machine runs.

The machine makes a call's outputs, checks its inputs and looks up weights, which takes a microsecond and more, as long
as a small network itself. The caller can do that once for all calls of equal shapes. So this function takes inputs
and a table of where weights, workspace and outputs lie, and calls one kernel after the other. See mcc/small_calls.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tvm
import tvm.tirx.script.builder.ir as B
from tvm import relax, tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder

from mcc.artifact import ALIGNMENT, DIRECT, DIRECT_ALONE, SMALL_CALL
from mcc.backends.cpu.memory_plan import IN_STORAGE, STORAGE, bindings_of, is_call, is_kernel
from mcc.backends.cpu.microkernel import product

if TYPE_CHECKING:
    from collections.abc import Sequence

# some hundred kernels: TVM and LLVM take longer by their square, and beyond 1,000 bindings TVM overflows its stack
MOST_BINDINGS = 600
_HOLD_STATEMENTS = ("body", "block", "init", "then_case", "else_case")
_ALONE, _VIEW = "relax.builtin.alloc_tensor", "relax.reshape"


def direct_function(module: tvm.IRModule) -> tirx.PrimFunc | None:
    """What `main`, its memory planned, does besides checks; None where calls are large or it does more than that.

    It takes inputs, the number of the call's outputs in their slabs, and a table of addresses: int64, of all weights,
    then of all of the workspace, then of a slab for each output. Its name says whether its kernels use several threads.
    """
    main = module["main"]
    bindings = bindings_of(main)
    writer = _Writer(module, main, bindings)
    return writer.write() if len(bindings) <= MOST_BINDINGS and writer.can() else None


class _Writer:
    """Writes the function of one module."""

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

    def write(self) -> tirx.PrimFunc:
        """The function."""
        known = len(self.weights.ty.fields) + len(self.workspace.ty.fields)
        name = DIRECT if any(_shares_work(self.module[k.op]) for k in self.kernels) else DIRECT_ALONE
        with IRBuilder() as builder, B.prim_func(is_private=False, s_tir=True):
            B.func_name(name)
            B.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
            for i, variable in enumerate(self.inputs):
                self.buffers[variable] = B.arg(f"input{i}", _buffer(variable.ty))
            number = B.arg("number", tirx.Var("number", "int64"))
            table = B.arg("table", B.buffer((known + len(self.outputs),), "int64", layout=None))
            with B.sblock("root"):
                B.reads([])
                B.writes([])
                for i, variable in enumerate(self.outputs):
                    slab = B.Bind(table[known + i])
                    self.buffers[variable] = _at(slab + number * _slab_bytes(variable.ty), variable.ty)
                for binding in self.bindings:
                    self._bind(binding.var, binding.value, table)
        return builder.get()

    def _bind(self, variable: Any, value: Any, table: Any) -> None:
        if isinstance(value, relax.Tuple) or is_call(value, _ALONE):
            return
        if is_kernel(value):
            none = tirx.reinterpret("handle", tirx.const(0, "uint64"))
            # an argument that is no tensor is a dim, which the function knows from its inputs
            B.evaluate(tirx.call_cpacked(value.op.name_hint, *(self.buffers.get(a, a) for a in value.args), none))
        elif isinstance(value, relax.Var):
            self.buffers[variable] = self.buffers[value]
        elif isinstance(value, relax.TupleGetItem):
            first = 0 if value.tuple_value.same_as(self.weights) else len(self.weights.ty.fields)
            self.buffers[variable] = _at(table[first + value.index], variable.ty)
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


def _buffer(kind: Any) -> Any:
    return B.buffer(_dims(kind), str(kind.dtype), layout=None)


def _seen_as(data: Any, kind: Any) -> Any:
    """What a pointer points to, as a tensor of that type."""
    return B.decl_buffer(_dims(kind), str(kind.dtype), data=data, layout=None)


def _at(address: Any, kind: Any) -> Any:
    """The memory at an address, as a tensor of that type."""
    pointer = PointerType(PrimType(str(kind.dtype)), "global")
    return _seen_as(B.Bind(tirx.reinterpret(pointer, address)), kind)


def _slab_bytes(kind: Any) -> Any:
    """Bytes from an output to the next in its slab."""
    size = product(_dims(kind)) * int(tvm.DataType(str(kind.dtype)).itemsize)
    return tirx.floordiv(tirx.const(ALIGNMENT - 1, "int64") + size, ALIGNMENT) * ALIGNMENT


def _least_bytes(kind: Any) -> int:
    """Of a tensor, dims of unknown size taken as one."""
    known = [int(d) for d in _dims(kind) if isinstance(d, tirx.IntImm)]
    return math.prod(known) * int(tvm.DataType(str(kind.dtype)).itemsize)
