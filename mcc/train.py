"""The one training loop: fine-tuning, training with quantizers, and distillation run through it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcc.errors import DataError, PassError
from mcc.learned_scales import LearnedScales

if TYPE_CHECKING:
    from mcc.data import Batch
    from mcc.graph import Graph
    from mcc.rewrite import Context

OptimizerName = Literal["sgd", "adamw"]
RateSchedule = Literal["cosine", "constant"]
MOMENTUM = 0.9
LARGEST_SCALE_RATE = 1e-2  # of change of a scale in a step, relative: gradients of scales vary by orders of magnitude


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Attributes:
        optimizer: "sgd" has Nesterov momentum 0.9.
        learning_rate: at the start.
        rate_schedule: "cosine" falls to zero at the end.
        weight_decay: decoupled for adamw.
        epochs: passes over the data.
        freeze_batch_norm: share of the training after which batch norms keep their running statistics and use them.
        distill: share of the loss that is the distance from the teacher's outputs.
        checkpoint: file written after every epoch and resumed from, or empty.
        fingerprint: text that says what is trained; a checkpoint of another text is refused.
    """

    optimizer: OptimizerName
    learning_rate: float
    rate_schedule: RateSchedule
    weight_decay: float
    epochs: int
    freeze_batch_norm: float
    distill: float
    checkpoint: str
    fingerprint: str


@dataclass(frozen=True)
class _Run:
    """What a training run holds.

    Attributes:
        graph: that is trained.
        teacher: what it learns from beside the labels, or None.
        plan: how.
        optimizers: of the graph's parameters, and of its scales if it has any.
        scales: of its quantizers.
        context: of the pass.
        label: the pass as text.
        task: of the progress display, or None.
    """

    graph: Graph
    teacher: Graph | None
    plan: TrainingPlan
    optimizers: tuple[torch.optim.Optimizer, ...]
    scales: LearnedScales
    context: Context
    label: str
    task: Any


def train(graph: Graph, teacher: Graph | None, plan: TrainingPlan, context: Context, label: str) -> list[float]:
    """Train `graph` in place, scales of its quantizers included; returns the mean loss of each epoch run here.

    The graph's schedules advance with it, step by step. The process's random state is left as it was.

    Args:
        graph: to train.
        teacher: gives the outputs that `plan.distill` asks for; None where it is 0.
        plan: how to train.
        context: the pass's, with the data.
        label: the pass as text, for the progress display and errors.

    Raises:
        DataError: the training data is empty or its batches do not fit the graph.
        PassError: the loss is infinite or not a number.
    """
    assert context.data.train is not None
    scales = LearnedScales(graph)
    optimizers = _optimizers(plan, [p for _, p in graph.named_parameters() if p.is_floating_point()], scales)
    start = _resume(graph, optimizers, plan)
    scales.read()
    losses: list[float] = []
    task = None if context.progress is None else context.progress.add_task(label, total=None)
    run = _Run(graph, teacher, plan, optimizers, scales, context, label, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed + start)
        for epoch in range(start, plan.epochs):
            losses.append(_train_epoch(run, epoch))
            _save(graph, optimizers, plan, epoch + 1)
    graph.eval()
    if not all(p.isfinite().all() for p in (*(p for _, p in graph.named_parameters()), *scales.parameters)):
        raise PassError(f"{label}: a weight or scale is no longer finite", remedy="lower learning_rate")
    scales.finish()
    if context.progress is not None and task is not None:
        context.progress.remove_task(task)
    return losses


def _optimizers(
    plan: TrainingPlan, parameters: list[torch.nn.Parameter], scales: LearnedScales
) -> tuple[torch.optim.Optimizer, ...]:
    rate, decay = plan.learning_rate, plan.weight_decay
    weights: torch.optim.Optimizer
    if plan.optimizer == "sgd":
        weights = torch.optim.SGD(parameters, rate, momentum=MOMENTUM, nesterov=True, weight_decay=decay)
    else:
        weights = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    if not scales.parameters:
        return (weights,)
    return weights, torch.optim.Adam(scales.parameters, min(rate, LARGEST_SCALE_RATE))


def _train_epoch(run: _Run, epoch: int) -> float:
    plan, context = run.plan, run.context
    run.graph.train(batch_norm=epoch < plan.freeze_batch_norm * plan.epochs)
    total, steps = 0.0, 0
    length = _epoch_length(context)
    for position, (*inputs, labels) in enumerate(_batches(context)):
        progress = (epoch + position / length) / plan.epochs
        for schedule in run.graph.schedules:
            schedule.advance(run.graph, progress)
        for optimizer in run.optimizers:
            _set_rate(optimizer, plan, progress)
            optimizer.zero_grad(set_to_none=True)
        loss = _loss(run, inputs, labels)
        if not loss.isfinite():
            raise PassError(
                f"{run.label}: the loss is {float(loss.detach())} in epoch {epoch + 1}, step {steps + 1}",
                remedy="lower learning_rate, or quantize before folding batch norms, which keep training stable",
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        for schedule in run.graph.schedules:
            schedule.after_gradients(run.graph, progress)
        run.scales.receive_gradients()
        for optimizer in run.optimizers:
            optimizer.step()
        run.scales.write()
        total, steps = total + float(loss.detach()), steps + 1
        if context.progress is not None and run.task is not None:
            context.progress.update(
                run.task, total=plan.epochs * length, completed=epoch * length + steps,
                description=f"epoch {epoch + 1}/{plan.epochs}, loss {total / steps:.4f}",
            )  # fmt: skip
    if epoch + 1 == plan.epochs:
        for schedule in run.graph.schedules:
            schedule.advance(run.graph, 1.0)
    return total / steps


def _output_and_loss(graph: Graph, inputs: list[Tensor], labels: Tensor, context: Context) -> tuple[Any, Tensor]:
    try:
        output = graph(*inputs)
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(str(list(t.shape)) for t in inputs if isinstance(t, Tensor))
        raise DataError(
            f"a training batch with inputs {shapes} does not fit the graph: {str(error).splitlines()[0]}",
            remedy="give each batch as (*inputs, labels)",
        ) from error
    try:
        return output, (context.data.loss or torch.nn.functional.cross_entropy)(output, labels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the loss does not take the graph's output and labels {list(labels.shape)}: {str(error).splitlines()[0]}",
            remedy="give data.loss=…, from (output, labels) to a scalar, or labels that fit",
        ) from error


def _loss(run: _Run, inputs: list[Tensor], labels: Tensor) -> Tensor:
    output, loss = _output_and_loss(run.graph, inputs, labels, run.context)
    if run.teacher is None:
        return loss
    with torch.no_grad():
        wanted = run.teacher(*inputs)
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise DataError("distillation needs a model that returns one tensor of logits", remedy="leave `distill` out")
    found, wanted = (t.reshape(-1, t.shape[-1]).log_softmax(-1) for t in (output, wanted))
    distance = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return (1 - run.plan.distill) * loss + run.plan.distill * distance


def loss_gradients(
    graph: Graph, tensors: Sequence[Tensor], context: Context, count: int
) -> Iterator[tuple[Tensor, ...]]:
    """The gradients of the loss by some tensors, on each of the first `count` batches of training data.

    Args:
        graph: gives the outputs; in whatever mode it is.
        tensors: float ones that it reads; frozen ones stay so.
        context: of the pass, with the data.
        count: of batches.

    Raises:
        DataError: the training data is empty or its batches do not fit the graph.
    """
    empty = True
    for *inputs, labels in itertools.islice(_batches(context), count):
        empty = False
        yield gradients(lambda: _output_and_loss(graph, inputs, labels, context)[1], tensors)  # noqa: B023 (called here)
    if empty:
        raise DataError("the training data is empty", remedy="give a DataLoader or a list of (*inputs, labels)")


def gradients(loss: Callable[[], Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a loss by some float tensors, zeros where it does not depend on one; frozen ones stay so.

    Raises:
        RuntimeError: an op that the loss is computed by has no gradient.
    """
    frozen = [t for t in tensors if not t.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_()
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), tensors, allow_unused=True)
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True))


def _epoch_length(context: Context) -> int:
    if not isinstance(context.data.train, Sized) or len(context.data.train) == 0:
        raise DataError(
            "the training data is empty or has no length",
            remedy="give a DataLoader or a list: a generator is spent after one epoch",
        )
    return len(context.data.train)


def _batches(context: Context) -> Iterator[Batch]:
    assert context.data.train is not None
    for batch in context.data.train:
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise DataError("a training batch is not (*inputs, labels)", remedy="yield tuples of tensors")
        yield tuple(batch)


def _set_rate(optimizer: torch.optim.Optimizer, plan: TrainingPlan, progress: float) -> None:
    share = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress)))) if plan.rate_schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = share * optimizer.defaults["lr"]


def _save(graph: Graph, optimizers: tuple[torch.optim.Optimizer, ...], plan: TrainingPlan, epoch: int) -> None:
    """Write tensors and optimizer state to a temporary file and rename it: an interrupt leaves the old one whole."""
    if not plan.checkpoint:
        return
    tensors = {f"graph.{k}": v.detach().clone().contiguous() for k, v in graph.module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                tensors[f"optimizer.{number}.{index}.{slot}"] = torch.as_tensor(value).clone().contiguous()
    metadata = {"epoch": json.dumps(epoch), "fingerprint": plan.fingerprint}
    path = Path(plan.checkpoint)
    temporary = path.with_name(path.name + ".partial")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)


def _resume(graph: Graph, optimizers: tuple[torch.optim.Optimizer, ...], plan: TrainingPlan) -> int:
    """Load the checkpoint if there is one; returns the epoch to start from."""
    path = Path(plan.checkpoint)
    if not plan.checkpoint or not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read the checkpoint {path}: {error}", remedy="delete it to train anew") from error
    if metadata.get("fingerprint") != plan.fingerprint:
        raise DataError(
            f"the checkpoint {path} belongs to another training run",
            remedy="delete it, or name another checkpoint file",
        )
    graph.module.load_state_dict({k.removeprefix("graph."): v for k, v in tensors.items() if k.startswith("graph.")})
    for number, optimizer in enumerate(optimizers):
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, slot = name.split(".", 3)
                slots.setdefault(int(index), {})[slot] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    epoch: int = json.loads(metadata["epoch"])
    return epoch
