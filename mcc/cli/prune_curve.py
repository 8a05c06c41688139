"""`mcc inspect --prunable --plot`: the metric, the MACs and the latency over the ratio of what is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from mcc import compiler
from mcc.cli.arguments import print_json
from mcc.cli.figures import check_figure, plotter
from mcc.cli.sensitivity import metric_of
from mcc.compiler import Options
from mcc.cost import graph_size
from mcc.coupling import couple
from mcc.data import Data
from mcc.errors import SpecError
from mcc.passes import PruneChannels, PruneHeads, PruneNeurons
from mcc.pipeline import Pipeline
from mcc.target import parse_target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from mcc.graph import Graph
    from mcc.structured import StructuredPruning

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WAYS = (PruneChannels, PruneHeads, PruneNeurons)


@dataclass(frozen=True)
class Point:
    """What is left after one pass, without training.

    Attributes:
        way: the pass's name.
        ratio: of the indices removed from each group.
        metric: of the graph.
        macs: share of the dense graph's.
        latency_ms: median of the artifact.
    """

    way: str
    ratio: float
    metric: float
    macs: float
    latency_ms: float


def show_curve(graph: Graph, example: tuple[Tensor, ...], data: Data, plot: Path, *, as_json: bool) -> None:
    """Prune by several ratios, each from the graph as it is, print the points and draw them.

    Args:
        graph: the model.
        example: its inputs, for latency, and for the metric where there are no data.
        data: with labels, accuracy counts; else how near outputs stay.
        plot: where to draw to.
        as_json: print JSON.

    Raises:
        SpecError: nothing can be removed, the plot's file has an unknown ending or no folder, or matplotlib is missing.
    """
    check_figure(plot)
    metric, name = metric_of(graph, example, data)
    measured = Data(calibration=data.calibration, train=data.train, evaluate=metric)
    saliency: Any = "l2" if data.calibration is None else "activation"
    open_kinds = {g.kind for g in couple(graph.copy()).open_groups}
    ways = [way for way in WAYS if open_kinds.intersection(way.kinds)]
    if not ways:
        raise SpecError(
            "nothing can be removed from this model", remedy="--prunable without --plot says what blocks it"
        )
    points = []
    for point in _points(graph, example, measured, [w(ratio=r, saliency=saliency) for w in ways for r in RATIOS]):
        typer.echo(f"{point.way} {point.ratio}: {point.metric:.4f}, {point.latency_ms:.3f} ms", err=True)
        points.append(point)
    if as_json:
        print_json({"metric": name, "points": [vars(p) for p in points]})
    else:
        _print(points, name)
    _draw(points, name, plot)


def _points(graph: Graph, example: tuple[Tensor, ...], data: Data, steps: list[StructuredPruning]) -> Iterator[Point]:
    whole = graph_size(graph).macs
    options = Options(data=data, verify=False, measure="never", tuning="model")
    for step in (None, *steps):
        state = graph
        if step is not None:
            state, _ = Pipeline((step,), parse_target("cpu"), Data(data.calibration), verify=False).run(graph, example)
        latency = compiler.median_latency(compiler.compile_graph(state, example, (), options), example)
        share = graph_size(state).macs / max(whole, 1)
        name, ratio = ("dense", 0.0) if step is None else (step.pass_name(), step.ratio)
        yield Point(name, ratio, data.measure(state), share, latency)


def _print(points: list[Point], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"after one pass, without training ({metric})")
    for column in ("pass", "ratio", "metric", "MACs", "latency ms"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for p in points:
        table.add_row(p.way, f"{p.ratio:.1f}", f"{p.metric:.4f}", f"{p.macs:.0%}", f"{p.latency_ms:.3f}")
    Console().print(table)


def _draw(points: list[Point], metric: str, path: Path) -> None:
    pyplot = plotter()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 7), layout="constrained", sharex=True)
    dense = points[0]
    for way in dict.fromkeys(p.way for p in points[1:]):
        line = [dense, *(p for p in points if p.way == way)]
        above.plot([p.ratio for p in line], [p.metric for p in line], marker="o", label=way)
        below.plot(
            [p.ratio for p in line],
            [p.latency_ms / dense.latency_ms for p in line],
            marker="o",
            label=f"{way}: latency",
        )
        below.plot([p.ratio for p in line], [p.macs for p in line], linestyle="--", label=f"{way}: MACs")
    above.set_ylabel(metric)
    below.set_ylabel("share of the dense network's")
    below.set_xlabel("ratio of each group removed")
    above.legend()
    below.legend()
    figure.savefig(path)
