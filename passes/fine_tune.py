"""Training what is left after compression."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcc.errors import SpecError
from mcc.rewrite import Context, Lossy, Pass
from mcc.text import graph_text
from mcc.train import OptimizerName, RateSchedule, TrainingPlan, train

if TYPE_CHECKING:
    from mcc.graph import Graph


@dataclass(frozen=True)
class FineTune(Pass):
    """Train the graph's parameters on `data.train`.

    Masks stay: a pruned weight is multiplied by its mask, so it neither contributes nor learns. Fake-quantizers pass
    gradients straight through. With a checkpoint file, an interrupted run goes on from its last whole epoch.
    Han, Pool, Tran, Dally: Learning both weights and connections for efficient neural networks. NeurIPS 2015.

    Attributes:
        epochs: passes over the data.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        learning_rate: at the start.
        rate_schedule: "cosine" falls to zero at the end, "constant" stays.
        weight_decay: decoupled for adamw.
        checkpoint: file written after every epoch and resumed from; empty for none.
    """

    epochs: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    rate_schedule: RateSchedule = "cosine"
    weight_decay: float = 0.0
    checkpoint: str = ""

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise SpecError(
                f"fine-tune: epochs={self.epochs}, learning_rate={self.learning_rate}", remedy="both are positive"
            )
        if self.optimizer not in ("sgd", "adamw") or self.rate_schedule not in ("cosine", "constant"):
            raise SpecError(
                f"fine-tune: optimizer={self.optimizer!r}, rate_schedule={self.rate_schedule!r}",
                remedy="optimizer is 'sgd' or 'adamw', rate_schedule 'cosine' or 'constant'",
            )

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Training needs batches."""
        return ("train",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Train in place."""
        plan = TrainingPlan(
            self.optimizer, self.learning_rate, self.rate_schedule, self.weight_decay, self.epochs, self.checkpoint,
            fingerprint=f"{self.full_text()} seed={context.seed}\n{graph_text(graph)}{_digest(graph)}",
        )  # fmt: skip
        losses = train(graph, plan, context, str(self))
        if losses:
            context.note(f"mean loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
        context.edited(sum(1 for _ in graph.named_parameters()))
        return graph.with_schedules(())


def _digest(graph: Graph) -> str:
    """SHA-256 of the tensors training starts from: a checkpoint of another model must not replace this one's."""
    digest = hashlib.sha256()
    for _, tensor in sorted(graph.module.state_dict().items()):
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
