"""Layers with weights pruned at random: mcc sparse against mcc dense and ONNX Runtime dense, on one thread.

    python tests/bench/sparse.py [--density 0.1] [--pattern 16x1] [--precision fp32,int8] [--target cpu:avx2] [--runs 40] [--only 3x3]

Each layer is called alone, in turns, from NumPy in to NumPy out; a convolution with a relu and one back to as many
channels behind it, both pruned. Images come and go with their channels first, and mcc's transposes of them count. Sparse
kernels are forced, whatever the density at which mcc would read the weight dense.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from unittest import mock

import onnxruntime
import torch
from torch import nn

import mcc
from mcc.backends import cpu
from mcc.benchmark import interleave

# rows (or size of the image), inputs, outputs, kernel; 0 for a linear layer
LAYERS = (
    (1, 1024, 1024, 0), (1, 4096, 1024, 0), (64, 784, 256, 0), (128, 384, 1536, 0), (128, 768, 768, 0),
    (128, 768, 3072, 0), (128, 3072, 768, 0), (28, 256, 128, 1), (28, 128, 512, 1), (14, 512, 256, 1),
    (14, 256, 1024, 1), (14, 1024, 512, 1), (7, 512, 2048, 1), (7, 2048, 512, 1), (56, 64, 64, 3), (28, 128, 128, 3),
    (14, 256, 256, 3), (7, 512, 512, 3), (16, 32, 32, 3), (8, 64, 64, 3),
)  # fmt: skip


def layer(size: int, inputs: int, outputs: int, kernel: int) -> tuple[str, nn.Module, torch.Tensor]:
    """A layer's family, the layer, and an input."""
    if not kernel:
        return "linear", nn.Linear(inputs, outputs), torch.randn(size, inputs)
    there, back = (nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in ((inputs, outputs), (outputs, inputs)))
    return f"{kernel}x{kernel}", nn.Sequential(there, nn.ReLU(), back), torch.randn(1, inputs, size, size)


def reference(model: nn.Module, x: torch.Tensor) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the dense float layer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--pattern", default="")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for precision in options.precision.split(","):
        rows(precision, options)


def rows(precision: str, options: argparse.Namespace) -> None:
    """Print a table: minimum ms of each, and how much faster sparse is."""
    quantize = "; quantize" if precision == "int8" else ""
    prune = f"prune-weights{{ratio={1 - options.density:g}, pattern='{options.pattern}'}}{quantize}"
    print(f"\n{precision}, density {options.density:g}, {options.target}\n")
    print(
        "| layer | sparse ms | dense ms | ONNX Runtime fp32 ms | over dense | over ONNX Runtime |\n|---|--:|--:|--:|--:|--:|"
    )
    gains: dict[str, list[tuple[float, float]]] = {}
    for shape in LAYERS:
        torch.manual_seed(0)
        family, model, x = layer(*shape)
        if options.only not in family:
            continue
        more = {"data": mcc.Data(calibration=[x]), "target": options.target, "threads": 1, "measure": "never"}
        with mock.patch.object(cpu, "prefer_dense", return_value=None):
            sparse = mcc.compile(model.eval(), (x,), passes=prune, **more)
        dense, session = mcc.compile(model, (x,), passes=quantize.removeprefix("; ") or (), **more), reference(model, x)
        given, name = x.numpy(), session.get_inputs()[0].name
        engines = {
            "sparse": partial(sparse, given), "dense": partial(dense, given),
            "peer": partial(session.run, None, {name: given}),
        }  # fmt: skip
        best = {engine: timing.min_ms for engine, timing in interleave(engines, options.runs).items()}
        gains.setdefault(family, []).append((best["dense"] / best["sparse"], best["peer"] / best["sparse"]))
        figures = " | ".join(f"{best[e]:.3f}" for e in ("sparse", "dense", "peer"))
        print(
            f"| {family} {shape[:3]} | {figures} | {gains[family][-1][0]:.2f} | {gains[family][-1][1]:.2f} |",
            flush=True,
        )
    for family, found in gains.items():
        means = [statistics.geometric_mean(g[i] for g in found) for i in range(2)]
        print(f"| geometric mean, {family} | | | | {means[0]:.2f} | {means[1]:.2f} |")


if __name__ == "__main__":
    main()
