"""Time mcc and its peers over the networks of zoo.py: engines in turns, equal threads and run counts.

    python tests/bench/suite.py [--models ResNet-50,BERT-base] [--threads 1,2] [--precision fp32,int8] [--runs 15]

`--models torchvision:NAME` takes any classifier of torchvision, `transformers:NAME` two layers of that kind of network. `--precision int4` quantizes the weights of linear layers, in groups of 32, and activations per token, as the peers do; `--precision bf16` is for CPUs that multiply bfloat16.
Prints a Markdown table; `--json FILE` and `--plot FILE` keep the figures and draw them. An engine that cannot run a model
is named with the reason. Beside each int8 time stands how far the engine's output is from eager float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Engine, peers
from torch import nn
from zoo import CASES, Case, case_of, settled

import mcc
from mcc.benchmark import interleave
from mcc.target import host_target

CALIBRATION_BATCHES = 4
PASSES = {
    "fp32": "fold-batch-norm",
    "bf16": "fold-batch-norm; round-bfloat16",
    "int8": "fold-batch-norm; quantize",
    "int4": "fold-batch-norm; quantize{weights='int4', activations='dynamic', group_size=32}",
}


@dataclass(frozen=True)
class Row:
    """One engine on one case; times in ms, deviation relative to the norm of eager's output."""

    model: str
    precision: str
    batch: int
    threads: int
    engine: str
    min_ms: float
    median_ms: float
    deviation: float


def measure(name: str, case: Case, setting: tuple[str, int, int], runs: int, failed: dict[str, str]) -> Iterator[Row]:
    """Time all engines on one model at (precision, batch, threads)."""
    precision, batch, threads = setting
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, inputs = settled(case.build()), case.inputs(batch)
    calibration = [case.inputs(batch) for _ in range(CALIBRATION_BATCHES)]
    arrays = [x.numpy() for x in inputs]
    with torch.inference_mode():
        expected = first_output(model(*inputs))
    text = PASSES[precision]
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        text = text.partition(";")[2].strip()
    artifact = mcc.compile(
        model, inputs, passes=text, data=mcc.Data(calibration=calibration), threads=threads, measure="never",
        target="cpu:avx512bf16" if precision == "bf16" and not host_target().bfloat16 else "cpu",
    )  # fmt: skip
    engines: dict[str, Engine] = {"mcc": artifact}
    proto = torch.onnx.export(model, inputs, dynamo=True, verbose=False).model_proto
    known = [tuple(x.numpy() for x in b) for b in calibration]
    for peer, make in peers(proto, known, precision, threads).items():
        try:
            engine = make()
            engine(*arrays)
        except Exception as error:  # noqa: BLE001 (a peer that cannot be measured is a line of the result)
            failed[f"{peer}, {name} {precision}"] = (str(error).strip() or repr(error)).splitlines()[0]
            continue
        engines[peer] = engine
    outputs = {engine: first_output(run(*arrays)) for engine, run in engines.items()}
    calls: dict[str, Callable[[], object]] = {
        engine: lambda run=run: run(*arrays)  # type: ignore[misc]
        for engine, run in engines.items()
    }
    if precision == "fp32":
        compiled = torch.compile(model)
        for engine, run in (("torch eager", model), ("torch.compile", compiled)):
            calls[engine] = lambda run=run: run(*inputs)  # type: ignore[misc]
            outputs[engine] = expected
    with torch.inference_mode():
        timings = interleave(calls, runs)
    scale = float(np.linalg.norm(expected)) or 1.0
    for engine, timing in timings.items():
        apart = float(np.linalg.norm(outputs[engine] - expected)) / scale
        yield Row(name, precision, batch, threads, engine, timing.min_ms, timing.median_ms, apart)


def first_output(outputs: Any) -> Any:
    first = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return np.asarray(first)


def best_ratio(rows: Sequence[Row]) -> float | None:
    """Median time of mcc over that of the fastest of ONNX Runtime and OpenVINO."""
    own = [r.median_ms for r in rows if r.engine == "mcc"]
    others = [r.median_ms for r in rows if r.engine in ("ONNX Runtime", "OpenVINO")]
    return own[0] / min(others) if own and others else None


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    """Rows by case."""
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.precision, row.batch, row.threads), []).append(row)
    return groups


def markdown(rows: Sequence[Row]) -> str:
    """Median (minimum) ms; the last column is mcc over the best of ONNX Runtime and OpenVINO: below 1 mcc is faster."""
    engines = ("mcc", "ONNX Runtime", "OpenVINO", "torch eager", "torch.compile")
    lines = [
        "| model | precision | batch | threads | " + " | ".join(engines) + " | deviation of mcc | mcc / best |",
        "|---|---|--:|--:|" + "--:|" * (len(engines) + 2),
    ]
    ratios: dict[str, list[float]] = {}
    for (model, precision, batch, threads), group in grouped(rows).items():
        by_engine = {r.engine: r for r in group}
        cells = [
            f"{r.median_ms:.2f} ({r.min_ms:.2f})" if (r := by_engine.get(engine)) is not None else ""
            for engine in engines
        ]
        ratio = best_ratio(group)
        if ratio is not None:
            ratios.setdefault(precision, []).append(ratio)
        shown = "" if ratio is None else f"{ratio:.2f}"
        apart = f"{by_engine['mcc'].deviation:.1e}"
        lines.append(f"| {model} | {precision} | {batch} | {threads} | {' | '.join(cells)} | {apart} | {shown} |")
    for precision, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"\n{precision}: geometric mean of mcc / best over {len(values)} rows {mean:.3f}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of mcc / best for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, ratios = [], []
    for (model, precision, batch, threads), group in grouped(rows).items():
        ratio = best_ratio(group)
        if ratio is not None:
            names.append(f"{model} {precision} b{batch} t{threads}")
            ratios.append(ratio)
    figure, axes = pyplot.subplots(figsize=(8, 0.25 * len(names) + 1))
    axes.barh(names, ratios, color=["tab:green" if r <= 1 else "tab:red" for r in ratios])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("time of mcc / time of the best peer")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--threads", default="1")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--batches", default="")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in options.models.split(","):
        case = case_of(name)
        for batch in map(int, options.batches.split(",")) if options.batches else case.batches:
            for threads in map(int, options.threads.split(",")):
                for precision in options.precision.split(","):
                    rows += measure(name, case, (precision, batch, threads), options.runs, failed)
                    print(f"{name} {precision} batch {batch} threads {threads}: done", flush=True)
    print(f"\ntarget {mcc.parse_target('cpu')}, {options.runs} runs of each engine in turns\n")
    print(markdown(rows))
    for peer, reason in failed.items():
        print(f"\nnot measured: {peer}: {reason}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
