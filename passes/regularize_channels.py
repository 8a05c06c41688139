"""Training that drives whole channels toward zero, so that removing them afterwards costs little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mcc.axes import Axis, positions
from mcc.coupling import Coupling, Group, Slot, couple
from mcc.errors import PassError, SpecError
from mcc.graph import Graph, Schedule
from mcc.patterns import Patterns
from mcc.rewrite import Context, Exact, Pass
from mcc.saliency import by_index, gains, matrices
from mcc.structured import decline_group, groups_taken

KINDS = ("channel", "neuron", "head")
PENALTIES = ("group-lasso", "batch-norm", "growing")
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class RegularizeChannels(Pass):
    """Penalize what coupled channels, neurons and heads have in weights, during the fine-tune that follows.

    The graph stays as it is; its training gets a schedule that adds the penalty's gradient to that of the loss.
    "group-lasso" penalizes the norm of everything an index has in weight matrices, "batch-norm" the size of its gain,
    "growing" the squared norm of the `ratio` indices of least norm, with a strength that rises to `strength` while the
    rest is left alone. Prune with prune-channels{saliency='l2'} afterwards, 'batch-norm' after "batch-norm".
    Wen, Wu, Wang, Chen, Li: Learning structured sparsity in deep neural networks. NeurIPS 2016 (group lasso);
    Liu, Li, Shen, Huang, Yan, Zhang: Learning efficient convolutional networks through network slimming. ICCV 2017;
    Wang, Qin, Zhang, Fu: Neural pruning via growing regularization. ICLR 2021.

    Attributes:
        penalty: see above.
        strength: of the penalty beside the loss.
        ratio: share of the indices of each group that "growing" penalizes.
        include: patterns of layer names, shell style; a group is taken if it is the output of a layer that matches.
        exclude: patterns of layers whose outputs are left alone.
    """

    penalty: Literal["group-lasso", "batch-norm", "growing"] = "group-lasso"
    strength: float = 1e-3
    ratio: float = 0.5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Exact()

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise SpecError(
                f"regularize-channels: penalty={self.penalty!r}", remedy=f"use one of {', '.join(PENALTIES)}"
            )
        if self.strength <= 0 or not 0 < self.ratio < 1:
            raise SpecError(
                f"regularize-channels: strength={self.strength}, ratio={self.ratio}",
                remedy="strength is positive, ratio a share between 0 and 1",
            )

    @property
    def needs_after(self) -> tuple[str, ...]:
        """A penalty acts only while the graph trains."""
        return ("fine-tune",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Find the groups, and leave the rest to the schedule."""
        parts = []
        for group in self._groups(couple(graph), context):
            found = gains(graph, group) if self.penalty == "batch-norm" else matrices(graph, group)
            if not found:
                what = "no batch norm scales it" if self.penalty == "batch-norm" else "it stands in no weight matrix"
                decline_group(group, what, context)
                continue
            part = Penalized(group.axis, tuple(slot for slot, _ in found), torch.ones(group.size, dtype=torch.bool))
            if self.penalty == "growing":
                part.chosen[part.squares(graph).topk(group.size - round(self.ratio * group.size)).indices] = False
            parts.append(part)
            context.edited()
        if not parts:
            raise PassError(f"{self}: nothing to penalize: {context.reasons}", remedy="`mcc inspect --prunable`")
        return graph.with_schedules((*graph.schedules, Penalty(self.penalty, self.strength, tuple(parts))))

    def _groups(self, coupling: Coupling, context: Context) -> list[Group]:
        patterns = Patterns(self.include, self.exclude)
        taken = groups_taken(coupling, KINDS, patterns, context)
        if patterns.unmatched:
            raise PassError(
                f"{self}: pattern {patterns.unmatched!r} matches no layer with channels, neurons or heads",
                remedy=f"`mcc inspect --prunable` lists groups; here: {context.reasons}",
            )
        return taken


@dataclass(frozen=True)
class Penalized:
    """A group under penalty.

    Attributes:
        axis: its indices.
        slots: where they stand.
        chosen: bool [size], those that are penalized.
    """

    axis: Axis
    slots: tuple[Slot, ...]
    chosen: Tensor

    def squares(self, graph: Graph) -> Tensor:
        """Of each index the sum of squares of what it has, float64 [size]."""
        total = torch.zeros(self.axis.size, dtype=torch.float64)
        for slot in self.slots:
            total += by_index(graph.tensor(slot.tensor).detach().square(), slot, self.axis)
        return total


@dataclass(frozen=True)
class Penalty(Schedule):
    """Adds a penalty's gradient while a graph trains.

    Attributes:
        kind, strength: as in `RegularizeChannels`.
        groups: under penalty.
    """

    kind: str
    strength: float
    groups: tuple[Penalized, ...]

    def advance(self, graph: Graph, progress: float) -> None:
        """Nothing: weights change by their gradients alone."""

    def after_gradients(self, graph: Graph, progress: float) -> None:
        """Add the penalty's gradient to that of the loss."""
        for group in self.groups:
            factors = self._factors(graph, group, progress)
            for slot in group.slots:
                weight = graph.tensor(slot.tensor)
                if weight.grad is not None:
                    held = weight.detach()
                    direction = held.sign() if self.kind == "batch-norm" else held
                    weight.grad.add_(direction * _along(factors, slot, group.axis, held))

    def _factors(self, graph: Graph, group: Penalized, progress: float) -> Tensor:
        """What each index's weights are multiplied by to give the gradient of its penalty."""
        strength = self.strength * group.chosen.double()
        if self.kind == "growing":
            return strength * progress
        if self.kind == "batch-norm":
            return strength
        return strength / group.squares(graph).sqrt().clamp(min=SMALLEST_NORM)


def _along(factors: Tensor, slot: Slot, axis: Axis, like: Tensor) -> Tensor:
    """Factors by index, shaped to broadcast against a slot's tensor; zero where the axis does not stand."""
    at = positions(slot.term, axis)
    spread = torch.where(at >= 0, factors[at.clamp(min=0)], 0.0).to(like.dtype)
    return spread.reshape([-1 if d == slot.dim else 1 for d in range(like.dim())])
