"""Post-training quantization: int8 weights, and int8 activations with ranges from calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.graph import Graph, Node, identifier
from mcc.rewrite import Context, Lossy, Pass, Rewriter
from mcc.statistics import OBSERVERS, Observer, affine_parameters, observe

FULL_LIMIT = 127
ACTIVATION_CODES = (0, 255)


@dataclass(frozen=True)
class Quantize(Pass):
    """Put fake-quantizers on the weights of linear and convolution layers, and on what they read.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %x_quantized: f32[8, 64] = mcc.fake_quantize(%x, @x_scale, @x_zero_point, axis=None, low=0, high=255)
        %fc_weight_quantized: f32[10, 64] = mcc.fake_quantize(@fc.weight, @fc.weight_scale, …, axis=0, low=-127,
        high=127)
        %fc: f32[8, 10] = linear(%x_quantized, %fc_weight_quantized, @fc.bias)

    Weights are symmetric with a scale for each output channel; activations affine with one scale, zero exact.
    Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
    2018.

    Attributes:
        weights: "int8".
        activations: "int8" needs calibration data; None quantizes weights alone.
        observer: how the range of an activation is chosen: "min-max"; "percentile-99.9", "-99.99", "-99.999" leave
            outliers out; "mse" has the least squared error.
        weight_range: "target" keeps codes within what the target's fast int8 kernel adds exactly (±63 on AVX2, ±127
            with VNNI); "full" is ±127 everywhere.
        exclude: patterns of layer names to leave in float, shell style.
    """

    weights: Literal["int8"] = "int8"
    activations: Literal["int8"] | None = "int8"
    observer: Observer = "mse"
    weight_range: Literal["target", "full"] = "target"
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        for option, allowed in (
            ("weights", ("int8",)), ("activations", ("int8", None)), ("observer", OBSERVERS),
            ("weight_range", ("target", "full")),
        ):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"quantize: {option}={getattr(self, option)!r}",
                    remedy=f"use one of {', '.join(map(repr, allowed))}",
                )

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Activation ranges come from calibration data."""
        return ("calibration",) if self.activations is not None else ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Quantize weights, then observe the graph with quantized weights and quantize activations."""
        layers = self._layers(graph, context)
        limit = context.target.int8_weight_limit if self.weight_range == "target" else FULL_LIMIT
        if self.activations is None:
            limit = FULL_LIMIT  # a weight-only kernel multiplies in float: any code is exact
        elif limit != FULL_LIMIT:
            context.note(f"weight codes within ±{limit}: {context.target} has no instruction that adds ±127 exactly")
        for node in layers:
            _quantize_weight(node, limit)
            context.edited()
        if self.activations is not None:
            self._quantize_activations(graph, layers, context)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with weights rounded in their tensors and activations rounded by plain ATen calls."""
        rounded = before.copy()
        for node in after.nodes:
            if node.op is not ops.FAKE_QUANTIZE or any(n.name == node.name for n in before.nodes):
                continue
            expression = weight_expression(node)
            if expression is not None:
                _round_weight(rounded, node)
            else:
                _round_activation(rounded, node)
        return rounded.clean()

    def _layers(self, graph: Graph, context: Context) -> list[Node]:
        layers = []
        matched: set[str] = set()
        for node in graph.nodes:
            if node.op not in ops.LAYERS:
                if node.op is not None and (node.op.macs(node.fx) or node.op.family == "weights"):
                    context.decline(node, f"{node.op.name} stays in float")
                continue
            excluded = [p for p in self.exclude if fnmatchcase(node.layer, p)]
            matched.update(excluded)
            expression = weight_expression(node.operand(1))
            if excluded:
                context.decline(node, f"excluded by {excluded[0]!r}")
            elif expression is None:
                context.decline(node, "its weight is computed")
            elif node.dtype is not torch.float32:
                context.decline(node, f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32")
            elif expression.quantizer is not None:
                context.decline(node, "its weight is already quantized")
            else:
                layers.append(node)
        unmatched = [p for p in self.exclude if p not in matched]
        if unmatched or not layers:
            names = ", ".join(sorted({n.layer for n in graph.nodes if n.op in ops.LAYERS})) or "none"
            what = f"pattern {unmatched[0]!r} matches no layer" if unmatched else "there is no layer to quantize"
            raise PassError(f"{self}: {what}", remedy=f"layers that can be quantized: {names}")
        return layers

    def _quantize_activations(self, graph: Graph, layers: list[Node], context: Context) -> None:
        graph.clean()
        inputs = {node: node.operand(0) for node in layers}
        values = {x.fx: x for x in inputs.values() if x is not None and x.op is not ops.FAKE_QUANTIZE}
        assert context.data.calibration is not None
        histograms = observe(graph, [x.name for x in values.values()], context.data.calibration)
        low, high = ACTIVATION_CODES
        for x in values.values():
            chosen = histograms[x.name].choose_range(self.observer, high - low + 1)
            scale, zero_point = affine_parameters(*chosen, low, high)
            readers = [node.fx for node in layers if node.operand(0) == x]
            if all(ops.lookup(reader.target) in ops.CONVOLUTIONS for reader in readers):
                # the residual of a convolutional network is added in codes too: it need not be kept in float beside
                readers += [user.fx for user in x.users if user.op is ops.ADD]
            first = next(n for n in graph.module.graph.nodes if n in readers)
            rewriter = Rewriter(graph, Node(first, graph))
            made = rewriter.call(
                ops.FAKE_QUANTIZE, x, rewriter.read(f"{x.name}_scale", torch.tensor(scale, dtype=torch.float32)),
                rewriter.read(f"{x.name}_zero_point", torch.tensor(zero_point, dtype=torch.int32)), None, low, high,
            )  # fmt: skip
            made.rename(f"{x.name}_quantized")
            for reader in readers:
                reader.replace_input_with(x.fx, made.fx)


def channel_scales(weight: Tensor, axis: int, limit: int) -> Tensor:
    """Symmetric scales, float32 [weight.shape[axis]]: the largest |w| of a channel gets the code `limit`."""
    others = [i for i in range(weight.dim()) if i != axis]
    largest = weight.detach().abs().amax(dim=others)
    # a channel too small for a float32 scale counts as zero
    smallest = torch.finfo(torch.float32).tiny * limit
    return torch.where(largest > smallest, largest / limit, 1.0).float()


def _quantize_weight(node: Node, limit: int) -> None:
    top = node.operand(1)
    expression = weight_expression(top)
    assert top is not None
    assert expression is not None
    name = str(expression.root.fx.target)
    shared = next((u for u in top.users if u.op is ops.FAKE_QUANTIZE), None)
    if shared is not None:
        node.fx.replace_input_with(top.fx, shared.fx)
        return
    weight = expression.root.tensor
    if expression.mask is not None:
        weight = weight * expression.mask
    axis = 1 if node.op is ops.CONV_TRANSPOSE2D else 0
    scales = channel_scales(weight, axis, limit)
    rewriter = Rewriter(node.graph, node)
    made = rewriter.call(
        ops.FAKE_QUANTIZE, top, rewriter.read(f"{name}_scale", scales),
        rewriter.read(f"{name}_zero_point", torch.zeros(scales.shape, dtype=torch.int32)), axis, -limit, limit,
    )  # fmt: skip
    made.rename(f"{identifier(name)}_quantized")
    node.fx.replace_input_with(top.fx, made.fx)


def _quantizer_tensors(node: Node) -> tuple[Tensor, Tensor, int, int]:
    scale, zero_point = node.operand(1), node.operand(2)
    assert scale is not None
    assert zero_point is not None
    return scale.tensor, zero_point.tensor, node.argument(4), node.argument(5)


def _round_weight(graph: Graph, quantizer: Node) -> None:
    """Give the readers of the quantized weight a rounded copy; others of a tied weight keep the weight itself."""
    expression, top = weight_expression(quantizer), quantizer.operand(0)
    assert expression is not None
    assert top is not None
    scale, _, low, high = _quantizer_tensors(quantizer)
    weight = expression.root.tensor.detach()
    if expression.mask is not None:
        weight = weight * expression.mask
    shape = [-1 if i == quantizer.argument(3) else 1 for i in range(weight.dim())]
    codes = torch.round(weight / scale.reshape(shape)).clamp(low, high)
    readers = [graph.node(user.name) for user in quantizer.users]
    order = {n: i for i, n in enumerate(graph.module.graph.nodes)}
    rewriter = Rewriter(graph, min(readers, key=lambda n: order[n.fx]))
    made = rewriter.read(f"{expression.root.fx.target}_rounded", codes * scale.reshape(shape))
    for reader in readers:
        reader.fx.replace_input_with(graph.node(top.name).fx, made.fx)


def _round_activation(graph: Graph, quantizer: Node) -> None:
    """Send the readers of the quantized value through divide, round, add, clamp, subtract, multiply."""
    source = quantizer.operand(0)
    assert source is not None
    scale, zero_point, low, high = _quantizer_tensors(quantizer)
    readers = [graph.node(user.name) for user in quantizer.users]
    value = graph.node(source.name)
    order = {n: i for i, n in enumerate(graph.module.graph.nodes)}
    rewriter = Rewriter(graph, min(readers, key=lambda n: order[n.fx]))

    def plain(x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x / float(scale)) + int(zero_point), low, high)
        return (codes - int(zero_point)) * float(scale)

    made = rewriter.insert(plain, value)
    for reader in readers:
        reader.fx.replace_input_with(value.fx, made.fx)
