"""Reconstruction: what compression left of the weights learns to give what the network gave, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import DataError, PassError, SpecError
from mcc.parts import Part, parts
from mcc.quantization import layers_taken, quantizer_tensors, without_quantizers
from mcc.rewrite import Context, Lossy, Pass
from mcc.statistics import StepwiseRuns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcc.graph import Graph, Node

HELD_OUT = 8  # of so many batches one is not learned from: it says whether the error fell
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Train the weights that pruned or quantized layers have left, so that each part of the network gives what it gave.

        %up: f32[8, 256] = linear(%x, %up_weight_masked, @up.bias)
        %gelu: f32[8, 256] = gelu(%up)
        %down: f32[8, 64] = linear(%gelu, %down_weight_masked, @down.bias)
        %add: f32[8, 64] = add.Tensor(%x, %down)
    gets other values in @up.weight, @up.bias, @down.weight and @down.bias, for the least squared error of %add. A part
    is a residual branch with its addition, or in a chain a single layer. What goes in comes from the parts before,
    trained already; what should come out is the captured model's. No labels are needed. Zeros stay, gradients go
    straight through fake-quantizers, and scales stay. Of eight batches one is not learned from: a part whose error
    there does not fall stays as it was. Give this after a pass that prunes or quantizes.
    Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: BRECQ: pushing the limit of post-training quantization by block
    reconstruction. ICLR 2021. Guo, Wu, Zhang, Yin, Wu, Wang: EBFT: effective and block-wise fine-tuning for sparse
    LLMs. arXiv 2402.12419, 2024.

    Attributes:
        iterations: steps of Adam for each part, of one batch of calibration data each.
        learning_rate: of Adam at the start, as a share of a quantized weight's step, of other tensors' root mean
            square; it falls to zero along a cosine.
    """

    iterations: int = 200
    learning_rate: float = 0.01

    guarantee = Lossy()

    def __post_init__(self) -> None:
        for option in ("iterations", "learning_rate"):
            if getattr(self, option) <= 0:
                raise SpecError(f"reconstruct: {option}={getattr(self, option)}", remedy="it is positive")

    @property
    def needs_data(self) -> tuple[str, ...]:
        """What parts give is compared on calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Train part by part while the calibration data runs through the graph and the captured one."""
        assert context.captured is not None
        exact_graph = without_quantizers(context.captured)
        found = self._parts(graph, exact_graph, context)
        assert context.data.calibration is not None
        batches = list(context.data.calibration)
        student, exact = StepwiseRuns(graph, batches), StepwiseRuns(exact_graph, batches)
        task = None if context.progress is None else context.progress.add_task("reconstruct", total=len(found))
        generator = torch.Generator().manual_seed(context.seed)
        errors: list[tuple[float, float]] = []
        with torch.no_grad():
            for part in found:
                student.run_before(part.layers[0].fx)
                problem = _Problem(graph, part, student.values(part.inputs), exact.run_to(part.end))
                errors.append(self._improve(problem, context, generator))
                student.refresh(part.nodes)
                if context.progress is not None and task is not None:
                    context.progress.advance(task)
        if context.progress is not None and task is not None:
            context.progress.remove_task(task)
        before, after = (sum(e) / len(errors) for e in zip(*errors, strict=True))
        context.note(f"mean error of what {len(found)} parts give, relative: {before:.2e} before, {after:.2e} after")
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the trained tensors."""
        trained = before.copy()
        for name, tensor in after.named_parameters():
            trained.set_tensor(name, tensor.detach().clone())
        return trained

    def _parts(self, graph: Graph, exact: Graph, context: Context) -> list[Part]:
        layers = [n for n in graph.nodes if n.op in ops.LAYERS]
        failure = PassError(f"{self}: no layer is compressed", remedy="give it after a pass that prunes or quantizes")
        taken = layers_taken(layers, context, _refusal, failure)
        known = {n.name: list(n.shape) for n in exact.nodes if isinstance(n.value, Tensor)}
        found = parts(graph, taken, lambda n: n.dtype.is_floating_point and known.get(n.name) == list(n.shape))
        inside = {layer for part in found for layer in part.layers}
        for layer in taken:
            if layer not in inside:
                context.decline(layer, "no single value behind it is one of the captured model's")
        if not found:
            raise PassError(f"{self}: no part can be compared: {context.reasons}", remedy="leave it out, or fine-tune")
        return found

    def _improve(self, problem: _Problem, context: Context, generator: torch.Generator) -> tuple[float, float]:
        """Train a part if that helps; returns its errors before and after."""
        before = problem.error()
        if not math.isfinite(before):
            raise DataError(
                f"reconstruct: what {problem.label} reads or gives is not finite",
                remedy="check the batches and weights",
            )
        kept = [p.detach().clone() for p in problem.parameters]
        self._train(problem, generator)
        after = problem.error()
        if after < before:
            context.edited(len(kept))
            return before, after
        for parameter, old in zip(problem.parameters, kept, strict=True):
            parameter.copy_(old)
        for layer in problem.part.layers:
            context.decline(
                layer, "what its part gives comes no closer" if kept else "its weight is read elsewhere too"
            )
        return before, before

    def _train(self, problem: _Problem, generator: torch.Generator) -> None:
        if not problem.parameters:
            return
        rates = (self.learning_rate * unit for unit in problem.units)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(problem.parameters, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        for batch in problem.picked(self.iterations, generator):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                problem.loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            optimizer.step()
            schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _refusal(node: Node) -> str | None:
    expression = weight_expression(node.operand(1))
    if expression is None:
        return "its weight is computed"
    direct = node.operand(1)
    if direct is not None and direct.op in ops.FIXED:
        return "its weight is already encoded"
    if expression.mask is None and expression.quantizer is None:
        return "its weight is neither pruned nor quantized"
    return None


def _step(layer: Node) -> tuple[str, float | None]:
    """The name of a layer's weight and the mean of its scales, or None where it is not quantized."""
    expression = weight_expression(layer.operand(1))
    assert expression is not None
    quantizer = expression.quantizer
    scale = None if quantizer is None or quantizer.op is not ops.FAKE_QUANTIZE else quantizer_tensors(quantizer)[0]
    return str(expression.root.fx.target), None if scale is None else float(scale.float().mean())


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


class _Problem:
    """One part: what goes in, what should come out, and the tensors to train.

    Attributes:
        part: the part.
        label: names of its layers, for errors.
        parameters: those tensors.
        units: what learning rates are shares of.

    Args:
        graph: of the part.
        part: to train.
        inputs: what its nodes read from before it, for each batch.
        wanted: what it should give, for each batch.
    """

    def __init__(self, graph: Graph, part: Part, inputs: list[dict[fx.Node, Any]], wanted: list[Tensor]) -> None:
        self.part, self._inputs, self._wanted = part, inputs, wanted
        self.label = ", ".join(layer.layer for layer in part.layers)
        self._run = fx.Interpreter(graph.module, garbage_collect_values=False)
        self.parameters = [graph.tensor(name) for name in part.parameters]
        steps = dict(map(_step, part.layers))
        self.units = [steps.get(name) or _size(graph.tensor(name)) for name in part.parameters]
        whole = [i for i, w in enumerate(wanted) if w.numel()]
        if not whole:
            raise DataError(f"reconstruct: no calibration batch has a row for {self.label}", remedy="give at least one")
        self._held_out = whole[HELD_OUT - 1 :: HELD_OUT] or whole
        self._learned = [i for i in whole if i not in self._held_out] or whole
        self._power = float(torch.stack([wanted[i].square().mean() for i in whole]).mean().clamp(min=1e-30))

    def picked(self, count: int, generator: torch.Generator) -> Iterator[int]:
        """So many of the batches to learn from; all come before one comes again."""
        for start in range(0, count, len(self._learned)):
            order = torch.randperm(len(self._learned), generator=generator).tolist()
            yield from (self._learned[i] for i in order[: count - start])

    def loss(self, batch: int) -> Tensor:
        """The mean squared error of what the part gives, relative to what it should give."""
        self._run.env = dict(self._inputs[batch])
        for node in self.part.nodes:
            self._run.env[node] = self._run.run_node(node)
        given: Tensor = self._run.env[self.part.nodes[-1]]
        return (given - self._wanted[batch]).square().mean() / self._power

    def error(self) -> float:
        """The mean of the losses of the batches held out."""
        return float(torch.stack([self.loss(i) for i in self._held_out]).mean())
