"""Attention in a graph, as the op or spelled out: softmax(queries times keys) times values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mcc.attention  # noqa: F401 (whose op is put into graphs here)
from mcc import ops
from mcc.ops import OPS
from mcc.rewrite import Rewriter

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

PRODUCTS = (OPS["matmul"], OPS["bmm"])
LARGEST_CODE = 255  # of a probability, of which none is negative
_SOFTMAX = OPS["softmax.int"]


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        node: what gives its value: the op, or the product with values.
        scores: what reads queries and keys: the op, or their product.
        query, key, value: what is read, [..., tokens, depth]; a spelled-out key is [..., depth, tokens].
    """

    node: Node
    scores: Node
    query: Node
    key: Node
    value: Node

    @property
    def reads(self) -> tuple[tuple[Node, Node], ...]:
        """Who reads what."""
        return (self.scores, self.query), (self.scores, self.key), (self.node, self.value)

    def round_probabilities(self) -> None:
        """Let the values be weighed by codes, of which each query's largest probability has the largest."""
        rewriter = Rewriter(self.node.graph, self.node)
        if self.node.op is ops.ATTENTION:
            made = rewriter.call(ops.ROUNDED_ATTENTION, *self.node.fx.args, **self.node.fx.kwargs)
            made.take_place_of(self.node)
            return
        probabilities = self.node.operand(0)
        assert probabilities is not None
        rounded = rewriter.call(ops.FAKE_QUANTIZE_PER_TOKEN, probabilities, LARGEST_CODE)
        rounded.rename(f"{probabilities.name}_rounded")
        self.node.fx.replace_input_with(probabilities.fx, rounded.fx)


def attentions(graph: Graph) -> list[Attention]:
    """Every attention of a graph whose probabilities are not rounded yet."""
    found = []
    for node in graph.nodes:
        if node.op is ops.ATTENTION:
            query, key, value = (node.operand(i) for i in range(3))
            assert query is not None
            assert key is not None
            assert value is not None
            found.append(Attention(node, node, query, key, value))
        elif node.op in PRODUCTS and (spelled := _spelled_out(node)) is not None:
            found.append(spelled)
    return found


def _spelled_out(node: Node) -> Attention | None:
    softmax, value = node.operand(0), node.operand(1)
    while softmax is not None and softmax.op is ops.DROPOUT and _alone(softmax):
        softmax = softmax.operand(0)
    if softmax is None or value is None or softmax.op is not _SOFTMAX or not _alone(softmax):
        return None
    if softmax.argument(1) % len(softmax.shape) != len(softmax.shape) - 1:
        return None
    scores = _product_below(softmax.operand(0))
    query, key = (None, None) if scores is None else (scores.operand(0), scores.operand(1))
    if scores is None or query is None or key is None:
        return None
    return Attention(node, scores, query, key, value)


def _product_below(node: Node | None) -> Node | None:
    """The product that scores come from: scaled by numbers, with masks added or keys hidden, or seen in other dims."""
    if node is None or not _alone(node):
        return None
    if node.op in PRODUCTS:
        return node
    first, second = node.operand(0), node.argument(1)
    scaled = node.op in (ops.MUL, OPS["div.Tensor"]) and isinstance(second, int | float)
    hidden = node.op is OPS["masked_fill.Scalar"] and node.argument(2) == -math.inf
    if scaled or hidden or node.op is ops.RESHAPE:
        return _product_below(first)
    if node.op is ops.ADD:
        return _product_below(first) or _product_below(node.operand(1))
    return None


def _alone(node: Node) -> bool:
    """Whether one node reads it, and the caller does not."""
    return len(node.users) == 1 and not node.is_output
