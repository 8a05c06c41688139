"""What the lowering rules are written with: a relax builder that promotes types as PyTorch does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tvm import relax, te, tirx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Expression: TypeAlias = Any
"""A relax expression or a tirx size: TVM's Python has no types for them."""

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8",
    torch.uint16: "uint16", torch.bool: "bool",
}  # fmt: skip
_WIDENING = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def is_tensor(value: object) -> bool:
    """Whether a rule's argument is a tensor (not a number or a size)."""
    return isinstance(value, relax.Expr) and isinstance(getattr(value, "ty", None), relax.TensorType)


def shape(x: Expression) -> list[Any]:
    """Dims: tirx integers or expressions."""
    return list(x.ty.shape)


def rank(x: Expression) -> int:
    """Number of dims."""
    return len(x.ty.shape)


def dtype(x: Expression) -> str:
    """Element type."""
    return str(x.ty.dtype)


def axis(x: Expression, dim: int, extra: int = 0) -> int:
    """`dim` counted from the front."""
    n = rank(x) + extra
    return dim % n if n else 0


def size(value: Any) -> Expression:
    """A size as a 64-bit tirx value."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def static(value: Any) -> int | None:
    """The value of a constant size, or None."""
    return int(value) if isinstance(value, int | tirx.IntImm) else None


def known_dims(x: Expression) -> tuple[Any, ...]:
    """Dims, constant ones as plain integers."""
    return tuple(s if (n := static(s)) is None else n for s in shape(x))


def is_one(value: Any) -> bool:
    """Whether a size is the constant 1."""
    return static(value) == 1


def is_float(kind: str) -> bool:
    """Whether an element type is floating."""
    return kind.startswith(("float", "bfloat"))


def tuple_of(value: Any, count: int) -> list[int]:
    """An int or a list, as a list of `count`."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def broadcast(*shapes: Sequence[Any]) -> list[Any]:
    """The shape these broadcast to."""
    count = max(map(len, shapes))
    result = []
    for k in range(count):
        dims = [s[k - count + len(s)] for s in shapes if k - count + len(s) >= 0]
        result.append(next((d for d in dims if not is_one(d)), dims[0]))
    return result


def read_broadcast(tensor: Expression, indices: Sequence[Any]) -> Expression:
    """Inside a te computation: the element of `tensor` that broadcasts to `indices`."""
    dims = tensor.shape
    kept = indices[len(indices) - len(dims) :] if len(dims) else ()
    return tensor(*[0 if is_one(d) else i for d, i in zip(dims, kept, strict=True)])


def wrap_index(index: Expression, extent: Expression, kind: str) -> Expression:
    """Inside a te computation: a negative index counts from the end.

    One outside the tensor reads its first or last element: PyTorch raises an error, which a kernel cannot.
    """
    return tirx.max(tirx.min(from_start(index, extent, kind), extent - 1), tirx.const(0, "int64"))


def from_start(index: Expression, extent: Expression, kind: str) -> Expression:
    """Inside a te computation: the place that an index means, where a negative one counts from the end."""
    wide = index if kind == "int64" else tirx.Cast("int64", index)
    return tirx.if_then_else(wide < 0, wide + extent, wide)


class Emitter:
    """Emits relax calls into the function under construction.

    Attributes:
        builder: of the function.
        expected: the shape that the graph knows the present op to have, or None; rules may use it where relax would
            derive another form of it, such as min(n, 512) for n.
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self.expected: list[Expression] | None = None

    def __call__(self, call: Expression) -> Expression:
        """Emit a relax call."""
        return self.builder.emit(call)

    def compute(self, function: Callable[..., Any], *operands: Any, name: str) -> Expression:
        """Emit a te computation over tensors and sizes."""
        return self.builder.emit_te(function, *operands, primfunc_name_hint=name)

    def constant(self, value: Any, kind: str) -> Expression:
        """A constant tensor."""
        return relax.const(value, kind)

    def cast(self, x: Expression, kind: str) -> Expression:
        """Convert elements; to bool means `!= 0`."""
        if dtype(x) == kind:
            return x
        if kind == "bool":
            return self.not_equal(x, self.constant(0, dtype(x)))
        return self(relax.op.astype(x, kind))

    def not_equal(self, a: Expression, b: Expression) -> Expression:
        """Whether elements differ; LLVM's comparison is false where one is not a number."""
        if dtype(a) == "bool":
            a, b = self.cast(a, "int8"), self.cast(b, "int8")
        differ = self(relax.op.not_equal(a, b))
        if not is_float(dtype(a)):
            return differ
        neither = self(relax.op.logical_or(self(relax.op.isnan(a)), self(relax.op.isnan(b))))
        return self(relax.op.logical_or(differ, neither))

    def floating(self, x: Expression) -> Expression:
        """Integers and booleans as float32."""
        return x if is_float(dtype(x)) else self.cast(x, "float32")

    def scalar(self, value: Any, kind: str) -> Expression:
        """A number or a symbolic size as a tensor of no dims."""
        known = static(value) if not isinstance(value, bool | float) else value
        if known is not None:
            return self.constant(known, kind)
        return self.compute(
            lambda s: te.compute((), lambda: s if kind == "int64" else tirx.Cast(kind, s)), value, name="size_as_tensor"
        )

    def promote_scalar(self, value: Any, kind: str) -> str:
        """The element type of a tensor of `kind` combined with a Python scalar."""
        if isinstance(value, float) and not is_float(kind):
            return "float32"
        return "int64" if kind == "bool" and not isinstance(value, bool | float) else kind

    def pair(self, a: Any, b: Any) -> tuple[Expression, Expression]:
        """Two operands of one element type, promoted as PyTorch does; either may be a scalar."""
        if not is_tensor(b):
            kind = self.promote_scalar(b, dtype(a))
            return self.cast(a, kind), self.scalar(b, kind)
        if not is_tensor(a):
            kind = self.promote_scalar(a, dtype(b))
            return self.scalar(a, kind), self.cast(b, kind)
        first, second = dtype(a), dtype(b)
        if first == second:
            return a, b
        kind = _common(first, second, rank(a), rank(b))
        return self.cast(a, kind), self.cast(b, kind)

    def item(self, values: Expression, index: int) -> Expression:
        """One field of a tuple."""
        return self(relax.TupleGetItem(values, index))

    def cut(self, x: Expression, dim: int, start: Any, end: Any, step: int = 1) -> Expression:
        """Elements start to end of a dim, bounds known to be inside."""
        bounds = [size(start)], [size(end)], [size(step)]
        return self(relax.op.strided_slice(x, [dim], *bounds, assume_inbound=True))


def widest(kinds: Sequence[str]) -> str:
    """The element type that the others convert to."""
    return max(kinds, key=_WIDENING.index)


def _common(first: str, second: str, first_rank: int, second_rank: int) -> str:
    """PyTorch's result type: a tensor of no dims does not raise one with dims within its category."""
    if first_rank == 0 < second_rank and is_float(first) <= is_float(second) and "bool" not in (first, second):
        return second
    if second_rank == 0 < first_rank and is_float(second) <= is_float(first) and "bool" not in (first, second):
        return first
    return widest((first, second))
