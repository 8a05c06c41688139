"""What a pad fills with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Node

PADS = (OPS["pad"], OPS["constant_pad_nd"])


def filling(node: Node) -> float | None:
    """The number that a pad puts around a value; None where it repeats the value's own, or is no pad."""
    if node.op is OPS["constant_pad_nd"]:
        return float(node.argument(2, 0) or 0)
    constant = node.op is OPS["pad"] and node.argument(2, "constant") == "constant"
    return float(node.argument(3) or 0) if constant else None
