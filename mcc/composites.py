"""ATen ops that a captured program has and the op table lacks, written out in ops that it has."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mcc import experts, recurrent  # noqa: F401 (registers the ops)
from mcc.einsum import einsum
from mcc.frames import FRAMES
from mcc.orderings import ORDERINGS
from mcc.writing import Writer, replace_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_A = torch.ops.aten
NEARER = 0.5  # the weight from which torch computes lerp from the end


def _diff(call: Writer, arguments: Sequence[Any]) -> Any:
    """Differences of neighbours along a dim, `n` times over."""
    given: list[Any] = [*arguments, *(None, 1, -1, None, None)[len(arguments) :]]
    source, n, dim, before, after = given
    parts = [part for part in (before, source, after) if part is not None]
    value = parts[0] if len(parts) == 1 else call(_A.cat.default, parts, dim)
    for _ in range(n):
        later, earlier = call(_A.slice.Tensor, value, dim, 1), call(_A.slice.Tensor, value, dim, 0, -1)
        logical = later.meta["val"].dtype is torch.bool
        value = call(_A.ne.Tensor if logical else _A.sub.Tensor, later, earlier)
    return value


def _narrow(call: Writer, arguments: Sequence[Any]) -> Any:
    """`length` indices of a dim from `start` on."""
    source, dim, start, length = arguments
    size = source.meta["val"].shape[dim]
    first = start + size if isinstance(start, int) and start < 0 else start
    return call(_A.slice.Tensor, source, dim, first, first + length)


def _added(combine: Any) -> Callable[..., Any]:
    """Addcmul and addcdiv: source + combine(value * a, b), `value` as a number of the source's kind."""

    def composite(call: Writer, arguments: Sequence[Any], value: float = 1) -> Any:
        source, a, b = arguments
        factor = value if source.meta["val"].is_floating_point() else int(value)
        scaled = a if factor == 1 else call(_A.mul.Tensor, a, factor)
        return call(_A.add.Tensor, source, call(combine, scaled, b))

    return composite


def _lerp(call: Writer, arguments: Sequence[Any]) -> Any:
    """Between start and end, from whichever is nearer, so that a weight of 1 gives the end itself."""
    start, end, weight = arguments
    apart = call(_A.sub.Tensor, end, start)

    def from_start() -> Any:
        return call(_A.add.Tensor, start, call(_A.mul.Tensor, apart, weight))

    def from_end(left: Any) -> Any:
        return call(_A.sub.Tensor, end, call(_A.mul.Tensor, apart, left))

    if not isinstance(weight, fx.Node):
        return from_start() if abs(weight) < NEARER else from_end(1 - weight)
    near = call(_A.lt.Scalar, call(_A.abs.default, weight), NEARER)
    return call(_A.where.self, near, from_start(), from_end(call(_A.rsub.Scalar, weight, 1)))


def _spread(name: str, overload: str, call: Writer, arguments: Sequence[Any], **options: Any) -> Any:
    """A variance or deviation ("std") over dims or over all, some with the mean.

    In what it divides by one is left out, unless `unbiased` is false, or as many as `correction` says.
    """
    source, *rest = arguments
    dims = options.get("dim") if not rest or isinstance(rest[0], bool) else rest.pop(0)
    unbiased, keepdim = [*rest, *(options.get("unbiased", True), options.get("keepdim", False))[len(rest) :]]
    given = options.get("correction") if overload == "correction" else int(unbiased)
    less = 1 if given is None else given
    found = call(_A.var.correction, source, dims, correction=less, keepdim=keepdim)
    found = call(_A.sqrt.default, found) if name.startswith("std") else found
    if not name.endswith("mean"):
        return found
    return found, call(_A.mean.dim, source, dims or list(range(source.meta["val"].dim())), keepdim)


def _turned(call: Writer, arguments: Sequence[Any]) -> Any:
    """All dims the other way round."""
    (source,) = arguments
    return call(_A.permute.default, source, list(range(source.meta["val"].dim()))[::-1])


def _turned_matrices(call: Writer, arguments: Sequence[Any]) -> Any:
    (source,) = arguments
    return call(_A.transpose.int, source, -2, -1)


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    """A composite of operands alone, as a function of `call` and those."""
    return lambda call, arguments: function(call, *arguments)


def _or_number(function: Any) -> Callable[..., Any]:
    """Fmax and fmin: of a number and what is none, the number."""

    def written(call: Writer, a: Any, b: Any) -> Any:
        kept = call(_A.where.self, call(_A.isnan.default, b), a, call(function, a, b))
        return call(_A.where.self, call(_A.isnan.default, a), b, kept)

    return _written(written)


def _below_zero(call: Writer, x: Any) -> Any:
    """Signbit: of a zero its inverse tells the sign."""
    if not x.meta["val"].is_floating_point():
        return call(_A.lt.Scalar, x, 0)
    inverse = call(_A.lt.Scalar, call(_A.reciprocal.default, x), 0)
    return call(_A.where.self, call(_A.eq.Scalar, x, 0), inverse, call(_A.lt.Scalar, x, 0))


def _with_sign(call: Writer, x: Any, signs: Any) -> Any:
    floating = x if x.meta["val"].is_floating_point() else call(_A.to.dtype, x, torch.get_default_dtype())
    size = call(_A.abs.default, floating)
    return call(_A.where.self, _below_zero(call, signs), call(_A.neg.default, size), size)


def _within(call: Writer, x: Any, low: Any = None, high: Any = None) -> Any:
    """Clamp with tensors as bounds."""
    above = x if low is None else call(_A.maximum.default, x, low)
    return above if high is None else call(_A.minimum.default, above, high)


def _counts(call: Writer, x: Any, bins: int = 100, low: float = 0, high: float = 0) -> Any:
    """Histc over a given range: in which of equal bins each element lies; one at the upper end is in the last."""
    if low >= high:
        return None  # the range is that of the values
    flat = call(_A.reshape.default, x, [-1])
    place = call(_A.mul.Tensor, call(_A.sub.Tensor, flat, low), bins / (high - low))
    last = call(_A.clamp_max.default, call(_A.floor.default, place), bins - 1)
    of_bin = call(_A.eq.Tensor, last, call(_A.unsqueeze.default, call(_A.arange.default, bins), 1))
    within = call(_A.logical_and.default, call(_A.ge.Scalar, flat, low), call(_A.le.Scalar, flat, high))
    counted = call(_A.sum.dim_IntList, call(_A.logical_and.default, of_bin, within), [1])
    return call(_A.to.dtype, counted, x.meta["val"].dtype)


def _bilinear(call: Writer, a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    found = einsum(call, ("...i,oij,...j->...o", [a, weight, b]))
    return found if bias is None else call(_A.add.Tensor, found, bias)


def size_of_both(call: Writer, a: Any, b: Any) -> Any:
    """sqrt(a^2 + b^2) of parts of the larger one, so that no square over- or underflows; its slope at zero is zero."""
    largest = call(_A.maximum.default, call(_A.abs.default, a), call(_A.abs.default, b))
    usable = call(_A.logical_and.default, call(_A.gt.Scalar, largest, 0), call(_A.lt.Scalar, largest, math.inf))
    scale = call(_A.where.ScalarOther, usable, largest, 1.0)
    both = [call(_A.div.Tensor, part, scale) for part in (a, b)]
    apart = call(_A.stack.default, [call(_A.expand_as.default, part, scale) for part in both], -1)
    return call(_A.mul.Tensor, call(_A.linalg_vector_norm.default, apart, 2, [-1]), scale)


def _distances(call: Writer, a: Any, b: Any, p: float, mode: int | None = None) -> Any:
    """Cdist: the norm of the difference of every row of one and every row of the other."""
    del mode
    apart = call(_A.sub.Tensor, call(_A.unsqueeze.default, a, -2), call(_A.unsqueeze.default, b, -3))
    return call(_A.linalg_vector_norm.default, apart, p, [-1])


def _added_product(product: Any) -> Callable[..., Any]:
    """Addmv and addbmm: beta * source + alpha * the product, whose batch is summed."""

    def composite(call: Writer, arguments: Sequence[Any], beta: float = 1, alpha: float = 1) -> Any:
        source, a, b = arguments
        found = call(product, a, b)
        found = call(_A.sum.dim_IntList, found, [0]) if product is _A.bmm.default else found
        scaled = found if alpha == 1 else call(_A.mul.Tensor, found, alpha)
        kept = source if beta == 1 else call(_A.mul.Tensor, source, beta)
        return call(_A.add.Tensor, kept, scaled) if beta else scaled

    return composite


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _A.isinf.default: _written(lambda call, x: call(_A.eq.Scalar, call(_A.abs.default, x), math.inf)),
    _A.frac.default: _written(lambda call, x: call(_A.sub.Tensor, x, call(_A.trunc.default, x))),
    _A.fmax.default: _or_number(_A.maximum.default), _A.fmin.default: _or_number(_A.minimum.default),
    _A.hypot.default: _written(size_of_both), _A._cdist_forward.default: _written(_distances),
    _A.signbit.default: _written(_below_zero),
    _A.copysign.Tensor: _written(_with_sign), _A.clamp.Tensor: _written(_within), _A.histc.default: _written(_counts),
    _A.bilinear.default: _written(_bilinear),
    _A._softmax.default: _written(lambda call, x, dim, _half: call(_A.softmax.int, x, dim)),
    _A._log_softmax.default: _written(lambda call, x, dim, _half: call(_A.log_softmax.int, x, dim)),
    _A.addmv.default: _added_product(_A.matmul.default), _A.addbmm.default: _added_product(_A.bmm.default),
}  # fmt: skip
COMPOSITES: dict[Any, Callable[..., Any]] = {
    _A.diff.default: _diff, _A.narrow.default: _narrow, _A.lstm.input: recurrent.layers, _A.gru.input: recurrent.layers,
    _A.addcmul.default: _added(_A.mul.Tensor), _A.addcdiv.default: _added(_A.div.Tensor),
    _A.numpy_T.default: _turned, _A.mT.default: _turned_matrices,
    _A.lerp.Scalar: _lerp, _A.lerp.Tensor: _lerp, _A.einsum.default: einsum,
    **_FUNCTIONS, **ORDERINGS, **FRAMES,
}  # fmt: skip
COMPOSITES |= {
    getattr(getattr(_A, name), overload): partial(_spread, name, overload)
    for name in ("var", "std", "var_mean", "std_mean")
    for overload in ("default", "dim", "correction")
    if (name, overload) != ("var", "correction")
}


def _of_experts(
    call: Writer, arguments: Sequence[Any], offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """A product of rows and the matrix of each one's group; `offs` is where groups end."""
    rows, weights, *rest = arguments
    ends = rest[0] if rest else offs
    if bias is not None or out_dtype is not None or len(rest) > 1 or weights.meta["val"].dim() != 3:
        return None
    return call(torch.ops.mcc.grouped_matmul.default, rows, weights, ends)


_OF_OTHERS: dict[str, Callable[..., Any]] = dict.fromkeys(
    ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"), _of_experts
)
"""By name, since the library that has an op may not be there."""


def spell_out(module: fx.GraphModule, *, views: bool) -> None:
    """Replace every call of a composite op.

    Args:
        module: an exported module with fake values; edited.
        views: of those, too, that give a view of what they read; where something writes into one they must stay.

    Raises:
        CaptureError: a recurrent layer projects its hidden state.
    """
    for node in list(module.graph.nodes):
        composite = COMPOSITES.get(node.target) or _OF_OTHERS.get(str(node.target))
        if node.op != "call_function" or composite is None or (node.target.is_view and not views):
            continue
        try:
            made = composite(Writer(module, node), node.args, **node.kwargs)
        except (IndexError, TypeError, RuntimeError, ZeroDivisionError):
            continue  # a form that is not written out: the op table will name it
        if made is None:
            continue  # as above
        if isinstance(made, tuple) and any(made[user.args[1]] is None for user in node.users if user.users):
            continue  # as above: what is not written out is read
        replace_call(module, node, made)
