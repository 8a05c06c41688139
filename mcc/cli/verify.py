"""`mcc verify`: check an artifact file, and its answers against a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from mcc import compiler
from mcc.cli.arguments import clear_errors, read_inputs, read_model
from mcc.errors import SpecError, VerificationError
from mcc.runtime import load
from mcc.verify import sample_inputs


def verify_file(
    artifact: Annotated[Path, typer.Argument(help="artifact.mcc")],
    model: Annotated[str | None, typer.Option(help="the model it was made from, to compare answers with")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=f32[batch:8,784]")] = None,
    tolerance: Annotated[float, typer.Option(help="largest difference, relative to the largest output")] = 1e-3,
) -> None:
    """Check hashes, sizes and CPU features; with a model, compare outputs on random inputs.

    Example: mcc verify mlp.mcc --model nets:make_mlp -i input=f32[8,784]
    """
    with clear_errors():
        loaded = load(artifact)
        typer.echo(f"{artifact}: every byte as written; {loaded!r}")
        if model is None:
            return
        example, dims = read_inputs(inputs or [])
        graph = compiler.load_graph(read_model(model), example, {}, dims)
        if len(loaded.inputs) != len(graph.inputs):
            raise SpecError(
                f"{artifact} takes {len(loaded.inputs)} inputs, the model {len(graph.inputs)}: its passes changed them",
                remedy="verify it without the model",
            )
        sample = sample_inputs(example or compiler.example_of(graph), 1)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(graph(*sample))
        found = torch.utils._pytree.tree_leaves(loaded(*sample))
        for spec, e, f in zip(loaded.outputs, expected, found, strict=True):
            error = float((e - f).abs().max() / e.abs().max().clamp(min=1e-12))
            typer.echo(f"output {spec.name}: largest difference {error:.2e} of the largest value")
            if not error <= tolerance:
                raise VerificationError(
                    f"output {spec.name} differs by {error:.2e}, more than {tolerance:g}", pass_text=loaded.passes,
                    node_name=spec.name, remedy="compression changes answers: raise --tolerance, or compare accuracy",
                )  # fmt: skip
