"""Which values are zero at the removed indices of an axis, when what is stored there is zero.

A graph whose weights are zero at some indices of an axis may be computed without them only if nothing but zeros comes
from there, or nothing reads it. This follows the zeros of stored tensors through the graph, op by op; what it cannot
tell it takes for not zero.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mcc import ops
from mcc.axes import Axis, axes_of, block
from mcc.graph import Graph, Node
from mcc.ties import Dims, Ties, is_number, place, tensor_operands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import fx

Zeros = frozenset[Axis]
NONE: Zeros = frozenset()


def _named(names: str) -> frozenset[ops.Op]:
    return frozenset(ops.OPS[name] for name in names.split())


_KEEPING = _named(
    "relu relu6 gelu silu mish neg abs sqrt sin tanh hardswish leaky_relu elu selu celu erf sign ceil floor round "
    "square log1p dropout feature_dropout sum.dim_IntList sum mean.dim mean amax amin var.correction "
    "linalg_vector_norm max.dim cumsum roll flip to.dtype to.device to.dtype_layout _to_copy type_as prelu glu "
    "slice.Tensor select.int chunk unbind.int split_with_sizes split.Tensor repeat tril triu "
    "repeat_interleave.self_int index.Tensor index_select gather mcc.fake_quantize_per_token remainder.Scalar "
    "mcc.round_bfloat16"
)
_DIVIDING = _named("div.Tensor div.Tensor_mode floor_divide remainder.Tensor")
_INVERTING = _named("reciprocal rsqrt log")
_ALL_OPERANDS = _named(
    "add.Tensor sub.Tensor maximum minimum max.other min.other cat stack slice_scatter select_scatter"
)
_PRODUCTS = _named("mul.Tensor __and__.Tensor bitwise_and.Tensor logical_and")
# stored tensors that are not zero where an axis has lost an index, for 0 / 0 is not: by op, the argument's position
_NEVER_ZEROED = {
    "batch_norm": (3, 4), "instance_norm": (3, 4), "div.Tensor": (1,), "div.Tensor_mode": (1,), "floor_divide": (1,),
    "remainder.Tensor": (1,), "mcc.fake_quantize": (1, 2), "_weight_norm": (0,), "pow.Tensor_Tensor": (0, 1),
}  # fmt: skip


def is_zeroed(graph: Graph, name: str) -> bool:
    """Whether a stored tensor is taken to be zero at removed indices: all but statistics, divisors and scales."""
    if not graph.tensor(name).is_floating_point():
        return False
    for read in graph.module.graph.nodes:
        if read.op != "get_attr" or read.target != name:
            continue
        for user in Node(read, graph).users:
            positions = _NEVER_ZEROED.get(user.op.name if user.op is not None else "", ())
            if user.op in _INVERTING or any(user.argument(p) is read for p in positions):
                return False
    return True


def find_zeros(graph: Graph, ties: Ties) -> dict[fx.Node, Zeros]:
    """Of each value the axes at whose removed indices it is zero.

    An axis at which something is divided by such a zero is blocked.
    """
    found: dict[fx.Node, Zeros] = {}
    for raw in graph.module.graph.nodes:
        node = Node(raw, graph)
        if raw.op == "get_attr":
            found[raw] = _axes(ties.of(node)) if is_zeroed(graph, str(raw.target)) else NONE
        elif raw.op == "call_function" and ties.dims.get(raw) is not None:
            found[raw] = _zeros_of(node, ties, found) & _axes(ties.dims[raw]) - _in_some_places_only(node, ties)
        else:
            found[raw] = NONE
    return found


def _in_some_places_only(node: Node, ties: Ties) -> Zeros:
    """Axes that several dims of a value have, where what goes in may be zero along one of these dims alone."""
    if isinstance(node.value, list | tuple):
        return NONE
    often = Counter(axis for term in ties.of(node) for axis in set(axes_of(term)))
    several = frozenset(axis for axis, count in often.items() if count > 1)
    operands = tensor_operands(node)
    if not several or node.op in _PRODUCTS or node.op in (ops.OPS["matmul"], ops.OPS["bmm"]):
        return NONE  # these say themselves what each dim needs
    if node.op in ops.LAYERS and node.operand(2) is None:
        return NONE
    if len(operands) != 1:
        return several
    given = Counter(axis for term in ties.of(operands[0]) for axis in set(axes_of(term)))
    return frozenset(axis for axis in several if given[axis] != often[axis])


def _axes(dims: Iterable[Any]) -> Zeros:
    """Every axis of a value's dims, or of those of several values."""
    found: set[Axis] = set()
    for term in dims:
        found |= _axes(term) if isinstance(term, tuple) else set(axes_of(term))
    return frozenset(found)


def _zeros_of(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    op = node.op
    assert op is not None
    first = _operand_zeros(node, 0, found)
    if op in _DIVIDING:
        _block_divisors(node, _operand_zeros(node, 1, found))
        return first
    if op in _INVERTING:
        _block_divisors(node, first)
        return NONE
    if op.name == "getitem" or op in _KEEPING or op.family in ("move", "window"):
        return first
    if op in _ALL_OPERANDS:
        return _everywhere(node, ties, found)
    if op in _PRODUCTS:
        return _in_any(node, ties, found)
    special = _SPECIAL.get(op.name)
    return NONE if special is None else special(node, ties, found)


def _block_divisors(node: Node, zeros: Zeros) -> None:
    for axis in zeros:
        block(axis, f"{place(node)} divides by it")


def _everywhere(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    """Of a sum or a concatenation: zero where every operand that has the axis is, and where none lacks it."""
    assert node.op is not None
    joins = node.op.name in ("cat", "stack")
    if not joins and any(is_number(node.argument(p)) and node.argument(p) != 0 for p in (0, 1)):
        return NONE
    operands = tensor_operands(node)
    out = _axes(ties.of(node))
    with_axis = [(_axes(ties.of(o)), found[o.fx]) for o in operands]
    return frozenset(
        axis for axis in out if all(axis in zeros or (joins and axis not in axes) for axes, zeros in with_axis)
    )


def _in_any(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    """Of a product: zero where one operand is; of an axis that two of its dims have, where all are that have it."""
    operands = tensor_operands(node)
    dims = ties.of(node)
    made = set()
    for axis in frozenset().union(*(found[o.fx] for o in operands)):
        several = sum(axis in _axes([term]) for term in dims) > 1
        if not several or all(axis in found[o.fx] for o in operands if axis in _axes(ties.of(o))):
            made.add(axis)
    return frozenset(made)


def _through(*sources: tuple[Dims, Zeros]) -> Zeros:
    """Dims of an output, each group with the axes that are zero there: zero where all groups that have an axis are."""
    present = frozenset().union(*(_axes(dims) for dims, _ in sources))
    return frozenset(a for a in present if all(a in zeros for dims, zeros in sources if a in _axes(dims)))


def _with_bias(zeros: Zeros, node: Node, position: int, found: dict[fx.Node, Zeros]) -> Zeros:
    bias = node.operand(position)
    return zeros if bias is None else zeros & found[bias.fx]


def _operand_zeros(node: Node, position: int, found: dict[fx.Node, Zeros]) -> Zeros:
    operand = node.operand(position)
    return NONE if operand is None else found[operand.fx]


def _layer(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    """A linear layer or a convolution: its channels are the weight's, what comes before them the input's."""
    x, w = _operand_zeros(node, 0, found), _operand_zeros(node, 1, found)
    out = ties.of(node)
    rank = len(ties.of(node.operand(1)))
    place_of_channels = len(out) - 1 if node.op is ops.LINEAR else len(out) - rank + 1
    made = _through((out[:place_of_channels], x), (out[place_of_channels : place_of_channels + 1], w))
    return _with_bias(made, node, 2, found)


def _embedding(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    out = ties.of(node)
    return _through((out[:-1], NONE), (out[-1:], _operand_zeros(node, 0, found)))


def _matmul(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    offset = 1 if node.op in (ops.OPS["addmm"], ops.OPS["baddbmm"]) else 0
    left, right = node.operand(offset), node.operand(offset + 1)
    assert left is not None
    assert right is not None
    a, b = found[left.fx], found[right.fx]
    out = ties.of(node)
    rows, columns = len(ties.of(left)) > 1, len(ties.of(right)) > 1
    batch = out[: len(out) - rows - columns]
    made = _through(
        (batch, a | b), (out[len(batch) : len(batch) + rows], a), (out[len(out) - columns :] if columns else (), b)
    )
    return _with_bias(made, node, 0, found) if offset else made


def _attention(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    out, values = ties.of(node), _operand_zeros(node, 2, found)
    return _through((out[:-2], values), (out[-2:-1], NONE), (out[-1:], values))


def _batch_norm(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    return _through((ties.of(node)[1:2], _operand_zeros(node, 1, found) & _operand_zeros(node, 2, found)))


def _norm(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    """A norm by the values themselves gives zero for zeros, times its gain, plus its shift."""
    assert node.op is not None
    if node.op is ops.OPS["instance_norm"] and not node.argument(5, True):
        return _batch_norm(node, ties, found)
    gain = node.op.weights[0]
    made = (_operand_zeros(node, 0, found) | _operand_zeros(node, gain, found)) & _axes(ties.of(node))
    return _with_bias(made, node, gain + 1, found) if len(node.op.weights) > 1 else made


def _weight_norm(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del ties
    return _operand_zeros(node, 1, found)


def _where(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    made = _axes(ties.of(node))
    for position in (1, 2):
        value = node.argument(position)
        if is_number(value) and value != 0:
            return NONE
        if not is_number(value):
            made &= found[value]
    return made


def _masked_fill(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del ties
    return _operand_zeros(node, 0, found) if node.argument(2) == 0 else NONE


def _clamp(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del ties
    low, high = node.argument(1, -1.0), node.argument(2, 1.0)  # the defaults are those of hardtanh
    if node.op is ops.OPS["clamp_max"]:
        low, high = None, low
    elif node.op is ops.CLAMP_MIN:
        high = None
    holds = (low is None or (is_number(low) and low <= 0)) and (high is None or (is_number(high) and high >= 0))
    return _operand_zeros(node, 0, found) if holds else NONE


def _power(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del ties
    zeros, exponent = _operand_zeros(node, 0, found), node.argument(1)
    if exponent < 0:
        _block_divisors(node, zeros)
    return zeros if exponent > 0 else NONE


def _pad(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    value = node.argument(2 if node.op is ops.OPS["constant_pad_nd"] else 3, None)
    mode = "constant" if node.op is ops.OPS["constant_pad_nd"] else node.argument(2, "constant")
    ends = _axes(ties.baked[node.fx]) if mode == "constant" else NONE
    return _operand_zeros(node, 0, found) | ends if not value else NONE


def _filled(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del found
    assert node.op is not None
    value = {"full": 1, "new_full": 2, "full_like": 1}.get(node.op.name)
    zero = node.op.name in ("zeros", "zeros_like", "new_zeros") or (value is not None and node.argument(value) == 0)
    return _axes(ties.of(node)) if zero else NONE


def _recurrent(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    """Gates of zero halve a state that starts at zero."""
    count = 2 if node.op is ops.LSTM else 1
    hidden = _axes([ties.of(node.operand(count + 1))[0]])
    made = hidden & _operand_zeros(node, 0, found) & _operand_zeros(node, count + 1, found)
    return _with_bias(made & _operand_zeros(node, count, found), node, count + 2, found)


def _fake_quantize(node: Node, ties: Ties, found: dict[fx.Node, Zeros]) -> Zeros:
    del ties
    zero = node.operand(2)
    whole = zero is not None and zero.is_parameter and not bool((zero.tensor.float() % 1 != 0).any())
    return _operand_zeros(node, 0, found) if whole else NONE


_SPECIAL: dict[str, Callable[[Node, Ties, dict[fx.Node, Zeros]], Zeros]] = {
    "linear": _layer, "conv1d": _layer, "conv2d": _layer, "conv3d": _layer, "conv_transpose2d.input": _layer,
    "embedding": _embedding, "matmul": _matmul, "bmm": _matmul, "addmm": _matmul, "baddbmm": _matmul,
    "scaled_dot_product_attention": _attention, "mcc.rounded_attention": _attention,
    "batch_norm": _batch_norm, "instance_norm": _norm, "group_norm": _norm,
    "layer_norm": _norm, "rms_norm": _norm, "_weight_norm": _weight_norm, "where.self": _where,
    "where.ScalarOther": _where, "where.ScalarSelf": _where, "masked_fill.Scalar": _masked_fill, "clamp": _clamp,
    "clamp_min": _clamp, "hardtanh": _clamp, "clamp_max": _clamp, "pow.Tensor_Scalar": _power, "pad": _pad,
    "constant_pad_nd": _pad,
    "zeros": _filled, "zeros_like": _filled, "new_zeros": _filled, "full": _filled, "new_full": _filled,
    "full_like": _filled, "mcc.lstm": _recurrent, "mcc.gru": _recurrent, "mcc.fake_quantize": _fake_quantize,
}  # fmt: skip
