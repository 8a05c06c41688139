"""What arguments of pads and clamps say, defaults filled in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mcc import ops
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Node

PADS = (OPS["pad"], OPS["constant_pad_nd"])
CLAMPS = (ops.RELU6, ops.HARDTANH, ops.CLAMP, ops.CLAMP_MIN)


def filling(node: Node) -> float | None:
    """The number that a pad puts around a value; None where it repeats the value's own, or is no pad."""
    if node.op is OPS["constant_pad_nd"]:
        return float(node.argument(2, 0) or 0)
    constant = node.op is OPS["pad"] and node.argument(2, "constant") == "constant"
    return float(node.argument(3) or 0) if constant else None


def clamp_bounds(node: Node) -> tuple[Any, Any]:
    """What a clamp holds values to, infinite where it does not: numbers, or the nodes that give them."""
    if node.op is ops.RELU6:
        return 0.0, 6.0
    defaults = (-1.0, 1.0) if node.op is ops.HARDTANH else (None, None)
    low, high = node.argument(1, defaults[0]), node.argument(2, defaults[1])
    return -math.inf if low is None else low, math.inf if high is None else high
