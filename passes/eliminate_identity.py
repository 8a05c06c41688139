"""Removing calls that return what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcc import ops
from mcc.rewrite import Exact, Match, Reject, Rewrite, Rewriter

if TYPE_CHECKING:
    from mcc.graph import Node

_SAME_TYPE = (
    "reshape",
    "expand",
    "expand_as",
    "reshape_as",
    "to.dtype",
    "to.device",
    "to.dtype_layout",
    "type_as",
    "_to_copy",
)
_IDEMPOTENT = ("relu", "relu6", "abs", "ceil", "floor", "round", "sign")


@dataclass(frozen=True)
class EliminateIdentity(Rewrite):
    """Remove dropout, reshapes and casts that change nothing, transposes that undo each other, and dead code.

        %d: f32[8, 4] = dropout(%x, p=0.5, train=False)
        %r: f32[8, 4] = reshape(%d, shape=[8, 4])
        %y: f32[8, 4] = relu(%r)
    becomes
        %y: f32[8, 4] = relu(%x)

    Dropout goes for good: run this after the last fine-tuning that wants it.
    """

    guarantee = Exact()

    def match(self, node: Node) -> Match | Reject:
        """Find the value that `node` returns unchanged."""
        source = node.operand(0)
        if source is None or node.op is None:
            return Reject.other_op(node)
        name = node.op.name
        if node.op in (ops.DROPOUT, ops.FEATURE_DROPOUT):
            return Match(node, source=source)
        if name in _SAME_TYPE and same_type(source, node):
            return Match(node, source=source)
        if name in _IDEMPOTENT and source.op is node.op:
            return Match(node, source=source)
        if name == "permute" and list(node.argument(1)) == list(range(len(node.shape))):
            return Match(node, source=source)
        if name == "transpose.int" and source.op is node.op and _axes(source) == _axes(node):
            origin = source.operand(0)
            return Reject.other_op(node) if origin is None else Match(node, source=origin)
        if name == "slice.Tensor" and node.argument(4, 1) == 1 and same_type(source, node):
            return Match(node, source=source)
        return Reject.other_op(node)

    def rewrite(self, match: Match, rewriter: Rewriter) -> Node:
        """Let users read the source."""
        del rewriter
        source: Node = match.source
        match.node.fx.replace_all_uses_with(source.fx)
        return match.node


def same_type(a: Node, b: Node) -> bool:
    """Whether two values have the same shape, symbol for symbol, and dtype."""
    return a.dtype is b.dtype and [str(s) for s in a.shape] == [str(s) for s in b.shape]


def _axes(node: Node) -> set[int]:
    return {node.argument(1) % len(node.shape), node.argument(2) % len(node.shape)}
