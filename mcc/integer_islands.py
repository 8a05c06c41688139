"""What lies between quantizers and computes in integers: which ops do, and in which units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from mcc import ops
from mcc.arguments import CLAMPS, PADS, clamp_bounds, filling
from mcc.constants import varying
from mcc.fixed_point import LARGEST, MOST_FRACTION_BITS, bits_behind_the_point
from mcc.graph import Node
from mcc.ops import OPS
from mcc.quantization import quantizer_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcc.graph import Graph
    from mcc.integer_layers import IntegerLayer

SPLITS = tuple(OPS[name] for name in ("chunk", "split.Tensor", "split_with_sizes", "unbind.int"))
MOVES = (
    *(
        OPS[name]
        for name in (
            "reshape", "permute", "transpose.int", "t", "unsqueeze", "squeeze.dim", "squeeze.dims", "slice.Tensor",
            "select.int", "cat", "max_pool1d", "max_pool2d", "max_pool3d", "upsample_nearest2d.vec", "relu", "dropout",
        )
    ),
    *SPLITS,
    ops.GETITEM,
)  # fmt: skip
AVERAGE = OPS["avg_pool2d"]
MEANS = (OPS["mean.dim"], OPS["adaptive_avg_pool2d"], AVERAGE)
FINEST = 16  # of a unit, that a quantizer's scale may be: with eight bits behind the point, a sixteenth of its steps


@dataclass(frozen=True)
class Island:
    """Ops with integer arithmetic that read each other.

    Attributes:
        unit: of what they compute.
        fraction_bits: behind the point.
        mean_bits: the same of means.
    """

    unit: float
    fraction_bits: int
    mean_bits: int


@dataclass(frozen=True)
class Islands:
    """Where each op between quantizers belongs.

    Attributes:
        of: the island of an op.
        carried: the quantizer whose integers an op moves, before anything else is done with them.
        floats: why an op that could be in an island is not, by name.
    """

    of: Mapping[fx.Node, Island]
    carried: Mapping[fx.Node, Node]
    floats: Mapping[str, str]


def is_quantizer(node: Node) -> bool:
    """Whether this gives codes of an activation, with one scale and few enough for fixed-point arithmetic."""
    scale = node.operand(1)
    if node.op is not ops.FAKE_QUANTIZE or scale is None or node.argument(3) is not None:
        return False
    return bool(node.argument(5) - node.argument(4) <= LARGEST // FINEST)


def islands(graph: Graph, layers: Mapping[fx.Node, IntegerLayer]) -> Islands:
    """Those of a graph whose `layers` compute in integers."""
    inputs, carried = varying(graph), _carried(graph)
    group: dict[fx.Node, list[Node]] = {}
    for node in graph.nodes:
        if node.fx not in inputs or node.fx in carried or not _is_member(node):
            continue
        joined = [node]
        for operand in node.fx.all_input_nodes:
            if operand in group and not any(n.fx is operand for n in joined):
                joined += group[operand]
        for member in joined:
            group[member.fx] = joined
    of: dict[fx.Node, Island] = {}
    floats: dict[str, str] = {}
    bounds = _bounds(graph, layers, carried)
    for members in {id(g): g for g in group.values()}.values():
        found = _island(members, {*group, *layers, *carried}, bounds)
        for member in members:
            if isinstance(found, Island):
                of[member.fx] = found
            else:
                floats[member.name] = found
    return Islands(of, carried, floats)


def _carried(graph: Graph) -> dict[fx.Node, Node]:
    """See `Islands`; where another op reads them."""
    found: dict[fx.Node, Node] = {}
    for node in graph.nodes:
        source = node.operand(0)
        if source is None or node.op not in (*MOVES, *PADS) or not _is_member(node):
            continue
        root = source if is_quantizer(source) else found.get(source.fx)
        if root is not None:
            found[node.fx] = root
    for node in reversed(graph.nodes):
        if node.fx in found and not any(_is_member(user) for user in node.users):
            del found[node.fx]
    return found


def _is_member(node: Node) -> bool:
    """Whether an op has integers where it reads integers of one unit."""
    source = node.operand(0)
    if node.op in SPLITS:
        return source is not None and source.dtype is torch.float32
    if not isinstance(node.value, Tensor) or node.dtype is not torch.float32:
        return False
    if node.op is ops.GETITEM:
        return source is not None and source.op in SPLITS
    if node.op is ops.ADD:
        return source is not None and (node.operand(1) is not None or node.argument(1) == 0) and not node.fx.kwargs
    if node.op in CLAMPS:
        return all(isinstance(b, int | float) for b in clamp_bounds(node))
    if node.op in PADS:
        return filling(node) == 0
    return node.op in MOVES or (node.op in MEANS and averaged(node) is not None)


def _bounds(
    graph: Graph, layers: Mapping[fx.Node, IntegerLayer], carried: Mapping[fx.Node, Node]
) -> dict[fx.Node, float]:
    """The largest absolute value that each node with integers can have."""
    found: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if node.fx in layers:
            found[node.fx] = layers[node.fx].largest
        elif is_quantizer(root := carried.get(node.fx, node)):
            scale, zero, low, high = quantizer_tensors(root)
            found[node.fx] = float(scale) * max(high - int(zero), int(zero) - low)
        elif _is_member(node):
            read = [found.get(operand, 0.0) for operand in node.fx.all_input_nodes]
            # x + x reads one node
            found[node.fx] = sum(read) * (2 / len(read)) if node.op is ops.ADD else max(read, default=0.0)
    return found


def _island(members: list[Node], integers: set[fx.Node], bounds: Mapping[fx.Node, float]) -> Island | str:
    """The island of these ops, which read each other, `integers` and quantizers; or why they stay in float."""
    for member in members:
        for operand in member.fx.all_input_nodes:
            node = Node(operand, member.graph)
            if isinstance(node.value, int | torch.SymInt):
                continue
            if operand not in integers and not is_quantizer(node):
                return f"%{member.name} reads %{operand.name}, which is float"
    sinks = [user for member in members for user in member.users if is_quantizer(user)]
    scales = {float(quantizer_tensors(sink)[0]) for sink in sinks}
    means = [count for member in members if member.op in MEANS and (count := averaged(member)) is not None]
    read = any(m.is_output or any(_reads_floats(u, integers) for u in m.users) for m in members)
    if len(scales) == 1 and not (means or read or any(member.op is ops.ADD for member in members)):
        return Island(min(scales), 0, 0)
    bits = bits_behind_the_point(max(means, default=1))
    if bits is None:
        return f"it has means of {max(means)} values"
    enough = unit = max(bounds[member.fx] for member in members) / LARGEST or 1.0
    if scales:
        unit = min(max(enough, min(scales)), FINEST * min(scales))
        codes = max(float(s) * (high - low) for s, _, low, high in map(quantizer_tensors, sinks))
        if unit < enough and codes > LARGEST / 2 * unit:
            return f"scales of what reads it are from {min(scales):.3g} to {max(scales):.3g}"
    return Island(unit, bits, bits if len(means) > 1 else MOST_FRACTION_BITS)


def _reads_floats(user: Node, integers: set[fx.Node]) -> bool:
    return user.fx not in integers and user.op is not ops.SYM_SIZE and not is_quantizer(user)


def averaged(node: Node) -> int | None:
    """How many values a mean is of; None where that varies, or where it is of windows that are no power of two."""
    source = node.operand(0)
    if source is None or (node.op is OPS["mean.dim"] and not node.argument(1)):
        return None
    if node.op is AVERAGE and not averages_all(node):
        count = math.prod(_window(node))
        plain = not node.argument(4) and (node.argument(5, default=True) or not _padded(node)) and not node.argument(6)
        return count if plain and count.bit_count() == 1 else None
    sizes = [source.shape[d] for d in reduced(node)]
    whole = node.op is not OPS["adaptive_avg_pool2d"] or all(s == 1 for s in node.shape[-2:])
    return math.prod(map(int, sizes)) if whole and all(isinstance(s, int) for s in sizes) else None


def reduced(node: Node) -> list[int]:
    """The dims that a mean is over."""
    return list(node.argument(1)) if node.op is OPS["mean.dim"] else [-2, -1]


def averages_all(node: Node) -> bool:
    """Whether the window of an average is the whole image."""
    source = node.operand(0)
    assert source is not None
    return list(source.shape[-2:]) == _window(node) and not _padded(node) and not node.argument(6)


def _window(node: Node) -> list[int]:
    given = node.argument(1)
    return list(given) * (2 // len(given)) if isinstance(given, list | tuple) else [given, given]


def _padded(node: Node) -> bool:
    given = node.argument(3) or 0
    return any(given) if isinstance(given, list | tuple) else bool(given)
