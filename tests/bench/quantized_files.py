"""Time mcc and its peers on one file: an ONNX model that ONNX Runtime has quantized to int8.

    python tests/bench/quantized_files.py [--models ResNet-18,ViT-S/16] [--threads 1] [--runs 15]

Prints a Markdown table; deviations are from the file as ONNX Runtime computes it without fusing anything. Engines take
turns in one process. Needs the extra bench.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from peers import quantized_onnx
from suite import first_output
from zoo import case_of, settled

import mcc
from mcc.benchmark import interleave, onnxruntime_engine, openvino_engine

MODELS = "ResNet-18,MobileNetV2,EfficientNet-Lite0,U-Net,ViT-S/16,MiniLM-L6"
CALIBRATION_BATCHES = 4


def row(name: str, threads: int, runs: int) -> str:
    case = case_of(name)
    torch.manual_seed(0)
    model, inputs = settled(case.build()), case.inputs(1)
    calibration = [tuple(x.numpy() for x in case.inputs(1)) for _ in range(CALIBRATION_BATCHES)]
    data = quantized_onnx(torch.onnx.export(model, inputs, dynamo=True, verbose=False).model_proto, calibration)
    file, arrays = onnx.load_from_string(data), [x.numpy() for x in inputs]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(data, options)
    expected = plain.run(None, {i.name: a for i, a in zip(plain.get_inputs(), arrays, strict=True)})[0]
    engines: dict[str, Any] = {
        "mcc": mcc.compile(file, threads=threads, measure="never"),
        "ONNX Runtime": onnxruntime_engine(data, threads), "OpenVINO": openvino_engine(file, threads),
    }  # fmt: skip
    timings = interleave({n: lambda run=run: run(*arrays) for n, run in engines.items()}, runs)  # type: ignore[misc]
    cells = []
    for engine, run in engines.items():
        apart = float(np.linalg.norm(first_output(run(*arrays)) - expected) / np.linalg.norm(expected))
        cells.append(f"{timings[engine].median_ms:.2f} ({timings[engine].min_ms:.2f}), {apart:.1e}")
    ratio = timings["mcc"].median_ms / min(timings[n].median_ms for n in ("ONNX Runtime", "OpenVINO"))
    return f"| {name} | {' | '.join(cells)} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| file | mcc | ONNX Runtime | OpenVINO | mcc / best |\n|---|--:|--:|--:|--:|", flush=True)
    for name in options.models.split(","):
        print(row(name, options.threads, options.runs), flush=True)


if __name__ == "__main__":
    main()
