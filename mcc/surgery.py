"""Removing indices from a graph: smaller tensors, and every size that stood baked in an op's arguments mended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mcc import ops
from mcc.axes import Axis, Term, kept_indices, kept_size, size
from mcc.errors import MccError
from mcc.graph import Graph, Node
from mcc.ties import Dims, is_number
from mcc.zeros import is_zeroed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mcc.coupling import Coupling

Kept = dict[Axis, Tensor]


def keep(coupling: Coupling, kept: Mapping[Axis, Tensor]) -> Graph:
    """The coupling's graph, changed in place, with only some indices of some axes.

    Args:
        coupling: of the graph.
        kept: of axes that lose indices, those that stay: int64, increasing, at least one.

    Raises:
        MccError: an axis is blocked, or would lose everything.
    """
    for axis, indices in kept.items():
        if axis.blocked:
            raise MccError(f"nothing may be removed: {next(iter(axis.blocked))}", remedy="choose an open group")
        if len(indices) == 0:
            raise MccError("an axis would lose all its indices", remedy="keep at least one")
    graph, ties = coupling.graph, coupling.ties
    for raw in graph.module.graph.nodes:
        raw.meta.pop("kept", None)
        if raw.op == "call_function" and (mend := _MENDERS.get(ops.op_name(raw.target))) is not None:
            mend(Node(raw, graph), ties.dims[raw], ties.baked.get(raw, ()), dict(kept))
    for name, dims in ties.stored.items():
        _shrink(graph, name, dims, kept)
    return graph.clean().repropagate()


def _shrink(graph: Graph, name: str, dims: Dims, kept: Mapping[Axis, Tensor]) -> None:
    tensor, left = graph.tensor(name).detach(), {}
    for dim, term in enumerate(dims):
        if kept_size(term, kept) != size(term):
            left[dim] = kept_indices(term, kept)
            tensor = tensor.index_select(dim, left[dim])
    if not left:
        return
    graph.set_tensor(name, tensor.contiguous())
    for raw in graph.module.graph.nodes:
        if raw.op == "get_attr" and raw.target == name:
            raw.meta["kept"] = left


def zeroed(before: Graph, after: Graph) -> Graph:
    """`before` with zeros wherever `keep`, which made `after` of it, took something from a stored tensor.

    Statistics, divisors and scales stay as they are: see `mcc.zeros`.
    """
    made = before.copy()
    for raw in after.module.graph.nodes:
        left: dict[int, Tensor] = raw.meta.get("kept", {}) if raw.op == "get_attr" else {}
        name = str(raw.target)
        if not left or not is_zeroed(before, name):
            continue
        tensor = made.tensor(name).detach().clone()
        for dim, indices in left.items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[indices] = False
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
        made.set_tensor(name, tensor)
    return made


def _mended_sizes(node: Node, sizes: list[Any], dims: Dims, kept: Kept) -> list[Any]:
    """Sizes of a result's dims: -1 and those that do not change stay, a computed one that changes becomes -1."""
    made = list(sizes)
    for i, term in enumerate(dims):
        left = kept_size(term, kept)
        if left == size(term) or (is_number(made[i]) and made[i] == -1):
            continue
        if is_number(made[i]):
            made[i] = left
        elif -1 in [s for s in made if is_number(s)]:
            made[i] = _scaled(node, made[i], left, size(term))
        else:
            made[i] = -1
    return made


def _scaled(node: Node, computed: fx.Node, left: int, whole: int) -> fx.Node:
    """A size computed at run time, times what is left of a factor in it."""
    shared = math.gcd(left, whole)
    times = node.graph.call(node, ops.OPS["mul"].target, computed, left // shared)
    times.meta["val"] = computed.meta["val"] * (left // shared)
    made = node.graph.call(node, ops.OPS["floordiv"].target, times, whole // shared)
    made.meta["val"] = times.meta["val"] // (whole // shared)
    return made


def _sizes_at(position: int) -> Callable[..., None]:
    def mend(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
        del baked
        sizes = list(node.argument(position))
        mended = _mended_sizes(node, sizes, dims, kept)
        if mended != sizes:
            node.set_argument(position, mended)

    return mend


def _count_at(position: int) -> Callable[..., None]:
    """An argument that counts what one term is made of, such as the groups of a convolution."""

    def mend(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
        del dims
        if kept_size(baked[0], kept) != size(baked[0]):
            node.set_argument(position, kept_size(baked[0], kept))

    return mend


def _counts_at(position: int) -> Callable[..., None]:
    """A list that counts what terms are made of: repeats, amounts of padding."""

    def mend(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
        del dims
        given = list(node.argument(position))
        made = [g if kept_size(t, kept) == size(t) else kept_size(t, kept) for g, t in zip(given, baked, strict=True)]
        if made != given:
            node.set_argument(position, made)

    return mend


def _slice(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
    del dims
    if not baked or all(kept_size(t, kept) == size(t) for t in baked):
        return
    before, taken, _ = (kept_size(t, kept) for t in baked)
    node.fx.args = (node.argument(0), node.argument(1, 0), before, before + taken)
    node.fx.kwargs = {}


def _split(node: Node, dims: tuple[Dims, ...], baked: tuple[Term, ...], kept: Kept) -> None:
    """Parts of one size may lose unequally: they are cut by their sizes from now on."""
    del dims
    if any(kept_size(t, kept) != size(t) for t in baked):
        axis = node.argument(2, 0)
        node.fx.target = ops.OPS["split_with_sizes"].target
        node.fx.args, node.fx.kwargs = (node.argument(0), [kept_size(t, kept) for t in baked], axis), {}


def _squeeze(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
    """A dim that was larger than 1 was left alone, and must be where only one of its indices stays."""
    del dims
    given = node.argument(1)
    listed = given if isinstance(given, list | tuple) else [given]
    left = [d for d in listed if size(baked[int(d) % len(baked)]) == 1]
    if len(left) != len(listed) and any(kept_size(t, kept) != size(t) for t in baked):
        node.fx.target = ops.OPS["squeeze.dims"].target
        node.fx.args, node.fx.kwargs = (node.argument(0), left), {}


def _attention(node: Node, dims: Dims, baked: tuple[Term, ...], kept: Kept) -> None:
    """Scores stay divided by the square root of the depth they were trained with."""
    del dims
    if kept_size(baked[0], kept) != size(baked[0]) and node.argument(6) is None:
        node.fx.update_kwarg("scale", size(baked[0]) ** -0.5)


_MENDERS: dict[str, Callable[..., None]] = {
    "reshape": _sizes_at(1), "expand": _sizes_at(1), "zeros": _sizes_at(0), "ones": _sizes_at(0), "full": _sizes_at(0),
    "new_zeros": _sizes_at(1), "new_ones": _sizes_at(1), "new_full": _sizes_at(1), "conv1d": _count_at(6),
    "conv2d": _count_at(6), "conv3d": _count_at(6), "conv_transpose2d.input": _count_at(6), "group_norm": _count_at(1),
    "repeat": _counts_at(1), "repeat_interleave.self_int": _count_at(1), "pad": _counts_at(1),
    "constant_pad_nd": _counts_at(1), "slice.Tensor": _slice, "split.Tensor": _split, "split_with_sizes": _split,
    "chunk": _split, "squeeze.dim": _squeeze, "squeeze.dims": _squeeze,
    "scaled_dot_product_attention": _attention, "mcc.rounded_attention": _attention,
}  # fmt: skip
