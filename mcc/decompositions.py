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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.writing import Writer, fake_mode_of, replace_call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_A = torch.ops.aten
_BEYOND_CORE = (
    _A.grid_sampler_2d.default, _A.upsample_trilinear3d.default, _A.dist.default,
)  # fmt: skip
_VIEW_WRITES: dict[Any, Any] = {
    _A.transpose_.default: _A.transpose.int, _A.squeeze_.dim: _A.squeeze.dim, _A.t_.default: _A.t.default,
    _A.unsqueeze_.default: _A.unsqueeze.default,
}  # fmt: skip


@cache
def _table(kept: frozenset[Any]) -> dict[Any, Callable[..., Any]]:
    known: dict[Any, Callable[..., Any]] = {**core_aten_decompositions(), **get_decompositions(_BEYOND_CORE)}
    return {op: function for op, function in known.items() if ops.lookup(op) is None and op not in kept}


def decompose(module: fx.GraphModule, kept: Collection[Any]) -> None:
    """Replace each call of an op outside the table by the calls that PyTorch writes it out as.

    What cannot be written out stays, for the op table to name.

    Args:
        module: an exported module with fake values; edited.
        kept: ops outside the table that have a spelling of ours, or that write into their argument.
    """
    for node in list(module.graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            continue
        if ops.lookup(target) is not None or target in kept or target._schema.is_mutable:
            continue
        if not node.all_input_nodes and torch.Tag.nondeterministic_seeded not in target.tags:
            _evaluate(module, node)
            continue
        body = _traced(node, frozenset(kept))
        if body is not None:
            _inline(module, node, body)


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

    try:
        with mode, torch.no_grad():
            body = make_fx(call, decomposition_table=_table(kept))(*values)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None  # the op table will name it
    _respell_view_writes(body)
    body.graph.eliminate_dead_code()
    calls = [n.target for n in body.graph.nodes if n.op == "call_function"]
    return None if node.target in calls else body


def _respell_view_writes(body: fx.GraphModule) -> None:
    """x.transpose_(…) turns x itself: what is read of x behind it is what transpose gives."""
    behind: set[fx.Node] = set(body.graph.nodes)
    for node in body.graph.nodes:
        behind.discard(node)
        if node.target in _VIEW_WRITES:
            node.target = _VIEW_WRITES[node.target]
            node.args[0].replace_all_uses_with(node, delete_user_cb=behind.__contains__)


def _evaluate(module: fx.GraphModule, node: fx.Node) -> None:
    """Store what a call of numbers alone gives, such as a window or the places of a triangle."""
    value = node.target(*node.args, **node.kwargs)  # type: ignore[operator]  # an op
    if not isinstance(value, Tensor):
        return
    replace_call(module, node, Writer(module, node).stored(value))


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
