"""Reconstruction: what compression left of the weights learns to give what the network gave, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import DataError, PassError, SpecError
from mcc.parts import Part, parts
from mcc.quantization import layers_taken, multiplying, quantizer_tensors, without_quantizers
from mcc.rewrite import Context, Lossy, Pass
from mcc.statistics import StepwiseRuns
from mcc.train import gradients

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
    trained already; what should come out is what the graph gave before the first pass that is not exact. No labels are
    needed. Zeros stay, gradients go straight through fake-quantizers, and scales stay. Of eight batches one is not
    learned from: a part whose error there does not fall stays as it was. Give this after a pass that prunes or
    quantizes.
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
        """Train part by part while the calibration data runs through the graph and the exact one."""
        assert context.exact is not None
        exact_graph = without_quantizers(context.exact)
        found = self._parts(graph, exact_graph, context)
        assert context.data.calibration is not None
        batches = list(context.data.calibration)
        student, exact = StepwiseRuns(graph, batches), StepwiseRuns(exact_graph, batches)
        generator = torch.Generator().manual_seed(context.seed)
        errors: list[tuple[float, float]] = []
        with torch.no_grad(), context.shown("reconstruct", len(found)) as advance:
            for part in found:
                student.run_before(part.layers[0].fx)
                values = student.values(part.inputs), exact.run_to(part.end)
                errors.append(self._improve(_Problem(graph, part, *values), context, generator))
                del values  # before those of the next part are there
                student.refresh(part.nodes)
                advance()
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
        failure = PassError(f"{self}: no layer is compressed", remedy="give it after a pass that prunes or quantizes")
        taken = layers_taken(multiplying(graph), context, _refusal, failure)
        known = {n.name: ops.shape_of(n.fx) for n in exact.nodes if isinstance(n.value, Tensor)}
        found = parts(graph, taken, lambda n: n.dtype.is_floating_point and known.get(n.name) == ops.shape_of(n.fx))
        inside = {layer for part in found for layer in part.layers}
        for layer in taken:
            if layer not in inside:
                context.decline(layer, "only an output reads it, or no single value behind it is one of the model's")
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
        for layer, reason in problem.left:
            context.decline(layer, reason)
        if not problem.trained:
            return before, before
        kept = [p.detach().clone() for p in problem.parameters]
        after, reason = math.inf, "what its part gives comes no closer"
        try:
            self._train(problem, generator)
            after = problem.error()
        except RuntimeError as error:  # an op without a gradient
            reason = f"its part cannot be trained: {str(error).splitlines()[0]}"
        if after < before:
            context.edited(len(kept))
            return before, after
        for parameter, old in zip(problem.parameters, kept, strict=True):
            parameter.copy_(old)
        for layer in problem.trained:
            context.decline(layer, reason)
        return before, before

    def _train(self, problem: _Problem, generator: torch.Generator) -> None:
        rates = (self.learning_rate * unit for unit in problem.units)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(problem.parameters, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        for batch in problem.picked(self.iterations, generator):
            found = gradients(partial(problem.loss, batch), problem.parameters)
            for parameter, gradient in zip(problem.parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _refusal(node: Node) -> str | None:
    if node.op not in ops.LAYERS:
        return f"{node.op} has no weight of its own"
    expression = weight_expression(node.operand(1))
    if expression is None:
        return "its weight is computed"
    direct = node.operand(1)
    if direct is not None and direct.op in ops.FIXED:
        return "its weight is already encoded"
    if node.dtype not in (torch.float32, torch.float64):
        return f"it computes in {str(node.dtype).removeprefix('torch.')}, too coarse to train in"
    if expression.mask is None and expression.quantizer is None:
        return "its weight is neither pruned nor quantized"
    return None


def _step(layer: Node) -> float | None:
    """The mean of a weight's scales, or None where it is not quantized."""
    expression = weight_expression(layer.operand(1))
    quantizer = None if expression is None else expression.quantizer
    if quantizer is None or quantizer.op is not ops.FAKE_QUANTIZE:
        return None
    return float(quantizer_tensors(quantizer)[0].float().mean())


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


class _Problem:
    """One part: what goes in, what should come out, and the tensors to train.

    Attributes:
        label: names of its layers, for errors.
        parameters: the tensors to train.
        units: what their learning rates are shares of.
        trained: the layers whose weights are among them.
        left: the others, and why.

    Args:
        graph: of the part.
        part: to train.
        inputs: what its nodes read from before it, for each batch.
        wanted: what it should give, for each batch.
    """

    def __init__(self, graph: Graph, part: Part, inputs: list[dict[fx.Node, Any]], wanted: list[Tensor]) -> None:
        self._nodes, self._inputs, self._wanted = part.nodes, inputs, wanted
        self._run = fx.Interpreter(graph.module, garbage_collect_values=False)
        self.label = ", ".join(layer.layer for layer in part.layers)
        weights = {layer: str(root.fx.target) for layer in part.layers if (root := layer.weight) is not None}
        self.trained = [layer for layer, name in weights.items() if name in part.parameters]
        reason = "its weight is read elsewhere too, or is no parameter"
        self.left = [(layer, reason) for layer in part.layers if layer not in self.trained]
        self.parameters = [graph.tensor(name) for name in part.parameters]
        steps = {weights[layer]: _step(layer) for layer in part.layers}
        # a bias of zeros would not learn: a part's tensors count as no smaller than its smallest weight
        least = min((_size(graph.tensor(name)) for name in weights.values()), default=0.0)
        self.units = [steps.get(name) or max(_size(graph.tensor(name)), least) for name in part.parameters]
        whole = [i for i, w in enumerate(wanted) if w.numel()]
        if not whole:
            raise DataError(f"reconstruct: no calibration batch has a row for {self.label}", remedy="give at least one")
        self._held_out = whole[HELD_OUT - 1 :: HELD_OUT] or whole
        self._learned = [i for i in whole if i not in self._held_out] or whole
        self._power = float(torch.stack([wanted[i].square().mean() for i in whole]).mean()) or 1.0

    def picked(self, count: int, generator: torch.Generator) -> Iterator[int]:
        """So many of the batches to learn from; all come before one comes again."""
        for start in range(0, count, len(self._learned)):
            order = torch.randperm(len(self._learned), generator=generator).tolist()
            yield from (self._learned[i] for i in order[: count - start])

    def loss(self, batch: int) -> Tensor:
        """The mean squared error of what the part gives, relative to what it should give."""
        self._run.env = dict(self._inputs[batch])
        for node in self._nodes:
            self._run.env[node] = self._run.run_node(node)
        given: Tensor = self._run.env[self._nodes[-1]]
        self._run.env = {}
        return (given - self._wanted[batch]).square().mean() / self._power

    def error(self) -> float:
        """The mean of the losses of the batches held out."""
        return float(torch.stack([self.loss(i) for i in self._held_out]).mean())
