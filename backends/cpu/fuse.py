"""Stage 2: let a region take in what follows its anchor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mcc import ops
from mcc.backends.kernel import Clamp, EpilogueStep, Region, Relu, Requantize

if TYPE_CHECKING:
    from torch import fx

    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Node


def fuse(lowering: Lowering) -> Lowering:
    """Extend each region over activations and a final quantize, as long as nothing else reads what is between."""
    regions: dict[fx.Node, Region] = {}
    for region in lowering.regions.values():
        extended = region
        while (following := _following(extended)) is not None:
            node, step = following
            extended = replace(extended, output=node, epilogue=(*extended.epilogue, step))
        regions[extended.output.fx] = extended
    return replace(lowering, regions=regions)


def _following(region: Region) -> tuple[Node, EpilogueStep] | None:
    users = region.output.users
    if len(users) != 1 or region.output.is_output or region.output_dtype == "uint8":
        return None
    step = _step(users[0], region.output)
    return None if step is None else (users[0], step)


def _step(node: Node, source: Node) -> EpilogueStep | None:
    if node.operand(0) != source:
        return None
    if node.op is ops.RELU:
        return Relu()
    if node.op is ops.RELU6:
        return Clamp(0.0, 6.0)
    if node.op in (ops.CLAMP, ops.HARDTANH, ops.CLAMP_MIN):
        low, high = _bounds(node)
        return Clamp(low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None
    return requantize_step(node) if node.op is ops.QUANTIZE else None


def requantize_step(node: Node) -> Requantize | None:
    """A quantize node with one stored scale and unsigned codes as an epilogue step, or None."""
    scale, zero_point = node.operand(1), node.operand(2)
    if node.argument(3) is not None or node.argument(4) < 0 or scale is None or zero_point is None:
        return None
    if not (scale.is_parameter and zero_point.is_parameter):
        return None
    return Requantize(float(scale.tensor), int(zero_point.tensor), node.argument(4), node.argument(5))


def _bounds(node: Node) -> tuple[object, object]:
    defaults = (-1.0, 1.0) if node.op is ops.HARDTANH else (None, None)
    low, high = node.argument(1, defaults[0]), node.argument(2, defaults[1])
    return -math.inf if low is None else low, math.inf if high is None else high
