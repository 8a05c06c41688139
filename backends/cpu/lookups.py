"""Where embeddings find their rows: in the arrays of a layer they are tied to, or in codes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcc import ops
from mcc.backends.cpu.integerize import stored_weight
from mcc.backends.cpu.kernels.lookup import CodeRows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import fx

    from mcc.backends.cpu.lowering import Lowering


@dataclass(frozen=True)
class Lookup:
    """The stored form of an embedding's weight.

    Attributes:
        name: of the weight.
        shape: rows and columns.
        text: the format in words.
        tied: the node that gives the value of the region whose kernel packed the arrays; None for own ones.
        arrays: by name.
        element: see `mcc.backends.kernel.Lowered`.
    """

    name: str
    shape: tuple[int, int]
    text: str
    tied: fx.Node | None
    arrays: Mapping[str, NDArray[Any]]
    element: Callable[[Mapping[str, Any], Any, Any], Any]


def lookups(lowering: Lowering) -> dict[fx.Node, Lookup]:
    """The embeddings that are tied to a layer, or have codes for a weight; others take rows of a float tensor."""
    layers = {
        choice.region.anchor.weight_operand: (output, choice, choice.lowered.element)
        for output, choice in lowering.choices.items()
        if choice.lowered.element is not None
    }
    found = {}
    for node in lowering.graph.nodes:
        top = node.weight_operand
        if node.op is not ops.EMBEDDING or top is None:
            continue
        shape = int(top.shape[0]), int(top.shape[1])
        if top in layers:
            output, choice, element = layers[top]
            text = f"that of {choice.region.anchor.name}"
            found[node.fx] = Lookup(choice.region.weight.name, shape, text, output, choice.lowered.packed, element)
        elif (weight := stored_weight(top)) is not None and weight.scale is not None and weight.sparse is None:
            rows = CodeRows(weight)
            found[node.fx] = Lookup(weight.name, shape, weight.text, None, rows.arrays, rows.element)
    return found
