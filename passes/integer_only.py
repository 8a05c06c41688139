"""Integer-only arithmetic: what lies between quantizers becomes integers and fixed-point multiplications."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.arguments import CLAMPS, clamp_bounds
from mcc.errors import PassError
from mcc.graph import Graph, Node
from mcc.integer_islands import (
    AVERAGE,
    MEANS,
    Island,
    Islands,
    averaged,
    averages_all,
    is_quantizer,
    islands,
    reduced,
)
from mcc.integer_layers import IntegerLayer, integer_layer
from mcc.ops import OPS
from mcc.rewrite import Context, Lossy, Pass, Rewriter


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
    integers, in order and out of it, as long as inputs are finite. What is added, averaged, read by quantizers of
    several scales or returned is rescaled to one unit, coarse enough for the largest sum that weights and codes can
    give, with some bits behind the point. What other ops read becomes float again; they are named in the report, as
    are layers that read floats.
    Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
    2018.
    """

    guarantee = Lossy()
    ends_changes = True

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
            raise PassError(
                f"{self}: no layer reads codes: {context.reasons}",
                remedy="give it behind quantize, with activations='int8'",
            )
        wide = [layer.node.layer for layer in layers.values() if not layer.sums_exactly]
        found = islands(graph, layers)
        for node in _Writer(graph, layers, found).write():
            if node.op in MEANS:
                reason = "its windows are not all of one power of two"
            else:
                reason = found.floats.get(node.name, f"{node.op} has no integer form")
            if node.op not in (*ops.LAYERS, *ops.ATTENTIONS):
                context.note(f"%{node.name} computes in float: {reason}")
        if wide:
            context.note(
                f"sums of {', '.join(wide)} may have more than 24 bits; the graph is exact while they have not"
            )
        context.edited(len(layers))
        return graph.clean().repropagate()


class _Writer:
    """Writes a graph's integer form beside what it replaces."""

    def __init__(self, graph: Graph, layers: dict[fx.Node, IntegerLayer], found: Islands) -> None:
        self.graph, self.layers, self.islands, self.carried = graph, layers, found.of, found.carried
        self.integers: dict[fx.Node, Node] = {}
        self.floats: dict[fx.Node, Node] = {}
        self.rescaled: dict[tuple[fx.Node, Island], Node] = {}
        self.weights: dict[fx.Node, Node] = {}
        self.one: str | None = None

    def write(self) -> list[Node]:
        """Write it; returns the ops that read integers as floats."""
        readers = []
        for node in self.graph.nodes:
            self.place = Rewriter(self.graph, node)
            if node.fx in self.layers:
                self._take(node, self.layers[node.fx].write(self.place, self._read, self.weights), node.name)
            elif node.fx in self.islands or node.fx in self.carried:
                self._take(node, self._member(node, self.islands.get(node.fx)), node.name)
            elif is_quantizer(node) and self._is_read(node):
                self._take(node, self._quantizer(node), f"{node.name.removesuffix('_quantized')}_integers")
            elif self._read_floats(node.fx):
                readers.append(node)
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
            return torch.tensor(self.islands[node.fx].unit, dtype=torch.float64), None
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
        one = self.place.read(self.one or "one", None if self.one else torch.ones(()))
        self.one = str(one.fx.target)
        return self.place.call(ops.FAKE_QUANTIZE, read, one, *node.fx.args[2:])

    def _member(self, node: Node, island: Island | None) -> Node:
        """An op on integers of its island's unit, or, where it has no island, of the quantizer's that it reads."""
        assert node.op is not None

        def read(operand: Any) -> Any:
            if not isinstance(operand, fx.Node) or operand not in self.integers:
                return operand
            if island is None or self.islands.get(operand) is island:
                return self.integers[operand]
            key = operand, island
            if key not in self.rescaled:
                self.rescaled[key] = self._rescaled(Node(operand, self.graph), island.unit, island.fraction_bits)
            return self.rescaled[key]

        args, kwargs = pytree.tree_map(read, (tuple(node.fx.args), dict(node.fx.kwargs)))
        if island is None:
            return self.place.call(node.op, *args, **kwargs)
        if node.op in CLAMPS:
            finest = float(1 << island.fraction_bits)
            low, high = (
                None if math.isinf(b) else round(b / island.unit * finest) / finest for b in clamp_bounds(node)
            )
            return self.place.call(ops.CLAMP, args[0], low, high)
        if node.op in MEANS and (node.op is not AVERAGE or averages_all(node)):
            return self._mean(node, args[0], island)
        return self.place.call(node.op, *args, **kwargs)

    def _mean(self, node: Node, source: Any, island: Island) -> Node:
        """A sum, which is exact in any order, rescaled."""
        keep = node.op is not OPS["mean.dim"] or bool(node.argument(2, default=False))
        total = self.place.call(OPS["sum.dim_IntList"], source, reduced(node), keep)
        count = averaged(node)
        assert count is not None
        share = self.place.read(f"{node.name}_share", torch.tensor(1 / count))
        return self.place.call(ops.RESCALE, total, share, None, island.mean_bits)
