"""Stage 1: what has a kernel in another form takes that form.

Sequences and volumes become images, layers that are taken apart a layer for each part, attention the op of that name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from mcc import ops
from mcc.backends.cpu.attention_patterns import gather_attention
from mcc.backends.cpu.recurrent_panels import lay_out_recurrences
from mcc.backends.cpu.restored_weights import restored_weight, stored_root
from mcc.backends.cpu.split_layers import split_layers
from mcc.backends.cpu.volumes import convolve_images
from mcc.backends.relax.emitter import tuple_of
from mcc.computed_weights import store_computed_weights
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Graph


HEIGHT = 2  # the dim of an image that a sequence lacks


def rephrase(lowering: Lowering) -> Lowering:
    """Rephrase a copy of the graph; of sequences what is elementwise between convolutions too."""
    graph = lowering.graph.copy()
    store_computed_weights(graph)
    _fill_alone(graph)
    split_layers(graph)
    gather_attention(graph, lowering.target)
    lay_out_recurrences(graph, lowering.target)
    volumes = [node for node in graph.nodes if node.op is ops.CONV3D]
    for node in volumes:
        convolve_images(graph, node)
    if volumes:
        graph.clean().repropagate()
    if not any(n.op is ops.CONV1D for n in graph.nodes):
        return replace(lowering, graph=graph)
    for node in graph.nodes:
        if node.op is ops.CONV1D:
            _conv1d(graph, node)
    graph.clean().repropagate()
    for node in graph.nodes:
        _sink(graph, node)
    return replace(lowering, graph=graph.clean().repropagate())


_FILLED = {
    OPS["new_zeros"]: 0, OPS["new_ones"]: 1, OPS["zeros_like"]: 0, OPS["ones_like"]: 1, OPS["empty_like"]: 0,
}  # fmt: skip


def _fill_alone(graph: Graph) -> None:
    """Tensors of one number that are made like another: of a fixed size they are constants, and so is what follows.

    An empty one may hold anything, so it holds zeros.
    """
    for node in graph.nodes:
        if node.op in _FILLED and all(isinstance(s, int) for s in node.shape):
            made = graph.call(node, torch.ops.aten.full.default, list(node.shape), _FILLED[node.op])
            made.kwargs = {"dtype": node.dtype}
            made.meta["val"] = node.value
            Node(made, graph).take_place_of(node)


def _conv1d(graph: Graph, node: Node) -> None:
    """The length becomes the width, so that lanes and tiles are those of any image."""
    source, bias = node.fx.args[0], node.argument(2)
    assert isinstance(source, fx.Node)
    stride, padding, dilation = (tuple_of(node.argument(i, d), 1)[0] for i, d in ((3, 1), (4, 0), (5, 1)))
    weight = node.operand(1)
    if len(node.shape) != 3 or weight is None:
        return
    kept = stored_root(weight) is not None
    read = restored_weight(graph, node, lambda w: w.unsqueeze(2)) if kept else _unsqueezed(graph, node, weight.fx)
    options = ([1, stride], [0, padding], [1, dilation], node.argument(6, 1))
    made = graph.call(node, ops.CONV2D.target, _image(graph, node, source), read, bias, *options)
    Node(_squeezed(graph, node, made), graph).take_place_of(node)


def _image(graph: Graph, node: Node, source: fx.Node) -> fx.Node:
    """A sequence as an image; codes are reshaped below what dequantizes them, where the kernel reads them."""
    reader = Node(source, graph)
    if reader.op is not ops.DEQUANTIZE or reader.argument(3) is not None:
        return _unsqueezed(graph, node, source)
    codes, *rest = source.args
    assert isinstance(codes, fx.Node)
    return graph.call(node, ops.DEQUANTIZE.target, _unsqueezed(graph, node, codes), *rest)


def _unsqueezed(graph: Graph, node: Node, value: fx.Node) -> fx.Node:
    return graph.call(node, OPS["unsqueeze"].target, value, HEIGHT)


def _squeezed(graph: Graph, node: Node, value: fx.Node) -> fx.Node:
    return graph.call(node, OPS["squeeze.dim"].target, value, HEIGHT)


_ELEMENTWISE = (ops.BATCH_NORM, ops.QUANTIZE, ops.DEQUANTIZE, ops.DROPOUT, OPS["group_norm"], OPS["instance_norm"])


def _sink(graph: Graph, node: Node) -> None:
    """Compute an elementwise op of sequences on the images they were made from; an image of a sequence is itself.

    So that a convolution and what follows it stay neighbours.
    """
    source = node.operand(0)
    if node.op is OPS["unsqueeze"] and source is not None and _was_image(source) and node.argument(1) == HEIGHT:
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
    images = {n.fx: _image_of(graph, node, n) for n in sequences}
    made = graph.call(node, node.fx.target, *fx.node.map_arg(node.fx.args, lambda n: images.get(n, n)))
    made.kwargs = node.fx.kwargs
    back = _squeezed(graph, node, made)
    made.meta["val"], back.meta["val"] = node.value.unsqueeze(HEIGHT), node.value
    Node(back, graph).take_place_of(node)


def _image_of(graph: Graph, node: Node, sequence: Node) -> fx.Node:
    """The image that a sequence was made from, or one that was made of it before `node`, or a new one."""
    if _was_image(sequence):
        return sequence.fx.all_input_nodes[0]
    made = {u.fx for u in sequence.users if u.op is OPS["unsqueeze"] and u.argument(1) == HEIGHT}
    for before in graph.nodes:
        if before.fx is node.fx:
            break
        if before.fx in made:
            return before.fx
    image = _unsqueezed(graph, node, sequence.fx)
    image.meta["val"] = sequence.value.unsqueeze(HEIGHT)
    return image


def _was_image(node: Node) -> bool:
    """Whether a value is a sequence made by `_conv1d` or `_sink`."""
    source = node.operand(0)
    made = node.op is OPS["squeeze.dim"] and node.argument(1) == HEIGHT
    return made and source is not None and len(source.shape) == 4 and source.shape[2] == 1
