"""Integer-only arithmetic: what lies between quantizers becomes integers and fixed-point multiplications."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.constants import varying
from mcc.errors import PassError
from mcc.fixed_point import bits_behind_the_point
from mcc.graph import Graph, Node
from mcc.integer_layers import IntegerLayer, integer_layer
from mcc.ops import OPS
from mcc.rewrite import Context, Lossy, Pass, Rewriter

MOVES = tuple(
    OPS[name]
    for name in (
        "reshape", "permute", "transpose.int", "t", "unsqueeze", "squeeze.dim", "squeeze.dims", "slice.Tensor",
        "select.int", "cat", "max_pool1d", "max_pool2d", "max_pool3d", "upsample_nearest2d.vec", "relu", "dropout",
    )
)  # fmt: skip
CLAMPS = (ops.RELU6, ops.HARDTANH, ops.CLAMP)
PADS, AVERAGES = (OPS["pad"], OPS["constant_pad_nd"]), OPS["avg_pool2d"]
MEANS = (OPS["mean.dim"], OPS["adaptive_avg_pool2d"], AVERAGES)


@dataclass(frozen=True)
class IntegerOnly(Pass):
    """Compute between quantizers in integers, as hardware without floats does; for behind quantize, and last.

        %c1: f32[1, 8, 6, 6] = conv2d(%x_quantized, %c1_weight_quantized, @c1.bias)
        %relu: f32[1, 8, 6, 6] = relu(%c1)
        %relu_quantized: f32[1, 8, 6, 6] = mcc.fake_quantize(%relu, @relu_scale, @relu_zero_point, …)
    becomes
        %c1: f32[1, 8, 6, 6] = conv2d(%x_integers, %c1_weight_integers, @c1.bias_integers)
        %c1_rescaled: f32[1, 8, 6, 6] = mcc.rescale(%c1, @c1_factor, axis=1, fraction_bits=0)
        %relu: f32[1, 8, 6, 6] = relu(%c1_rescaled)
        %relu_integers: f32[1, 8, 6, 6] = mcc.fake_quantize(%relu, @one, @relu_zero_point, …)

    Activations, weights, biases and sums are integers in units of their scales. Each sum is rescaled once, half to
    even, by a multiplier of 24 bits and a shift (`mcc.rescale`), so that whatever computes the graph has the same
    integers. What is added, averaged or read by quantizers of several scales is rescaled to the finest of these with
    some bits behind the point. What other ops read becomes float again; they are named in the report, as are layers
    that read floats.
    Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
    2018.
    """

    guarantee = Lossy()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Rewrite every layer between quantizers, and what lies between."""
        layers: dict[fx.Node, IntegerLayer] = {}
        for node in graph.nodes:
            if node.op not in (*ops.LAYERS, *ops.ATTENTIONS):
                continue
            layer = integer_layer(node)
            if isinstance(layer, str):
                context.decline(node, layer)
            else:
                layers[node.fx] = layer
        if not layers:
            raise PassError(f"{self}: no layer reads codes: {context.reasons}", remedy="give it behind quantize")
        islands = _islands(graph, layers)
        for name in _Writer(graph, layers, islands).write():
            reason = islands.floats.get(name, f"{graph.node(name).op} has no integer form")
            context.note(f"%{name} computes in float: {reason}")
        context.edited(len(layers))
        return graph.clean().repropagate()


@dataclass(frozen=True)
class _Island:
    """Ops with integer arithmetic that read each other.

    Attributes:
        scale: the unit of what they compute, that of the finest quantizer that reads any.
        fraction_bits: bits behind the point.
    """

    scale: float
    fraction_bits: int


@dataclass(frozen=True)
class _Islands:
    """Where each op between quantizers belongs.

    Attributes:
        of: the island of an op.
        carried: the quantizer whose integers an op moves, before anything else is done with them.
        floats: why an op that could be in an island is not, by name.
    """

    of: dict[fx.Node, _Island]
    carried: dict[fx.Node, Node]
    floats: dict[str, str]


def _is_quantizer(node: Node) -> bool:
    """Whether this gives codes of an activation with one scale."""
    scale = node.operand(1)
    return node.op is ops.FAKE_QUANTIZE and scale is not None and node.argument(3) is None


def _islands(graph: Graph, layers: dict[fx.Node, IntegerLayer]) -> _Islands:
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
    of: dict[fx.Node, _Island] = {}
    floats: dict[str, str] = {}
    for members in {id(g): g for g in group.values()}.values():
        found = _island(members, {*group, *layers, *carried})
        for member in members:
            if isinstance(found, _Island):
                of[member.fx] = found
            else:
                floats[member.name] = found
    return _Islands(of, carried, floats)


def _carried(graph: Graph) -> dict[fx.Node, Node]:
    """See `_Islands`; where another op reads them."""
    found: dict[fx.Node, Node] = {}
    for node in graph.nodes:
        source = node.operand(0)
        if source is None or node.op not in (*MOVES, *PADS) or not _is_member(node):
            continue
        root = source if _is_quantizer(source) else found.get(source.fx)
        if root is not None:
            found[node.fx] = root
    for node in reversed(graph.nodes):
        if node.fx in found and not any(_is_member(user) for user in node.users):
            del found[node.fx]
    return found


def _is_member(node: Node) -> bool:
    """Whether an op has integers where it reads integers of one unit."""
    if node.value is None or not isinstance(node.value, Tensor) or node.dtype is not torch.float32:
        return False
    if node.op is ops.ADD:
        return all(node.operand(i) is not None for i in (0, 1)) and not node.fx.kwargs
    if node.op in CLAMPS:
        return all(b is None or isinstance(b, int | float) for b in _bounds(node))
    if node.op in PADS:
        value = node.argument(2 if node.op is OPS["constant_pad_nd"] else 3) or 0
        return value == 0 and node.argument(2, "constant") in ("constant", value)
    return node.op in MOVES or (node.op in MEANS and _averaged(node) is not None)


def _island(members: list[Node], integers: set[fx.Node]) -> _Island | str:
    """The island of these ops, which read each other, `integers` and quantizers; or why they stay in float."""
    for member in members:
        for operand in member.fx.all_input_nodes:
            node = Node(operand, member.graph)
            if not isinstance(node.value, Tensor):
                continue  # a size
            if operand not in integers and not _is_quantizer(node):
                return f"%{member.name} reads %{operand.name}, which is float"
    sinks = [user for member in members for user in member.users if _is_quantizer(user)]
    if not sinks:
        return "no quantizer reads what it gives"
    scales = {float(sink.operand(1).tensor) for sink in sinks}  # type: ignore[union-attr]  # quantizers have one
    counts = [count for member in members if member.op in MEANS and (count := _averaged(member)) is not None]
    if len(scales) == 1 and not counts and all(member.op is not ops.ADD for member in members):
        return _Island(min(scales), 0)
    bits = bits_behind_the_point(max(counts, default=1))
    return f"its means are of {max(counts)} values" if bits is None else _Island(min(scales), bits)


def _averaged(node: Node) -> int | None:
    """How many values a mean is of; None where that varies, or where it is of windows that are no power of two."""
    source = node.operand(0)
    if source is None:
        return None
    if node.op is AVERAGES and not _of_all(node):
        count = math.prod(_window(node))
        plain = not node.argument(4) and (node.argument(5, default=True) or not _padded(node)) and not node.argument(6)
        return count if plain and count.bit_count() == 1 else None
    sizes = [source.shape[d] for d in _reduced(node)]
    whole = node.op is not OPS["adaptive_avg_pool2d"] or all(s == 1 for s in node.shape[-2:])
    return math.prod(map(int, sizes)) if whole and all(isinstance(s, int) for s in sizes) else None


def _window(node: Node) -> list[int]:
    given = node.argument(1)
    return list(given) * (2 // len(given)) if isinstance(given, list | tuple) else [given, given]


def _padded(node: Node) -> bool:
    given = node.argument(3) or 0
    return any(given) if isinstance(given, list | tuple) else bool(given)


def _of_all(node: Node) -> bool:
    """Whether the window of an average is the whole image."""
    source = node.operand(0)
    assert source is not None
    return list(source.shape[-2:]) == _window(node) and not _padded(node) and not node.argument(6)


def _reduced(node: Node) -> list[int]:
    given = node.argument(1)
    return list(given) if node.op is OPS["mean.dim"] and given else [-2, -1]


def _bounds(node: Node) -> tuple[Any, Any]:
    """What a clamp holds values to."""
    if node.op is ops.RELU6:
        return 0.0, 6.0
    defaults = (-1.0, 1.0) if node.op is ops.HARDTANH else (None, None)
    return node.argument(1, defaults[0]), node.argument(2, defaults[1])


class _Writer:
    """Writes a graph's integer form beside what it replaces."""

    def __init__(self, graph: Graph, layers: dict[fx.Node, IntegerLayer], islands: _Islands) -> None:
        self.graph, self.layers, self.islands, self.carried = graph, layers, islands.of, islands.carried
        self.integers: dict[fx.Node, Node] = {}
        self.floats: dict[fx.Node, Node] = {}
        self.rescaled: dict[tuple[fx.Node, _Island], Node] = {}
        self.weights: dict[fx.Node, Node] = {}

    def write(self) -> list[str]:
        """Write it; returns the names of the ops that read integers as floats."""
        readers = []
        for node in self.graph.nodes:
            self.place = Rewriter(self.graph, node)
            if node.fx in self.layers:
                self._take(node, self.layers[node.fx].write(self.place, self._read, self.weights), node.name)
            elif node.fx in self.islands or node.fx in self.carried:
                self._take(node, self._member(node, self.islands.get(node.fx)), node.name)
            elif _is_quantizer(node) and self._is_read(node):
                self._take(node, self._quantizer(node), f"{node.name.removesuffix('_quantized')}_integers")
            elif self._read_floats(node.fx):
                readers.append(node.name)
        self.place = Rewriter(self.graph, Node(self.graph.module.graph.output_node(), self.graph))
        self._read_floats(self.graph.module.graph.output_node())
        return readers

    def _take(self, old: Node, new: Node, name: str) -> None:
        old.fx.name, new.fx.name = f"{old.name}_before", name
        self.integers[old.fx] = new

    def _is_read(self, quantizer: Node) -> bool:
        """Whether integer arithmetic reads a quantizer."""
        return any(user.fx in part for user in quantizer.users for part in (self.layers, self.islands, self.carried))

    def _read(self, node: Node) -> Node:
        return self.integers[node.fx]

    def _read_floats(self, reader: fx.Node) -> bool:
        """Let an op read floats; returns whether there were integers."""
        read = [operand for operand in reader.all_input_nodes if operand in self.integers]
        of_size = reader.target is ops.SYM_SIZE.target
        for operand in read:
            made = self.integers[operand] if of_size else self._float(Node(operand, self.graph))
            reader.replace_input_with(operand, made.fx)
        return bool(read) and not of_size

    def _unit(self, node: Node) -> tuple[Tensor, int | None]:
        """What an integer of a node stands for, float64, [] or one for each channel, and the channels' axis."""
        if node.fx in self.layers:
            return self.layers[node.fx].unit
        if node.fx in self.islands:
            return torch.tensor(self.islands[node.fx].scale, dtype=torch.float64), None
        scale = self.carried.get(node.fx, node).operand(1)
        assert scale is not None
        return scale.tensor.double(), None

    def _float(self, node: Node) -> Node:
        """The float value of an integer."""
        if node.fx not in self.floats:
            unit, axis = self._unit(node)
            integers, last = self.integers[node.fx], len(node.shape) - 1
            if axis is not None:
                unit = unit.reshape(-1, *[1] * (last - axis))
            read = self.place.read(f"{integers.name}_unit", unit.float())
            self.floats[node.fx] = self.place.call(ops.MUL, integers, read)
            self.floats[node.fx].rename(f"{integers.name}_float")
        return self.floats[node.fx]

    def _rescaled(self, node: Node, scale: float, fraction_bits: int) -> Node:
        """An integer of a node in other units."""
        unit, axis = self._unit(node)
        integers = self.integers[node.fx]
        factor = self.place.read(f"{integers.name}_factor", (unit / scale).float())
        made = self.place.call(ops.RESCALE, integers, factor, axis, fraction_bits)
        made.rename(f"{integers.name}_rescaled")
        return made

    def _quantizer(self, node: Node) -> Node:
        source, scale = node.operand(0), node.operand(1)
        assert source is not None
        assert scale is not None
        step = float(scale.tensor)
        if source.fx not in self.integers:
            read = self.place.call(ops.MUL, source, 1 / step)
        elif source.fx not in self.layers and float(self._unit(source)[0]) == step:
            read = self.integers[source.fx]
        else:
            read = self._rescaled(source, step, 0)
        one = self.place.read("one", None if hasattr(self.graph.module, "one") else torch.ones(()))
        return self.place.call(ops.FAKE_QUANTIZE, read, one, *node.fx.args[2:])

    def _member(self, node: Node, island: _Island | None) -> Node:
        """An op on integers of its island's unit, or, where it has no island, of the quantizer's that it reads."""
        assert node.op is not None

        def read(operand: Any) -> Any:
            if not isinstance(operand, fx.Node) or operand not in self.integers:
                return operand
            if island is None or self.islands.get(operand) is island:
                return self.integers[operand]
            key = operand, island
            if key not in self.rescaled:
                self.rescaled[key] = self._rescaled(Node(operand, self.graph), island.scale, island.fraction_bits)
            return self.rescaled[key]

        args, kwargs = pytree.tree_map(read, (tuple(node.fx.args), dict(node.fx.kwargs)))
        if island is None:
            return self.place.call(node.op, *args, **kwargs)
        if node.op in CLAMPS:
            finest = float(1 << island.fraction_bits)
            low, high = (None if b is None else round(b / island.scale * finest) / finest for b in _bounds(node))
            return self.place.call(ops.CLAMP, args[0], low, high)
        if node.op in MEANS and (node.op is not AVERAGES or _of_all(node)):
            return self._mean(node, args[0], island)
        return self.place.call(node.op, *args, **kwargs)

    def _mean(self, node: Node, source: Any, island: _Island) -> Node:
        """A sum, which is exact in any order, rescaled."""
        keep = node.op is not OPS["mean.dim"] or bool(node.argument(2, default=False))
        total = self.place.call(OPS["sum.dim_IntList"], source, _reduced(node), keep)
        count = _averaged(node)
        assert count is not None
        share = self.place.read(f"{node.name}_share", torch.tensor(1 / count))
        return self.place.call(ops.RESCALE, total, share, None, island.fraction_bits)
