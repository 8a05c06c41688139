"""The stored weights of recurrences in panels, read from begin to end at every step.

As rows of all units of all gates, a tile would read a part of a line here and there, each on a page of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc.backends.cpu.kernels.recurrent import NARROWEST, panel_units
from mcc.computed_weights import spelled
from mcc.constants import stored_value
from mcc.ops import GRU, RECURRENT, extent

if TYPE_CHECKING:
    from torch import Tensor

    from mcc.graph import Graph
    from mcc.target import Target


def lay_out_recurrences(graph: Graph, target: Target) -> None:
    """Read the weight of every recurrence whose weight is stored as a tensor of panels; see `in_panels`.

    Args:
        graph: edited in place.
        target: whose vectors panels are made for.
    """
    made: dict[tuple[str, int], str] = {}
    for node in [n for n in graph.nodes if n.op in RECURRENT]:
        first, weight = node.operand(1), node.operand(2 if node.op is GRU else 3)
        assert first is not None
        assert weight is not None
        hidden, value = int(weight.shape[0]), stored_value(graph, weight)
        if value is None or value.dtype is not torch.float32 or hidden < NARROWEST:
            continue
        units = panel_units(target, hidden, int(extent(first.shape[0])))
        key = spelled(weight.fx), units
        if key not in made:
            made[key] = graph.free_name(f"{node.layer}.{weight.name}_in_panels")
            graph.set_tensor(made[key], in_panels(value.detach(), units))
        node.fx.replace_input_with(weight.fx, graph.read(made[key], node).fx)
    if made:
        graph.clean().repropagate()


def in_panels(weight: Tensor, units: int) -> Tensor:
    """A weight [hidden, gates * hidden] as [panels, hidden, gates, units]; the last panel ends with the last unit."""
    hidden = len(weight)
    firsts = [min(first, hidden - units) for first in range(0, hidden, units)]
    by_gate = weight.reshape(hidden, -1, hidden)
    return torch.stack([by_gate[..., first : first + units] for first in firsts]).contiguous()
