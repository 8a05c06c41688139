"""Unstructured pruning: the weights of least saliency become zero and stay so."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.graph import Graph, Node, Schedule, identifier
from mcc.rewrite import Context, Lossy, Pass, Rewriter

RAMP_END = 0.75


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Multiply weights by a mask that is zero where their saliency is least.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %fc_weight_masked: f32[10, 64] = mul.Tensor(@fc.weight, @fc.weight_mask)
        %fc: f32[8, 10] = linear(%x, %fc_weight_masked, @fc.bias)

    With schedule "cubic" the pass starts with nothing removed and a later fine-tune raises the ratio step by step,
    s(t) = ratio * (1 - (1 - t)^3), reaching it after three quarters of the training.
    Han et al.: Learning both weights and connections. NeurIPS 2015 (magnitude);
    Zhu, Gupta: To prune, or not to prune. ICLR workshop 2018 (cubic schedule).

    Attributes:
        ratio: fraction of weights removed, in (0, 1).
        scope: "global" ranks the weights of all layers together, "layer" each layer by itself.
        saliency: what is kept longest: "magnitude" is |w|.
        schedule: "one-shot", or "cubic" across the fine-tuning that follows.
        include: patterns of layer names to prune, shell style.
        exclude: patterns of layer names to leave.
    """

    ratio: float = 0.5
    scope: Literal["global", "layer"] = "global"
    saliency: Literal["magnitude"] = "magnitude"
    schedule: Literal["one-shot", "cubic"] = "one-shot"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise SpecError(f"prune-weights: ratio={self.ratio}", remedy="a fraction between 0 and 1, such as 0.9")
        for option, allowed in (
            ("scope", ("global", "layer")), ("saliency", ("magnitude",)), ("schedule", ("one-shot", "cubic")),
        ):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"prune-weights: {option}={getattr(self, option)!r}", remedy=f"use one of {', '.join(allowed)}"
                )

    @property
    def needs_after(self) -> tuple[str, ...]:
        """A cubic schedule moves only while the graph trains."""
        return ("fine-tune",) if self.schedule == "cubic" else ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Insert masks, and set them at once or leave that to the schedule."""
        names = self._insert_masks(graph, context)
        if self.schedule == "cubic":
            return graph.with_schedules((*graph.schedules, CubicPruning(self.ratio, self.scope, names)))
        set_masks(graph, names, self.ratio, self.scope)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the masked weights set to zero in their tensors."""
        zeroed = before.copy()
        for node in after.nodes:
            expression = weight_expression(node) if node.op is ops.MUL else None
            if expression is not None and expression.mask is not None:
                kept = torch.where(expression.mask, expression.root.tensor.detach(), 0.0)
                zeroed.set_tensor(str(expression.root.fx.target), kept)
        return zeroed

    def _insert_masks(self, graph: Graph, context: Context) -> tuple[str, ...]:
        names: dict[str, None] = {}
        matched: set[str] = set()
        for node in graph.nodes:
            if node.op not in ops.LAYERS:
                continue
            reason = self._left_alone(node, matched)
            if reason is not None:
                context.decline(node, reason)
                continue
            root = node.weight
            assert root is not None
            name = str(root.fx.target)
            if name not in names:
                _mask(graph, root)
                context.edited()
            names[name] = None
        unmatched = [p for p in (*self.include, *self.exclude) if p not in matched]
        if unmatched or not names:
            layers = ", ".join(sorted({n.layer for n in graph.nodes if n.op in ops.LAYERS})) or "none"
            what = f"pattern {unmatched[0]!r} matches no layer" if unmatched else "there is no layer to prune"
            raise PassError(f"{self}: {what}", remedy=f"layers that can be pruned: {layers}")
        return tuple(names)

    def _left_alone(self, node: Node, matched: set[str]) -> str | None:
        included = [p for p in self.include if fnmatchcase(node.layer, p)]
        excluded = [p for p in self.exclude if fnmatchcase(node.layer, p)]
        matched.update(included, excluded)
        if excluded:
            return f"excluded by {excluded[0]!r}"
        if not included:
            return "not included"
        if node.weight is None:
            return "its weight is computed"
        direct = node.operand(1)
        if direct is not None and direct.op in ops.FIXED:
            return "its weight is already encoded: prune before that"
        zero = direct.operand(2) if direct is not None and direct.op is ops.FAKE_QUANTIZE else None
        if zero is not None and bool((zero.tensor % 1 != 0).any()):
            return "its pruned weights would not stay zero: no code stands for it"
        return None


@dataclass(frozen=True)
class CubicPruning(Schedule):
    """Raises the sparsity of masks while a graph trains.

    Attributes:
        ratio: reached in the end.
        scope: as in `PruneWeights`.
        names: of the masked weights.
    """

    ratio: float
    scope: Literal["global", "layer"]
    names: tuple[str, ...]

    def advance(self, graph: Graph, progress: float) -> None:
        """Prune to s(t); masks change in a hundred steps, not at every batch."""
        ramp = min(round(progress / RAMP_END, 2), 1.0)
        target = self.ratio * (1 - (1 - ramp) ** 3)
        masks = [graph.tensor(f"{name}_mask") for name in self.names]
        sparsity = 1 - sum(int(m.count_nonzero()) for m in masks) / sum(m.numel() for m in masks)
        if target > sparsity + 1e-6:
            set_masks(graph, self.names, target, self.scope)


def _mask(graph: Graph, root: Node) -> None:
    """Multiply the weight `root` reads by an all-true mask in front of every reader; an existing mask stays."""
    name = str(root.fx.target)
    masks = (user.operand(1) for user in root.users if user.op is ops.MUL)
    if any(mask is not None and mask.fx.target == f"{name}_mask" for mask in masks):
        return
    readers = list(root.fx.users)
    first = next(n for n in graph.module.graph.nodes if n in root.fx.users)
    rewriter = Rewriter(graph, Node(first, graph))
    mask = rewriter.read(f"{name}_mask", torch.ones(root.tensor.shape, dtype=torch.bool))
    masked = rewriter.call(ops.MUL, root, mask)
    masked.rename(f"{identifier(name)}_masked")
    for reader in readers:
        reader.replace_input_with(root.fx, masked.fx)


def set_masks(graph: Graph, names: tuple[str, ...], ratio: float, scope: Literal["global", "layer"]) -> None:
    """Make masks keep the 1 - ratio weights of largest magnitude; a weight pruned before stays pruned.

    Every layer keeps at least one weight: a layer without any would cut the network in two.
    """
    scores = [_saliency(graph, name) for name in names]
    if scope == "global":
        whole = _kept(torch.cat([s.flatten() for s in scores]), ratio)
        kept = list(torch.split(whole, [s.numel() for s in scores]))
    else:
        kept = [_kept(s.flatten(), ratio) for s in scores]
    for name, score, mask in zip(names, scores, kept, strict=True):
        mask = mask.clone()
        if not mask.any():
            mask[int(score.argmax())] = True
        graph.set_tensor(f"{name}_mask", mask.reshape(score.shape))


def _saliency(graph: Graph, name: str) -> Tensor:
    weight, mask = graph.tensor(name).detach(), graph.tensor(f"{name}_mask")
    return torch.where(mask, weight.abs(), -1.0)


def _kept(scores: Tensor, ratio: float) -> Tensor:
    """False for exactly the `ratio` smallest scores; of equal ones the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.argsort(stable=True)[: round(ratio * scores.numel())]] = False
    return kept
