"""Stage 1: convolutions of sequences become those of images of height 1, which have kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mcc import ops
from mcc.backends.relax.emitter import tuple_of
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Graph


def rephrase(lowering: Lowering) -> Lowering:
    """Change every conv1d, and what is elementwise between them, in a copy of the graph."""
    if not any(n.op is ops.CONV1D for n in lowering.graph.nodes):
        return lowering
    graph = lowering.graph.copy()
    for node in graph.nodes:
        if node.op is ops.CONV1D:
            _conv1d(graph, node)
    graph.clean().repropagate()
    for node in graph.nodes:
        _sink(graph, node)
    return replace(lowering, graph=graph.clean().repropagate())


def _conv1d(graph: Graph, node: Node) -> None:
    """The length becomes the width, so that lanes and tiles are those of any image."""
    source, bias = node.fx.args[0], node.argument(2)
    assert isinstance(source, fx.Node)
    stride, padding, dilation = (tuple_of(node.argument(i, d), 1)[0] for i, d in ((3, 1), (4, 0), (5, 1)))
    call = _caller(graph, node)
    if len(node.shape) != 3 or isinstance(padding, str):
        return
    weight = restored_weight(graph, node, lambda w: w.unsqueeze(2), lambda w: call("unsqueeze", w, 2))
    options = ([1, stride], [0, padding], [1, dilation], node.argument(6, 1))
    made = call("squeeze.dim", call("conv2d", _image(graph, node, source), weight, bias, *options), 2)
    Node(made, graph).take_place_of(node)


def _image(graph: Graph, node: Node, source: fx.Node) -> fx.Node:
    """A sequence as an image; codes are reshaped below what dequantizes them, where the kernel reads them."""
    call, reader = _caller(graph, node), Node(source, graph)
    if reader.op is not ops.DEQUANTIZE or reader.argument(3) is not None:
        return call("unsqueeze", source, 2)
    codes, *rest = source.args
    return call("mcc.dequantize", call("unsqueeze", codes, 2), *rest)


_ELEMENTWISE = (ops.BATCH_NORM, ops.QUANTIZE, ops.DEQUANTIZE, ops.DROPOUT)


def _sink(graph: Graph, node: Node) -> None:
    """Compute an elementwise op of sequences on the images they were made from; an image of a sequence is itself.

    So that a convolution and what follows it stay neighbours.
    """
    source = node.operand(0)
    if node.op is OPS["unsqueeze"] and source is not None and _was_image(source) and node.argument(1) == 2:
        node.fx.replace_all_uses_with(source.fx.all_input_nodes[0])
        return
    if node.op is None or not (node.op.family == "pointwise" or node.op in _ELEMENTWISE):
        return
    operands = [Node(n, graph) for n in node.fx.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if node.op in _ELEMENTWISE:
        operands = operands[:1]
        if node.op in (ops.QUANTIZE, ops.DEQUANTIZE) and node.argument(3) is not None:
            return
    sequences = [n for n in operands if n.value.dim() > 0]
    if not any(_was_image(n) for n in sequences) or any(n.value.dim() != 3 for n in sequences):
        return
    call = _caller(graph, node)
    images = {n.fx: _image_of(graph, node, n) for n in sequences}
    made = call(node.op.name, *fx.node.map_arg(node.fx.args, lambda n: images.get(n, n)))
    made.kwargs = node.fx.kwargs
    back = call("squeeze.dim", made, 2)
    made.meta["val"], back.meta["val"] = node.value.unsqueeze(2), node.value
    Node(back, graph).take_place_of(node)


def _image_of(graph: Graph, node: Node, sequence: Node) -> fx.Node:
    """The image that a sequence was made from, or one that was made of it before `node`, or a new one."""
    if _was_image(sequence):
        return sequence.fx.all_input_nodes[0]
    made = {u.fx for u in sequence.users if u.op is OPS["unsqueeze"] and u.argument(1) == 2}
    for before in graph.nodes:
        if before.fx is node.fx:
            break
        if before.fx in made:
            return before.fx
    image = _caller(graph, node)("unsqueeze", sequence.fx, 2)
    image.meta["val"] = sequence.value.unsqueeze(2)
    return image


def _was_image(node: Node) -> bool:
    """Whether a value is a sequence made by `_conv1d` or `_sink`."""
    source = node.operand(0)
    made = node.op is OPS["squeeze.dim"] and node.argument(1) == 2
    return made and source is not None and len(source.shape) == 4 and source.shape[2] == 1


def _caller(graph: Graph, node: Node) -> Callable[..., fx.Node]:
    """Makes calls in front of a node, by the op's name."""

    def call(name: str, *args: Any) -> fx.Node:
        with graph.module.graph.inserting_before(node.fx):
            made = graph.module.graph.call_function(OPS[name].target, args)
        made.meta = {k: v for k, v in node.fx.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return made

    return call


def restored_weight(
    graph: Graph,
    node: Node,
    stored: Callable[[Tensor], Tensor],
    computed: Callable[[fx.Node], fx.Node],
    scales: Callable[[Tensor], Tensor] = lambda s: s,
) -> fx.Node:
    """A layer's weight in another form: its stored values or codes are changed, where it is one of these.

    Args:
        graph: of the layer.
        node: the layer.
        stored: the change, of values or codes.
        computed: the change of a weight that is computed in another way, as calls.
        scales: the change of the scales of codes, which belong to outputs after it.
    """
    top = node.operand(1)
    assert top is not None
    root = top.operand(0) if top.op is ops.DEQUANTIZE else top
    if root is None or not root.is_parameter:
        return computed(top.fx)

    def changed(old: Node, change: Callable[[Tensor], Tensor]) -> fx.Node:
        name = graph.free_name(f"{old.fx.target}_{node.name}")
        graph.set_tensor(name, change(old.tensor.detach()).contiguous())
        return graph.read(name, node).fx

    values = changed(root, stored)
    if root is top:
        return values
    scale, zero = top.operand(1), top.operand(2)
    assert scale is not None
    assert zero is not None
    with graph.module.graph.inserting_before(node.fx):
        made = graph.module.graph.call_function(
            ops.DEQUANTIZE.target, (values, changed(scale, scales), changed(zero, scales), 0, *top.fx.args[4:])
        )
    made.meta = {k: v for k, v in top.fx.meta.items() if k in ("nn_module_stack", "stack_trace")}
    return made
