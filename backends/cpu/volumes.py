"""Convolutions of volumes as those of images: the slices that a window reads become channels of one image.

Slices of the volume are copied side by side for each depth of the window, with channels last, where nothing has to be
transposed for that; what is elementwise after the convolution is computed on its images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mcc import ops
from mcc.backends.cpu.restored_weights import restored_weight, stored_root
from mcc.backends.relax.emitter import tuple_of
from mcc.graph import Node
from mcc.layouts import TO_FIRST, TO_LAST
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Graph

_VOLUME_LAST, _VOLUME_FIRST = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]
_PERMUTE, _RESHAPE = OPS["permute"].target, ops.RESHAPE.target


def convolve_images(graph: Graph, node: Node) -> None:
    """Replace a conv3d of fixed sizes with one group; others are left. The graph is edited in place."""
    source, weight, bias = (node.operand(i) for i in range(3))
    if source is None or weight is None or stored_root(weight) is None or node.dtype is not torch.float32:
        return
    sizes = (*source.shape[1:], *node.shape[1:])
    single = node.argument(6, 1) == 1 and len(node.shape) == 5 and (bias is None or bias.is_parameter)
    if not single or not all(isinstance(s, int) for s in sizes):
        return
    stride, padding, dilation = (tuple_of(node.argument(i, d), 3) for i, d in ((3, 1), (4, 0), (5, 1)))

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call(node, target, *args)

    read, rest, fill = _codes_or_values(source)
    last = call(_PERMUTE, read, _VOLUME_LAST)
    if padding[0]:
        last = call(OPS["constant_pad_nd"].target, last, [0] * 6 + [padding[0]] * 2, fill)
    reach = (int(node.shape[2]) - 1) * stride[0] + 1
    begins = [k * dilation[0] for k in range(int(weight.shape[2]))]
    slices = [call(OPS["slice.Tensor"].target, last, 1, begin, begin + reach, stride[0]) for begin in begins]
    channels = len(slices) * int(source.shape[1])
    joined = call(OPS["cat"].target, slices, 4) if len(slices) > 1 else slices[0]
    image = call(_PERMUTE, call(_RESHAPE, joined, [-1, *source.shape[3:], channels]), list(TO_FIRST))
    if rest:
        image = call(ops.DEQUANTIZE.target, image, *rest)
    flat = restored_weight(graph, node, lambda w: w.transpose(1, 2).flatten(1, 2))
    options = (stride[1:], padding[1:], dilation[1:], 1)
    made = call(ops.CONV2D.target, image, flat, None if bias is None else bias.fx, *options)
    end, made = _elementwise(graph, node, made)
    volume = graph.call(end, _RESHAPE, graph.call(end, _PERMUTE, made, list(TO_LAST)), [-1, *_last(node)])
    back = graph.call(end, _PERMUTE, volume, _VOLUME_FIRST)
    back.meta["val"] = end.value
    Node(back, graph).take_place_of(end)


def _codes_or_values(source: Node) -> tuple[fx.Node, tuple[Any, ...], float]:
    """What is copied, what dequantizes it, and what stands for zero: codes are copied as such."""
    codes, zero = (source.operand(0), source.operand(2)) if source.op is ops.DEQUANTIZE else (None, None)
    if codes is None or zero is None or not zero.is_parameter or source.argument(3) is not None:
        return source.fx, (), 0.0
    return codes.fx, source.fx.args[1:], int(zero.tensor)


def _last(node: Node) -> list[int]:
    channels, *space = (int(s) for s in node.shape[1:])
    return [*space, channels]


def _elementwise(graph: Graph, node: Node, made: fx.Node) -> tuple[Node, fx.Node]:
    """Repeat on images what alone reads the convolution and changes its elements; the last of it, and its new form."""
    end = node
    while len(end.users) == 1 and not end.is_output:
        (user,) = end.users
        whole = user.op in (ops.QUANTIZE, ops.DEQUANTIZE) and user.argument(3) is None and user.operand(0) == end
        alone = user.op is not None and user.op.family == "pointwise" and user.fx.all_input_nodes == [end.fx]
        if not whole and not alone:
            break
        places = {end.fx: made}
        args = fx.node.map_arg(user.fx.args, lambda n, places=places: places.get(n, n))  # type: ignore[misc]
        copied = graph.call(user, user.fx.target, *args)
        copied.kwargs = user.fx.kwargs
        end, made = user, copied
    return end, made
