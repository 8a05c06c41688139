"""`mcc compile`: a model becomes an artifact file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcc import compiler
from mcc.cli.arguments import clear_errors, read_data, read_inputs, read_model


def compile_model(
    model: Annotated[str, typer.Argument(help="model.onnx, program.pt2, or package.module:name")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the artifact file to write")],
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=f32[batch:8,784]")] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", help="pass list, or a .yaml recipe")] = "",
    target: Annotated[str, typer.Option(help="see `mcc targets`")] = "cpu",
    data: Annotated[Path | None, typer.Option(help=".npz with x (and y) for calibration and training")] = None,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    tuning: Annotated[str, typer.Option(help="measure: time tiles here; model: take the first")] = "measure",
) -> None:
    """Compress and compile a model.

    Example: mcc compile nets:make_mlp -i input=f32[batch:64,784] -p "prune-weights{ratio=0.9}" -o mlp.mcc
    """
    with clear_errors():
        if tuning not in ("measure", "model"):
            raise typer.BadParameter("is measure or model", param_hint="--tuning")
        example, dims = read_inputs(inputs or [])
        artifact = compiler.compile(
            read_model(model), example or None, passes=passes, dynamic_shapes=dims, target=target, data=read_data(data),
            seed=seed, tuning="model" if tuning == "model" else "measure",
        )  # fmt: skip
        if isinstance(artifact, compiler.Deferred):
            raise typer.BadParameter("a PyTorch module needs example inputs", param_hint="--input")
        artifact.save(out)
        typer.echo(str(artifact.report))
        typer.echo(f"{out}: {out.stat().st_size:,} bytes")
