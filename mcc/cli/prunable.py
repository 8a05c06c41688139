"""`mcc inspect --prunable`: what structured pruning could remove, and what stands in its way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcc.axes import positions
from mcc.cli.arguments import print_json
from mcc.coupling import couple

if TYPE_CHECKING:
    from mcc.coupling import Group
    from mcc.graph import Graph

LAYERS_SHOWN = 3


def show_prunable(graph: Graph, *, as_json: bool) -> None:
    """Print the groups of coupled indices: those that can shrink, then those that cannot, with the reason.

    Args:
        graph: the model.
        as_json: print JSON.
    """
    groups = couple(graph).groups
    if as_json:
        print_json([
            {
                "kind": g.kind, "size": g.size, "parameters": _parameters(graph, g), "layers": g.layers,
                "blocked": g.blocked,
            }
            for g in groups
        ])  # fmt: skip
        return
    from rich.console import Console
    from rich.table import Table

    open_groups = [g for g in groups if not g.blocked]
    table = Table(title=f"{len(open_groups)} of {len(groups)} groups can shrink")
    table.add_column("kind")
    for column in ("size", "parameters of each"):
        table.add_column(column, justify="right")
    for column in ("layers", "blocked by"):
        table.add_column(column, overflow="fold")
    for group in sorted(groups, key=lambda g: bool(g.blocked)):
        more = len(group.layers) - LAYERS_SHOWN
        layers = ", ".join(group.layers[:LAYERS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        table.add_row(
            group.kind, str(group.size), f"{_parameters(graph, group):,}", layers, "\n".join(group.blocked[:2])
        )
    Console().print(table)


def _parameters(graph: Graph, group: Group) -> int:
    """Stored elements that go with the first index of a group."""
    total = 0
    for name in {slot.tensor for slot in group.slots}:
        shape = graph.tensor(name).shape
        left = list(shape)
        for slot in group.slots:
            if slot.tensor == name:
                left[slot.dim] -= int((positions(slot.term, group.axis) == 0).sum())
        total += shape.numel() - math.prod(left)
    return total
