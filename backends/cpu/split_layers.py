"""Linear layers whose outputs are taken apart, as queries, keys and values are: each part becomes a layer of its own.

    linear(x, w).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4)[i]
        = linear(x, w[i * h * d : (i + 1) * h * d]).reshape(b, n, h, d).permute(0, 2, 1, 3)

Parts then lie where attention reads them, instead of being copied out of the whole, and each may be quantized by its
own scale in the layer that makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, fx

from mcc import ops
from mcc.backends.cpu.permutes import order_of
from mcc.backends.cpu.restored_weights import restored_tensor, restored_weight, stored_root
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Graph

View: TypeAlias = Callable[[Node, fx.Node], fx.Node]
"""Makes a view of a value in front of a node."""
MOST_PARTS = 8
SMALLEST = 16  # outputs of a part, one vector
_PARTED = tuple(OPS[name] for name in ("split.Tensor", "split_with_sizes", "chunk"))
_SLICE, _SELECT, _UNBIND = OPS["slice.Tensor"], OPS["select.int"], OPS["unbind.int"]
_UNSQUEEZE, _SQUEEZE = OPS["unsqueeze"], OPS["squeeze.dim"]


@dataclass(frozen=True)
class _Part:
    """Outputs `start` to `stop` of a layer.

    Attributes:
        node: the value that holds them.
        start, stop: which.
        views: what makes `node` of these outputs alone, in order.
    """

    node: Node
    start: int
    stop: int
    views: tuple[View, ...]


@dataclass(frozen=True)
class _Whole:
    """A view of a layer's outputs, in which one dim tells the parts apart.

    Attributes:
        node: the view.
        dim: which dim.
        size: outputs of a part.
        views: what makes the same view of one part, which lacks the dim.
    """

    node: Node
    dim: int
    size: int
    views: tuple[View, ...]


def split_layers(graph: Graph) -> None:
    """Split every linear layer with a stored weight of which parts alone are read; the graph is edited in place."""
    split = False
    reads = Counter(str(n.target) for n in graph.module.graph.nodes if n.op == "get_attr")
    for node in graph.nodes:
        if node.op is not ops.LINEAR or node.is_output or not _may_split(node, reads):
            continue
        found = [part for user in node.users if not _is_size(user) for part in _parts(node, user)]
        parts = [part for part in found if part is not None and part.stop - part.start >= SMALLEST]
        if parts and len(parts) == len(found) and _are_apart(parts):
            _split(node, parts)
            split = True
    if split:
        graph.clean().repropagate()


def _are_apart(parts: list[_Part]) -> bool:
    """Whether there are few parts, and none computes what another does."""
    bounds = sorted({(part.start, part.stop) for part in parts})
    return len(bounds) <= MOST_PARTS and all(a[1] <= b[0] for a, b in pairwise(bounds))


def _may_split(node: Node, reads: Counter[str]) -> bool:
    """Whether a layer's weight and bias are stored, and nothing else reads the weight; `reads` counts readers."""
    weight, bias = node.operand(1), node.operand(2)
    root = None if weight is None else stored_root(weight)
    if weight is None or root is None or not root.is_parameter:
        return False
    if bias is not None and not (bias.is_parameter and [*bias.shape] == [*weight.shape[:1]]):
        return False
    return reads[str(root.fx.target)] == len(root.users) == len(weight.users) == 1


def _is_size(user: Node) -> bool:
    """Whether it is a size that varies, which the layer's input has too."""
    return user.op is ops.SYM_SIZE


def _parts(layer: Node, user: Node) -> list[_Part | None]:
    """What parts of a layer's outputs are read through a user; None among them where it is no part."""
    last, outputs = len(layer.shape) - 1, int(layer.shape[-1])
    if user.is_output:
        return [None]
    if user.op in _PARTED and user.argument(2, 0) % (last + 1) == last:
        return _items(user, outputs)
    if user.op is _SLICE and user.argument(1, 0) % (last + 1) == last and user.argument(4, 1) == 1:
        bounds = user.argument(2), user.argument(3)
        if not all(b is None or isinstance(b, int) for b in bounds):
            return [None]
        start, stop, _ = slice(*bounds).indices(outputs)
        return [_Part(user, start, stop, ())]
    if user.op is not ops.RESHAPE or not _keeps_before(layer, user):
        return [None]
    dim, given = last, user.argument(1)
    if not all(isinstance(s, int) for s in user.shape[dim:]) or len(user.shape) < last + 2:
        return [None]
    without = [*given[:dim], *given[dim + 1 :]]
    return _follow(_Whole(user, dim, outputs // int(user.shape[dim]), (_view("reshape", without),)))


def _keeps_before(layer: Node, view: Node) -> bool:
    """Whether a reshape leaves all dims but the last as they are."""
    before = len(layer.shape) - 1
    return [str(s) for s in view.shape[:before]] == [str(s) for s in layer.shape[:before]]


def _items(split: Node, outputs: int) -> list[_Part | None]:
    sizes = [int(v.shape[-1]) for v in split.value]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found: list[_Part | None] = []
    for item in split.users:
        i = item.argument(1)
        taken = item.op is ops.GETITEM and sum(sizes) == outputs
        found.append(_Part(item, starts[i], starts[i] + sizes[i], ()) if taken else None)
    return found


def _follow(whole: _Whole) -> list[_Part | None]:
    """The parts that are taken of a view, and of views of it."""
    found: list[_Part | None] = [None] if whole.node.is_output else []
    for user in whole.node.users:
        found += _follow_user(whole, user)
    return found


def _follow_user(whole: _Whole, user: Node) -> list[_Part | None]:
    dim, rank, size = whole.dim, len(whole.node.shape), whole.size
    if user.op is _SELECT and user.argument(1) % rank == dim and isinstance(user.argument(2), int):
        i = user.argument(2) % int(whole.node.shape[dim])
        return [_Part(user, i * size, (i + 1) * size, whole.views)]
    if user.op is _UNBIND and user.argument(1, 0) % rank == dim:
        items = [(item, item.argument(1)) for item in user.users]
        return [_Part(item, i * size, (i + 1) * size, whole.views) for item, i in items]
    if (order := order_of(user)) is not None:
        kept = [o - (o > dim) for o in order if o != dim]
        return _follow(replace(whole, node=user, dim=order.index(dim), views=(*whole.views, _view("permute", kept))))
    if user.op is _UNSQUEEZE:
        at = user.argument(1) % (rank + 1)
        view = _view("unsqueeze", at - (at > dim))
        return _follow(replace(whole, node=user, dim=dim + (at <= dim), views=(*whole.views, view)))
    if user.op is _SQUEEZE and (at := user.argument(1) % rank) != dim:
        view = _view("squeeze.dim", at - (at > dim))
        squeezed = len(user.shape) < rank and at < dim
        return _follow(replace(whole, node=user, dim=dim - squeezed, views=(*whole.views, view)))
    return [None]


def _view(op: str, argument: Any) -> View:
    return lambda before, value: before.graph.call(before, OPS[op].target, value, argument)


def _split(layer: Node, parts: list[_Part]) -> None:
    graph, bias = layer.graph, layer.operand(2)
    for size in [user for user in layer.users if _is_size(user)]:
        source = layer.fx.args[0]
        assert isinstance(source, fx.Node)
        size.fx.args = (source, size.argument(1) % len(layer.shape))
    made: dict[tuple[int, int], fx.Node] = {}
    for part in parts:
        rows = slice(part.start, part.stop)

        def cut(stored: Tensor, rows: slice = rows) -> Tensor:
            return stored[rows] if stored.dim() else stored

        if (part.start, part.stop) not in made:
            weight = restored_weight(graph, layer, cut, cut)
            own = None if bias is None else restored_tensor(graph, layer, bias, cut).fx
            made[part.start, part.stop] = graph.call(layer, ops.LINEAR.target, layer.fx.args[0], weight, own)
        value = made[part.start, part.stop]
        for view in part.views:
            value = view(part.node, value)
        value.meta["val"] = part.node.value
        Node(value, graph).take_place_of(part.node)
