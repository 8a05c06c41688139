"""What is least, middle, any or all, written out in the maxima, sums and sorts of the op table."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.writing import Writer

_A = torch.ops.aten


def _reversed(call: Writer, source: Any) -> Any:
    """The values in reverse order; negation would overflow at the least integer, whose complement is the largest."""
    floating = source.meta["val"].is_floating_point()
    return call(_A.neg.default if floating else _A.bitwise_not.default, source)


def _all_dims(source: Any) -> list[int]:
    return list(range(source.meta["val"].dim()))


def _item(call: Writer, results: Any, place: int) -> Any:
    """One of several results."""
    return call(operator.getitem, results, place)


def least(call: Writer, arguments: Sequence[Any]) -> Any:
    """min.dim: the least values along a dim and their places, the first ones."""
    source, *rest = arguments
    largest = call(_A.max.dim, _reversed(call, source), *rest)
    return _reversed(call, _item(call, largest, 0)), _item(call, largest, 1)


def place_of_least(call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
    """Argmin: of equal values the first one's place."""
    source, *rest = arguments
    return call(_A.argmax.default, _reversed(call, source), *rest, **options)


def extreme(combine: Any) -> Callable[..., Any]:
    """Max and min of all elements."""

    def composite(call: Writer, arguments: Sequence[Any]) -> Any:
        (source,) = arguments
        return call(combine, source, _all_dims(source))

    return composite


def whether(counted: Any, told: Any) -> Callable[..., Any]:
    """Any and all over a dim, several or all: how many elements are not zero (or are) is told from their number."""

    def composite(call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
        source, dims, keepdim = _over(arguments, options)
        return call(told, call(_A.sum.dim_IntList, call(counted, source, 0), dims, keepdim), 0)

    return composite


def _over(arguments: Sequence[Any], options: dict[str, Any]) -> tuple[Any, list[int], bool]:
    source, *rest = arguments
    dims = rest[0] if rest else options.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    keepdim = rest[1] if len(rest) > 1 else options.get("keepdim", False)
    return source, _all_dims(source) if dims is None else list(dims), keepdim


def kth(call: Writer, arguments: Sequence[Any]) -> Any:
    """kthvalue: the k-th least along a dim, and its place."""
    given: list[Any] = [*arguments, *(-1, False)[len(arguments) - 2 :]]
    source, k, dim, keepdim = given
    in_order = call(_A.sort.default, source, dim)
    return tuple(_picked(call, _item(call, in_order, i), dim, k - 1, keep=keepdim) for i in range(2))


def median(call: Writer, arguments: Sequence[Any]) -> Any:
    """median.dim: of an even count the lower one; None where the count varies."""
    given: list[Any] = [*arguments, *(-1, False)[len(arguments) - 1 :]]
    source, dim, keepdim = given
    size = source.meta["val"].shape[dim] if source.meta["val"].dim() else None
    return kth(call, (source, (size + 1) // 2, dim, keepdim)) if isinstance(size, int) else None


def _picked(call: Writer, values: Any, dim: int, place: int, *, keep: bool) -> Any:
    picked = call(_A.select.int, values, dim, place)
    return call(_A.unsqueeze.default, picked, dim) if keep else picked


def searched(call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
    """searchsorted: how many entries of a sorted row lie before each value; None where an option reorders it."""
    row, values = arguments
    if set(options) - {"right", "side", "out_int32"} or row.meta["val"].dim() != 1:
        return None
    right = options.get("right", False) or options.get("side") == "right"
    beside = call(_A.unsqueeze.default, values, -1)
    before = call(_A.le.Tensor if right else _A.lt.Tensor, row, beside)
    counted = call(_A.sum.dim_IntList, before, [-1])
    return call(_A.to.dtype, counted, torch.int32) if options.get("out_int32") else counted


def bucket(call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
    """Bucketize: searchsorted with its operands the other way round."""
    values, row = arguments
    return searched(call, (row, values), **options)


ORDERINGS: dict[Any, Callable[..., Any]] = {
    _A.min.dim: least, _A.argmin.default: place_of_least, _A.kthvalue.default: kth, _A.median.dim: median,
    _A.max.default: extreme(_A.amax.default), _A.min.default: extreme(_A.amin.default),
    **dict.fromkeys((_A.any.default, _A.any.dim, _A.any.dims), whether(_A.ne.Scalar, _A.gt.Scalar)),
    **dict.fromkeys((_A.all.default, _A.all.dim, _A.all.dims), whether(_A.eq.Scalar, _A.eq.Scalar)),
    _A.searchsorted.Tensor: searched, _A.bucketize.Tensor: bucket,
}  # fmt: skip
