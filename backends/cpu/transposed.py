"""Transposed convolutions with channels last: one convolution gives all phases of the output, which are then mixed.

With stride s, output pixel s q + r - p reads the input pixels q - m with the taps r + s m of the kernel: for every r,
its phase, a plain convolution. One convolution gives the s * s phases as channels; taps that a phase lacks are zero.
Shi et al.: Is the deconvolution layer the same as a convolutional layer? arXiv 1609.07009, 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.backends.cpu.rephrase import restored_weight, stored_root
from mcc.backends.relax.emitter import tuple_of
from mcc.ops import OPS

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
        result: the output image.
    """

    stride: tuple[int, int]
    taps: tuple[int, int]
    padding: list[int]
    groups: int
    cropped: tuple[int, int]
    result: tuple[int, int]


def _phases(node: Node) -> _Phases | None:
    """The sizes, or None where there is no such form."""
    source, weight = node.operand(0), node.operand(1)
    assert source is not None
    assert weight is not None
    stride, padding = (tuple_of(node.argument(i, d), 2) for i, d in ((3, 1), (4, 0)))
    if set(tuple_of(node.argument(7, 1), 2)) != {1}:
        return None
    taps, before, after = [], [], []
    for axis in range(2):
        size, kernel, wanted = (int(x.shape[2 + axis]) for x in (source, weight, node))
        taps.append(-(-kernel // stride[axis]))
        before.append(taps[-1] - 1)
        after.append((wanted - 1 + padding[axis]) // stride[axis] + 1 - size)
    if min(after) < 0 or min(int(s) for s in node.shape[2:]) < 1:
        return None
    pads = [*before, *after]
    result = (int(node.shape[2]), int(node.shape[3]))
    return _Phases(
        (stride[0], stride[1]), (taps[0], taps[1]), pads, int(node.argument(6, 1)), (padding[0], padding[1]), result
    )


def transposed_fits(node: Node) -> bool:
    """Whether a transposed convolution has the form: fixed sizes, no dilation, a stored weight."""
    source, weight, bias = (node.operand(i) for i in range(3))
    if source is None or weight is None or node.dtype is not torch.float32:
        return False
    if not all(isinstance(s, int) for s in source.shape[1:]) or (bias is not None and not bias.is_parameter):
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
    image = turner.last(node, source.fx)
    channels = int(node.shape[1])
    rows, columns = (int(source.shape[2 + axis]) + phases.padding[2 + axis] for axis in range(2))
    form = [-1, rows, columns, groups, height, width, channels // groups]
    shape = [-1, rows * height, columns * width, channels]
    steps: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.CONV2D_NHWC.target, (image, weight, read, [1, 1], phases.padding, [1, 1], groups)),
        (ops.RESHAPE.target, (form,)),
        (OPS["permute"].target, ([0, 1, 4, 2, 5, 3, 6],)),
        (ops.RESHAPE.target, (shape,)),
    ]
    for dim, (first, wanted, whole) in enumerate(zip(phases.cropped, phases.result, shape[1:3], strict=True), 1):
        if first or wanted != whole:
            steps.append((OPS["slice.Tensor"].target, (dim, first, first + wanted)))
    (target, args), *after = steps
    for following, options in after:
        target, args = following, (turner.graph.call(node, target, *args), *options)
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
