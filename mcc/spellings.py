"""Activations and norms that a model spells out, as the ops that have their names.

ONNX files hold them as arithmetic, and so do many models: gelu by erf or tanh, silu, hardswish, layer norm, RMS norm.
Each is found by what it computes of a value x, as a polynomial of x inside one function, so that it does not matter in
which order a model multiplies and adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from mcc import ops
from mcc.graph import Node
from mcc.ops import OPS
from mcc.writing import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from mcc.graph import Graph

Polynomial: TypeAlias = dict[int, float]
"""Coefficients by exponent."""
DEEPEST = 6  # of the expressions that are looked into
HIGHEST = 3  # exponent
TOLERANCE = 1e-5  # of constants that models write with few digits
_SUB, _DIV, _SQRT, _RSQRT = OPS["sub.Tensor"], OPS["div.Tensor"], OPS["sqrt"], OPS["rsqrt"]
_POWERS = (OPS["pow.Tensor_Scalar"], OPS["pow.Tensor_Tensor"])
_SQUARE, _MEAN, _VAR = OPS["square"], OPS["mean.dim"], OPS["var.correction"]
_LAYER_NORM, _RMS_NORM = OPS["layer_norm"], OPS["rms_norm"]
_TANH_SLOPE, _TANH_CUBE = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715


@dataclass(frozen=True)
class Call:
    """The name of an op, and its arguments, which may be calls."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def write(self, graph: Graph, before: Node) -> fx.Node:
        """Put it in front of a node."""
        args = [a.write(graph, before) if isinstance(a, Call) else a for a in self.args]
        return Writer(graph.module, before.fx)(OPS[self.name].target, *args, **self.kwargs)


def unify_spellings(graph: Graph) -> Graph:
    """Replace what is spelled out; the graph is edited in place."""
    edited = False
    for node in graph.nodes:
        call = _named(node) if node.fx.users and _is_float(node) else None
        if call is not None:
            Node(call.write(graph, node), graph).take_place_of(node)
            edited = True
    return graph.clean().repropagate() if edited else graph


def _is_float(node: Node) -> bool:
    return isinstance(node.value, torch.Tensor) and node.dtype is torch.float32


def _named(node: Node) -> Call | None:
    """The call that a node stands for, or None."""
    if node.op in (ops.MUL, _DIV):
        for product in _products(node):
            x = product.x
            if x.dtype is not torch.float32 or x.value.shape != node.value.shape:
                continue  # the op would give another type or shape
            for rule in (_gated, _normalized):
                if (call := rule(product)) is not None:
                    return call
    return _affine_norm(node) if node.op in (ops.MUL, ops.ADD) else None


@dataclass(frozen=True)
class _Product:
    """A node as factor * x * gate, or factor * x / gate."""

    factor: float
    x: Node
    gate: Node
    divided: bool


def _products(node: Node) -> Iterator[_Product]:
    """All ways to see a node so, however its numbers are placed."""
    outer, inner = _without_numbers(node)[-1]
    first, second = inner.operand(0), inner.operand(1)
    if inner.op not in (ops.MUL, _DIV) or first is None or second is None:
        return
    divided = inner.op is _DIV
    for left, right in ((first, second),) if divided else ((first, second), (second, first)):
        scale, gate = _without_numbers(right)[-1]
        for factor, x in _without_numbers(left):
            if divided:
                yield _Product(outer * factor / scale, x, gate, divided)
            else:
                yield _Product(outer * factor * scale, x, gate, divided)


def _without_numbers(node: Node) -> list[tuple[float, Node]]:
    """A node as numbers times what they multiply: itself, and what is left as more and more numbers are taken out."""
    found, factor = [(1.0, node)], 1.0
    while node.op in (ops.MUL, _DIV):
        number, other = _number_beside(node)
        if number is None or other is None or number == 0:
            break
        factor = factor * number if node.op is ops.MUL else factor / number
        node = other
        found.append((factor, node))
    return found


def _number(node: Node, position: int) -> float | None:
    """An operand that is a number, written as such or stored as a tensor of one element; or None."""
    argument, operand = node.argument(position), node.operand(position)
    if isinstance(argument, int | float):
        return float(argument)
    if operand is None or not operand.is_parameter or len(operand.shape) > 1 or operand.value.numel() != 1:
        return None
    tensor = operand.tensor
    return None if tensor.requires_grad else float(tensor)  # one that is trained is no number


def _number_beside(node: Node) -> tuple[float | None, Node | None]:
    """The number among a node's two operands, and the other one; only the second divides."""
    number, other = _number(node, 1), node.operand(0)
    return (number, other) if number is not None or node.op is _DIV else (_number(node, 0), node.operand(1))


def _polynomial(node: Node, x: Node, depth: int = DEEPEST) -> Polynomial | None:
    """What a node computes of x, or None where it is no polynomial of low degree."""
    if _alike(node, x):
        return {1: 1.0}
    if depth == 0 or node.op is None:
        return None
    if node.op in _POWERS:
        exponent, base = _number(node, 1), _part(node, 0, x, depth)
        whole = exponent is not None and exponent in (2.0, 3.0)
        return _power(base, int(exponent)) if base is not None and exponent is not None and whole else None
    if node.op is _SQUARE:
        base = _part(node, 0, x, depth)
        return None if base is None else _power(base, 2)
    if node.op not in (ops.MUL, _DIV, ops.ADD, _SUB) or node.fx.kwargs or len(node.fx.args) != 2:
        return None
    left, right = _part(node, 0, x, depth), _part(node, 1, x, depth)
    if left is None or right is None:
        return None
    if node.op is ops.MUL:
        return _times(left, right)
    if node.op is _DIV:
        return _times(left, {0: 1 / right[0]}) if [*right] == [0] and right[0] else None
    sign = 1 if node.op is ops.ADD else -1
    return {e: left.get(e, 0.0) + sign * right.get(e, 0.0) for e in left.keys() | right.keys()}


def _part(node: Node, position: int, x: Node, depth: int) -> Polynomial | None:
    if (number := _number(node, position)) is not None:
        return {0: number}
    operand = node.operand(position)
    return None if operand is None else _polynomial(operand, x, depth - 1)


def _times(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product: Polynomial = {}
    for i, p in a.items():
        for j, q in b.items():
            product[i + j] = product.get(i + j, 0.0) + p * q
    return product if max(product) <= HIGHEST else None


def _power(base: Polynomial, exponent: int) -> Polynomial | None:
    found: Polynomial | None = base
    for _ in range(exponent - 1):
        found = None if found is None else _times(found, base)
    return found


def _alike(a: Any, b: Any, depth: int = 2) -> bool:
    """Whether two arguments are the same, or differences that are written twice, of a value and its mean."""
    if not isinstance(a, Node) or not isinstance(b, Node) or a == b:
        return bool(a == b)
    if depth == 0 or a.op is not b.op or a.op not in (_SUB, _MEAN) or a.fx.kwargs != b.fx.kwargs:
        return False
    pairs = [[n.operand(i) or n.argument(i) for i in range(len(n.fx.args))] for n in (a, b)]
    return len(pairs[0]) == len(pairs[1]) and all(_alike(p, q, depth - 1) for p, q in zip(*pairs, strict=True))


def _is(found: Polynomial | None, wanted: Polynomial) -> bool:
    """Whether a polynomial has these coefficients, as far as models write them."""
    return found is not None and all(
        math.isclose(found.get(e, 0.0), wanted.get(e, 0.0), rel_tol=TOLERANCE, abs_tol=TOLERANCE**2)
        for e in found.keys() | wanted.keys()
    )


def _gated(product: _Product) -> Call | None:
    """Of x times a function of x: gelu, silu or hardswish."""
    x, gate, factor = product.x, product.gate, product.factor
    if product.divided or gate.op is None:
        return None
    if gate.op is ops.ADD:
        return _gelu(product)
    inside = gate.operand(0)
    found = None if inside is None else _polynomial(inside, x)
    if gate.op is OPS["sigmoid"] and found is not None and [*found] == [1] and found[1] > 0:
        return _silu(x, found[1], factor)
    if gate.op is OPS["hardsigmoid"] and _is(found, {1: 1}) and _close(factor, 1):
        return Call("hardswish", (x.fx,))
    bounds = (0, 6) if gate.op is ops.RELU6 else (gate.argument(1), gate.argument(2))
    if gate.op in (ops.RELU6, ops.CLAMP, ops.HARDTANH) and (
        (bounds == (0, 6) and _is(found, {0: 3, 1: 1}) and _close(factor, 1 / 6))
        or (bounds == (0, 1) and _is(found, {0: 0.5, 1: 1 / 6}) and _close(factor, 1))
    ):
        return Call("hardswish", (x.fx,))
    return None


def _silu(x: Node, slope: float, factor: float) -> Call | None:
    """Factor * x * sigmoid(slope * x): with a slope of 1.702 the approximation of gelu that CLIP has."""
    if _close(slope, 1) and _close(factor, 1):
        return Call("silu", (x.fx,))
    return Call("mul.Tensor", (Call("silu", (Call("mul.Tensor", (x.fx, slope)),)), factor / slope))


def _gelu(product: _Product) -> Call | None:
    """Factor * x * (one + slope * f(polynomial of x)), where f is erf or tanh."""
    x, gate = product.x, product.gate
    one, term = _number_beside(gate)
    if one is None or term is None or gate.fx.kwargs:
        return None
    slope, function = _without_numbers(term)[-1]
    inside = function.operand(0)
    if not _close(product.factor * one, 0.5) or not _close(slope, one) or inside is None:
        return None
    found = _polynomial(inside, x) if function.op in (OPS["erf"], OPS["tanh"]) else None
    if function.op is OPS["erf"] and _is(found, {1: math.sqrt(0.5)}):
        return Call("gelu", (x.fx,))
    if function.op is OPS["tanh"] and _is(found, {1: _TANH_SLOPE, 3: _TANH_CUBE}):
        return Call("gelu", (x.fx,), {"approximate": "tanh"})
    return None


def _close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=TOLERANCE)


def _normalized(product: _Product) -> Call | None:
    """X over the root of its mean square, or, where x is what a mean was taken from, of its variance."""
    x, root = product.x, product.gate
    inside = root.operand(0) if root.op is (_SQRT if product.divided else _RSQRT) else None
    if inside is None or inside.op is not ops.ADD or inside.fx.kwargs or not _close(product.factor, 1):
        return None
    eps, spread = _number_beside(inside)
    width = x.shape[-1] if x.shape else None
    if eps is None or spread is None or not isinstance(width, int):
        return None
    source = x.operand(0) if x.op is _SUB and not x.fx.kwargs and _is_mean(x.operand(1), x.operand(0)) else None
    if spread.op is _VAR and source is not None and spread.operand(0) == source and _is_variance(spread):
        return Call("layer_norm", (source.fx, [width], None, None, eps))
    squared = spread.operand(0)
    if squared is None or not _over_last(spread) or spread.op is not _MEAN or not _is(_polynomial(squared, x), {2: 1}):
        return None
    if source is not None:
        return Call("layer_norm", (source.fx, [width], None, None, eps))
    return Call("rms_norm", (x.fx, [width], None, eps))


def _is_mean(node: Node | None, of: Node | None) -> bool:
    return node is not None and of is not None and node.op is _MEAN and node.operand(0) == of and _over_last(node)


def _over_last(node: Node, keeps: int = 2) -> bool:
    """Whether a reduction keeps its dims, as argument `keeps` says, and goes over the last one alone."""
    dims, source = node.argument(1), node.operand(0)
    if source is None or not isinstance(dims, list | tuple) or len(dims) != 1 or node.argument(keeps) is not True:
        return False
    return int(dims[0]) % len(source.shape) == len(source.shape) - 1


def _is_variance(node: Node) -> bool:
    """Whether it divides by the number of elements."""
    return _over_last(node, keeps=3) and node.argument(2, 1) == 0


def _affine_norm(node: Node) -> Call | None:
    """A norm without weights times a stored vector, and a layer norm with a weight plus one."""
    if node.fx.kwargs or len(node.fx.args) != 2:
        return None
    for norm, vector in ((node.operand(0), node.operand(1)), (node.operand(1), node.operand(0))):
        if norm is None or vector is None or norm.op not in (_LAYER_NORM, _RMS_NORM) or norm.is_output:
            continue
        plain = vector.is_parameter and vector.dtype is torch.float32 and norm.dtype is torch.float32
        if len(norm.users) != 1 or not plain or [*vector.shape] != [*norm.argument(1)]:
            continue
        source, shape, weight, *rest = (norm.argument(i) for i in range(5))
        layer = norm.op is _LAYER_NORM
        if node.op is ops.MUL and weight is None and (not layer or rest[0] is None):
            return Call(norm.op.name, (source, shape, vector.fx, *(rest if layer else rest[:1])))
        if node.op is ops.ADD and layer and weight is not None and rest[0] is None:
            return Call(norm.op.name, (source, shape, weight, vector.fx, rest[1]))
    return None
