"""Normalizing an exported module: functional ops, one node a tensor, one spelling for reshapes, no wrappers."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mcc import complex_numbers, composites, decompositions
from mcc.errors import CaptureError
from mcc.graph import source_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_A = torch.ops.aten
_DROP = {
    _A._assert_tensor_metadata.default, _A._assert_scalar.default, _A._assert_async.msg,
    _A.sym_constrain_range_for_size.default, torch._check,
}  # fmt: skip
_ALIAS = {_A.alias.default, _A.detach.default, _A.detach_.default}
_COPY = {_A.contiguous.default, _A.clone.default, _A.lift_fresh_copy.default}
_CASTS = {_A.to.dtype, _A.to.dtype_layout, _A.to.device, _A._to_copy.default, _A.type_as.default}
_SPELLINGS = {
    _A.fill.Tensor: _A.copy.default, _A.fill.Scalar: _A.full_like.default, _A.zero.default: _A.zeros_like.default,
    _A.swapaxes.default: _A.transpose.int, _A.view.default: _A.reshape.default,
    _A._unsafe_view.default: _A.reshape.default, _A.mm.default: _A.matmul.default, _A.mv.default: _A.matmul.default,
    _A.dot.default: _A.matmul.default, _A.vdot.default: _A.matmul.default,
    _A.add.Scalar: _A.add.Tensor, _A.sub.Scalar: _A.sub.Tensor, _A.mul.Scalar: _A.mul.Tensor,
    _A.div.Scalar: _A.div.Tensor,
    _A._neg_view.default: _A.neg.default, _A.unsafe_split.Tensor: _A.split.Tensor,
    _A.unsafe_chunk.default: _A.chunk.default,
    _A.__lshift__.Scalar: _A.bitwise_left_shift.Tensor_Scalar,
    _A.__rshift__.Scalar: _A.bitwise_right_shift.Tensor_Scalar,
}  # fmt: skip
_SCATTER = {_A.slice.Tensor: _A.slice_scatter.default, _A.select.int: _A.select_scatter.default}


def plain_module(exported: fx.GraphModule | torch.nn.Module) -> fx.GraphModule:
    """The exported module without its hooks and its train/eval guard, which cannot be copied or pickled."""
    assert isinstance(exported, fx.GraphModule)
    exported.graph._tracer_cls = None
    module = fx.GraphModule(exported, exported.graph, class_name="Captured")
    saved = set(exported.state_dict())
    for path, child in module.named_modules():
        # the copy forgets which buffers stay out of state_dict(): strict loading of a checkpoint would fail
        child._non_persistent_buffers_set = {
            name for name in child._buffers if f"{path}.{name}".lstrip(".") not in saved
        }
    return module


def normalize(module: fx.GraphModule) -> None:
    """Bring an exported module into the form the op table describes."""
    _inline_wrappers(module)
    _spell_out(module, views=False)
    for node in _calls(module):
        if node.target in _DROP:
            module.graph.erase_node(node)
        elif node.target in _ALIAS or (node.target in _CASTS and _casts_nothing(node)):
            _skip(module, node)
    _make_functional(module)  # before copies go: `y = x.clone(); y.mul_(2)` must not touch x
    _spell_out(module, views=True)  # what wrote in place, too
    _make_functional(module)  # what PyTorch writes that out as
    decompositions.evaluate(module, _SPELLED)
    complex_numbers.spell_out_complex(module)
    for node in _calls(module):
        if node.target in _COPY and node.kwargs.get("memory_format") in _PLAIN_FORMATS:
            _skip(module, node)
        elif node.target is _A.cat.default and (part := _only_part(node)) is not None:
            node.replace_all_uses_with(part)
            module.graph.erase_node(node)
    _one_read_per_tensor(module)
    for node in _calls(module):
        _respell(module, node)
    _drop_bodies(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _spell_out(module: fx.GraphModule, *, views: bool) -> None:
    """Write out what the op table lacks, by ways of ours where there are, else by PyTorch's own."""
    composites.spell_out(module, views=views)
    decompositions.decompose(module, _SPELLED, views=views)
    composites.spell_out(module, views=views)


_PLAIN_FORMATS = (None, torch.preserve_format, torch.contiguous_format)


def _only_part(cat: fx.Node) -> fx.Node | None:
    """What a concatenation is where its other parts are empty, as the caches of decoders are before the first token."""
    parts = cat.args[0]
    assert isinstance(parts, list | tuple)
    left = [p for p in parts if isinstance(p, fx.Node) and not any(s == 0 for s in _fixed(p.meta["val"]))]
    if len(left) != 1 or left[0].meta["val"].dtype is not cat.meta["val"].dtype:
        return None
    return left[0]


def _fixed(value: Tensor) -> list[int]:
    return [s for s in value.shape if isinstance(s, int)]


def _drop_bodies(module: fx.GraphModule) -> None:
    """Remove the inlined wrappers' bodies, one by one: delete_all_unused_submodules() would also drop tied weights."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, child in list(module.named_children()):
        if isinstance(child, fx.GraphModule) and name not in read:
            delattr(module, name)


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _casts_nothing(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _skip(module: fx.GraphModule, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)


def _inline_wrappers(module: fx.GraphModule) -> None:
    """Replace calls of torch.no_grad and torch.autocast regions by their bodies."""
    wrappers = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
    for node in _calls(module):
        if node.target not in wrappers:
            continue
        position = next(
            i
            for i, argument in enumerate(node.args)
            if isinstance(argument, fx.Node) and isinstance(getattr(module, str(argument.target), None), fx.GraphModule)
        )
        reader = node.args[position]
        assert isinstance(reader, fx.Node)
        body: fx.GraphModule = getattr(module, str(reader.target))
        _inline_wrappers(body)
        returned = _copy_body(module, body, node, node.args[position + 1 :])
        for user in list(node.users):
            user.replace_all_uses_with(returned[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not reader.users:
            module.graph.erase_node(reader)


def _copy_body(module: fx.GraphModule, body: fx.GraphModule, before: fx.Node, operands: tuple[Any, ...]) -> Any:
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    made: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    returned: Any = ()
    with module.graph.inserting_before(before):
        for node in body.graph.nodes:
            if node.op == "output":
                returned = fx.node.map_arg(node.args[0], made.__getitem__)
            elif node.op != "placeholder":
                made[node] = module.graph.node_copy(node, made.__getitem__)
    return returned


def _is_view(node: fx.Node) -> bool:
    """Whether the value shares memory with the node's first argument: x[:, 0], or one part of x.chunk(2)."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _make_functional(module: fx.GraphModule) -> None:
    """x.relu_() becomes relu(x), read by all that follows; x[:, :k] += y becomes slice_scatter. Buffer writes stay."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in _calls(module):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        if written.op == "get_attr":
            continue
        place = order[node]

        def later(user: fx.Node, place: int = place) -> bool:
            return order.get(user, -1) > place

        chain = list(_view_chain(written))
        shared = _read_elsewhere(written, chain, later)
        if shared:
            _refuse_unknown_views(node, chain)
            _rebase(module, node, chain, later)
        namespace, name = target._schema.name.split("::")
        plain = f"__{name.removeprefix('__i')}" if name.startswith("__i") else name.removesuffix("_")
        packet = getattr(getattr(torch.ops, namespace), plain, None)
        functional = getattr(packet, target._overloadname, None)
        if functional is None:
            raise CaptureError(
                f"{target} writes into what it is given, and has no form that does not",
                node=f"%{node.name} {source_line(node)}", remedy="build the result with torch.where or torch.cat",
            )  # fmt: skip
        node.target = functional
        if not shared:
            written.replace_all_uses_with(node, delete_user_cb=later)
    for view in _calls(module):
        whole = view.args[0] if view.target in _SCATTER else None
        if isinstance(whole, fx.Node) and whole.target is _SCATTER[view.target] and whole.args[2:] == view.args[1:]:  # type: ignore[index]
            view.replace_all_uses_with(whole.args[1])  # type: ignore[arg-type]  # what was written there


def _view_chain(written: fx.Node) -> Iterator[fx.Node]:
    """The views that lead from a value to the tensor whose memory it shares, the last one first."""
    while _is_view(written):
        yield written
        written = written.args[0]  # type: ignore[assignment]  # a view's first argument is a node


def _rebase(module: fx.GraphModule, node: fx.Node, chain: list[fx.Node], later: Callable[[fx.Node], bool]) -> None:
    """Let all that is read later see a write: the tensor it reaches becomes new, and its views are taken once more."""
    base = chain[-1].args[0] if chain else node.args[0]
    assert isinstance(base, fx.Node)
    family = set(_views(base))
    views = [n for n in module.graph.nodes if n in family and not later(n)]
    last = node
    for view in chain:
        assert isinstance(view.target, torch._ops.OpOverload)
        with module.graph.inserting_after(last):
            whole = module.graph.call_function(_SCATTER[view.target], (view.args[0], last, *view.args[1:]))
        whole.meta = dict(node.meta) | {"val": view.args[0].meta["val"]}  # type: ignore[union-attr]  # a view's first argument is a node
        last = whole
    taken = {base: last}
    for view in views:
        source = view.args[0]
        assert isinstance(source, fx.Node)
        with module.graph.inserting_after(last):
            last = module.graph.call_function(view.target, (taken[source], *view.args[1:]), view.kwargs)
        last.meta = dict(view.meta)
        taken[view] = last
    # what is read of the write itself is the view that it went through
    taken[node] = taken[node.args[0]]  # type: ignore[index]  # what it writes to
    for old, new in taken.items():
        if old is not new:
            old.replace_all_uses_with(new, delete_user_cb=later)


def _views(base: fx.Node) -> Iterator[fx.Node]:
    for user in base.users:
        if _is_view(user):
            yield user
            yield from _views(user)


def _read_elsewhere(written: fx.Node, chain: list[fx.Node], later: Callable[[fx.Node], bool]) -> bool:
    """Whether memory that a write changes is read after it through another value: then the write must reach that."""
    root = chain[-1].args[0] if chain else written
    assert isinstance(root, fx.Node)
    if root.op == "get_attr":
        return True
    return any(later(user) for alias in (root, *_views(root)) if alias is not written for user in alias.users)


def _refuse_unknown_views(node: fx.Node, chain: list[fx.Node]) -> None:
    for view in chain:
        if view.target not in _SCATTER:
            raise CaptureError(
                f"{node.target} writes into a view made by {view.target}",
                node=f"%{node.name} {source_line(node)}",
                remedy="write into the whole tensor, or build the result with torch.where or torch.cat",
            )


def _one_read_per_tensor(module: fx.GraphModule) -> None:
    """One get_attr node a tensor, under its first name; the module keeps every alias so that checkpoints load."""
    names: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names.setdefault(id(tensor), name)
    reads: dict[int, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(str(node.target))(module)
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in reads:
            node.replace_all_uses_with(reads[id(tensor)])
            module.graph.erase_node(node)
        else:
            node.target = names.get(id(tensor), node.target)
            reads[id(tensor)] = node


def _respell(module: fx.GraphModule, node: fx.Node) -> None:
    """view, flatten, unflatten become reshape; expand keeps dims as -1, which survives any later resize."""
    if node.target in _SPELLINGS:
        node.target = _SPELLINGS[node.target]
        return
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return
    if node.target is _A.flatten.using_ints:
        rank = source.meta["val"].dim()
        start = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
        end = int(node.args[2]) % rank if len(node.args) > 2 else rank - 1  # type: ignore[arg-type]
        with module.graph.inserting_before(node):
            kept = [_size(module, source, i) for i in range(rank) if not start <= i <= end]
        node.target, node.args = _A.reshape.default, (source, [*kept[:start], -1, *kept[start:]])
    elif node.target in _NAMED_PADDING:
        _number_padding(module, node)
    elif node.target is _A.unflatten.int:
        rank, dim = source.meta["val"].dim(), int(node.args[1]) % source.meta["val"].dim()  # type: ignore[arg-type]
        with module.graph.inserting_before(node):
            kept = [_size(module, source, i) for i in range(rank) if i != dim]
        node.target = _A.reshape.default
        node.args = (source, [*kept[:dim], *node.args[2], *kept[dim:]])  # type: ignore[misc]
    elif node.target is _A.expand.default:
        before, after = source.meta["val"], node.meta["val"]
        extra = after.dim() - before.dim()
        sizes = [
            -1 if i >= extra and before.shape[i - extra] == after.shape[i] else size
            for i, size in enumerate(node.args[1])  # type: ignore[arg-type]
        ]
        node.args = (source, sizes)


def _number_padding(module: fx.GraphModule, node: fx.Node) -> None:
    """Give padding "same" as numbers; the extra element of an even kernel comes last, which takes an op of its own."""
    source, weight, *rest = node.args
    assert isinstance(weight, fx.Node)
    assert isinstance(node.target, torch._ops.OpOverload)
    kernel = weight.meta["val"].shape[2:]
    given: list[Any] = [*rest, *(None, 1, "valid", 1, 1)[len(rest) :]]
    bias, stride, padding, dilation, groups = given
    apart = list(dilation) if isinstance(dilation, list | tuple) else [dilation]
    each = apart * len(kernel) if len(apart) == 1 else apart
    total = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(each, kernel, strict=True)]
    if any(t % 2 for t in total):
        assert isinstance(source, fx.Node)
        beyond = [amount for t in reversed(total) for amount in (0, t % 2)]
        with module.graph.inserting_before(node):
            padded = module.graph.call_function(_A.constant_pad_nd.default, (source, beyond, 0.0))
        padded.meta = dict(node.meta) | {"val": _padded_value(source.meta["val"], beyond)}
        source = padded
    steps = list(stride) if isinstance(stride, list | tuple) else [stride]
    node.target = _NAMED_PADDING[node.target]
    node.args = (source, weight, bias, steps, [t // 2 for t in total], each, groups)


def _padded_value(value: Tensor, beyond: list[int]) -> Tensor:
    lead = value.dim() - len(beyond) // 2
    grown = [s + after for s, after in zip(value.shape[lead:], reversed(beyond[1::2]), strict=True)]
    with value.fake_mode:  # type: ignore[attr-defined]  # graphs hold fake tensors
        return value.new_empty([*value.shape[:lead], *grown])


_NAMED_PADDING = {
    _A.conv1d.padding: _A.conv1d.default, _A.conv2d.padding: _A.conv2d.default, _A.conv3d.padding: _A.conv3d.default,
}  # fmt: skip


_SPELLED = frozenset(
    {
        *_SPELLINGS,
        *_DROP,
        *_ALIAS,
        *_COPY,
        *_NAMED_PADDING,
        *composites.COMPOSITES,
        _A.flatten.using_ints,
        _A.unflatten.int,
    }
)


def _size(module: fx.GraphModule, node: fx.Node, axis: int) -> int | fx.Node:
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    made = module.graph.call_function(_A.sym_size.int, (node, axis))
    made.meta["val"] = size
    return made
