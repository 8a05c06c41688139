"""Attention in a graph, as the op or spelled out: softmax(queries times keys) times values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcc import ops
from mcc.attention import LARGEST_CODE
from mcc.ops import OPS
from mcc.rewrite import Rewriter

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

PRODUCTS = (OPS["matmul"], OPS["bmm"])
NEGLIGIBLE = -1e30  # what takes in any score that is added to it
_SOFTMAX, _MASKED_FILL = OPS["softmax.int"], OPS["masked_fill.Scalar"]
_VIEWS = {
    OPS["permute"], OPS["transpose.int"], OPS["expand"], OPS["unsqueeze"], OPS["squeeze.dim"], ops.RESHAPE,
    OPS["repeat_interleave.self_int"],
}  # fmt: skip


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

    @property
    def keeps_cache(self) -> bool:
        """Whether keys or values are what the graph returns, for the call after it."""
        return any(_is_kept(x) for x in (self.key, self.value))

    def round_probabilities(self) -> None:
        """Let the values be weighed by codes, of which each query's largest probability has the largest."""
        if self.node.op is ops.ATTENTION:
            round_probabilities(self.node)
            return
        probabilities = self.node.operand(0)
        assert probabilities is not None
        rewriter = Rewriter(self.node.graph, self.node)
        rounded = rewriter.call(ops.FAKE_QUANTIZE_PER_TOKEN, probabilities, LARGEST_CODE)
        rounded.rename(f"{probabilities.name}_rounded")
        self.node.fx.replace_input_with(probabilities.fx, rounded.fx)


@dataclass(frozen=True)
class Fill:
    """Scores of hidden keys that are set to a number.

    Attributes:
        scores: before.
        where: bool.
        hides: whether it is true where keys are hidden, else where they are seen.
        number: minus infinity, or so small that it takes in any score that is added to it.
    """

    scores: Node
    where: Node
    hides: bool
    number: float


def round_probabilities(attention: Node) -> None:
    """Put the op that rounds its probabilities in the place of an attention."""
    rewriter = Rewriter(attention.graph, attention)
    made = rewriter.call(ops.ROUNDED_ATTENTION, *attention.fx.args, **attention.fx.kwargs)
    made.take_place_of(attention)


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


def softmax_of(weights: Node | None) -> Node | None:
    """The softmax over keys that gives what values are weighed by alone, through dropout; or None."""
    while weights is not None and weights.op is ops.DROPOUT and _alone(weights) and not weights.argument(2, False):
        weights = weights.operand(0)
    if weights is None or weights.op is not _SOFTMAX or not _alone(weights):
        return None
    return weights if weights.argument(1) % len(weights.shape) == len(weights.shape) - 1 else None


def _spelled_out(node: Node) -> Attention | None:
    softmax, value = softmax_of(node.operand(0)), node.operand(1)
    if softmax is None or value is None:
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
    if scaled or node.op is ops.RESHAPE:
        return _product_below(first)
    if (fill := fill_of(node)) is not None:
        return _product_below(fill.scores)
    if node.op is ops.ADD:
        return _product_below(first) or _product_below(node.operand(1))
    return None


def fill_of(node: Node) -> Fill | None:
    """How a node hides scores, or None where it does something else."""
    masked = node.op is _MASKED_FILL
    if not masked and node.op not in (OPS["where.self"], OPS["where.ScalarOther"]):
        return None
    scores, where = node.operand(0 if masked else 1), node.operand(1 if masked else 0)
    number, stored = node.argument(2), node.operand(2)
    if stored is not None and stored.value.numel() == 1:
        made = stored.argument(1) if stored.op is OPS["full"] else None
        number = float(stored.tensor) if stored.is_parameter else made
    if scores is None or where is None or not isinstance(number, int | float) or number > NEGLIGIBLE:
        return None
    return Fill(scores, where, masked, float(number))


def _is_kept(node: Node) -> bool:
    """Whether a value, or what it is a view of, is returned."""
    source: Node | None = node
    while source is not None:
        if source.is_output:
            return True
        source = source.operand(0) if source.op in _VIEWS else None
    return False


def _alone(node: Node) -> bool:
    """Whether one node reads it, and the caller does not."""
    return len(node.users) == 1 and not node.is_output
