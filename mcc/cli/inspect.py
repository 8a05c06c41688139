"""`mcc inspect`: what is in a model or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcc import compiler
from mcc.cli.arguments import clear_errors, print_json, read_data, read_inputs, read_model
from mcc.cli.prunable import show_prunable
from mcc.cli.prune_curve import show_curve
from mcc.cli.sensitivity import show_sensitivity
from mcc.cost import graph_size, layer_costs
from mcc.errors import SpecError
from mcc.graph import Graph
from mcc.pipeline import Pipeline
from mcc.runtime import load
from mcc.target import parse_target


def inspect_model(
    model: Annotated[str, typer.Argument(help="artifact.mcc, model.onnx, program.pt2, or package.module:name")],
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=f32[batch:8,784]")] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", help="show the model after these passes, too")] = "",
    data: Annotated[Path | None, typer.Option(help=".npz for passes that need data")] = None,
    target: Annotated[str, typer.Option(help="that passes are for, see `mcc targets`")] = "cpu",
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="rank layers by what few bits do to them")] = False,
    prunable: Annotated[bool, typer.Option("--prunable", help="show what channels, heads and neurons can go")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --sensitivity or --prunable: an .svg, .png or .pdf")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="print the graph as text")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show layers with parameters, bytes and MACs; with passes, before and after.

    --sensitivity shows what weights of 8 to 2 bits, layer by layer, do to the accuracy on the data's labels, or, where
    it has none, to the outputs. --prunable shows which channels, heads and neurons structured pruning could remove, and
    what blocks the others; with --plot, what removing them does to the metric, MACs and latency, before any training.

    Example: mcc inspect nets:make_mlp -i input=f32[batch:64,784] -p "prune-weights{ratio=0.9}"
    """
    with clear_errors():
        if plot is not None and not (sensitivity or prunable):
            raise SpecError("--plot draws what --sensitivity or --prunable measures", remedy="add --sensitivity")
        if model.endswith(".mcc"):
            if sensitivity or prunable:
                raise SpecError("an artifact's weights are what they are", remedy="give the model it was made from")
            _print_artifact(model, as_json=as_json)
            return
        example, dims = read_inputs(inputs or [])
        before = compiler.load_graph(read_model(model), example, {}, dims)
        states, taken = {"before": before}, example or compiler.example_of(before)
        steps = compiler.resolve_passes(passes)
        if steps:
            pipeline = Pipeline(steps, parse_target(target), read_data(data))
            states["after"], _, taken = pipeline.run_with_inputs(before, taken)
        if sensitivity:
            show_sensitivity(states.get("after", before), taken, read_data(data), plot, as_json=as_json)
            return
        if prunable and plot is not None:
            show_curve(states.get("after", before), taken, read_data(data), plot, as_json=as_json)
            return
        if prunable:
            show_prunable(states.get("after", before), as_json=as_json)
            return
        if as_json:
            print_json({name: [vars(row) for row in layer_costs(state)] for name, state in states.items()})
            return
        for name, state in states.items():
            _print_state(name, state, graph)


def _print_artifact(path: str, *, as_json: bool) -> None:
    artifact = load(path)
    if as_json:
        print_json(artifact.report.as_dict())
        return
    typer.echo(repr(artifact))
    typer.echo(str(artifact.report))
    typer.echo(artifact.report.layers_text())


def _print_state(name: str, state: Graph, graph: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if graph:
        typer.echo(str(state))
    total = graph_size(state)
    table = Table(title=f"{name}: {total.parameters:,} parameters, {total.stored_bytes:,} bytes, {total.macs:,} MACs")
    for column in ("layer", "op", "parameters", "bytes", "MACs"):
        table.add_column(column, justify="left" if column in ("layer", "op") else "right")
    for row in layer_costs(state):
        table.add_row(row.layer, row.op, f"{row.parameters:,}", f"{row.stored_bytes:,}", f"{row.macs:,}")
    Console().print(table)
