"""Complex numbers as two real values each, and Fourier transforms as products with stored cosines and sines.

Rotary embeddings and spectral layers compute with complex tensors, which no kernel does: each becomes its real and its
imaginary part. A transform of n elements is a product with an n x n matrix, as fast as a linear layer of that size.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc.composites import size_of_both
from mcc.errors import CaptureError
from mcc.graph import source_line
from mcc.writing import Writer, replace_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_A = torch.ops.aten
LARGEST_MATRIX = 1 << 24  # elements
Pair = tuple[Any, Any]
"""The real and the imaginary part, as nodes or numbers."""


def spell_out_complex(module: fx.GraphModule) -> None:
    """Replace what computes with complex tensors.

    Args:
        module: an exported module of functional calls with fake values; edited.

    Raises:
        CaptureError: an input is complex, or there is no rule for an op of complex numbers.
    """
    parts: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        write = Writer(module, node)
        if node.op == "get_attr" and _is_complex(node):
            parts[node] = _stored_parts(write, node)
        elif node.op == "placeholder" and _is_complex(node):
            raise CaptureError(
                f"input {node.name} is complex", remedy="take its parts as real tensors: torch.view_as_real"
            )
        elif node.op == "call_function" and (_is_complex(node) or any(n in parts for n in node.all_input_nodes)):
            made = _written(write, node, parts)
            if _is_complex(node):
                parts[node] = made
            else:
                replace_call(module, node, made)
    for node in reversed(list(parts)):
        if not node.users:
            module.graph.erase_node(node)
            if node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                delattr(module.get_submodule(owner), name)


def _stored_parts(write: Writer, read: fx.Node) -> Pair:
    """Reads of the parts of a stored tensor, which are trained where it is."""
    stored: Tensor = operator.attrgetter(str(read.target))(write.module)
    name, pairs = str(read.target).replace(".", "_"), torch.view_as_real(stored.detach())
    parts: list[Tensor] = [pairs[..., i].clone(memory_format=torch.contiguous_format) for i in range(2)]
    if isinstance(stored, torch.nn.Parameter):
        parts = [torch.nn.Parameter(part, stored.requires_grad) for part in parts]
    return write.stored(parts[0], f"{name}_real"), write.stored(parts[1], f"{name}_imaginary")


def _is_complex(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)


def _written(write: Writer, node: fx.Node, parts: dict[fx.Node, Any]) -> Any:
    """What a call gives: two parts where that is complex, a node where it is real.

    Raises:
        CaptureError: there is no rule for it.
    """

    def operand(value: Any) -> Any:
        return parts.get(value, value) if isinstance(value, fx.Node) else value

    rule, made = _RULES.get(node.target), None
    if rule is not None:
        made = rule(write, *(operand(a) for a in node.args), **{k: operand(v) for k, v in node.kwargs.items()})
    elif node.target in _PARTWISE and "dtype" not in node.kwargs:
        made = tuple(write(node.target, *_parts_of(write, node, parts, i), **node.kwargs) for i in range(2))
    if made is None:
        raise CaptureError(
            f"there is no rule for {node.target} of complex numbers", node=f"%{node.name} {source_line(node)}",
            remedy="write that part with real tensors, or keep it outside the compiled model",
        )  # fmt: skip
    return _of_result(write, made, node.meta["val"]) if _is_complex(node) else made


def _of_result(write: Writer, pair: Pair, value: Tensor) -> Pair:
    """Both parts as nodes, with the element type and the shape that the result has."""
    known = next(p for p in pair if isinstance(p, fx.Node))
    parts = []
    for given in pair:
        part = given
        if not isinstance(part, fx.Node):
            part = write(_A.full_like.default, known, float(given or 0), dtype=value.dtype.to_real())
        if part.meta["val"].dtype is not value.dtype.to_real():
            part = write(_A.to.dtype, part, value.dtype.to_real())
        parts.append(part)
    for i, other in ((0, 1), (1, 0)):
        if parts[i].meta["val"].dim() < value.dim() or parts[i].meta["val"].shape != value.shape:
            zero = write(_A.zeros_like.default, parts[other])
            parts[i] = write(_A.add.Tensor, parts[i], zero)
    return parts[0], parts[1]


def _parts_of(write: Writer, node: fx.Node, parts: dict[fx.Node, Any], which: int) -> Any:
    """Arguments with one part of each complex value; of a real one that it is joined with nothing is imaginary."""
    joins = node.target in (_A.cat.default, _A.stack.default)

    def part(operand: fx.Node) -> Any:
        if operand in parts:
            return parts[operand][which]
        return write(_A.zeros_like.default, operand) if which and joins else operand

    return fx.node.map_arg(node.args, part)


def _pair(value: Any) -> Pair:
    """A value's parts; None where nothing is imaginary."""
    if isinstance(value, tuple):
        return value
    return (value.real, value.imag) if isinstance(value, complex) else (value, None)


def _product(write: Writer, a: Any, b: Any) -> Any:
    """One product of numbers or tensors; what is times nothing is nothing."""
    if a is None or b is None:
        return None
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return write(_A.mul.Tensor, a, b)
    number, value = (b, a) if isinstance(a, fx.Node) else (a, b)
    return write(_A.mul.Tensor, value, number) if isinstance(value, fx.Node) else number * value


def _sum(write: Writer, a: Any, b: Any, sign: int = 1) -> Any:
    if b is None:
        return a
    signed = b if sign > 0 else _product(write, b, -1)
    if a is None:
        return signed
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return write(_A.add.Tensor if sign > 0 else _A.sub.Tensor, a, b)
    node, number = (a, signed) if isinstance(a, fx.Node) else (signed, a)
    return write(_A.add.Tensor, node, number) if isinstance(node, fx.Node) else node + number


def _multiply(write: Writer, a: Any, b: Any) -> Pair:
    (ar, ai), (br, bi) = _pair(a), _pair(b)
    real = _sum(write, _product(write, ar, br), _product(write, ai, bi), -1)
    return real, _sum(write, _product(write, ar, bi), _product(write, ai, br))


def _divide(write: Writer, a: Any, b: Any) -> Pair:
    """Times the conjugate over the square of the size, each as a part of the size, so that nothing overflows."""
    if not isinstance(b, tuple | complex):
        real, imaginary = _pair(a)
        return write(_A.div.Tensor, real, b), None if imaginary is None else write(_A.div.Tensor, imaginary, b)
    if isinstance(b, complex):
        return _multiply(write, a, 1 / b)
    size = size_of_both(write, *b)
    unit = tuple(write(_A.div.Tensor, part, size) for part in b)
    real, imaginary = _multiply(write, a, (unit[0], write(_A.neg.default, unit[1])))
    return write(_A.div.Tensor, real, size), write(_A.div.Tensor, imaginary, size)


def _added(sign: int) -> Callable[..., Pair]:
    def rule(write: Writer, a: Any, b: Any, alpha: float = 1) -> Pair:
        (ar, ai), (br, bi) = _pair(a), _pair(b)
        scaled = (br, bi) if alpha == 1 else (_product(write, br, alpha), _product(write, bi, alpha))
        return _sum(write, ar, scaled[0], sign), _sum(write, ai, scaled[1], sign)

    return rule


def _as_complex(write: Writer, pairs: Any) -> Pair:
    return write(_A.select.int, pairs, -1, 0), write(_A.select.int, pairs, -1, 1)


def _polar(write: Writer, size: Any, angle: Any) -> Pair:
    across, up = write(_A.cos.default, angle), write(_A.sin.default, angle)
    return write(_A.mul.Tensor, size, across), write(_A.mul.Tensor, size, up)


def _cast(write: Writer, value: Any, *rest: Any, **options: Any) -> Any:
    """To complex from real: nothing is imaginary. To real from complex the real part stays, as PyTorch does."""
    kind = next((a for a in (*rest, *options.values()) if isinstance(a, torch.dtype)), None)
    if kind is None or kind.is_complex:
        return _pair(value)
    return write(_A.to.dtype, _pair(value)[0], kind)


@lru_cache(maxsize=16)
def _waves(rows: int, columns: int, period: int, scale: float, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2 pi jk / period, [rows, columns]; of one size the same tensors, which are stored once.

    Raises:
        CaptureError: they are too large to multiply by.
    """
    if rows * columns > LARGEST_MATRIX:
        raise CaptureError(
            f"a Fourier transform of {period} elements, which here is a product with a matrix of {rows} x {columns}",
            remedy="keep it outside the compiled model",
        )
    places = torch.outer(torch.arange(rows), torch.arange(columns)) % period
    angles = places.double() * (2 * math.pi / period)
    return (torch.cos(angles) * scale).to(kind), (torch.sin(angles) * scale).to(kind)


def _matrices(write: Writer, rows: int, columns: int, period: int, scale: float, value: Any) -> Pair:
    """Reads of waves in the element type of a value."""
    cosines, sines = _waves(rows, columns, period, scale, value.meta["val"].dtype)
    return write.stored(cosines, "cosines"), write.stored(sines, "sines")


def _along(write: Writer, value: Any, dim: int, matrix: Any) -> Any:
    """A dim of a value times a matrix."""
    last = write(_A.transpose.int, value, dim, -1)
    return write(_A.transpose.int, write(_A.matmul.default, last, matrix), dim, -1)


def _extent(value: Any, dim: int) -> int | None:
    size = value.meta["val"].shape[dim]
    return size if isinstance(size, int) else None


def _scale(count: int, normalization: int) -> float:
    return (1.0, 1 / math.sqrt(count), 1 / count)[normalization]


def _transform(write: Writer, z: Any, dims: Sequence[int], normalization: int, forward: bool) -> Pair | None:  # noqa: FBT001 (an op's schema)
    """A complex transform over dims, one after another: exp(-+ 2 pi i jk / n) summed over k."""
    real, imaginary = z
    for dim in dims:
        n = _extent(real, dim)
        if n is None:
            return None
        cosines, sines = _matrices(write, n, n, n, _scale(n, normalization), real)
        turned = [_along(write, part, dim, m) for part in (real, imaginary) for m in (cosines, sines)]
        sign = 1 if forward else -1
        real, imaginary = _sum(write, turned[0], turned[3], sign), _sum(write, turned[2], turned[1], -sign)
    return real, imaginary


def _of_real(write: Writer, x: Any, dims: Sequence[int], normalization: int, onesided: bool) -> Pair | None:  # noqa: FBT001 (an op's schema)
    """A transform of real values: of the last dim the first half is enough, the other one mirrors it."""
    *others, last = dims
    n = _extent(x, last)
    if n is None:
        return None
    cosines, sines = _matrices(write, n, n // 2 + 1 if onesided else n, n, _scale(n, normalization), x)
    imaginary = write(_A.neg.default, _along(write, x, last, sines))
    return _transform(write, (_along(write, x, last, cosines), imaginary), others, normalization, forward=True)


def _to_real(write: Writer, z: Pair, dims: Sequence[int], normalization: int, size: int) -> Any:
    """The inverse of a one-sided transform: elements that have a mirror image count twice."""
    *others, last = dims
    turned = _transform(write, z, others, normalization, forward=False)
    if turned is None or not isinstance(size, int):
        return None
    half = size // 2 + 1
    cosines, sines = _matrices(write, half, size, size, _scale(size, normalization), turned[0])
    twice = torch.full((half, 1), 2.0, dtype=turned[0].meta["val"].dtype)
    twice[0] = 1
    if size % 2 == 0:
        twice[-1] = 1
    weighted = [write(_A.mul.Tensor, m, write.stored(twice)) for m in (cosines, sines)]
    known = [write(_A.slice.Tensor, part, last, 0, half) for part in turned]
    return write(_A.sub.Tensor, *(_along(write, part, last, m) for part, m in zip(known, weighted, strict=True)))


_PARTWISE = {
    _A.view.default, _A.reshape.default, _A._unsafe_view.default, _A.transpose.int, _A.permute.default,
    _A.unsqueeze.default, _A.squeeze.dim, _A.squeeze.dims, _A.slice.Tensor, _A.select.int, _A.expand.default,
    _A.cat.default, _A.stack.default, _A.index.Tensor, _A.flip.default, _A.roll.default, _A.clone.default,
    _A.contiguous.default, _A.neg.default, _A.sum.dim_IntList, _A.mean.dim, _A.flatten.using_ints,
    _A.unflatten.int, _A.alias.default, _A.detach.default, _A.repeat.default,
}  # fmt: skip
"""Ops of complex tensors that treat both parts alike."""

_RULES: dict[Any, Callable[..., Any]] = {
    _A.view_as_complex.default: _as_complex,
    _A.view_as_real.default: lambda write, z: write(_A.stack.default, list(z), -1),
    _A.real.default: lambda write, z: _pair(z)[0], _A.imag.default: lambda write, z: _pair(z)[1],
    _A.complex.default: lambda write, real, imaginary: (real, imaginary), _A.polar.default: _polar,
    _A.mul.Tensor: _multiply, _A.div.Tensor: _divide, _A.add.Tensor: _added(1), _A.sub.Tensor: _added(-1),
    _A.rsub.Scalar: lambda write, z, number, alpha=1: _added(-1)(write, number, z, alpha),
    _A.reciprocal.default: lambda write, z: _divide(write, 1.0, z),
    **dict.fromkeys((_A.conj.default, _A._conj.default, _A.conj_physical.default, _A._conj_physical.default),
                    lambda write, z: (z[0], write(_A.neg.default, z[1]))),
    **dict.fromkeys((_A.resolve_conj.default, _A.resolve_neg.default), lambda write, z: z),
    _A.abs.default: lambda write, z: size_of_both(write, *z),
    _A.angle.default: lambda write, z: write(_A.atan2.default, z[1], z[0]),
    _A.exp.default: lambda write, z: _polar(write, write(_A.exp.default, z[0]), z[1]),
    **dict.fromkeys((_A.to.dtype, _A._to_copy.default), _cast),
    _A._fft_c2c.default: _transform, _A._fft_r2c.default: _of_real, _A._fft_c2r.default: _to_real,
}  # fmt: skip
