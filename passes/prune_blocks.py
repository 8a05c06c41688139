"""Block pruning: residual branches whole, so that a network becomes less deep."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx

from mcc import ops
from mcc.cost import graph_size
from mcc.errors import PassError, SpecError
from mcc.graph import Graph, Node
from mcc.patterns import Patterns
from mcc.report import Declined
from mcc.rewrite import Context, Lossy, Pass
from mcc.statistics import record
from mcc.train import loss_gradients

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROUNDING = 1e-9  # of shares
BATCHES = 16  # of training data; more change the order of blocks little


@dataclass(frozen=True)
class Block:
    """A residual branch.

    Attributes:
        add: what joins the branch and its shortcut.
        shortcut: what goes past.
        side: which operand of `add` that is, 0 or 1.
        branch: what is added to it.
        layer: the module that all layers of the branch belong to.
    """

    add: Node
    shortcut: Node
    side: int
    branch: Node
    layer: str


@dataclass(frozen=True)
class PruneBlocks(Pass):
    """Remove residual branches, so that their input goes on in place of the sum.

        %up: f32[8, 256] = linear(%x, @up.weight, @up.bias)
        %gelu: f32[8, 256] = gelu(%up)
        %down: f32[8, 64] = linear(%gelu, @down.weight, @down.bias)
        %add: f32[8, 64] = add.Tensor(%x, %down)
    becomes %x. Branches whose shortcut changes the value, such as those that halve the resolution, stay.

    Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen: ShortGPT: layers in large language models are more redundant than you
    expect. arXiv 2403.03853, 2024 (influence); Molchanov, Mallya, Tyree, Frosio, Kautz: Importance estimation for
    neural network pruning. CVPR 2019 (taylor, of a gate on the branch).

    Attributes:
        ratio: what is removed, as a share of what `of` measures; in (0, 1).
        of: "blocks" counts them, "macs" and "bytes" are the graph's.
        saliency: what is kept longest: "influence" is 1 - cos of the angle between a block's input and output;
            "taylor" the squared change of the loss, to first order.
        include: patterns of layer names, shell style.
        exclude: patterns of layer names to leave.
    """

    ratio: float = 0.25
    of: Literal["blocks", "macs", "bytes"] = "blocks"
    saliency: Literal["influence", "taylor"] = "influence"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise SpecError(f"prune-blocks: ratio={self.ratio}", remedy="a share between 0 and 1, such as 0.25")
        for option, allowed in (("of", ("blocks", "macs", "bytes")), ("saliency", ("influence", "taylor"))):
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"prune-blocks: {option}={getattr(self, option)!r}", remedy=f"use one of {', '.join(allowed)}"
                )

    @property
    def needs_data(self) -> tuple[str, ...]:
        """What the saliency is computed from."""
        return ("train",) if self.saliency == "taylor" else ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Remove the blocks of least saliency until enough is gone."""
        blocks = self._candidates(graph, context)
        saliency = (_changes_of_loss if self.saliency == "taylor" else _influences)(graph, blocks, context)
        whole, removed = self._cost(graph), list[Block]()
        for block in sorted(blocks, key=lambda block: saliency[block.add.name]):
            if self._gone(graph, whole) >= self.ratio - ROUNDING:
                break
            if block.add in graph.nodes:  # not inside a larger one that is gone
                shortcut = block.add.operand(block.side)
                assert shortcut is not None
                block.add.fx.replace_all_uses_with(shortcut.fx)
                graph.clean()
                removed.append(block)
        gone = self._gone(graph, whole)
        if gone < self.ratio - ROUNDING:
            raise PassError(
                f"{self}: {self.of} cannot fall by {self.ratio:.0%}, only by {gone:.0%}",
                remedy="lower `ratio`, or prune channels, heads or neurons too",
            )
        context.edited(len(removed))
        context.note(f"{self.of} fall by {gone:.1%}: {', '.join(b.layer for b in removed)}")
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the removed branches times zero."""
        made, left = before.copy(), {n.name for n in after.nodes}
        for block in list(residual_blocks(made)):
            if block.add.name not in left:
                zero = made.call(block.add, ops.MUL.target, block.branch.fx, 0.0)
                zero.meta["val"] = block.branch.value
                block.add.fx.update_arg(1 - block.side, zero)
        return made.clean()

    def _cost(self, graph: Graph) -> float:
        if self.of == "blocks":
            return float(len(list(residual_blocks(graph))))
        size = graph_size(graph)
        return float(size.macs if self.of == "macs" else size.stored_bytes)

    def _gone(self, graph: Graph, whole: float) -> float:
        """The share of the whole cost that is no more."""
        return 1 - self._cost(graph) / whole

    def _candidates(self, graph: Graph, context: Context) -> list[Block]:
        taken, patterns = [], Patterns(self.include, self.exclude)
        for block in residual_blocks(graph, context):
            reason = patterns.refusal([block.layer])
            if reason is None:
                taken.append(block)
            else:
                context.declined.append(Declined(block.layer, reason))
        if patterns.unmatched or not taken:
            unmatched = f"pattern {patterns.unmatched!r} matches no block"
            what = unmatched if patterns.unmatched else "there is no block to remove"
            raise PassError(f"{self}: {what}", remedy=f"what was not taken: {context.reasons}")
        return taken


def residual_blocks(graph: Graph, context: Context | None = None) -> Iterator[Block]:
    """Every residual branch of a graph that can go, in order; other sums of layers are declined."""
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for raw in graph.module.graph.nodes:
        before[raw] = frozenset(raw.all_input_nodes).union(*(before[n] for n in raw.all_input_nodes))
    for node in graph.nodes:
        sides = [node.operand(0), node.operand(1)] if node.op is ops.ADD and node.argument(2, 1) == 1 else []
        if None in sides or not sides or any(s.shape != node.shape for s in sides if s is not None):
            continue
        block, reason = _block(node, before)
        if block is not None:
            yield block
        elif reason is not None and context is not None:
            context.decline(node, reason)


def _block(node: Node, before: dict[fx.Node, frozenset[fx.Node]]) -> tuple[Block | None, str | None]:
    """The branch that a sum adds to what it is computed from, or why there is none; no reason where it has no layer."""
    for side in (0, 1):
        shortcut, branch = node.operand(side), node.operand(1 - side)
        assert shortcut is not None
        assert branch is not None
        if shortcut.fx not in before[branch.fx]:
            continue
        inside = frozenset(n for n in (*before[branch.fx], branch.fx) if shortcut.fx in before[n])
        if not any(Node(n, node.graph).weight is not None for n in inside):
            return None, None
        leaving = [n for n in inside if any(u not in inside and u is not node.fx for u in n.users)]
        if leaving:
            return None, f"%{leaving[0].name} inside the branch is read elsewhere"
        return Block(node, shortcut, side, branch, _module(node.graph, inside)), None
    sides = [o.fx for o in (node.operand(0), node.operand(1)) if o is not None]
    both = all(any(Node(n, node.graph).weight is not None for n in (*before[side], side)) for side in sides)
    return None, "neither side is what the other is computed from" if both else None


def _module(graph: Graph, inside: Iterable[fx.Node]) -> str:
    layers = sorted(Node(n, graph).layer for n in inside if Node(n, graph).weight is not None)
    common = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(layers[0].split("."), layers[-1].split("."), strict=False)
    )
    return ".".join(part for part, _ in common) or layers[0]


def _influences(graph: Graph, blocks: list[Block], context: Context) -> dict[str, float]:
    """1 - cos of the angle between what goes into a block and what comes out, over positions and batches."""
    assert context.data.calibration is not None
    sums, counts = {b.add.name: 0.0 for b in blocks}, {b.add.name: 0 for b in blocks}
    by_add = {b.add.name: b for b in blocks}
    seen: dict[str, Tensor] = {}

    def take(name: str, values: Tensor) -> None:
        block = by_add.get(name)
        if block is not None:
            channels = 1 if values.dim() == 4 else -1
            angles = torch.cosine_similarity(seen[block.shortcut.name].double(), values.double(), dim=channels)
            sums[name] += float((1 - angles).sum())
            counts[name] += angles.numel()
        seen[name] = values.detach()

    names = {*by_add, *(b.shortcut.name for b in blocks)}
    record(graph, names, context.data.calibration, take)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _changes_of_loss(graph: Graph, blocks: list[Block], context: Context) -> dict[str, float]:
    """The squared derivative of the loss by a factor on the branch, over batches."""
    gated, names = graph.copy().eval(), {}
    for i, block in enumerate(blocks):
        names[f"gate_{i}"] = block.add.name
        gated.add_parameter(f"gate_{i}", torch.ones(()))
        add, branch = gated.node(block.add.name), gated.node(block.branch.name)
        product = gated.call(add, ops.MUL.target, branch.fx, gated.read(f"gate_{i}", add).fx)
        add.fx.replace_input_with(branch.fx, product)
    gated.module.recompile()
    totals = {b.add.name: 0.0 for b in blocks}
    gates = [p for n, p in gated.named_parameters() if n in names]
    for gradients in loss_gradients(gated, gates, context, BATCHES):
        for name, gradient in zip(names.values(), gradients, strict=True):
            totals[name] += float(gradient.double().square())
    return totals
