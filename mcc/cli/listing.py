"""`mcc passes` and `mcc targets`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import typer

from mcc import compiler
from mcc.cli.arguments import clear_errors, print_json
from mcc.rewrite import Pass
from mcc.target import missing_features, parse_target, target_names


def list_passes(
    name: Annotated[str | None, typer.Argument(help="one pass, with its whole text")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List every pass with its options and source; name one for its whole text.

    Example: mcc passes quantize
    """
    with clear_errors():
        known = compiler.known_passes()
        if name is not None:
            kind = type(compiler.resolve_passes(name)[0])
            typer.echo(f"{name}{{{', '.join(_options(kind))}}}\n\n{inspect.getdoc(kind)}")
            return
    if as_json:
        print_json({n: {"options": _options(kind), "summary": _summary(kind)} for n, kind in known.items()})
        return
    for pass_name, kind in sorted(known.items()):
        typer.echo(f"{pass_name}{{{', '.join(_options(kind))}}}\n    {_summary(kind)}")
        for line in _sources(kind):
            typer.echo(f"    {line}")


def list_targets() -> None:
    """List every target, and what this machine lacks for it.

    Example: mcc targets
    """
    with clear_errors():
        for text in target_names():
            target = parse_target(text)
            missing = missing_features(target)
            state = "runs here" if not missing else f"this machine lacks {', '.join(missing)}"
            typer.echo(f"{text:16} {target}: {', '.join(target.features)} ({state})")


def _options(kind: type[Pass]) -> list[str]:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # passes are dataclasses
    return [f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}" for f in fields]


def _summary(kind: type[Pass]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")


def _sources(kind: type[Pass]) -> list[str]:
    """Lines of the docstring that cite a paper: they name a year."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    return [line.strip() for line in lines if any(f" {year}" in line for year in range(1990, 2030))]
