"""Changing what goes into a graph and what leaves it: one tensor becomes several, in a tuple where it stood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from mcc.graph import Graph, Node

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def split_input(graph: Graph, old: Node, parts: Mapping[str, Tensor]) -> list[Node]:
    """Put inputs in the place of one.

    Args:
        graph: edited in place.
        old: an input; its readers must be given others before the graph is cleaned.
        parts: names after the old one's, and fake values.

    Returns:
        the new inputs; the old one is gone once nothing reads it: see `drop_input`.
    """
    made = []
    with graph.module.graph.inserting_before(old.fx):
        for suffix, value in parts.items():
            part = graph.module.graph.placeholder(f"{old.name}_{suffix}")
            part.target = part.name  # a free one
            part.meta["val"] = value
            made.append(Node(part, graph))
    return made


def drop_input(graph: Graph, old: Node, count: int) -> None:
    """Take away an input that `count` new ones in front of it replace: callers give a tuple of them."""
    place = [n.fx for n in graph.inputs].index(old.fx) - count
    graph.module.graph.erase_node(old.fx)
    codegen: Any = graph.module.graph._codegen
    info = codegen.pytree_info
    _set_trees(graph, info._replace(in_spec=_nested(info.in_spec, {place: count})))


def split_output(graph: Graph, old: Node, parts: Sequence[Node]) -> None:
    """Return a tuple of `parts` wherever the graph returns `old`."""
    output = graph.module.graph.output_node()
    flat = list(output.args[0])  # type: ignore[arg-type]  # a captured graph returns a flat sequence
    places = {i: len(parts) for i, node in enumerate(flat) if node is old.fx}
    wanted = [part for i, node in enumerate(flat) for part in ([p.fx for p in parts] if i in places else [node])]
    output.args = (tuple(wanted),)
    codegen: Any = graph.module.graph._codegen
    info = codegen.pytree_info
    _set_trees(graph, info._replace(out_spec=_nested(info.out_spec, places)))


def _nested(spec: Any, places: Mapping[int, int]) -> Any:
    """A tree whose leaves at some places are tuples of so many leaves."""
    leaves = [tuple(range(places[i])) if i in places else i for i in range(spec.num_leaves)]
    return pytree.tree_structure(pytree.tree_unflatten(leaves, spec))


def _set_trees(graph: Graph, info: Any) -> None:
    module: Any = graph.module
    codegen = type(module.graph._codegen)(info)
    module.graph.set_codegen(codegen)
    for name, spec in (("_in_spec", info.in_spec), ("_out_spec", info.out_spec)):
        if name in module.__dict__:
            setattr(module, name, spec)
