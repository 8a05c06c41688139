"""Which dims of a graph must shrink together, and which of their indices may go.

Removing a channel of a convolution removes a row of its weight and its bias, a value of each vector of the batch norm
behind it, and a column of every weight that reads it; through residual adds, concatenations, reshapes into heads and
tied weights it reaches further. A `Group` is an axis (see `mcc.axes`) with every place in a stored tensor where it
stands. What is removed is exact in this sense: the smaller graph computes what the larger one does when everything
stored at the removed indices is zero.
Grouping by dependency is the idea of Fang, Ma, Song, Mi, Wang: DepGraph: towards any structural pruning. CVPR 2023.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from mcc import ops
from mcc.axes import Axis, Product, Sum, Term, axes_of, block, resolved, size
from mcc.dim_rules import rule
from mcc.graph import Node
from mcc.ties import Dims, Ties, place, unknown
from mcc.zeros import find_zeros

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mcc.graph import Graph

Kind = Literal["channel", "neuron", "head", "query head", "head dim", "state"]


@dataclass(frozen=True)
class Slot:
    """A place in a stored tensor where an axis stands.

    Attributes:
        tensor: the tensor's name.
        dim: which of its dims.
        term: what that dim is made of.
    """

    tensor: str
    dim: int
    term: Term


@dataclass(frozen=True)
class Group:
    """Indices that are removed together wherever they stand.

    Attributes:
        axis: the indices.
        kind: what they are to the layers: "channel" of convolutions, "neuron" of linear layers only, "head" of
            attention with its keys and values, "query head" of those that share keys, "head dim", "state" of recurrent
            layers.
        slots: every place in stored tensors.
        layers: the layers those tensors belong to, each once, in the graph's order.
        givers: those of which these are outputs.
    """

    axis: Axis
    kind: Kind
    slots: tuple[Slot, ...]
    layers: tuple[str, ...]
    givers: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many indices."""
        return self.axis.size

    @property
    def blocked(self) -> tuple[str, ...]:
        """Why none may be removed; empty where some may."""
        return tuple(self.axis.blocked)


@dataclass(frozen=True)
class Coupling:
    """What is coupled in a graph.

    Attributes:
        graph: the graph.
        ties: the terms of every dim.
        groups: what can be removed, or is blocked, in the graph's order; nothing of size 1.
    """

    graph: Graph
    ties: Ties
    groups: tuple[Group, ...]

    @property
    def open_groups(self) -> tuple[Group, ...]:
        """The groups from which indices may be removed."""
        return tuple(g for g in self.groups if not g.blocked)


def couple(graph: Graph) -> Coupling:
    """Find what must shrink together in a graph."""
    ties = Ties()
    for raw in graph.module.graph.nodes:
        node = Node(raw, graph)
        if raw.op == "placeholder":
            if isinstance(node.value, Tensor):
                ties.dims[raw] = tuple(Axis(s, [f"%{raw.name} is an input"]) for s in ops.shape_of(raw))
        elif raw.op == "get_attr":
            name = str(raw.target)
            ties.stored.setdefault(name, tuple(Axis(s) for s in node.tensor.shape))
            ties.dims[raw] = ties.stored[name]
        elif raw.op == "call_function":
            _visit(ties, node)
    for node in graph.output_nodes:
        if isinstance(node.value, Tensor):
            for term in ties.of(node):
                block(term, f"%{node.name} is returned")
    _block_what_repeats(ties)
    _judge_needs(graph, ties)
    return Coupling(graph, ties, tuple(_groups(ties)))


def _visit(ties: Ties, node: Node) -> None:
    op = node.op
    if op is ops.GETITEM:
        source = node.argument(0)
        if isinstance(node.value, Tensor):
            ties.dims[node.fx] = ties.dims[source][node.argument(1)]
    elif op is not None and op.family == "size":
        if op is ops.SYM_SIZE:
            source = node.operand(0)
            block(ties.of(source)[int(node.argument(1))], f"{place(node)} computes with its size")
    else:
        ties.dims[node.fx] = _checked(ties, node, rule(op)(ties, node))


def _checked(ties: Ties, node: Node, made: Dims | tuple[Dims, ...]) -> Dims | tuple[Dims, ...]:
    """A rule's dims, or closed ones where they are not the node's: a rule that is wrong must not cut anything."""
    values = node.value if isinstance(node.value, list | tuple) else [node.value]
    dims = made if isinstance(node.value, list | tuple) else (made,)
    fits = all(
        tuple(map(size, found)) == tuple(ops.extent(s) for s in value.shape)  # type: ignore[arg-type]
        for value, found in zip(values, dims, strict=True)
    )
    if fits:
        return made
    for term in _terms(made):
        block(term, f"{place(node)} has sizes that its rule does not expect")
    closed: Dims | tuple[Dims, ...] = unknown(ties, node)
    return closed


def _block_what_repeats(ties: Ties) -> None:
    """An axis that stands twice in one product has no index of its own there."""
    for dims in ties.dims.values():
        for term in _terms(dims):
            for axis, count in _repeats(resolved(term)).items():
                if count > 1:
                    axis.blocked["it stands twice in one dim"] = None


def _repeats(term: Term) -> Counter[Axis]:
    if isinstance(term, Axis):
        return Counter([term])
    found: Counter[Axis] = Counter()
    for inner in term.factors if isinstance(term, Product) else term.parts:
        counts = _repeats(inner)
        found = found + counts if isinstance(term, Product) else found | counts
    return found


def _terms(dims: object) -> Iterator[Term]:
    if isinstance(dims, Axis | Product | Sum):
        yield dims
    elif isinstance(dims, tuple):
        for inner in dims:
            yield from _terms(inner)


def _judge_needs(graph: Graph, ties: Ties) -> None:
    zeros = find_zeros(graph, ties)
    for need in ties.needs:
        for axis in axes_of(need.term):
            if not any(axis in zeros[operand] for operand in need.operands):
                axis.blocked[f"{need.place} adds it up, and what would be removed is not zero"] = None


def _groups(ties: Ties) -> Iterator[Group]:
    slots: dict[Axis, list[Slot]] = {}
    for name, dims in ties.stored.items():
        for i, term in enumerate(dims):
            for axis in dict.fromkeys(axes_of(term)):
                slots.setdefault(axis, []).append(Slot(name, i, term))
    roles, givers = _by_axis(ties.roles), _by_axis(ties.givers)
    for axis, places in slots.items():
        if axis in roles and axis.size > 1:
            layers = tuple(dict.fromkeys(s.tensor.rpartition(".")[0] or s.tensor for s in places))
            yield Group(axis, _kind(axis, roles, slots), tuple(places), layers, tuple(givers.get(axis, layers)))


def _by_axis(said: Iterable[tuple[Term, str]]) -> dict[Axis, dict[str, None]]:
    """What is said of terms, for each of their axes, in order."""
    found: dict[Axis, dict[str, None]] = {}
    for term, what in said:
        for axis in axes_of(term):
            found.setdefault(axis, {})[what] = None
    return found


def _kind(axis: Axis, roles: dict[Axis, dict[str, None]], slots: dict[Axis, list[Slot]]) -> Kind:
    mine = roles[axis]
    if "head" in mine:
        # beside heads that keys and values have too, those that share them
        beside = {a for s in slots[axis] for a in axes_of(s.term) if a in slots and "head" in roles.get(a, ())}
        most = max(_uses(a, slots) for a in beside)
        return "head" if _uses(axis, slots) == most else "query head"
    for role in ("head dim", "state", "channel"):
        if role in mine:
            return role
    return "neuron"


def _uses(axis: Axis, slots: dict[Axis, list[Slot]]) -> int:
    return sum(list(axes_of(s.term)).count(axis) for s in slots[axis])
