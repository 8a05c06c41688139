"""ATen ops outside the op table, written out as PyTorch itself does, where that ends in ops of the table.

`torch._decomp` holds what PyTorch's own compilers write ops out with. Ops of the table and what has a spelling of
ours are never taken apart, so that layers stay whole.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.writing import Writer, fake_mode_of, replace_call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_A = torch.ops.aten
_BEYOND_CORE = (
    _A.grid_sampler_2d.default, _A.upsample_trilinear3d.default, _A.dist.default,
)  # fmt: skip
_WITHOUT_VALUES = (_A.empty.memory_format, _A.empty_strided.default)
_VIEW_WRITES: dict[Any, Any] = {
    _A.transpose_.default: _A.transpose.int, _A.squeeze_.dim: _A.squeeze.dim, _A.t_.default: _A.t.default,
    _A.unsqueeze_.default: _A.unsqueeze.default,
}  # fmt: skip


@cache
def _table(kept: frozenset[Any]) -> dict[Any, Callable[..., Any]]:
    known: dict[Any, Callable[..., Any]] = {**core_aten_decompositions(), **get_decompositions(_BEYOND_CORE)}
    return {op: function for op, function in known.items() if ops.lookup(op) is None and op not in kept}


def decompose(module: fx.GraphModule, kept: Collection[Any], *, views: bool) -> None:
    """Replace each call of an op outside the table by the calls that PyTorch writes it out as.

    What cannot be written out stays, for the op table to name: for other sizes than those of the example, or where
    training would compute something else.

    Args:
        module: an exported module with fake values; edited.
        kept: ops outside the table that have a spelling of ours, or that write into their argument.
        views: of ops, too, that give a view of what they read; where something writes into one they must stay.
    """
    for node in _unknown(module, kept):
        target: Any = node.target
        if node.all_input_nodes and not _trains_otherwise(node) and (views or not target.is_view):
            body = _traced(node, frozenset(kept))
            if body is not None:
                _inline(module, node, body)


def evaluate(module: fx.GraphModule, kept: Collection[Any]) -> None:
    """Store what calls of numbers alone give, such as a window or the places of a triangle.

    Args:
        module: an exported module of functional calls with fake values; edited.
        kept: as above.
    """
    for node in _unknown(module, kept):
        target: Any = node.target
        if node.all_input_nodes or torch.Tag.nondeterministic_seeded in target.tags:
            continue
        value = target(*node.args, **node.kwargs)
        if isinstance(value, Tensor):
            plain = torch.zeros_like(value) if target in _WITHOUT_VALUES else value
            replace_call(module, node, Writer(module, node).stored(plain))


def _unknown(module: fx.GraphModule, kept: Collection[Any]) -> list[fx.Node]:
    """The calls of ATen ops that no table has and that write into nothing."""
    return [
        node
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and not (ops.lookup(node.target) or node.target in kept or node.target._schema.is_mutable)
    ]


def _trains_otherwise(node: fx.Node) -> bool:
    """Whether a call does something random in training, which would be left out for good."""
    schema: Any = node.target._schema  # type: ignore[union-attr]  # an op
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if "dropout" in names:
        return bool(given.get("dropout"))
    return not {"train", "training"}.isdisjoint(names)


def _traced(node: fx.Node, kept: frozenset[Any]) -> fx.GraphModule | None:
    """What a call runs, with its nodes as inputs; None where that is the call itself, or cannot be traced."""
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    values = [leaves[i].meta["val"] for i in places]
    mode = fake_mode_of([*values, node.meta["val"]])
    if mode is None:
        return None

    def call(*given: Any) -> Any:
        filled = list(leaves)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an op

    def trace(given: list[Any]) -> fx.GraphModule:
        with enable_python_dispatcher():  # others take sizes for numbers
            return make_fx(call, decomposition_table=_table(kept))(*given)

    try:
        with torch.no_grad():
            if _fixes_sizes(trace, values):
                return None
            with mode:
                body = trace(values)
    except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None  # the op table will name it
    _respell_view_writes(body)
    body.graph.eliminate_dead_code()
    calls = [n.target for n in body.graph.nodes if n.op == "call_function"]
    return None if node.target in calls else body


def _fixes_sizes(trace: Callable[..., fx.GraphModule], values: list[Any]) -> bool:
    """Whether tracing takes a size that varies for what it is in the example; tried on values of their own.

    What it takes is for good: the nodes of symbolic sizes forget that they were any.
    """
    if all(isinstance(n, int) for v in values for n in (v.shape if isinstance(v, Tensor) else (v,))):
        return False
    known = ShapeEnv()
    with FakeTensorMode(shape_env=known) as mode:
        trace([_like(mode, v) if isinstance(v, Tensor) else _size_like(mode, v) for v in values])
    return any(size.is_number for size in known.replacements.values())


def _size_like(mode: FakeTensorMode, size: torch.SymInt) -> torch.SymInt | int:
    return _like(mode, torch.empty(ops.extent(size))).shape[0]


def _like(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A fake tensor whose sizes vary where those of `value` do; all of a plain tensor's do."""
    plain = not isinstance(value, FakeTensor)
    varies = [DimDynamic.DYNAMIC if plain or not isinstance(n, int) else DimDynamic.STATIC for n in value.shape]
    with unset_fake_temporarily():
        example = torch.empty([ops.extent(n) for n in value.shape], dtype=value.dtype)
    context: Any = StatelessSymbolicContext(dynamic_sizes=varies, constraint_sizes=[None] * len(varies))
    return mode.from_tensor(example, symbolic_context=context)


def _respell_view_writes(body: fx.GraphModule) -> None:
    """x.transpose_(…) turns x itself: what is read of x behind it is what transpose gives."""
    behind: set[fx.Node] = set(body.graph.nodes)
    for node in body.graph.nodes:
        behind.discard(node)
        if node.target in _VIEW_WRITES:
            node.target = _VIEW_WRITES[node.target]
            node.args[0].replace_all_uses_with(node, delete_user_cb=behind.__contains__)


def _inline(module: fx.GraphModule, node: fx.Node, body: fx.GraphModule) -> None:
    operands = (leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node))
    write = Writer(module, node)
    made: dict[fx.Node, Any] = {}
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            made[inner] = next(operands)
        elif inner.op == "get_attr":
            made[inner] = write.stored(getattr(body, str(inner.target)))
        elif inner.op == "output":
            replace_call(module, node, fx.node.map_arg(inner.args[0], made.__getitem__))
        else:
            made[inner] = write(
                inner.target,
                *fx.node.map_arg(inner.args, made.__getitem__),
                **fx.node.map_arg(inner.kwargs, made.__getitem__),
            )
