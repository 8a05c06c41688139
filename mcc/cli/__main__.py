"""The `mcc` command."""

from __future__ import annotations

import typer

from mcc.cli.bench import bench_model
from mcc.cli.compile import compile_model
from mcc.cli.inspect import inspect_model
from mcc.cli.listing import list_passes, list_targets
from mcc.cli.run import run_artifact
from mcc.cli.tune import tune_model
from mcc.cli.verify import verify_file

app = typer.Typer(
    help="mcc makes neural networks smaller and faster.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command("compile")(compile_model)
app.command("inspect")(inspect_model)
app.command("run")(run_artifact)
app.command("bench")(bench_model)
app.command("tune")(tune_model)
app.command("verify")(verify_file)
app.command("passes")(list_passes)
app.command("targets")(list_targets)

if __name__ == "__main__":
    app()
