"""Where activations lie: in one workspace, at places that share what is never alive at once.

TVM's planner lets tensors take turns in storages as large as the largest of each, and a call allocates them. Here the
whole program is known: every activation of fixed size gets a place in a workspace that is made once and that calls take
as an argument. Larger ones are placed first, each in the smallest gap between those that are alive beside it.
Pisarchyk, Lee: Efficient memory management for deep neural net inference. arXiv 2001.03288, 2020 (there "greedy by
size" for offsets).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx

from mcc.artifact import ALIGNMENT, PLACED, Place, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STORAGE, IN_STORAGE = "relax.memory.alloc_storage", "relax.memory.alloc_tensor"


@dataclass(frozen=True)
class MemoryPlan:
    """What activations of fixed size take.

    Attributes:
        workspace: where those lie that no caller may get.
        returned: bytes of those whose views a caller may get; what is returned itself is allocated by the call.
        alive: bytes of those that are alive at once, at most: what no plan can do without.
    """

    workspace: Workspace
    returned: int
    alive: int

    @property
    def planned(self) -> int:
        """Bytes in all."""
        return self.workspace.size + self.returned


@dataclass(eq=False)
class _Tensor:
    """An activation.

    Attributes:
        variable: that holds it first.
        shape, dtype: of the tensor.
        size: in bytes.
        first, last: positions of the bindings between which it is alive.
    """

    variable: Any
    shape: tuple[int, ...]
    dtype: str
    size: int
    first: int
    last: int

    def beside(self, other: _Tensor) -> bool:
        """Whether both are alive at one time."""
        return self.first <= other.last and other.first <= self.last


_ORDERS: tuple[Callable[[_Tensor], tuple[int, ...]], ...] = (
    lambda t: (-t.size, t.first), lambda t: (-t.size * (t.last - t.first + 1), t.first), lambda t: (t.first, -t.size),
)  # fmt: skip
"""What comes first: the largest, what is large for long, or what is needed first."""


def plan_memory(module: tvm.IRModule) -> tuple[tvm.IRModule, MemoryPlan]:
    """Let `main` take a workspace as its last argument, and its activations lie in that."""
    main = module["main"]
    bindings = bindings_of(main)
    tensors = _tensors(bindings, main.body.body)
    inside = [t for t in tensors if t.last < len(bindings)]
    offsets = min((_placed(sorted(inside, key=order)) for order in _ORDERS), key=lambda o: _end(inside, o))
    places = tuple(Place(offsets[t], t.shape, t.dtype) for t in inside)
    workspace = Workspace(_end(inside, offsets), places)
    returned = sum(t.size for t in tensors if t.last == len(bindings))
    alive = max(
        (sum(t.size for t in tensors if t.first <= at <= t.last) for at in {t.first for t in tensors}), default=0
    )
    module.update_func(module.get_global_var("main"), _rewritten(main, bindings, inside))
    return module, MemoryPlan(workspace, returned, alive)


def _tensors(bindings: Sequence[Any], result: Any) -> list[_Tensor]:
    """The activations of fixed size and of types that numpy has; those whose views a caller may get live to the end."""
    found: dict[Any, _Tensor] = {}
    held: dict[Any, set[Any]] = {}  # the activations that a variable may be
    for at, binding in enumerate(bindings):
        value = binding.value
        if is_call(value, STORAGE):
            continue
        if is_call(value, IN_STORAGE):
            shape, dtype = _fixed(value.args[2]), str(value.args[3].value)
            if shape is not None and dtype in PLACED:
                size = math.prod(shape) * int(tvm.DataType(dtype).itemsize)
                found[binding.var] = _Tensor(binding.var, shape, dtype, size, at, at)
                held[binding.var] = {binding.var}
            continue
        read = set().union(*(held.get(v, set()) for v in _variables(value)))
        for variable in read:
            found[variable].last = at
        # a kernel writes into what it is given and returns nothing; all else may return a view of what it reads
        held[binding.var] = set() if is_kernel(value) else read
    for variable in set().union(*(held.get(v, set()) for v in _variables(result))):
        found[variable].last = len(bindings)
    return list(found.values())


def bindings_of(function: relax.Function) -> list[Any]:
    """All bindings of a function, in order."""
    return [binding for block in function.body.blocks for binding in block.bindings]


def is_call(value: Any, name: str) -> bool:
    """Whether a value is what the relax op of that name gives."""
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def is_kernel(value: Any) -> bool:
    """Whether a value is a call of a function of the module."""
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


def _variables(value: Any) -> list[Any]:
    found: list[Any] = []
    relax.analysis.post_order_visit(value, lambda e: found.append(e) if isinstance(e, relax.Var) else None)
    return found


def _fixed(shape: Any) -> tuple[int, ...] | None:
    dims = list(shape.values)
    return tuple(int(d) for d in dims) if all(isinstance(d, tirx.IntImm) for d in dims) else None


def _placed(tensors: Sequence[_Tensor]) -> dict[_Tensor, int]:
    """Offsets, given one after another: the smallest gap that is large enough, else behind all that is beside."""
    offsets: dict[_Tensor, int] = {}
    for tensor in tensors:
        taken = sorted((offset, _rounded(offset + t.size)) for t, offset in offsets.items() if t.beside(tensor))
        end, best = 0, (math.inf, 0)
        for start, behind in taken:
            if start - end >= tensor.size:
                best = min(best, (start - end, end))
            end = max(end, behind)
        offsets[tensor] = best[1] if best[0] < math.inf else end
    return offsets


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _end(tensors: Sequence[_Tensor], offsets: dict[_Tensor, int]) -> int:
    return max((offsets[t] + t.size for t in tensors), default=0)


def _rewritten(main: Any, bindings: Sequence[Any], inside: Sequence[_Tensor]) -> Any:
    """The function with a workspace, and without the storages that it no longer needs."""
    places = {t.variable: i for i, t in enumerate(inside)}
    workspace = relax.Var("workspace", relax.TupleType([relax.TensorType(t.shape, t.dtype) for t in inside]))
    kept = {b.value.args[0] for b in bindings if is_call(b.value, IN_STORAGE) and b.var not in places}
    placed: list[Any] = []
    for binding in bindings:
        if is_call(binding.value, STORAGE) and binding.var not in kept:
            continue
        if binding.var in places:
            binding = relax.VarBinding(binding.var, relax.TupleGetItem(workspace, places[binding.var]))
        placed.append(binding)
    body = relax.SeqExpr([relax.BindingBlock(placed)], main.body.body)
    return relax.Function([*main.params, workspace], body, main.ret_ty, main.is_pure, main.attrs)
