"""Training what is left after compression."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mcc.errors import SpecError
from mcc.quantization import without_quantizers
from mcc.rewrite import Context, Lossy, Pass
from mcc.text import graph_text
from mcc.train import OptimizerName, RateSchedule, TrainingPlan, train

if TYPE_CHECKING:
    from mcc.graph import Graph


FORM = 2  # of checkpoints: scales have an optimizer of their own


@dataclass(frozen=True)
class FineTune(Pass):
    """Train the graph's parameters on `data.train`.

    Masks stay: a pruned weight is multiplied by its mask, so it neither contributes nor learns. Fake-quantizers pass
    gradients straight through, and their scales are learned beside the weights: behind `quantize` this is
    quantization-aware training. With a checkpoint file, an interrupted run goes on from its last whole epoch.
    Han, Pool, Tran, Dally: Learning both weights and connections for efficient neural networks. NeurIPS 2015.
    Esser, McKinstry, Bablani, Appuswamy, Modha: Learned step size quantization. ICLR 2020.
    Hinton, Vinyals, Dean: Distilling the knowledge in a neural network. arXiv 1503.02531, 2015.

    Attributes:
        epochs: passes over the data.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        learning_rate: at the start.
        rate_schedule: "cosine" falls to zero at the end, "constant" stays.
        weight_decay: decoupled for adamw; never of scales.
        distill: share of the loss that is the Kullback-Leibler divergence of the logits (last dim) from the teacher's.
        teacher: "before" is this graph before training, without its quantizers; "captured" is the model as it was
            before the first pass, which a pruned graph learns from.
        freeze_batch_norm: share of the training after which batch norms use their running statistics.
        checkpoint: file written after every epoch and resumed from; empty for none.
    """

    epochs: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    rate_schedule: RateSchedule = "cosine"
    weight_decay: float = 0.0
    distill: float = 0.0
    teacher: Literal["before", "captured"] = "before"
    freeze_batch_norm: float = 1.0
    checkpoint: str = ""

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise SpecError(
                f"fine-tune: epochs={self.epochs}, learning_rate={self.learning_rate}", remedy="both are positive"
            )
        if not (0 <= self.distill <= 1 and 0 <= self.freeze_batch_norm <= 1):
            raise SpecError(
                f"fine-tune: distill={self.distill}, freeze_batch_norm={self.freeze_batch_norm}",
                remedy="both are shares, from 0 to 1",
            )
        if self.teacher not in ("before", "captured"):
            raise SpecError(f"fine-tune: teacher={self.teacher!r}", remedy="use 'before' or 'captured'")
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
            self.optimizer, self.learning_rate, self.rate_schedule, self.weight_decay, self.epochs,
            self.freeze_batch_norm, self.distill, self.checkpoint,
            fingerprint=f"{FORM} {self.full_text()} seed={context.seed}\n{graph_text(graph)}{_digest(graph)}",
        )  # fmt: skip
        captured = context.captured if self.teacher == "captured" else None
        teacher = without_quantizers(captured or graph).eval() if self.distill else None
        losses = train(graph, teacher, plan, context, str(self))
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
