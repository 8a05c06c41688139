"""AdaRound: whether each weight is rounded up or down is learned, for the least error of its layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.channels import weight_is_shared
from mcc.cost import weight_expression
from mcc.errors import DataError, PassError, SpecError
from mcc.formats import along_axis
from mcc.pairs import LARGEST, fitted, reads_pairs
from mcc.quantization import layers_taken, quantizer_tensors, without_quantizers
from mcc.rewrite import Context, Lossy, Pass, Rewriter
from mcc.statistics import StepwiseRuns, run_in_step

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph, Node

# the rectified sigmoid reaches 0 and 1; its sharpness falls over the iterations, of which the first push nothing
STRETCH = (-0.1, 1.1)
SHARPNESS = (20.0, 2.0)
WARM_UP = 0.2
DECIDED = 0.5


@dataclass(frozen=True)
class AdaRound(Pass):
    """Learn the rounding of weights that a pass before quantized; scales and the graph's text stay as they are.

        %conv: f32[8, 16, 32, 32] = conv2d(%x_quantized, %conv_weight_quantized, @conv.bias)
    gets other values in @conv.weight, each on one of the two codes next to it. The output is compared with that of the
    float graph, the quantized layers before included; behind a relu after it where that alone reads it. A layer whose
    error does not fall keeps nearest rounding. Give this after `fold-batch-norm; quantize`.
    Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or down? Adaptive rounding for post-training quantization.
    ICML 2020.

    Attributes:
        iterations: steps of Adam for each layer.
        batch: rows of calibration data in a step.
        learning_rate: of Adam.
        regularization: weight of what pushes each choice to up or down.
    """

    iterations: int = 1000
    batch: int = 32
    learning_rate: float = 0.01
    regularization: float = 0.01

    guarantee = Lossy()

    def __post_init__(self) -> None:
        for option in ("iterations", "batch", "learning_rate", "regularization"):
            if getattr(self, option) <= 0:
                raise SpecError(f"ada-round: {option}={getattr(self, option)}", remedy="it is positive")

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Outputs are compared on calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Learn layer by layer while the calibration data runs through the graph and its float form."""
        layers = {node.fx: node for node in self._layers(graph, context)}
        assert context.data.calibration is not None
        batches = list(context.data.calibration)
        exact = StepwiseRuns(without_quantizers(graph), batches)
        generator = torch.Generator().manual_seed(context.seed)
        errors: list[tuple[float, float]] = []

        def before(node: fx.Node, arguments: list[list[Any]]) -> bool:
            if node not in layers:
                return False
            problem = _Problem(layers[node], arguments, exact.run_to(node.name), context)
            nearest, learned, weight = self._learn(problem, generator)
            if not math.isfinite(nearest):
                raise DataError(
                    f"ada-round: what {layers[node].layer} reads or gives is not finite",
                    remedy="check the batches and the weights",
                )
            errors.append((nearest, min(nearest, learned)))
            if learned < nearest:
                problem.store(weight)
                context.edited()
            else:
                context.decline(layers[node], "nearest rounding has the least error")
            advance()
            return learned < nearest

        with context.shown("ada-round", len(layers)) as advance:
            run_in_step(graph, batches, before)
        before_, after = (sum(e) / len(errors) for e in zip(*errors, strict=True))
        context.note(
            f"mean error of a layer's output, relative: {before_:.2e} rounded to nearest, {after:.2e} as learned"
        )
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, reading the learned weights, which are on their grids, without their quantizers."""
        plain = before.copy()
        for node in plain.nodes:
            expression = weight_expression(node) if node.op is ops.FAKE_QUANTIZE else None
            if expression is None or not node.users:
                continue
            name = str(expression.root.fx.target)
            learned = after.tensor(name).detach()
            if torch.equal(learned, before.tensor(name)):
                continue
            kept = learned if expression.mask is None else learned * expression.mask
            made = Rewriter(plain, node).read(f"{name}_learned", kept)
            node.fx.replace_all_uses_with(made.fx)
        return plain.clean()

    def _layers(self, graph: Graph, context: Context) -> list[Node]:
        failure = PassError(f"{self}: no layer's weight can be rounded", remedy="give it after quantize")
        return layers_taken((n for n in graph.nodes if n.op in ops.LAYERS), context, _refusal, failure)

    def _learn(self, problem: _Problem, generator: torch.Generator) -> tuple[float, float, Tensor]:
        """The relative error of nearest rounding, that of learned rounding, and the learned weight."""
        nearest = problem.error(problem.nearest)
        choice = problem.start().requires_grad_()
        optimizer = torch.optim.Adam([choice], self.learning_rate)
        for i in range(self.iterations):
            x, wanted = problem.sample(self.batch, generator)
            with torch.enable_grad():
                up = _rectified(choice)
                loss = (problem.output(x, problem.weight(up)) - wanted).square().mean() / problem.power
                progress = (i / self.iterations - WARM_UP) / (1 - WARM_UP)
                if progress >= 0:
                    sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * progress
                    undecided = 1 - (2 * up - 1).abs().pow(sharpness)
                    loss = loss + self.regularization * undecided.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            optimizer.step()
        weight = problem.fitted(problem.weight((_rectified(choice.detach()) >= DECIDED).float()))
        return nearest, problem.error(weight), weight


def _refusal(node: Node) -> str | None:
    expression = weight_expression(node.operand(1))
    if expression is None or expression.quantizer is None or expression.quantizer.op is not ops.FAKE_QUANTIZE:
        return "its weight is not quantized, or encoded already"
    return "its weight is shared" if weight_is_shared(node) else None


def _rectified(choice: Tensor) -> Tensor:
    low, high = STRETCH
    return (torch.sigmoid(choice) * (high - low) + low).clamp(0, 1)


class _Problem:
    """One layer: what goes in, what should come out, and the codes to choose from.

    Args:
        node: the layer.
        arguments: of its call with quantized inputs, for each batch.
        wanted: its outputs in the float graph, for each batch.
        context: whose target may need neighbouring codes to fit together.
    """

    def __init__(self, node: Node, arguments: list[list[Any]], wanted: list[Tensor], context: Context) -> None:
        expression = weight_expression(node.operand(1))
        assert expression is not None
        assert expression.quantizer is not None
        self._node, self._name = node, str(expression.root.fx.target)
        scale, zero, self._low, self._high = quantizer_tensors(expression.quantizer)
        axis = expression.quantizer.argument(3)
        values = expression.values.float()
        self._step = along_axis(scale.float(), values, axis)
        self._zero = along_axis(zero.float(), values, axis)
        narrow = context.target.int8_weight_limit < self._high == LARGEST and not bool(zero.any())
        self._pairs = narrow and reads_pairs(node)
        self._kept = torch.ones(()) if expression.mask is None else expression.mask.float()
        self._whole = self._zero.floor()  # codes that stand for halves have a zero point of -1/2
        self._in_steps = values / self._step + (self._zero - self._whole)
        self._relu = len(node.users) == 1 and node.users[0].op is ops.RELU and not node.is_output
        single = len(node.shape) < len(values.shape)  # no dim of rows
        pairs = [(x[None], w[None]) if single else (x, w) for (x, *_), w in zip(arguments, wanted, strict=True)]
        self._inputs = [x for x, _ in pairs if x.numel()]
        self._wanted = [self._activated(w) for x, w in pairs if x.numel()]
        self._rest = arguments[0][2:]
        if not self._inputs:
            raise DataError(f"ada-round: no calibration batch has a row for {node.layer}", remedy="give at least one")
        self.power = float(torch.stack([w.square().mean() for w in self._wanted]).mean().clamp(min=1e-30))

    @property
    def nearest(self) -> Tensor:
        """The weight rounded to nearest."""
        return self.weight(self._in_steps.round() - self._in_steps.floor())

    def start(self) -> Tensor:
        """Choices under which every weight begins as it is, not rounded."""
        low, high = STRETCH
        part = (self._in_steps - self._in_steps.floor() - low) / (high - low)
        return torch.log(part / (1 - part))

    def weight(self, up: Tensor) -> Tensor:
        """The weight whose codes are the floor plus `up`, in [0, 1]."""
        codes = (self._in_steps.floor() + up + self._whole).clamp(self._low, self._high)
        return (codes - self._zero) * self._step * self._kept

    def fitted(self, weight: Tensor) -> Tensor:
        """A weight on its grid, its neighbours such that the target adds their products exactly."""
        return fitted(weight / self._step) * self._step if self._pairs else weight

    def sample(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of one batch and what the layer should give for them."""
        i = int(torch.randint(len(self._inputs), (), generator=generator))
        picked = torch.randperm(len(self._inputs[i]), generator=generator)[:rows]
        return self._inputs[i][picked], self._wanted[i][picked]

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of the layer, and the relu behind it."""
        made: Tensor = self._node.fx.target(x, weight, *self._rest, **self._node.fx.kwargs)  # type: ignore[operator]
        return self._activated(made)

    def _activated(self, value: Tensor) -> Tensor:
        return value.relu() if self._relu else value

    def error(self, weight: Tensor) -> float:
        """Mean squared error over all batches, relative to what the layer should give."""
        pairs = zip(self._inputs, self._wanted, strict=True)
        errors = torch.stack([(self.output(x, weight) - w).square().mean() for x, w in pairs])
        return float(errors.mean()) / self.power

    def store(self, weight: Tensor) -> None:
        """Give the graph's layer this weight."""
        old = self._node.graph.tensor(self._name)
        self._node.graph.set_tensor(self._name, weight.to(old.dtype))
