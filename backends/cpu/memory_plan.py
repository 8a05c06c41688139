"""Which activations share memory: those that are never alive at once, as few bytes in all as can be had.

TVM's planner gives a tensor the first storage that is free when it comes. With the whole program known larger tensors
are placed first, and each takes the smallest storage in which no tensor is alive beside it: those that come later are
smaller, so that a storage never grows. Pisarchyk, Lee: Efficient memory management for deep neural net inference.
arXiv 2001.03288, 2020 (there "greedy by size" for shared objects).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx

if TYPE_CHECKING:
    from collections.abc import Sequence

_STORAGE, _TENSOR = "relax.memory.alloc_storage", "relax.memory.alloc_tensor"


@dataclass(frozen=True)
class MemoryPlan:
    """What activations of fixed size take.

    Attributes:
        planned: bytes of all storages.
        alive: bytes of those tensors that are alive at once, at most: what no plan can do without.
    """

    planned: int
    alive: int


@dataclass
class _Tensor:
    """An activation.

    Attributes:
        variable: that holds it first.
        storage: the variable of the storage that TVM's planner gave it.
        size: in bytes.
        first, last: positions of the bindings between which it is alive.
    """

    variable: Any
    storage: Any
    size: int
    first: int
    last: int


@dataclass
class _Storage:
    """Memory that tensors share.

    Attributes:
        size: in bytes.
        tensors: that lie in it, one after another in time.
    """

    size: int
    tensors: list[_Tensor] = field(default_factory=list)

    def fits(self, tensor: _Tensor) -> bool:
        """Whether none of its tensors is alive beside another."""
        return all(tensor.last < t.first or t.last < tensor.first for t in self.tensors)


def plan_memory(module: tvm.IRModule) -> tuple[tvm.IRModule, MemoryPlan]:
    """Place the activations of `main` anew, where that takes less than TVM's plan does."""
    main = module["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    tensors, kept = _tensors(bindings, main.body.body)
    storages = _placed(tensors)
    planned, old = sum(s.size for s in storages), _bytes_of(bindings, {t.storage for t in tensors})
    alive = max(
        (sum(t.size for t in tensors if t.first <= at <= t.last) for at in {t.first for t in tensors}), default=0
    )
    if kept or planned >= old:
        return module, MemoryPlan(old, alive)
    module.update_func(module.get_global_var("main"), _rewritten(main, bindings, storages))
    return module, MemoryPlan(planned, alive)


def _tensors(bindings: Sequence[Any], result: Any) -> tuple[list[_Tensor], bool]:
    """The activations that have a storage, and whether one of them is of another kind than is placed here."""
    found: dict[Any, _Tensor] = {}
    held: dict[Any, set[Any]] = {}  # the activations that a variable may be
    strange = False
    for at, binding in enumerate(bindings):
        value = binding.value
        if _is_call(value, _STORAGE):
            continue
        if _is_call(value, _TENSOR):
            size = _bytes(value.args[2], str(value.args[3].value))
            if size is None or int(value.args[1].value) != 0:
                strange = True
                continue
            found[binding.var] = _Tensor(binding.var, value.args[0], size, at, at)
            held[binding.var] = {binding.var}
            continue
        read = set().union(*(held.get(v, set()) for v in _variables(value)))
        for variable in read:
            found[variable].last = at
        # a kernel writes into what it is given and returns nothing; all else may return a view of what it reads
        held[binding.var] = set() if _is_kernel(value) else read
    for variable in set().union(*(held.get(v, set()) for v in _variables(result))):
        found[variable].last = len(bindings)
    return list(found.values()), strange


def _is_call(value: Any, name: str) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


def _variables(value: Any) -> list[Any]:
    found: list[Any] = []
    relax.analysis.post_order_visit(value, lambda e: found.append(e) if isinstance(e, relax.Var) else None)
    return found


def _bytes(shape: Any, dtype: str) -> int | None:
    dims = list(shape.values)
    if not all(isinstance(d, tirx.IntImm) for d in dims):
        return None
    return math.prod(int(d) for d in dims) * int(tvm.DataType(dtype).itemsize)


def _bytes_of(bindings: Sequence[Any], storages: set[Any]) -> int:
    """Bytes of some storages."""
    sizes = [b.value.args[0] for b in bindings if _is_call(b.value, _STORAGE) and b.var in storages]
    return sum(math.prod(int(d) for d in size.values) for size in sizes)


def _placed(tensors: Sequence[_Tensor]) -> list[_Storage]:
    """Storages with their tensors, the largest first."""
    storages: list[_Storage] = []
    for tensor in sorted(tensors, key=lambda t: -t.size):
        free = [s for s in storages if s.fits(tensor)]
        chosen = min(free, key=lambda s: s.size) if free else _Storage(tensor.size)
        if not free:
            storages.append(chosen)
        chosen.tensors.append(tensor)
    return storages


def _rewritten(main: Any, bindings: Sequence[Any], storages: Sequence[_Storage]) -> Any:
    """The function with these storages, each made in front of its first tensor."""
    owner = {t.variable: s for s in storages for t in s.tensors}
    made: dict[int, Any] = {}
    dropped = {t.storage for s in storages for t in s.tensors}
    old = {b.var: b.value for b in bindings if _is_call(b.value, _STORAGE)}
    placed: list[Any] = []
    for binding in bindings:
        if binding.var in dropped:
            continue
        storage = owner.get(binding.var)
        if storage is None:
            placed.append(binding)
            continue
        value = binding.value
        if id(storage) not in made:
            like = old[value.args[0]]
            variable = relax.Var(f"storage{len(made)}", like.ty)
            call = relax.op.memory.alloc_storage(relax.ShapeExpr([storage.size]), *like.args[1:])
            placed.append(relax.VarBinding(variable, call))
            made[id(storage)] = variable
        call = relax.op.memory.alloc_tensor(made[id(storage)], *value.args[1:])
        placed.append(relax.VarBinding(binding.var, call))
    body = relax.SeqExpr([relax.BindingBlock(placed)], main.body.body)
    return relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
