"""`mcc tune`: time every tile of a model's layers, so that compiling takes the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcc import compiler
from mcc.backends.cpu import TunedLayer
from mcc.cli.arguments import clear_errors, print_json, read_data, read_inputs, read_model
from mcc.data import Data
from mcc.target import parse_target


def tune_model(
    model: Annotated[str, typer.Argument(help="model.onnx, program.pt2, or package.module:name")],
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=f32[batch:8,784]")] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", help="pass list, or a .yaml recipe")] = "",
    target: Annotated[str, typer.Option(help="see `mcc targets`")] = "cpu",
    data: Annotated[Path | None, typer.Option(help=".npz for passes that need data")] = None,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time all tiles of every layer on one thread and remember them; interrupted, it goes on where it was.

    Example: mcc tune nets:make_mlp -i input=f32[64,784]
    """
    with clear_errors():
        example, dims = read_inputs(inputs or [])
        graph = compiler.load_graph(read_model(model), example, {}, dims)
        options = compiler.Options(parse_target(target), read_data(data) or Data(), seed=seed)
        example = example or compiler.example_of(graph)
        rows = compiler.tune_layers(graph, example, compiler.resolve_passes(passes), options)
    if as_json:
        print_json({"layers": [vars(row) | {"best": row.best} for row in rows]})
        return
    _print(rows)


def _print(rows: list[TunedLayer]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "op", "kernel", "best tile", "us", "first tile", "us")
    for row in rows:
        first = next(iter(row.seconds))
        best = row.best
        table.add_row(
            row.layer,
            row.op,
            row.kernel,
            best,
            f"{row.seconds[best] * 1e6:.1f}",
            first,
            f"{row.seconds[first] * 1e6:.1f}",
        )
    Console().print(table)
    if rows:
        first_sum = sum(next(iter(row.seconds.values())) for row in rows)
        best_sum = sum(row.seconds[row.best] for row in rows)
        typer.echo(f"{len(rows)} layers: {best_sum * 1e3:.3f} ms, {first_sum * 1e3:.3f} ms with the first tiles")
