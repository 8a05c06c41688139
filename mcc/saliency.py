"""How much each index of a group matters to a graph: what structured pruning removes last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.axes import Axis, axes_of, positions
from mcc.cost import weight_expression
from mcc.statistics import channel_energies, channels_read
from mcc.train import loss_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.coupling import Coupling, Group, Slot
    from mcc.graph import Graph, Node
    from mcc.rewrite import Context

SaliencyName = Literal["l1", "l2", "batch-norm", "fpgm", "random", "activation", "taylor", "fisher"]
LARGEST_GRADIENT_BATCHES = 32  # more change the order of channels little
NEEDS = {"activation": "calibration", "taylor": "train", "fisher": "train"}
Saliencies = dict[Axis, Tensor]


def saliencies(name: SaliencyName, coupling: Coupling, groups: list[Group], context: Context) -> Saliencies:
    """Of each group the saliency of its indices, float64 [size], larger for what matters more.

    Args:
        name: "l1" and "l2" are norms of everything an index has in weight matrices (Li, Kadav, Durdanovic, Samet,
            Graf: Pruning filters for efficient ConvNets. ICLR 2017); "batch-norm" is the size of its gain (Liu, Li,
            Shen, Huang, Yan, Zhang: Learning efficient convolutional networks through network slimming. ICCV 2017), or
            "l2" where there is none; "fpgm" how far what a layer gives it lies from what it gives the others (He, Liu,
            Wang, Hu, Yang: Filter pruning via geometric median. CVPR 2019); "activation" the energy that it adds to
            the outputs of the layers that read it (An, Zhao, Yu, Tang, Wang: Fluctuation-based adaptive structured
            pruning for large language models. AAAI 2024, without their bias), or "l2" where none of those is
            ungrouped; "taylor" the squared change of the loss, to first order (Molchanov, Mallya, Tyree, Frosio,
            Kautz: Importance estimation for neural network pruning. CVPR 2019); "fisher" the change of the loss with
            its curvature taken for the gradient's square (LeCun, Denker, Solla: Optimal brain damage. NeurIPS 1989).
        coupling: of the graph.
        groups: those wanted.
        context: the pass's, with data and seed.

    Raises:
        DataError: the data is empty or does not fit the graph.
    """
    if name in ("taylor", "fisher"):
        return _by_gradients(name, coupling, groups, context)
    if name == "activation":
        return _by_activations(coupling, groups, context)
    if name == "random":
        generator = torch.Generator().manual_seed(context.seed)
        return {g.axis: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in groups}
    by_name: dict[str, Callable[[Graph, Group], Tensor]] = {
        "l1": lambda graph, group: _norms(graph, group, 1), "l2": lambda graph, group: _norms(graph, group, 2),
        "batch-norm": _gains, "fpgm": _distances,
    }  # fmt: skip
    return {g.axis: by_name[name](coupling.graph, g) for g in groups}


def by_index(values: Tensor, slot: Slot, axis: Axis) -> Tensor:
    """Sums over everything that an index of an axis has in a stored tensor, float64 [size].

    Args:
        values: of the shape of the slot's tensor.
        slot: where the axis stands.
        axis: the axis.
    """
    others = [d for d in range(values.dim()) if d != slot.dim]
    along = values.double().sum(others) if others else values.double()
    at = positions(slot.term, axis)
    return torch.zeros(axis.size, dtype=torch.float64).index_add_(0, at[at >= 0], along[at >= 0])


def matrices(graph: Graph, group: Group) -> list[tuple[Slot, Tensor]]:
    """The float tensors of two dims or more in which a group stands."""
    found = [(slot, graph.tensor(slot.tensor).detach()) for slot in group.slots]
    return [(slot, t) for slot, t in found if t.dim() > 1 and t.is_floating_point()]


def gains(graph: Graph, group: Group) -> list[tuple[Slot, Tensor]]:
    """The gains of batch norms in which a group stands."""
    found = [n.operand(1) for n in graph.nodes if n.op is ops.BATCH_NORM]
    names = {str(gain.fx.target) for gain in found if gain is not None and gain.is_parameter}
    return [(slot, graph.tensor(slot.tensor).detach()) for slot in group.slots if slot.tensor in names]


def _norms(graph: Graph, group: Group, order: int) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for slot, tensor in matrices(graph, group):
        total += by_index(tensor.abs().double() ** order, slot, group.axis)
    return total ** (1 / order)


def _gains(graph: Graph, group: Group) -> Tensor:
    found = [by_index(gain.abs(), slot, group.axis) for slot, gain in gains(graph, group)]
    return torch.stack(found).sum(0) if found else _norms(graph, group, 2)


def _distances(graph: Graph, group: Group) -> Tensor:
    """Of what gives each index, the sum of distances from that of the others."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for slot, tensor in matrices(graph, group):
        at = positions(slot.term, group.axis)
        if slot.dim == 0 and (at >= 0).all() and list(axes_of(slot.term)) == [group.axis]:
            rows = tensor.flatten(1).double()
            total += torch.cdist(rows, rows).sum(1)
    return total if bool(total.any()) else _norms(graph, group, 2)


def _readers(coupling: Coupling, group: Group) -> list[tuple[Node, Slot]]:
    """The layers that add a group's indices up, with where it stands in their weights."""
    found = []
    for node in coupling.graph.nodes:
        if node.op not in ops.LAYERS or node.op is ops.CONV_TRANSPOSE2D:
            continue
        expression = weight_expression(node.operand(1))
        name = None if expression is None else expression.root.fx.target
        found += [(node, slot) for slot in group.slots if slot.tensor == name and slot.dim == 1]
    return found


def _by_activations(coupling: Coupling, groups: list[Group], context: Context) -> Saliencies:
    assert context.data.calibration is not None
    readers = {g.axis: _readers(coupling, g) for g in groups}
    wanted = [channels_read(node) for pairs in readers.values() for node, _ in pairs]
    energies = channel_energies(coupling.graph, wanted, context.data.calibration)
    made: Saliencies = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for node, slot in readers[group.axis]:
            weight, energy = coupling.graph.tensor(slot.tensor).detach(), energies[channels_read(node)]
            if len(energy) == weight.shape[1]:  # a grouped convolution's weight has the inputs of one group
                squares = weight.double().square() * energy.reshape(-1, *[1] * (weight.dim() - 2))
                total += by_index(squares, slot, group.axis)
        made[group.axis] = total if bool(total.any()) else _norms(coupling.graph, group, 2)
    return made


def _by_gradients(name: str, coupling: Coupling, groups: list[Group], context: Context) -> Saliencies:
    graph = coupling.graph.eval()
    parameters = {n: p for n, p in graph.named_parameters() if p.is_floating_point()}
    totals = {g.axis: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    for gradients in loss_gradients(graph, list(parameters.values()), context, LARGEST_GRADIENT_BATCHES):
        changes = {n: p.detach() * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        for group in groups:
            for slot in (s for s in group.slots if s.tensor in changes):
                change = changes[slot.tensor]
                if name == "fisher":
                    totals[group.axis] += by_index(change.square(), slot, group.axis)
                else:
                    totals[group.axis] += by_index(change, slot, group.axis).square()
    return totals
