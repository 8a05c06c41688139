"""What is known of a graph's dims while their rules are applied, and what the rules share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from mcc import ops
from mcc.axes import Axis, Term, block, size, tie
from mcc.graph import Node

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Dims = tuple[Term, ...]


@dataclass(frozen=True)
class Need:
    """A sum over an axis: of each removed index one of the operands must be zero.

    Attributes:
        term: what is summed over.
        operands: what is multiplied with each other, or the one that is added up.
        place: the op, for the reason.
    """

    term: Term
    operands: tuple[fx.Node, ...]
    place: str


@dataclass
class Ties:
    """What is known of a graph's dims.

    Attributes:
        dims: the terms of each value; of an op that gives several, one tuple each.
        stored: the terms of each stored tensor, by name.
        baked: terms whose size stands among a node's arguments, in the order its rule says.
        needs: sums over axes.
        roles: what axes are to the layers: "channel", "neuron", "head", "head dim" or "state".
        givers: of each layer its name and what its outputs are.
    """

    dims: dict[fx.Node, Any] = field(default_factory=dict)
    stored: dict[str, Dims] = field(default_factory=dict)
    baked: dict[fx.Node, tuple[Term, ...]] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    roles: list[tuple[Term, str]] = field(default_factory=list)
    givers: list[tuple[Term, str]] = field(default_factory=list)

    def of(self, operand: Node | None) -> Dims:
        """The terms of an operand's dims."""
        assert operand is not None
        dims: Dims = self.dims[operand.fx]
        return dims

    def gives(self, node: Node, term: Term, role: str) -> None:
        """A layer's outputs are these."""
        self.roles.append((term, role))
        self.givers.append((term, node.layer))

    def contract(self, node: Node, a: Term, b: Term, operands: Sequence[Node | None]) -> None:
        """Two dims that are multiplied and added up."""
        tie(a, b, place(node))
        self.needs.append(Need(a, tuple(o.fx for o in operands if o is not None), place(node)))

    def broadcast(self, node: Node, operands: Iterable[Dims]) -> Dims:
        """The dims of several values that are broadcast against each other; those of one size are tied."""
        shapes = list(operands)
        rank = max((len(s) for s in shapes), default=0)
        made: list[Term] = []
        for i in range(-rank, 0):
            terms = [s[i] for s in shapes if len(s) >= -i]
            wide = [t for t in terms if size(t) != 1] or terms
            for other in wide[1:]:
                tie(wide[0], other, place(node))
            made.append(wide[0])
        return tuple(made)


def place(node: Node) -> str:
    """An op and its node, for a reason."""
    return f"{node.op} %{node.name}"


def shape(node: Node) -> tuple[int, ...]:
    """The sizes of a node's dims in the example inputs."""
    return ops.shape_of(node.fx)


def closed(node: Node, sizes: Iterable[int], why: str) -> Dims:
    """New axes of which nothing may be removed."""
    return tuple(Axis(s, [f"{place(node)} {why}"]) for s in sizes)


def tensor_operands(node: Node) -> list[Node]:
    """Every tensor an op takes, lists opened, in order."""
    return [Node(n, node.graph) for n in node.fx.all_input_nodes if hasattr(n.meta.get("val"), "dim")]


def is_number(value: object) -> bool:
    """Whether an argument is a number and no node."""
    return not isinstance(value, fx.Node)


def unknown(ties: Ties, node: Node) -> Any:
    """An op that no rule knows: nothing that goes in or comes out may change."""
    for operand in tensor_operands(node):
        for term in ties.of(operand):
            block(term, f"{place(node)} takes it as it is")
    value = node.value
    if isinstance(value, list | tuple):
        return tuple(closed(node, [ops.extent(s) for s in v.shape], "takes it as it is") for v in value)
    return closed(node, shape(node), "takes it as it is")
