"""`mcc bench`: time a model under mcc and its peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mcc import compiler
from mcc.backends.cpu import KernelTime
from mcc.benchmark import interleave, onnxruntime_engine, openvino_engine
from mcc.cli.arguments import clear_errors, print_json, read_data, read_inputs, read_model
from mcc.data import Data
from mcc.errors import SpecError

LAYER_RUNS = 20
_PEERS = {"ONNX Runtime": onnxruntime_engine, "OpenVINO": openvino_engine}


def bench_model(
    model: Annotated[str, typer.Argument(help="model.onnx or package.module:name")],
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=f32[batch:8,784]")] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", help="pass list, or a .yaml recipe")] = "",
    data: Annotated[Path | None, typer.Option(help=".npz for passes that need data")] = None,
    target: Annotated[str, typer.Option(help="see `mcc targets`")] = "cpu",
    threads: Annotated[int, typer.Option(help="for every engine")] = 1,
    runs: Annotated[int, typer.Option(help="of every engine")] = 200,
    layers: Annotated[bool, typer.Option(help="time every kernel instead, beside the peak")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time mcc, torch eager, ONNX Runtime and OpenVINO in turns, with equal threads; peers that lack are named.

    Example: mcc bench nets:make_mlp -i input=f32[1,784] --threads 1
    """
    with clear_errors():
        if threads < 1 or runs < 1:
            raise SpecError("threads and runs are at least 1")
        example, dims = read_inputs(inputs or [])
        found = read_model(model)
        graph = compiler.load_graph(found, example, {}, dims)
        example = example or compiler.example_of(graph)
        if layers:
            options = compiler.Options(target, read_data(data) or Data())
            profiler = compiler.layer_profiler(graph, example, compiler.resolve_passes(passes), options)
            _print_layers(profiler.measure(LAYER_RUNS, threads), threads, as_json=as_json)
            return
        engines: dict[str, Callable[[], Any]] = {}
        torch.set_num_threads(threads)
        eager = found.eval() if isinstance(found, torch.nn.Module) else graph
        engines["torch eager"] = lambda: _without_gradients(eager, example)
        arrays = [x.numpy() for x in example]
        missing = _add_peers(engines, found, example, arrays, threads)
        artifact = compiler.compile(graph, example, passes=passes, data=read_data(data), target=target, threads=threads)
        if len(artifact.inputs) != len(arrays):
            raise SpecError(
                f"{passes} changes what the model takes: there is nothing to compare it with",
                remedy="leave that pass out, or see --layers",
            )
        engines[f"mcc {passes}".strip()] = lambda: artifact(*arrays)
        timings = interleave(engines, runs)
    if as_json:
        print_json({"timings": {name: vars(timing) for name, timing in timings.items()}, "not_measured": missing})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}, {runs} runs of each, in turns")
    for column in ("engine", "min ms", "median ms", "median, torch eager = 1"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, timing in timings.items():
        ratio = timings["torch eager"].median_ms / timing.median_ms
        table.add_row(name, f"{timing.min_ms:.4f}", f"{timing.median_ms:.4f}", f"{ratio:.2f} times as fast")
    Console().print(table)
    for name, reason in missing.items():
        typer.echo(f"not measured: {name}: {reason}")


def _print_layers(rows: list[KernelTime], threads: int, *, as_json: bool) -> None:
    """Every kernel, the slowest first."""
    if as_json:
        print_json({"layers": [vars(row) for row in rows]})
        return
    from rich.console import Console
    from rich.table import Table

    total = sum(row.milliseconds for row in rows)
    table = Table(title=f"{len(rows)} kernels, {total:.3f} ms with --threads {threads}, the slowest first")
    for column in ("layer", "op", "kernel", "ms", "% of time", "% of peak"):
        table.add_column(column, justify="right" if column in ("ms", "% of time", "% of peak") else "left")
    for row in sorted(rows, key=lambda r: -r.milliseconds):
        peak = "" if row.percent_of_peak is None else f"{row.percent_of_peak:.0f}"
        share = f"{100 * row.milliseconds / total:.1f}"
        table.add_row(row.layer, row.op, row.kernel, f"{row.milliseconds:.4f}", share, peak)
    Console().print(table)


def _without_gradients(model: Callable[..., Any], inputs: tuple[Any, ...]) -> object:
    with torch.inference_mode():
        return model(*inputs)


def _add_peers(
    engines: dict[str, Callable[[], Any]], model: Any, example: tuple[Any, ...], arrays: list[np.ndarray], threads: int
) -> dict[str, str]:
    """Add the peers that can run the model; returns those that cannot, with the reason."""
    missing: dict[str, str] = {}
    try:
        proto = Path(model).read_bytes() if isinstance(model, str) else _to_onnx(model, example)
    except Exception as error:  # noqa: BLE001 (a peer that cannot be measured is a row, whatever ails it)
        return dict.fromkeys(_PEERS, f"no ONNX form: {(str(error) or repr(error)).splitlines()[0]}")
    for name, make in _PEERS.items():
        try:
            run = make(proto, threads)
            run(*arrays)
        except Exception as error:  # noqa: BLE001 (as above)
            missing[name] = (str(error) or repr(error)).strip().splitlines()[0]
            continue
        engines[name] = lambda run=run: run(*arrays)  # type: ignore[misc]
    return missing


def _to_onnx(model: torch.nn.Module, example: tuple[Any, ...]) -> bytes:
    program = torch.onnx.export(model.eval(), example, dynamo=True, verbose=False)
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data
