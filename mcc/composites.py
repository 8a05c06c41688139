"""ATen ops that a captured program has and the op table lacks, written out in ops that it has."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from mcc import recurrent
from mcc.einsum import einsum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_A = torch.ops.aten
NEARER = 0.5  # the weight from which torch computes lerp from the end


def _diff(call: recurrent.Call, arguments: Sequence[Any]) -> Any:
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


def _narrow(call: recurrent.Call, arguments: Sequence[Any]) -> Any:
    """`length` indices of a dim from `start` on."""
    source, dim, start, length = arguments
    size = source.meta["val"].shape[dim]
    first = start + size if isinstance(start, int) and start < 0 else start
    return call(_A.slice.Tensor, source, dim, first, first + length)


def _added(combine: Any) -> Callable[..., Any]:
    """Addcmul and addcdiv: source + combine(value * a, b), `value` as a number of the source's kind."""

    def composite(call: recurrent.Call, arguments: Sequence[Any], value: float = 1) -> Any:
        source, a, b = arguments
        factor = value if source.meta["val"].is_floating_point() else int(value)
        scaled = a if factor == 1 else call(_A.mul.Tensor, a, factor)
        return call(_A.add.Tensor, source, call(combine, scaled, b))

    return composite


def _lerp(call: recurrent.Call, arguments: Sequence[Any]) -> Any:
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


def _spread(name: str, overload: str, call: recurrent.Call, arguments: Sequence[Any], **options: Any) -> Any:
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


def _turned(call: recurrent.Call, arguments: Sequence[Any]) -> Any:
    """All dims the other way round."""
    (source,) = arguments
    return call(_A.permute.default, source, list(range(source.meta["val"].dim()))[::-1])


def _turned_matrices(call: recurrent.Call, arguments: Sequence[Any]) -> Any:
    (source,) = arguments
    return call(_A.transpose.int, source, -2, -1)


_COMPOSITES: dict[Any, Callable[..., Any]] = {
    _A.diff.default: _diff, _A.narrow.default: _narrow, _A.lstm.input: recurrent.layers, _A.gru.input: recurrent.layers,
    _A.addcmul.default: _added(_A.mul.Tensor), _A.addcdiv.default: _added(_A.div.Tensor),
    _A.numpy_T.default: _turned, _A.mT.default: _turned_matrices,
    _A.lerp.Scalar: _lerp, _A.lerp.Tensor: _lerp, _A.einsum.default: einsum,
}  # fmt: skip
_COMPOSITES |= {
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
        composite = _COMPOSITES.get(node.target)
        if node.op != "call_function" or composite is None:
            continue
        made = composite(partial(write_call, module, node), node.args, **node.kwargs)
        if made is None:
            continue  # the op table will name it
        if isinstance(node.meta["val"], Tensor):
            node.replace_all_uses_with(made)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(made[user.args[1]])
                module.graph.erase_node(user)
        module.graph.erase_node(node)


def write_call(module: fx.GraphModule, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in front of a node, with its fake value."""
    value = before.meta["val"]
    mode: Any = (value if isinstance(value, Tensor) else value[0]).fake_mode  # type: ignore[union-attr]  # graphs hold fake tensors
    with module.graph.inserting_before(before):
        made = module.graph.call_function(target, args, kwargs)
    made.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace")}
    with mode, enable_python_dispatcher():
        values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta["val"] = target(*values[0], **values[1])
    return made
