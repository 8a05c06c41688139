"""`mcc run`: run an artifact on saved inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mcc.cli.arguments import clear_errors, read_arrays
from mcc.errors import DataError
from mcc.runtime import load


def run_artifact(
    artifact: Annotated[Path, typer.Argument(help="artifact.mcc")],
    inputs: Annotated[Path, typer.Option("--inputs", help=".npz with an array for each input, by name")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=".npz to write the outputs to")] = None,
    threads: Annotated[int | None, typer.Option(help="kernels use; all cores where left out")] = None,
) -> None:
    """Run an artifact and print or save what it returns.

    Example: mcc run mlp.mcc --inputs digits.npz --out answers.npz
    """
    with clear_errors():
        loaded = load(artifact, threads)
        arrays = read_arrays(inputs)
        missing = [s.name for s in loaded.inputs if s.name not in arrays]
        if missing:
            raise DataError(f"{inputs} holds no array {missing[0]}", remedy=f"it holds {', '.join(arrays) or 'none'}")
        returned = loaded(**{s.name: arrays[s.name] for s in loaded.inputs})
        values = _flat(returned)
        results = {spec.name: value for spec, value in zip(loaded.outputs, values, strict=True)}
        if out is None:
            for name, value in results.items():
                typer.echo(f"{name}: {value.dtype}{list(value.shape)}\n{value}")
            return
        np.savez(out, allow_pickle=False, **results)
        typer.echo(f"wrote {', '.join(results)} to {out}")


def _flat(returned: object) -> list[np.ndarray]:
    if isinstance(returned, dict):
        return [leaf for value in returned.values() for leaf in _flat(value)]
    if isinstance(returned, list | tuple):
        return [leaf for value in returned for leaf in _flat(value)]
    assert isinstance(returned, np.ndarray)
    return [returned]
