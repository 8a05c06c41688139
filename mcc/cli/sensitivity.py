"""`mcc inspect --sensitivity`: what few bits do to each layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcc import compiler, ops
from mcc.cli.arguments import print_json
from mcc.cli.figures import check_figure, plotter
from mcc.data import Data, in_order
from mcc.errors import SpecError
from mcc.passes import Quantize
from mcc.passes.quantize import BITS
from mcc.rewrite import Context
from mcc.sensitivity import Damage, damages
from mcc.target import parse_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.graph import Graph
    from mcc.sensitivity import Formats

WIDEST_BAR = 30  # characters


def show_sensitivity(
    graph: Graph, example: tuple[Tensor, ...], data: Data, plot: Path | None, *, as_json: bool
) -> None:
    """Measure every layer in every format, print the layers, the weakest first, and draw them.

    Args:
        graph: whose weights are in float.
        example: inputs, where there are no data.
        data: with labels, accuracy counts; else how near outputs stay.
        plot: where to draw to, or None.
        as_json: print JSON.

    Raises:
        SpecError: no layer is in float, the plot's file has an unknown ending or no folder, or matplotlib is missing.
        DataError: the data do not fit the model.
    """
    if plot is not None:
        check_figure(plot)
    with compiler.progress_display() as progress:
        found, metric = sensitivity(graph, example, data, progress)
    if as_json:
        print_json({"metric": metric, "damages": [vars(d) for d in found]})
    else:
        _print(found, metric)
    if plot is not None:
        _draw(found, metric, plot)


def sensitivity(
    graph: Graph, example: tuple[Tensor, ...], data: Data, progress: Any = None
) -> tuple[list[Damage], str]:
    """Every layer's damage in int8 to int2, alone, and what is measured."""
    step, context = Quantize("int8", None), Context(parse_target("cpu"), data)
    layers = [name for name, node in step.candidates(graph).items() if node.op in ops.LAYERS]
    if not layers:
        raise SpecError("the model has no layer in float whose weights could be quantized")
    evaluate, metric = metric_of(graph, example, data)
    measured = Data(evaluate=evaluate)

    def measure(formats: Formats) -> float:
        return measured.measure(step.in_formats(graph.copy(), formats, context).clean())

    saved = {layer: dict.fromkeys(BITS, 0) for layer in layers}
    return damages(measure, measure({}), saved, progress), metric


def metric_of(graph: Graph, example: tuple[Tensor, ...], data: Data) -> tuple[Callable[..., float], str]:
    """Accuracy on the data's labels, or, where it has none, how near outputs stay to the graph's; and its name."""
    batches = list(data.train or ())
    if batches:

        def accuracy(state: Callable[..., Any]) -> float:
            with torch.no_grad():
                found = [(pytree.tree_leaves(state(*xs))[0].argmax(-1), labels) for *xs, labels in batches]
            right = sum(int((answers == labels).sum()) for answers, labels in found)
            return right / max(sum(labels.numel() for _, labels in found), 1)

        return accuracy, "accuracy"
    given = [in_order(b, graph.signature.inputs) for b in data.calibration or ()]
    inputs = given or [example]
    with torch.no_grad():
        expected = [_outputs(graph, xs) for xs in inputs]
    size = math.sqrt(sum(float(e.square().sum()) for e in expected))

    def closeness(state: Callable[..., Any]) -> float:
        with torch.no_grad():
            pairs = zip(inputs, expected, strict=True)
            squared = [float((_outputs(state, xs) - e).square().sum()) for xs, e in pairs]
        return 1 - math.sqrt(sum(squared)) / max(size, 1e-30)

    return closeness, "1 - relative distance of the outputs"


def _outputs(run: Callable[..., Any], inputs: Sequence[Tensor]) -> Tensor:
    """All outputs as one vector; what is no number counts as zero."""
    leaves = [x for x in pytree.tree_leaves(run(*inputs)) if isinstance(x, Tensor)]
    return torch.cat([x.double().flatten() for x in leaves]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _by_layer(found: list[Damage]) -> dict[str, dict[str, Damage]]:
    """The layers, the one with the largest sum of drops first."""
    rows: dict[str, dict[str, Damage]] = {}
    for damage in found:
        rows.setdefault(damage.layer, {})[damage.format] = damage
    return dict(sorted(rows.items(), key=lambda row: -sum(d.drop for d in row[1].values())))


def _print(found: list[Damage], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = _by_layer(found)
    worst = max((abs(d.drop) for d in found), default=0.0) or 1.0
    table = Table(title=f"drop of the metric ({metric}) with one layer's weights in")
    table.add_column("layer")
    for kind in BITS:
        table.add_column(kind, justify="right")
    table.add_column(f"{list(BITS)[-1]} drawn")
    for layer, by_format in rows.items():
        last = by_format[list(BITS)[-1]].drop
        bar = "█" * round(max(last, 0.0) / worst * WIDEST_BAR)
        table.add_row(layer, *(f"{by_format[kind].drop:.4f}" for kind in BITS), bar)
    Console().print(table)


def _draw(found: list[Damage], metric: str, path: Path) -> None:
    pyplot = plotter()
    rows = _by_layer(found)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    height = 0.8 / len(BITS)
    for i, kind in enumerate(BITS):
        places = [y + (i - len(BITS) / 2 + 0.5) * height for y in range(len(rows))]
        axes.barh(places, [by_format[kind].drop for by_format in rows.values()], height, label=kind)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"drop of {metric}")
    axes.legend()
    figure.savefig(path)
