"""What each op becomes when its activations lie [batch, height, width, channels]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx

from mcc import layouts, ops
from mcc.arguments import PADS, filling
from mcc.backends.cpu.integerize import reads_sparse
from mcc.backends.cpu.permutes import order_of
from mcc.backends.cpu.restored_weights import restored_weight, stored_root
from mcc.backends.cpu.transposed import transposed, transposed_fits
from mcc.backends.relax.emitter import tuple_of
from mcc.constants import varying
from mcc.cost import weight_expression
from mcc.graph import Node
from mcc.layouts import TO_FIRST, TO_LAST
from mcc.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mcc.graph import Graph
    from mcc.target import Target

_NEW_DIM = TO_FIRST  # where each NCHW dim goes: the inverse of TO_LAST

Arguments: TypeAlias = tuple[Any, ...]
Form: TypeAlias = "Callable[[Turner, Node], tuple[Any, Arguments]]"


class Turner:
    """Turns nodes of a graph, one after another in order."""

    def __init__(self, graph: Graph, target: Target) -> None:
        self.graph = graph
        self.target = target
        self._varying = varying(graph)
        self._turned: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, fx.Node] = {}
        self._backs: dict[fx.Node, fx.Node] = {}

    def varies(self, node: fx.Node) -> bool:
        """Whether a node depends on the inputs: what does not is computed when the model is compiled."""
        return node in self._varying

    def able(self, node: Node) -> bool:
        """Whether this very call has a form with channels last."""
        if not self.varies(node.fx):
            return False
        if node.op is not None and node.op.family == "pointwise" and node.value.dim() != 4:
            return False  # an operand of more dims that does not vary
        if node.op is ops.CONV2D and reads_sparse(node, self.target):
            return False  # its kernel takes vectors of neighbouring pixels
        source = node.operand(0) if node.op is not OPS["cat"] else None
        if source is not None and source.op is not None and isinstance(source.value, list | tuple):
            return source.op.name in FORMS and self.able(source)  # a part of a split
        tensors = [n for n in node.fx.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and self.varies(n)]
        return all(n.meta["val"].dim() == 4 for n in tensors) and _CONDITIONS.get(node.op, _always)(node)

    def turn(self, node: Node) -> None:
        """Put the form with channels last before a node, and its value, turned back, wherever the node was read."""
        assert node.op is not None
        target, args = FORMS[node.op.name](self, node)
        made = self.graph.call(node, target, *args)
        if target is node.fx.target:
            made.kwargs = node.fx.kwargs
        self._turned[node.fx] = made
        value = node.value
        if isinstance(value, Tensor) and value.dim() == 4:
            back = self.graph.call(node, OPS["permute"].target, made, list(TO_FIRST))
            back.meta["val"] = value
            self._views[back] = self._backs[back] = made
            self._replace(node, back)
        elif isinstance(value, Tensor):
            self._replace(node, made)

    def _replace(self, node: Node, by: fx.Node) -> None:
        node.fx.replace_all_uses_with(by, delete_user_cb=lambda user: user is not by)
        name = node.name
        self.graph.module.graph.erase_node(node.fx)
        by.name = name

    def finish(self) -> None:
        """Name the values for the nodes they took the place of, where those are no longer needed."""
        self.graph.clean()
        for back, made in self._backs.items():
            if back._erased and not made._erased:
                made.name = back.name

    def last(self, node: Node, operand: Any) -> Any:
        """An operand with its channels last; what is no activation of four dims is brought to them, or left alone."""
        if not isinstance(operand, fx.Node):
            return operand
        if operand in self._views:
            return self._views[operand]
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or (value.numel() == 1 and not self.varies(operand)):
            return operand
        if value.dim() < 4:
            operand = self.graph.call(node, OPS["reshape"].target, operand, [*[1] * (4 - value.dim()), *value.shape])
        turned = self.graph.call(node, OPS["permute"].target, operand, list(TO_LAST))
        if value.dim() == 4:
            self._views[operand] = turned
        return turned

    def part(self, node: fx.Node) -> fx.Node:
        """The turned form of a node that gives several values."""
        return self._turned[node]


def _dims(dims: Any) -> Any:
    return [_NEW_DIM[d % 4] for d in dims] if isinstance(dims, list | tuple) else _NEW_DIM[dims % 4]


def _pointwise(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    return node.fx.target, tuple(turner.last(node, a) for a in node.fx.args)


def _first_only(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    """Ops whose further operands are scales of the whole tensor."""
    return node.fx.target, (turner.last(node, node.fx.args[0]), *node.fx.args[1:])


def _rescale(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    source, scale, axis, fraction_bits = node.fx.args
    return node.fx.target, (turner.last(node, source), scale, None if axis is None else _dims(axis), fraction_bits)


def _with_dim(position: int, default: int = 0) -> Form:
    """Ops that take a dim, or several, at an argument."""

    def form(turner: Turner, node: Node) -> tuple[Any, Arguments]:
        source = node.fx.args[0]
        turned = (
            [turner.last(node, s) for s in source] if isinstance(source, list | tuple) else turner.last(node, source)
        )
        args = [turned, *node.fx.args[1:]]
        while len(args) <= position:
            args.append(default)
        args[position] = _dims(args[position])
        return node.fx.target, tuple(args)

    return form


def _permute(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    """A user's own permute to NCHW: with its channels last it is what it was made from."""
    del turner
    order = node.argument(1)
    return node.fx.target, (node.fx.args[0], [order[d] % 4 for d in TO_LAST])


def _getitem(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    source, index = node.fx.args
    assert isinstance(source, fx.Node)
    return node.fx.target, (turner.part(source), index)


def _convolution(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    stride, padding, dilation = (tuple_of(node.argument(i, d), 2) for i, d in ((3, 1), (4, 0), (5, 1)))
    weight, bias = node.argument(1), node.argument(2)
    if _is_linear(node):
        flat = restored_weight(turner.graph, node, lambda w: w.flatten(1))
        return ops.LINEAR.target, (turner.last(node, node.fx.args[0]), flat, bias)
    source, before = _unpadded(turner, node, turner.last(node, node.fx.args[0]))
    padding = [p + b for p, b in zip(padding * 2, before, strict=True)]
    read, top = node.operand(0), node.operand(1)
    assert read is not None
    assert top is not None
    image = [size - before[axis] - before[2 + axis] for axis, size in enumerate(read.shape[2:])]
    taps, padding = _used_taps(image, top, (stride, padding, dilation))
    if taps is not None:
        weight = restored_weight(turner.graph, node, lambda w: w[:, :, taps[0], taps[1]])
    return layouts.conv2d_nhwc._opoverload, (source, weight, bias, stride, padding, dilation, node.argument(6, 1))


def _used_taps(
    image: Sequence[Any], weight: Node, options: tuple[list[int], list[int], list[int]]
) -> tuple[tuple[slice, slice] | None, list[int]]:
    """The rows and columns of a window that some output reads the image with, and the padding that goes with them.

    Windows that are dilated further than the image is large read only its padding at their borders.

    Args:
        image: height and width.
        weight: the expression that gives it; where it is not stored as it is or as codes, all its taps are used.
        options: stride, padding [top, left, bottom, right] and dilation.
    """
    stride, padding, dilation = options
    kernel = [int(k) for k in weight.shape[2:]]
    if not all(isinstance(s, int) for s in image):
        return None, padding
    used, before, after = [], padding[:2], padding[2:]
    for axis, (size, k, s, d) in enumerate(zip(image, kernel, stride, dilation, strict=True)):
        outputs = (size + before[axis] + after[axis] - d * (k - 1) - 1) // s + 1
        reads = [any(0 <= o * s + t * d - before[axis] < size for o in range(outputs)) for t in range(k)]
        first, last = (reads.index(True), k - reads[::-1].index(True)) if any(reads) else (0, k)
        trimmed = before[axis] - first * d, after[axis] - (k - last) * d
        if min(trimmed) < 0:
            first, last, trimmed = 0, k, (before[axis], after[axis])
        used.append(slice(first, last))
        before[axis], after[axis] = trimmed
    all_used = all(taps == slice(0, k) for taps, k in zip(used, kernel, strict=True))
    if all_used or stored_root(weight) is None:
        return None, padding
    return (used[0], used[1]), [*before, *after]


def _is_linear(node: Node) -> bool:
    """Whether a convolution of varying height and width is a linear layer of its pixels, whatever the image's form."""
    weight = node.operand(1)
    assert weight is not None
    options = ((3, 1), (4, 0), (5, 1))
    plain = all(tuple_of(node.argument(i, default), 2) == [default] * 2 for i, default in options)
    single = plain and tuple(weight.shape[2:]) == (1, 1) and node.argument(6, 1) == 1
    return single and not _fixed(node, (2, 3)) and stored_root(weight) is not None


def _unpadded(turner: Turner, node: Node, source: fx.Node) -> tuple[fx.Node, list[int]]:
    """What a convolution reads without a pad of zeros before it, and that pad as [top, left, bottom, right]."""
    reader = Node(source, turner.graph)
    if reader.op is not ops.DEQUANTIZE or reader.argument(3) is not None:
        return _unpadded_by(reader, 0)
    codes, zero = reader.operand(0), reader.operand(2)
    if codes is None or zero is None or not zero.is_parameter:
        return source, [0] * 4
    inner, before = _unpadded_by(codes, int(zero.tensor))
    changed = inner is not codes.fx
    return (turner.graph.call(node, source.target, inner, *source.args[1:]) if changed else source), before


def _unpadded_by(source: Node, fill: float) -> tuple[fx.Node, list[int]]:
    """The same where the pad's value is `fill`."""
    inner = source.operand(0)
    if inner is None or filling(source) != fill:
        return source.fx, [0] * 4
    channels_first, channels_last, left, right, top, bottom = amounts = [*source.argument(1), *[0] * 6][:6]
    if channels_first or channels_last or min(amounts) < 0:
        return source.fx, [0] * 4
    return inner.fx, [top, left, bottom, right]


def _max_pool(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    kernel = tuple_of(node.argument(1), 2)
    stride, padding = tuple_of(node.argument(2) or kernel, 2), tuple_of(node.argument(3, 0), 2)
    bottom = padding
    if node.argument(5, False):
        source = node.operand(0)
        assert source is not None
        sizes = zip(source.shape[2:], node.shape[2:], kernel, stride, padding, strict=True)
        bottom = [max(p, (int(out) - 1) * s + k - int(size) - p) for size, out, k, s, p in sizes]
    source_last = turner.last(node, node.fx.args[0])
    return layouts.max_pool2d_nhwc._opoverload, (source_last, kernel, stride, [*padding, *bottom])


def _avg_pool(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    kernel = tuple_of(node.argument(1), 2)
    stride, padding = tuple_of(node.argument(2) or kernel, 2), tuple_of(node.argument(3, 0), 2)
    counted = node.argument(5, True)
    return layouts.avg_pool2d_nhwc._opoverload, (turner.last(node, node.fx.args[0]), kernel, stride, padding, counted)


def _global_pool(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    return OPS["mean.dim"].target, (turner.last(node, node.fx.args[0]), [1, 2], True)


def _batch_norm(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    """As one multiplication and one addition a channel, computed in float64 at build time."""
    parts = [node.operand(i) for i in range(1, 5)]
    gamma, beta, mean, variance = (None if p is None else p.tensor.detach().double() for p in parts)
    assert mean is not None
    assert variance is not None
    gain = (variance + float(node.argument(7))).rsqrt()
    gain = gain if gamma is None else gain * gamma
    shift = -mean * gain if beta is None else beta - mean * gain
    read = []
    for kind, tensor in (("gain", gain), ("shift", shift)):
        name = turner.graph.free_name(f"{node.name}_{kind}")
        turner.graph.set_tensor(name, tensor.float())
        read.append(turner.graph.read(name, node).fx)
    scaled = turner.graph.call(node, ops.MUL.target, turner.last(node, node.fx.args[0]), read[0])
    return OPS["add.Tensor"].target, (scaled, read[1])


def _group_norm(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    args = [turner.last(node, node.fx.args[0]), node.argument(1), node.argument(2), node.argument(3)]
    return layouts.group_norm_nhwc._opoverload, (*args, float(node.argument(4, 1e-5)))


def _instance_norm(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    source, channels = turner.last(node, node.fx.args[0]), int(node.shape[1])
    eps = float(node.argument(7, 1e-5))
    return layouts.group_norm_nhwc._opoverload, (source, channels, node.argument(1), node.argument(2), eps)


def _pad(turner: Turner, node: Node) -> tuple[Any, Arguments]:
    """Padding is given from the last dim on."""
    pairs = [list(node.fx.args[1][i : i + 2]) for i in range(0, len(node.fx.args[1]), 2)]  # type: ignore[index,arg-type]
    pairs += [[0, 0]] * (3 - len(pairs))
    width, height, channels = pairs
    args = [turner.last(node, node.fx.args[0]), [*channels, *width, *height], *node.fx.args[2:]]
    return node.fx.target, tuple(args)


def _upsample(mode: str) -> Form:
    def form(turner: Turner, node: Node) -> tuple[Any, Arguments]:
        align = node.argument(2) if mode == "bilinear" else None
        source = turner.last(node, node.fx.args[0])
        size: list[Any] = list(node.shape[2:])
        if not all(isinstance(s, int) for s in size):
            wanted, factors = node.argument(1), node.argument(3 if mode == "bilinear" else 2)
            size = list(wanted) if wanted is not None else _enlarged(turner, node, source, factors)
        return layouts.upsample_nhwc._opoverload, (source, size, mode, align)

    return form


def _enlarged(turner: Turner, node: Node, source: fx.Node, factors: Sequence[float]) -> list[fx.Node]:
    """Height and width of an image with channels last, times whole factors."""
    sizes = (turner.graph.call(node, ops.SYM_SIZE.target, source, dim) for dim in (1, 2))
    return [
        turner.graph.call(node, OPS["mul"].target, s, int(factor)) for s, factor in zip(sizes, factors, strict=True)
    ]


def _always(node: Node) -> bool:
    del node
    return True


def _fixed(node: Node, dims: Iterable[int]) -> bool:
    source = node.operand(0)
    return source is not None and all(isinstance(source.shape[d], int) for d in dims)


def _convolution_fits(node: Node) -> bool:
    stored = weight_expression(node.operand(1)) is not None and node.dtype is torch.float32
    bias = node.operand(2)
    return stored and _fixed(node, (1,)) and (bias is None or bias.is_parameter)


_POOLED = (torch.float32, torch.uint8)


def _pool_fits(node: Node) -> bool:
    ceils = bool(node.argument(5, False))  # then the padding is computed here
    fixed = _fixed(node, (1, 2, 3) if ceils else (1,))
    return fixed and set(tuple_of(node.argument(4, 1), 2)) == {1} and node.dtype in _POOLED


def _avg_pool_fits(node: Node) -> bool:
    exact = not node.argument(4, False) and node.argument(6) is None
    return exact and _fixed(node, (1,)) and node.dtype is torch.float32


def _batch_norm_fits(node: Node) -> bool:
    return all(p is None or p.is_parameter for p in (node.operand(i) for i in range(1, 5))) and bool(
        node.operand(3) and not node.argument(5)
    )


def _group_norm_fits(node: Node) -> bool:
    affine = (node.operand(i) for i in ((1, 2) if node.op is OPS["instance_norm"] else (2, 3)))
    by_image = node.op is not OPS["instance_norm"] or bool(node.argument(5))
    plain = all(p is None or (p.is_parameter and p.dtype is torch.float32) for p in affine)
    return by_image and plain and _fixed(node, (1,)) and node.dtype is torch.float32


def _factors_are_whole(node: Node) -> bool:
    factors = node.argument(3 if node.op is OPS["upsample_bilinear2d.vec"] else 2)
    whole = factors is None or all(float(f).is_integer() for f in factors)
    kinds = (torch.float32,) if node.op is OPS["upsample_bilinear2d.vec"] else _POOLED
    return whole and node.dtype in kinds


def _order_kept(node: Node) -> bool:
    """Whether the dims left by a reduction are in the same order: not channels before height or width."""
    dims = node.argument(1)
    if not isinstance(dims, list | tuple) or not dims:
        return False
    reduced = {d % 4 for d in dims}
    return bool(node.argument(2, default=False)) or 1 in reduced or {2, 3} <= reduced


def _constant_pad(node: Node) -> bool:
    return len(node.argument(1)) <= 6 and filling(node) is not None


def _one_slope(node: Node) -> bool:
    slope = node.operand(1)
    return slope is not None and slope.value.numel() == 1


def _one_scale(node: Node) -> bool:
    return node.argument(3) is None


PREFERRED = (ops.CONV2D, ops.CONV_TRANSPOSE2D, OPS["max_pool2d"], OPS["avg_pool2d"])
_CONDITIONS: dict[ops.Op | None, Callable[[Node], bool]] = {
    ops.CONV2D: _convolution_fits, ops.CONV_TRANSPOSE2D: transposed_fits,
    OPS["max_pool2d"]: _pool_fits, OPS["avg_pool2d"]: _avg_pool_fits,
    OPS["adaptive_avg_pool2d"]: lambda n: all(s == 1 for s in n.shape[2:]), ops.BATCH_NORM: _batch_norm_fits,
    OPS["group_norm"]: _group_norm_fits, OPS["instance_norm"]: _group_norm_fits,
    OPS["upsample_nearest2d.vec"]: _factors_are_whole, OPS["upsample_bilinear2d.vec"]: _factors_are_whole,
    ops.QUANTIZE: _one_scale, ops.DEQUANTIZE: _one_scale,
    **{OPS[name]: _order_kept for name in ("mean.dim", "sum.dim_IntList", "amax", "amin")},
    OPS["permute"]: lambda n: order_of(n) == TO_FIRST,
    **dict.fromkeys(PADS, _constant_pad), OPS["prelu"]: _one_slope,
}  # fmt: skip

FORMS: dict[str, Form] = {
    **{row.name: _pointwise for row in OPS.values() if row.family == "pointwise"},
    "mcc.quantize": _first_only, "mcc.dequantize": _first_only, "dropout": _first_only,
    "mcc.round_bfloat16": _first_only, "mcc.rescale": _rescale,
    "cat": _with_dim(1), "chunk": _with_dim(2), "split.Tensor": _with_dim(2), "split_with_sizes": _with_dim(2),
    "slice.Tensor": _with_dim(1), "softmax.int": _with_dim(1), "getitem": _getitem, "permute": _permute,
    "mean.dim": _with_dim(1), "sum.dim_IntList": _with_dim(1), "amax": _with_dim(1), "amin": _with_dim(1),
    "conv2d": _convolution, "max_pool2d": _max_pool, "avg_pool2d": _avg_pool, "adaptive_avg_pool2d": _global_pool,
    "conv_transpose2d.input": transposed, "batch_norm": _batch_norm,
    "group_norm": _group_norm, "instance_norm": _instance_norm, "pad": _pad, "constant_pad_nd": _pad,
    "upsample_nearest2d.vec": _upsample("nearest"), "upsample_bilinear2d.vec": _upsample("bilinear"),
}  # fmt: skip
"""By op: its form with channels last."""
