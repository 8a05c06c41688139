"""Overlapping windows, diagonals and pools of a given size, written out in the gathers and maxima of the op table."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.writing import Writer

_A = torch.ops.aten


def frames(call: Writer, arguments: Sequence[Any]) -> Any:
    """Tensor.unfold: windows of `size` elements along a dim, `step` apart, their elements in a last dim."""
    source, dim, size, step = arguments
    rank = source.meta["val"].dim()
    axis = dim % rank
    count = (source.meta["val"].shape[axis] - size) // step + 1
    if not isinstance(count, int):
        return None
    starts = call(_A.unsqueeze.default, call(_A.arange.start_step, 0, count * step, step), 1)
    places = call(_A.add.Tensor, starts, call(_A.arange.default, size))
    gathered = call(_A.index.Tensor, source, [*[None] * axis, places])
    order = [i for i in range(rank + 1) if i != axis + 1]
    return call(_A.permute.default, gathered, [*order, axis + 1])


def diagonal(call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
    """The elements where one dim's place is another's plus `offset`, in a last dim."""
    source, *rest = arguments
    given = [*rest, *(options.get("offset", 0), options.get("dim1", 0), options.get("dim2", 1))[len(rest) :]]
    rank, (offset, first, second) = source.meta["val"].dim(), given
    dims = [first % rank, second % rank]
    rows, columns = (source.meta["val"].shape[d] for d in dims)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    length = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
    order = [*(i for i in range(rank) if i not in dims), *dims]
    turned = call(_A.permute.default, source, order)
    places = [call(_A.arange.start, start, start + length) for start in (max(-offset, 0), max(offset, 0))]
    return call(_A.index.Tensor, turned, [*[None] * (rank - 2), *places])


def adaptive_max_pool(call: Writer, arguments: Sequence[Any]) -> Any:
    """Maxima over as many windows a dim as asked for; the places of the maxima are not written out."""
    source, sizes = arguments
    shape = source.meta["val"].shape
    first = len(shape) - len(sizes)
    for axis, count in enumerate(sizes, first):
        if count == 1:
            source = call(_A.amax.default, source, [axis], True)
            continue
        if not isinstance(shape[axis], int):
            return None
        size = int(shape[axis])
        bounds = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        windows = [call(_A.slice.Tensor, source, axis, start, end) for start, end in bounds]
        source = call(_A.cat.default, [call(_A.amax.default, w, [axis], True) for w in windows], axis)
    return source, None


def max_pool_alone(call: Writer, arguments: Sequence[Any]) -> Any:
    """A max pool without the places of its maxima."""
    return call(_A.max_pool2d.default, *arguments), None


def transposed_conv1d(call: Writer, arguments: Sequence[Any]) -> Any:
    """conv_transpose1d as the two-dimensional one over rows of one pixel's height."""
    source, weight, *rest = arguments
    given: list[Any] = [*rest, *(None, [1], [0], [0], 1, [1])[len(rest) :]]
    bias, stride, padding, beyond, groups, dilation = given
    batched = source.meta["val"].dim() == 3
    rows = call(_A.unsqueeze.default, source, -2)
    rows = rows if batched else call(_A.unsqueeze.default, rows, 0)
    found = call(
        _A.conv_transpose2d.input, rows, call(_A.unsqueeze.default, weight, -2), bias, [1, stride[0]], [0, padding[0]],
        [0, beyond[0]], groups, [1, dilation[0]],
    )  # fmt: skip
    return reduce(lambda value, dim: call(_A.squeeze.dim, value, dim), (-2,) if batched else (-2, 0), found)


def transposed_conv3d(call: Writer, arguments: Sequence[Any]) -> Any:
    """conv_transpose3d as a convolution, with turned weights, of voxels set apart by zeros."""
    source, weight, *rest = arguments
    defaults: tuple[Any, ...] = (None, [1, 1, 1], [0, 0, 0], [0, 0, 0], 1, [1, 1, 1])
    bias, stride, padding, beyond, groups, dilation = [*rest, *defaults[len(rest) :]]
    kernel = [int(k) for k in weight.meta["val"].shape[2:]]
    if groups != 1 or source.meta["val"].dim() != 5:
        return None
    edges = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if min(edges) < 0 or not all(isinstance(s, int) for s in source.meta["val"].shape[2:]):
        return None
    spread = _set_apart(call, source, list(stride))
    sides = [(edge, edge + more) for edge, more in zip(edges, beyond, strict=True)]
    padded = call(_A.constant_pad_nd.default, spread, [side for pair in sides[::-1] for side in pair], 0.0)
    turned = call(_A.flip.default, call(_A.transpose.int, weight, 0, 1), [2, 3, 4])
    return call(_A.conv3d.default, padded, turned, bias, [1, 1, 1], [0, 0, 0], list(dilation), 1)


def _set_apart(call: Writer, source: Any, stride: list[int]) -> Any:
    """Voxels with stride - 1 zeros between them."""
    for axis, step in enumerate(stride, 2):
        if step == 1:
            continue
        shape = list(source.meta["val"].shape)
        columns = call(_A.unsqueeze.default, source, axis + 1)
        beside = [0, 0] * (len(shape) - axis - 1) + [0, step - 1]
        filled = call(_A.constant_pad_nd.default, columns, beside, 0.0)
        whole = call(_A.reshape.default, filled, [-1, *shape[1:axis], shape[axis] * step, *shape[axis + 1 :]])
        source = call(_A.slice.Tensor, whole, axis, 0, (shape[axis] - 1) * step + 1)
    return source


def strided(call: Writer, arguments: Sequence[Any]) -> Any:
    """as_strided of a whole contiguous tensor of known sizes: a gather of its elements in a row.

    Of a slice PyTorch counts from where the tensor begins that it is a slice of.
    """
    source, sizes, strides, *rest = arguments
    value, first = source.meta["val"], next(iter(rest), None) or 0
    if not all(isinstance(n, int) for n in (*value.shape, *sizes, *strides, first)):
        return None
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if not value.is_contiguous() or value.storage_offset() or last >= value.numel():
        return None
    places = None
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        steps = call(_A.mul.Tensor, call(_A.arange.default, size), stride)
        steps = call(_A.reshape.default, steps, [-1, *[1] * (len(sizes) - dim - 1)])
        places = steps if places is None else call(_A.add.Tensor, places, steps)
    if places is None:
        return None
    shifted = call(_A.add.Tensor, places, first) if first else places
    return call(_A.index.Tensor, call(_A.reshape.default, source, [-1]), [shifted])


def smooth_resize(op: Any) -> Callable[..., Any]:
    """Resizing with antialiasing, which weighs rows and columns apart: a product with a matrix for each."""

    def composite(call: Writer, arguments: Sequence[Any]) -> Any:
        source, sizes, align_corners, factors = arguments
        value = source.meta["val"]
        shape = value.shape[-2:]
        if not value.is_floating_point() or not all(isinstance(s, int) for s in (*shape, *(sizes or ()))):
            return None
        found = source
        for place, turned in ((0, False), (1, True)):
            extent = int(shape[place])
            unit = torch.eye(extent, dtype=torch.float64)[None, None]
            size = None if sizes is None else [sizes[place], extent]
            factor = None if factors is None else [factors[place], 1.0]
            matrix = op(unit, size, align_corners, factor)[0, 0].to(source.meta["val"].dtype)
            stored = call.stored(matrix.T.contiguous() if turned else matrix)
            found = call(_A.matmul.default, *((found, stored) if turned else (stored, found)))
        return found

    return composite


def resize_of_rows(op: Any) -> Callable[..., Any]:
    """Resizing of sequences as that of images of height 1."""

    def composite(call: Writer, arguments: Sequence[Any]) -> Any:
        source, sizes, *options, factors = arguments
        image = call(_A.unsqueeze.default, source, -2)
        size = None if sizes is None else [1, sizes[0]]
        factor = None if factors is None else [1.0, factors[0]]
        return call(_A.squeeze.dim, call(op, image, size, *options, factor), -2)

    return composite


def bags(call: Writer, arguments: Sequence[Any]) -> Any:
    """embedding_bag of bags of one size: an embedding whose vectors are summed, averaged or compared."""
    given: list[Any] = list(arguments)
    given += [None] * (9 - len(given))
    (weight, indices, offsets, scale, mode), factors, padding = given[:5], given[6], given[8]
    size = offsets.args[2] if offsets.target is _A.arange.start_step and offsets.args[0] == 0 else None
    count = indices.meta["val"].numel()
    if not isinstance(size, int) or scale or (padding is not None and padding >= 0):
        return None
    if count != size * offsets.meta["val"].numel():
        return None  # bags of other sizes
    vectors = call(_A.embedding.default, weight, call(_A.reshape.default, indices, [-1, size]))
    if factors is not None:
        each = call(_A.unsqueeze.default, call(_A.reshape.default, factors, [-1, size]), -1)
        vectors = call(_A.mul.Tensor, vectors, each)
    combine = (_A.sum.dim_IntList, _A.mean.dim, _A.amax.default)[mode or 0]
    return call(combine, vectors, [1]), None, None, None


FRAMES: dict[Any, Callable[..., Any]] = {
    _A.unfold.default: frames, _A.diagonal.default: diagonal, _A.conv_transpose1d.default: transposed_conv1d,
    _A.adaptive_max_pool1d.default: adaptive_max_pool, _A.adaptive_max_pool2d.default: adaptive_max_pool,
    _A.max_pool2d_with_indices.default: max_pool_alone, _A.as_strided.default: strided,
    _A.conv_transpose3d.input: transposed_conv3d, _A.embedding_bag.padding_idx: bags,
    _A.upsample_nearest1d.vec: resize_of_rows(_A.upsample_nearest2d.vec),
    _A.upsample_linear1d.vec: resize_of_rows(_A.upsample_bilinear2d.vec),
    _A._upsample_bilinear2d_aa.vec: smooth_resize(_A._upsample_bilinear2d_aa.vec),
    _A._upsample_bicubic2d_aa.vec: smooth_resize(_A._upsample_bicubic2d_aa.vec),
}  # fmt: skip
