"""Batch norm re-estimation: running statistics of the data that calibration gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.channels import readers
from mcc.errors import DataError, PassError
from mcc.quantization import layers_taken
from mcc.rewrite import Context, Lossy, Pass
from mcc.statistics import run_in_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Give each batch norm the mean and variance that its input has over the calibration data.

        %bn: f32[8, 16, 32, 32] = batch_norm(%conv, @bn.weight, @bn.bias, @bn.running_mean, @bn.running_var)
    gets other values in @bn.running_mean and @bn.running_var. Each sees what the batch norms before it give with
    theirs. Pruned or coarsely quantized weights move these statistics. Give it before `fold-batch-norm`, with some
    hundred examples like those of the training: of data without its augmentation they are others too. Batch norms
    without running statistics, which take those of each batch, stay.
    Li, Wu, Su, Wang: EagleEye: fast sub-net evaluation for efficient neural network pruning. ECCV 2020 (pruning). Sun,
    Choi, Chen, Wang, Venkataramani, et al.: Hybrid 8-bit floating point (HFP8) training and inference for deep neural
    networks. NeurIPS 2019 (quantization).
    """

    guarantee = Lossy()

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Statistics are those of calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Re-estimate norm by norm while the calibration data runs through the graph."""
        norms = [n for n in graph.nodes if n.op is ops.BATCH_NORM]
        failure = PassError(f"{self}: there is no batch norm to change", remedy="give it before fold-batch-norm")
        taken = {node.fx: node for node in layers_taken(norms, context, _refusal, failure)}

        def before(node: fx.Node, arguments: list[list[Any]]) -> bool:
            if node not in taken:
                return False
            found = _channel_statistics(taken[node], [x for x, *_ in arguments])
            for stored, values in zip((taken[node].operand(3), taken[node].operand(4)), found, strict=True):
                assert stored is not None
                graph.set_tensor(str(stored.fx.target), values)
            context.edited()
            return True

        assert context.data.calibration is not None
        run_in_step(graph, context.data.calibration, before)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the statistics of the graph after."""
        changed = before.copy()
        for node in changed.nodes:
            for stored in (node.operand(3), node.operand(4)) if node.op is ops.BATCH_NORM else ():
                if stored is not None:
                    name = str(stored.fx.target)
                    changed.set_tensor(name, after.tensor(name).clone())
        return changed


def _refusal(node: Node) -> str | None:
    stored = [node.operand(3), node.operand(4)]
    if any(s is None for s in stored):
        return "it has no running statistics"
    if not all(s.is_parameter for s in stored if s is not None):
        return "its running statistics are computed"
    return "its running statistics are shared" if any(readers(s) > 1 for s in stored if s is not None) else None


def _channel_statistics(node: Node, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance, as an estimate for all data, of each channel over all batches, [channels].

    Raises:
        DataError: there are fewer than two values of a channel, or they are not finite.
    """
    stored = node.operand(3)
    assert stored is not None

    def total(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([of(x.movedim(1, -1).flatten(0, -2).double()).sum(0) for x in inputs]).sum(0)

    count = sum(x.numel() // x.shape[1] for x in inputs)
    mean = total(lambda rows: rows) / count
    variance = (total(lambda rows: (rows - mean).square()) / (count - 1)).to(stored.dtype)
    if count < 2 or not variance.isfinite().all():
        raise DataError(
            f"reestimate-batch-norm: calibration gives {node.layer} fewer than two rows, or some are not finite",
            remedy="give some hundred examples, and check the weights",
        )
    return mean.to(stored.dtype), variance
