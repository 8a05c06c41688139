"""Pruning weights: those of least saliency become zero and stay so; single ones, N of M, or blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.errors import SpecError
from mcc.graph import Graph, Schedule
from mcc.masks import SCOPES, Layers, Pattern, Scope, choose, insert_mask, mask_name, masked_weights
from mcc.rewrite import Context, Lossy, Pass
from mcc.statistics import channel_energies, channels_read
from mcc.train import loss_gradients

if TYPE_CHECKING:
    from mcc.graph import Node

RAMP_END = 0.75
GRADIENT_BATCHES = 32  # more change the order of weights little
NEEDS = {"magnitude": (), "movement": (), "wanda": ("calibration",), "snip": ("train",)}


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
    Zhu, Gupta: To prune, or not to prune. ICLR workshop 2018 (cubic schedule);
    Sun, Liu, Bair, Kolter: A simple and effective pruning approach for large language models. ICLR 2024 (wanda);
    Lee, Ajanthan, Torr: SNIP: single-shot network pruning based on connection sensitivity. ICLR 2019;
    Sanh, Wolf, Rush: Movement pruning: adaptive sparsity by fine-tuning. NeurIPS 2020 (movement, but what is removed
    stays so).

    Attributes:
        ratio: fraction of weights removed, in (0, 1).
        scope: "global" ranks the weights of all layers together, "layer" each layer by itself, "output" each output of
            a layer, "erk" each layer with a ratio of its own, which leaves small layers denser.
        saliency: what is kept longest: "magnitude" is |w|, "wanda" |w| times the root mean square of the input, "snip"
            |w times its gradient|, "movement" how far training has moved w away from zero, the sum of -w times its
            gradient over all steps, which takes a schedule.
        pattern: "" for single weights, "2:4" for two kept of every four inputs, "16x1" for blocks of 16 outputs and one
            input.
        schedule: "one-shot", or "cubic" across the fine-tuning that follows.
        include: patterns of layer names to prune, shell style.
        exclude: patterns of layer names to leave.
    """

    ratio: float = 0.5
    scope: Scope = "global"
    saliency: Literal["magnitude", "movement", "wanda", "snip"] = "magnitude"
    pattern: str = ""
    schedule: Literal["one-shot", "cubic"] = "one-shot"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise SpecError(f"prune-weights: ratio={self.ratio}", remedy="a fraction between 0 and 1, such as 0.9")
        for option, allowed in (
            ("scope", SCOPES), ("saliency", tuple(NEEDS)), ("schedule", ("one-shot", "cubic")),
        ):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"prune-weights: {option}={getattr(self, option)!r}", remedy=f"use one of {', '.join(allowed)}"
                )
        trained = self.saliency in ("magnitude", "movement")
        if self.schedule == "cubic" and (not trained or ":" in self.pattern):
            raise SpecError(
                f"prune-weights: schedule='cubic' with saliency={self.saliency!r}, pattern={self.pattern!r}",
                remedy="a schedule ranks by magnitude or movement, and N:M has one ratio only",
            )
        if self.saliency == "movement" and self.schedule != "cubic":
            raise SpecError(
                "prune-weights: saliency='movement' at once", remedy="schedule='cubic': weights move while they train"
            )
        Pattern.parse(self.pattern, self.ratio)

    @property
    def needs_data(self) -> tuple[str, ...]:
        """What the saliency is computed from."""
        return NEEDS[self.saliency]

    @property
    def needs_after(self) -> tuple[str, ...]:
        """A cubic schedule moves only while the graph trains."""
        return ("fine-tune",) if self.schedule == "cubic" else ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Insert masks, and set them at once or leave that to the schedule."""
        pattern = Pattern.parse(self.pattern, self.ratio)
        layers = Layers(self.include, self.exclude).taken(
            self, graph, context, lambda node: pattern.misfit(_weight_of(node).shape)
        )
        factors = self._factors(graph, layers, context)
        for name in layers:
            insert_mask(graph, name, torch.ones(graph.tensor(name).shape, dtype=torch.bool))
            context.edited()
        if self.schedule == "cubic":
            names = tuple(layers)
            if self.saliency == "movement":
                for name in names:
                    graph.set_tensor(moved(name), torch.zeros_like(graph.tensor(name).detach()))
            schedule = CubicPruning(self.ratio, self.scope, pattern, names, self.saliency == "movement")
            return graph.with_schedules((*graph.schedules, schedule))
        sizes = {name: graph.tensor(name).detach().abs() for name in layers}
        scores = {name: size * factors[name] if name in factors else size for name, size in sizes.items()}
        set_masks(graph, scores, self.ratio, self.scope, pattern)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the masked weights set to zero in their tensors."""
        return masked_weights(before, after)

    def _factors(self, graph: Graph, layers: dict[str, list[Node]], context: Context) -> dict[str, Tensor]:
        """Of each weight what its magnitude is multiplied by; nothing for magnitude itself."""
        if self.saliency == "snip":
            tensors = [graph.tensor(name) for name in layers]
            totals = [torch.zeros_like(t) for t in tensors]
            for gradients in loss_gradients(graph.eval(), tensors, context, GRADIENT_BATCHES):
                totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
            return {name: total.abs() for name, total in zip(layers, totals, strict=True)}
        return _input_sizes(graph, layers, context) if self.saliency == "wanda" else {}


@dataclass(frozen=True)
class CubicPruning(Schedule):
    """Raises the sparsity of masks while a graph trains.

    Attributes:
        ratio: reached in the end.
        scope: as in `PruneWeights`.
        pattern: what goes together.
        names: of the masked weights.
        movement: weights are ranked by how far they have moved away from zero, else by magnitude.
    """

    ratio: float
    scope: Scope
    pattern: Pattern
    names: tuple[str, ...]
    movement: bool = False

    def advance(self, graph: Graph, progress: float) -> None:
        """Prune to s(t); masks change in a hundred steps, not at every batch."""
        ramp = min(round(progress / RAMP_END, 2), 1.0)
        target = self.ratio * (1 - (1 - ramp) ** 3)
        masks = [graph.tensor(mask_name(graph, name)) for name in self.names]
        sparsity = 1 - sum(int(m.count_nonzero()) for m in masks) / sum(m.numel() for m in masks)
        if target > sparsity + 1e-6:
            scores = {n: graph.tensor(moved(n) if self.movement else n).detach() for n in self.names}
            scores = scores if self.movement else {n: weight.abs() for n, weight in scores.items()}
            set_masks(graph, scores, target, self.scope, self.pattern)
        if self.movement and progress == 1:
            for name in self.names:
                graph.remove_tensor(moved(name))

    def after_gradients(self, graph: Graph, progress: float) -> None:
        """Add up movement: a step against the gradient takes w away from zero where their signs differ."""
        del progress
        for name in self.names if self.movement else ():
            weight = graph.tensor(name)
            if weight.grad is not None:
                graph.tensor(moved(name)).sub_(weight.detach() * weight.grad)


def moved(name: str) -> str:
    """The name of the buffer with a weight's movement: it is in the checkpoints of training."""
    return f"{name}_movement"


def set_masks(graph: Graph, scores: dict[str, Tensor], ratio: float, scope: Scope, pattern: Pattern) -> None:
    """Make the masks of weights keep those with the largest scores; a weight pruned before stays pruned."""
    least = min(float(score.min()) for score in scores.values()) - 1
    kept = {name: torch.where(graph.tensor(mask_name(graph, name)), score, least) for name, score in scores.items()}
    for name, mask in choose(kept, ratio, scope, pattern).items():
        insert_mask(graph, name, mask)


def _weight_of(node: Node) -> Tensor:
    root = node.weight
    assert root is not None
    return root.tensor


def _input_sizes(graph: Graph, layers: dict[str, list[Node]], context: Context) -> dict[str, Tensor]:
    """The root mean square of what each weight [out, in, …] multiplies, of a shape that broadcasts against it."""
    assert context.data.calibration is not None
    energies = channel_energies(
        graph, [channels_read(n) for nodes in layers.values() for n in nodes], context.data.calibration
    )
    found = {}
    for name, nodes in layers.items():
        weight = graph.tensor(name)
        total = torch.zeros((), dtype=torch.float64)
        for node in nodes:
            total = total + _for_weight(energies[channels_read(node)], node, weight)
        found[name] = (total / len(nodes)).sqrt().to(weight.dtype)
    return found


def _for_weight(energy: Tensor, node: Node, weight: Tensor) -> Tensor:
    """Energies [channels] as a layer's weight has its inputs, in dim 1 or, of a transposed convolution, in dim 0."""
    rest = [1] * (weight.dim() - 2)
    if node.op is ops.CONV_TRANSPOSE2D:
        return energy.reshape(-1, 1, *rest)
    groups = len(energy) // weight.shape[1]
    rows = energy.reshape(groups, weight.shape[1]).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *rest)
