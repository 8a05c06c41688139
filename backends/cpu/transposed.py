"""Transposed convolutions with channels last: one convolution gives all phases of the output, which are then mixed.

With stride s, output pixel s q + r - p reads the input pixels q - m with the taps r + s m of the kernel: for every r,
its phase, a plain convolution. One convolution gives the s * s phases as channels; taps that a phase lacks are zero.
Shi et al.: Is the deconvolution layer the same as a convolutional layer? arXiv 1609.07009, 2016.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.backends.cpu.restored_weights import restored_weight, stored_root
from mcc.backends.relax.emitter import tuple_of
from mcc.ops import OPS, extent

if TYPE_CHECKING:
    from mcc.backends.cpu.channels_last import Turner
    from mcc.graph import Node


@dataclass(frozen=True)
class _Phases:
    """Sizes; pairs are height, width.

    Attributes:
        stride: of the transposed convolution.
        taps: of the convolution that gives the phases.
        padding: of that convolution, [top, left, bottom, right].
        groups: of both.
        cropped: pixels left out at the top and on the left.
        beyond: pixels left out at the bottom and on the right.
    """

    stride: tuple[int, int]
    taps: tuple[int, int]
    padding: list[int]
    groups: int
    cropped: tuple[int, int]
    beyond: tuple[int, int]


def _phases(node: Node) -> _Phases | None:
    """The sizes, or None where there is no such form."""
    weight = node.operand(1)
    assert weight is not None
    stride, padding = (tuple_of(node.argument(i, d), 2) for i, d in ((3, 1), (4, 0)))
    if set(tuple_of(node.argument(7, 1), 2)) != {1}:
        return None
    more = tuple_of(node.argument(5, 0), 2)
    taps, before, after, beyond = [], [], [], []
    for kernel, step, pad, extra in zip(weight.shape[2:], stride, padding, more, strict=True):
        size = int(kernel)
        taps.append(-(-size // step))
        before.append(taps[-1] - 1)
        after.append((size - pad + extra - 1) // step)
        beyond.append((after[-1] + 1) * step + pad - size - extra)
    if min(after) < 0 or min(extent(s) for s in node.shape[2:]) < 1:
        return None
    pads = [*before, *after]
    return _Phases(
        (stride[0], stride[1]), (taps[0], taps[1]), pads, int(node.argument(6, 1)), (padding[0], padding[1]),
        (beyond[0], beyond[1]),
    )  # fmt: skip


def transposed_fits(node: Node) -> bool:
    """Whether a transposed convolution has the form: no dilation, a stored weight."""
    source, weight, bias = (node.operand(i) for i in range(3))
    if source is None or weight is None or node.dtype is not torch.float32:
        return False
    if not isinstance(source.shape[1], int) or (bias is not None and not bias.is_parameter):
        return False
    by_output = weight.op is not ops.DEQUANTIZE or (weight.argument(3) == 1 and node.argument(6, 1) == 1)
    return by_output and stored_root(weight) is not None and _phases(node) is not None


def transposed(turner: Turner, node: Node) -> tuple[Any, tuple[Any, ...]]:
    """The convolution, its phases mixed, its border cropped."""
    phases = _phases(node)
    assert phases is not None
    (height, width), groups = phases.stride, phases.groups
    repeats = height * width
    weight = restored_weight(turner.graph, node, lambda w: _phase_weight(w, phases), lambda s: s.repeat(repeats))
    bias = node.operand(2)
    read = None
    if bias is not None:
        name = turner.graph.free_name(f"{bias.fx.target}_{node.name}")
        grouped = bias.tensor.detach().reshape(groups, 1, -1).expand(groups, repeats, -1)
        turner.graph.set_tensor(name, grouped.reshape(-1).contiguous())
        read = turner.graph.read(name, node).fx
    source = node.operand(0)
    assert source is not None
    image, channels = turner.last(node, source.fx), int(node.shape[1])

    def call(target: Any, *args: Any) -> Any:
        return turner.graph.call(node, target, *args)

    phased = call(ops.CONV2D_NHWC.target, image, weight, read, [1, 1], phases.padding, [1, 1], groups)
    sizes = [
        s + after if isinstance(s, int) else None for s, after in zip(source.shape[2:], phases.padding[2:], strict=True)
    ]
    rows, columns = (call(ops.SYM_SIZE.target, phased, 1 + i) if s is None else s for i, s in enumerate(sizes))
    split = call(ops.RESHAPE.target, phased, [-1, rows, columns, groups, height, width, channels // groups])
    mixed = call(OPS["permute"].target, split, [0, 1, 4, 2, 5, 3, 6])
    tall, wide = (
        s * n if isinstance(s, int) else call(OPS["mul"].target, s, n) for s, n in ((rows, height), (columns, width))
    )
    target: Any = ops.RESHAPE.target
    args: tuple[Any, ...] = (mixed, [-1, tall, wide, channels])
    for dim, (first, last) in enumerate(zip(phases.cropped, phases.beyond, strict=True), 1):
        if first or last:
            target, args = OPS["slice.Tensor"].target, (call(target, *args), dim, first, -last if last else sys.maxsize)
    return target, args


def _phase_weight(weight: Tensor, phases: _Phases) -> Tensor:
    """[in, out / groups, …] as [groups * phases * out / groups, in / groups, …], taps from the last to the first."""
    groups, (height, width), (rows, columns) = phases.groups, phases.stride, phases.taps
    inputs, outputs = weight.shape[:2]
    room = weight.new_zeros(inputs, outputs, rows * height, columns * width)
    room[:, :, : weight.shape[2], : weight.shape[3]] = weight
    parts = room.reshape(groups, inputs // groups, outputs, rows, height, columns, width).flip(3, 5)
    # [group, in, out, tap row, phase row, tap column, phase column]
    ordered = parts.permute(0, 4, 6, 2, 1, 3, 5)
    return ordered.reshape(groups * height * width * outputs, inputs // groups, rows, columns)
