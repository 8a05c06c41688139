"""ATen ops that a captured program has and the op table lacks, written out in ops that it has."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mcc import recurrent
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


def _times(function: Any, factor: float, *, before: bool = False) -> Callable[..., Any]:
    """A function with a number as a factor of its result, or of what it is of: logarithms and powers of other bases."""
    if before:
        return _written(lambda call, x: call(function, call(_A.mul.Tensor, x, factor)))
    return _written(lambda call, x: call(_A.mul.Tensor, call(function, x), factor))


def _or_number(function: Any) -> Callable[..., Any]:
    """Fmax and fmin: of a number and what is none, the number."""

    def written(call: Writer, a: Any, b: Any) -> Any:
        kept = call(_A.where.self, call(_A.isnan.default, b), a, call(function, a, b))
        return call(_A.where.self, call(_A.isnan.default, a), b, kept)

    return _written(written)


def _of_exponentials(combine: Any) -> Callable[..., Any]:
    """Half of exp(x) and exp(-x), added or subtracted."""

    def written(call: Writer, x: Any) -> Any:
        both = call(combine, call(_A.exp.default, x), call(_A.exp.default, call(_A.neg.default, x)))
        return call(_A.mul.Tensor, both, 0.5)

    return _written(written)


def _with_sign(call: Writer, x: Any, signs: Any) -> Any:
    size = call(_A.abs.default, x)
    return call(_A.where.self, call(_A.lt.Scalar, signs, 0), call(_A.neg.default, size), size)


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


def _root_of_squares(call: Writer, a: Any, b: Any) -> Any:
    return call(_A.sqrt.default, call(_A.add.Tensor, call(_A.square.default, a), call(_A.square.default, b)))


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
    _A.exp2.default: _times(_A.exp.default, math.log(2), before=True),
    _A.log2.default: _times(_A.log.default, 1 / math.log(2)),
    _A.log10.default: _times(_A.log.default, 1 / math.log(10)),
    _A.expm1.default: _written(lambda call, x: call(_A.sub.Tensor, call(_A.exp.default, x), 1)),
    _A.erfc.default: _written(lambda call, x: call(_A.rsub.Scalar, call(_A.erf.default, x), 1)),
    _A.isinf.default: _written(lambda call, x: call(_A.eq.Scalar, call(_A.abs.default, x), math.inf)),
    _A.frac.default: _written(lambda call, x: call(_A.sub.Tensor, x, call(_A.trunc.default, x))),
    _A.fmax.default: _or_number(_A.maximum.default), _A.fmin.default: _or_number(_A.minimum.default),
    _A.hypot.default: _written(_root_of_squares), _A._cdist_forward.default: _written(_distances),
    _A.sinh.default: _of_exponentials(_A.sub.Tensor), _A.cosh.default: _of_exponentials(_A.add.Tensor),
    _A.signbit.default: _written(lambda call, x: call(_A.lt.Scalar, x, 0)),
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


def spell_out(module: fx.GraphModule) -> None:
    """Replace every call of a composite op.

    Raises:
        CaptureError: a recurrent layer projects its hidden state.
    """
    for node in list(module.graph.nodes):
        composite = COMPOSITES.get(node.target)
        if node.op != "call_function" or composite is None:
            continue
        made = composite(Writer(module, node), node.args, **node.kwargs)
        if made is None:
            continue  # the op table will name it
        if isinstance(made, tuple) and any(made[user.args[1]] is None for user in node.users if user.users):
            continue  # as above: what is not written out is read
        replace_call(module, node, made)
