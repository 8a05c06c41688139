"""The parts of a network: from one value that all that follows comes from to the next."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, fx

from mcc import ops
from mcc.graph import Node
from mcc.statistics import made_of_stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcc.graph import Graph


@dataclass(frozen=True)
class Part:
    """Some layers and what lies between them: a residual branch with its addition, or in a chain one layer.

    Attributes:
        layers: those that were asked for.
        nodes: from the first of them on, with what computes weights from stored tensors, in order; the last one's value
            is what the part gives.
        inputs: values from before the first layer that `nodes` read.
        parameters: names of the trainable tensors that nothing else depends on, but by what the part gives.
    """

    layers: tuple[Node, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    parameters: tuple[str, ...]

    @property
    def end(self) -> str:
        """The name of what the part gives."""
        return self.nodes[-1].name


def parts(graph: Graph, layers: Iterable[Node], comparable: Callable[[Node], bool]) -> list[Part]:
    """Cut a graph behind `layers`, wherever all that it has learned so far goes through a single value.

    Masks and tables of positions go past the parts. A batch norm behind that value, and a relu, belong to the part
    before them.

    Args:
        graph: to cut.
        layers: what changes values.
        comparable: whether the graph may be cut at a value.

    Returns:
        Parts in order, each with one of `layers` at least. Layers behind the last cut, and those that only outputs of
        the graph read, are in none.
    """
    order = list(graph.module.graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    wanted = {layer.fx for layer in layers}
    found, open_layers, end = list[Part](), list[fx.Node](), -1
    trainable = {name for name, p in graph.named_parameters() if p.is_floating_point()}
    stored = made_of_stored(graph)
    cuts = [place[n] for n in _single_values(_learned(graph, trainable), place) if comparable(Node(n, graph))]
    for position, following in itertools.pairwise([*cuts, len(order)]):
        open_layers += [n for n in order[end + 1 : position + 1] if n in wanted]
        behind = order[following] if following < len(order) else None
        end = position
        if not open_layers or (behind is not None and _completes(behind, order[position])):
            continue
        above = _above(order[position])
        if through := [n for n in open_layers if n in above]:
            nodes, inputs = _between(through[0], order[position], place, stored)
            found.append(
                Part(
                    tuple(Node(n, graph) for n in through),
                    tuple(sorted(nodes, key=place.__getitem__)),
                    tuple(sorted(inputs, key=place.__getitem__)),
                    tuple(sorted(_own_tensors(graph, nodes, order[position]) & trainable)),
                )
            )
        open_layers = []
    return found


def _above(node: fx.Node) -> set[fx.Node]:
    """A node and all that it depends on."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        some = waiting.pop()
        if some not in found:
            found.add(some)
            waiting += some.all_input_nodes
    return found


def _learned(graph: Graph, trainable: set[str]) -> list[fx.Node]:
    """The nodes whose values come from those of inputs and from trainable tensors: no masks or tables of positions."""
    data, learned = set[fx.Node](), set[fx.Node]()
    for node in graph.module.graph.nodes:
        read = node.all_input_nodes
        holds = isinstance(node.meta.get("val"), Tensor | tuple | list)  # not a size
        if holds and (node.op == "placeholder" or not data.isdisjoint(read)):
            data.add(node)
        if (node.op == "get_attr" and node.target in trainable) or not learned.isdisjoint(read):
            learned.add(node)
    return [n for n in graph.module.graph.nodes if n.op == "call_function" and n in data and n in learned]


def _single_values(learned: list[fx.Node], place: dict[fx.Node, int]) -> list[fx.Node]:
    """Those behind which no other one from before is read any more."""
    found, open_until = [], -1
    for node in learned:
        if open_until <= place[node] and isinstance(node.meta["val"], Tensor):
            found.append(node)
        read = [place[user] for user in node.users if user.op != "output"]
        open_until = max(open_until, *read, place[node])
    return found


def _completes(node: fx.Node, source: fx.Node) -> bool:
    return ops.lookup(node.target) in (ops.BATCH_NORM, ops.RELU) and node.args[0] is source


def _between(
    first: fx.Node, end: fx.Node, place: dict[fx.Node, int], stored: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What `end` depends on from `first` on and all stored values, and the other values from before that these read."""
    nodes, inputs, waiting = set[fx.Node](), set[fx.Node](), [end]
    while waiting:
        node = waiting.pop()
        if node in nodes or node in inputs:
            continue
        if place[node] < place[first] and node not in stored:
            inputs.add(node)
            continue
        nodes.add(node)
        waiting += node.all_input_nodes
    return nodes, inputs


def _own_tensors(graph: Graph, nodes: set[fx.Node], end: fx.Node) -> set[str]:
    """The stored tensors of which nothing outside of a part reads anything but through its end."""
    read_outside = set[fx.Node]()
    for node in reversed(list(graph.module.graph.nodes)):
        within = node in nodes and (node is end or all(u in nodes and u not in read_outside for u in node.users))
        if not within:
            read_outside.add(node)
    reads = [n for n in graph.module.graph.nodes if n.op == "get_attr"]
    return {str(n.target) for n in reads} - {str(n.target) for n in reads if n in read_outside}
