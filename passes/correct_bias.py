"""Bias correction: the mean that quantization moved is put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.channels import readers
from mcc.cost import weight_expression
from mcc.errors import DataError, PassError
from mcc.quantization import layers_taken, without_quantizers
from mcc.rewrite import Context, Lossy, Pass, Rewriter
from mcc.statistics import StepwiseRuns, run_in_step

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to the bias of each quantized layer what its outputs lack in the mean, channel by channel.

        %conv: f32[8, 16, 32, 32] = conv2d(%x_quantized, %conv_weight_quantized, @conv.bias)
    gets other values in @conv.bias, or that bias where it had none. Means are those of calibration data, in the float
    graph and behind the quantized layers before, which are corrected already. Give this after `quantize`.
    Nagel, van Baalen, Blankevoort, Welling: Data-free quantization through weight equalization and bias correction.
    ICCV 2019, the empirical form.
    """

    guarantee = Lossy()

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Means are those of calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Correct layer by layer while the calibration data runs through the graph and its float form."""
        exact_graph = without_quantizers(graph)
        layers = {node.fx: node for node in self._layers(graph, context)}
        for node in layers.values():
            _give_bias(node)
        assert context.data.calibration is not None
        batches = list(context.data.calibration)
        exact = StepwiseRuns(exact_graph, batches)

        def before(node: fx.Node, arguments: list[list[Any]]) -> bool:
            if node not in layers:
                return False
            wanted = _channel_means(layers[node], exact.run_to(node.name))
            found = _channel_means(layers[node], [node.target(*a, **node.kwargs) for a in arguments])  # type: ignore[operator]
            lacking = wanted - found
            if not lacking.isfinite().all():
                raise DataError(
                    f"correct-bias: the calibration data has no rows for {layers[node].layer}, or they are not finite",
                    remedy="check the batches and the weights",
                )
            bias = layers[node].operand(2)
            assert bias is not None
            graph.set_tensor(str(bias.fx.target), (bias.tensor.detach() + lacking).to(bias.dtype))
            context.edited()
            return True

        run_in_step(graph, batches, before)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the corrections added behind its layers."""
        corrected = before.copy()
        for node in corrected.nodes:
            if node.op not in ops.LAYERS:
                continue
            old, new = node.operand(2), after.node(node.name).operand(2)
            if new is None or not new.is_parameter:
                continue
            added = new.tensor.detach() - (0 if old is None else old.tensor.detach())
            _add_behind(node, added)
        return corrected.clean()

    def _layers(self, graph: Graph, context: Context) -> list[Node]:
        failure = PassError(f"{self}: no layer's bias can be corrected", remedy="give it after quantize")
        return layers_taken((n for n in graph.nodes if n.op in ops.LAYERS), context, _refusal, failure)


def _refusal(node: Node) -> str | None:
    expression, source, bias = weight_expression(node.operand(1)), node.operand(0), node.operand(2)
    by_weight = expression is not None and expression.quantizer is not None
    if not by_weight and (source is None or source.op is not ops.FAKE_QUANTIZE):
        return "it is not quantized"
    if bias is None:
        return None
    if not bias.is_parameter:
        return "its bias is computed"
    return "its bias is shared" if readers(bias) > 1 else None


def _channel_axis(node: Node) -> int:
    """Behind the dims of rows, of which an image or sequence by itself has none."""
    weight = node.operand(1)
    assert weight is not None
    return len(node.shape) - (len(weight.shape) - 1)


def _channels(node: Node) -> int:
    return int(node.shape[_channel_axis(node)])


def _give_bias(node: Node) -> None:
    """A bias of zeros for a layer that has none."""
    if node.operand(2) is not None:
        return
    expression = weight_expression(node.operand(1))
    owner = "" if expression is None else str(expression.root.fx.target).rpartition(".")[0]
    name = node.graph.free_name(f"{owner}.bias" if owner else "bias")
    node.graph.add_parameter(name, torch.zeros(_channels(node), dtype=node.dtype))
    node.fx.args = (*node.fx.args[:2], node.graph.read(name, node).fx, *node.fx.args[3:])


def _channel_means(node: Node, outputs: list[Tensor]) -> Tensor:
    """Over all rows of all batches, float64 [channels]; not a number where there is no row."""
    flat = [y.movedim(_channel_axis(node), -1).reshape(-1, _channels(node)).double() for y in outputs]
    rows = sum(len(y) for y in flat)
    return torch.stack([y.sum(0) for y in flat]).sum(0) / rows


def _add_behind(node: Node, added: Tensor) -> None:
    """Let what reads a layer read its output plus a stored tensor."""
    graph, following = node.graph, type(node)(node.fx.next, node.graph)
    axes = len(node.shape) - _channel_axis(node)  # from the channels on
    name = graph.free_name(f"{node.name}_correction")
    graph.set_tensor(name, added.reshape(-1, *[1] * (axes - 1)))
    made = Rewriter(graph, following).call(ops.ADD, node, graph.read(name, following))
    node.fx.replace_all_uses_with(made.fx, delete_user_cb=lambda user: user is not made.fx)
