"""Pruned layers: mcc sparse against mcc dense, ONNX Runtime dense and, where it is installed, DeepSparse, on one thread.

    python tests/bench/sparse.py [--density 0.1] [--pattern 16x1] [--precision fp32,int8] [--target cpu:avx2] [--only 3x3]
        [--runs 40] [--deepsparse there/bin/python] [--networks resnet50,mobilenet_v2] [--rows 1,8,64]

With networks, those of torchvision (random weights, all layers but the first and those of single channels pruned) instead of
layers. Each layer is called alone, in turns, from NumPy in to NumPy out; a convolution with a relu and one back to as many
channels behind it, both pruned. Images come and go with their channels first, and mcc's transposes of them count. Sparse
kernels are forced, whatever the density at which mcc would read the weight dense; in networks mcc chooses. DeepSparse
1.8, the last one, reads the same pruned float32 layers in a process of its own (see deepsparse_peer.py).

With rows, linear layers alone, each called with so many, by artifacts that take any number of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from torch import nn
from zoo import import_torchvision

import mcc
from mcc.backends import cpu
from mcc.benchmark import interleave
from mcc.masks import Pattern, choose

# rows (or size of the image), inputs, outputs, kernel; 0 for a linear layer
LAYERS = (
    (1, 1024, 1024, 0), (1, 4096, 1024, 0), (64, 784, 256, 0), (128, 384, 1536, 0), (128, 768, 768, 0),
    (128, 768, 3072, 0), (128, 3072, 768, 0), (28, 256, 128, 1), (28, 128, 512, 1), (14, 512, 256, 1),
    (14, 256, 1024, 1), (14, 1024, 512, 1), (7, 512, 2048, 1), (7, 2048, 512, 1), (56, 64, 64, 3), (28, 128, 128, 3),
    (14, 256, 256, 3), (7, 512, 512, 3), (16, 32, 32, 3), (8, 64, 64, 3),
)  # fmt: skip
PEER_TURNS = 5
COLOURS = 3
FAMILIES = {0: "linear", 1: "1x1", 3: "3x3"}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of torchvision, and an image."""
    models: Any = import_torchvision().models
    return getattr(models, name)(weights=None), torch.randn(1, 3, 224, 224)


def layer(size: int, inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, torch.Tensor]:
    """A layer, and an input."""
    if not kernel:
        return nn.Linear(inputs, outputs), torch.randn(size, inputs)
    there, back = (nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in ((inputs, outputs), (outputs, inputs)))
    return nn.Sequential(there, nn.ReLU(), back), torch.randn(1, inputs, size, size)


def prune(model: nn.Module, density: float, pattern: str) -> None:
    """Set the weights of least magnitude to zero, layer by layer; colours and single channels are left."""
    weights = {name: p.data for name, p in model.named_parameters() if p.dim() > 1 and p.shape[1] > COLOURS}
    scores = {name: weight.abs() for name, weight in weights.items()}
    for name, mask in choose(scores, 1 - density, "layer", Pattern.parse(pattern, 1 - density)).items():
        weights[name].mul_(mask)


def reference(model: nn.Module, x: torch.Tensor) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the float layer, which reads zeros as any number."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


class DeepSparse:
    """The peer process."""

    def __init__(self, python: str, folder: Path) -> None:
        command = [python, str(Path(__file__).parent / "deepsparse_peer.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder

    def ask(self, **question: Any) -> list[float]:
        """One question, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: list[float] = json.loads(self.process.stdout.readline())
        return answer

    def load(self, model: nn.Module, x: torch.Tensor, wanted: np.ndarray) -> None:
        """Give it a layer, and see that it computes the same."""
        paths = {name: str(self.folder / name) for name in ("model.onnx", "input.npy", "output.npy")}
        torch.onnx.export(model, (x,), paths["model.onnx"], dynamo=False, opset_version=13)
        np.save(paths["input.npy"], x.numpy())
        self.ask(model=paths["model.onnx"], input=paths["input.npy"], output=paths["output.npy"])
        np.testing.assert_allclose(np.load(paths["output.npy"]), wanted, rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--pattern", default="")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", default="")
    parser.add_argument("--networks", default="")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--deepsparse", default="", help="the Python that has it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peer = DeepSparse(options.deepsparse, Path(folder)) if options.deepsparse else None
        for precision in options.precision.split(","):
            rows(precision, options, peer)


def rows(precision: str, options: argparse.Namespace, peer: DeepSparse | None) -> None:
    """Print a table: minimum ms of each, and how much faster sparse is."""
    quantize = "quantize" if precision == "int8" else ""
    others = ("dense", "ONNX Runtime fp32", *(["DeepSparse fp32"] if peer else []))
    pattern = options.pattern or "single weights"
    print(f"\n{precision}, density {options.density:g}, {pattern}, {options.target}\n")
    print(f"| layer | sparse ms | {' ms | '.join(others)} ms | over {' | over '.join(others)} |")
    print("|---" + "|--:" * (1 + 2 * len(others)) + "|")
    gains: dict[str, list[list[float]]] = {}
    for label, family, make in cases(options):
        torch.manual_seed(0)
        model, x = make()
        prune(model.eval(), options.density, options.pattern)
        best = timed(model, x, quantize, options, peer)
        gains.setdefault(family, []).append([best[o] / best["sparse"] for o in others])
        figures = [f"{best[e]:.3f}" for e in ("sparse", *others)] + [f"{gain:.2f}" for gain in gains[family][-1]]
        print(f"| {label} | {' | '.join(figures)} |", flush=True)
    for family, found in gains.items():
        means = [f"{statistics.geometric_mean(column):.2f}" for column in zip(*found, strict=True)]
        print(f"| geometric mean, {family} |{' |' * (1 + len(others))} {' | '.join(means)} |")


def cases(options: argparse.Namespace) -> list[tuple[str, str, Callable[[], tuple[nn.Module, torch.Tensor]]]]:
    """Of each row a label, its family, and what makes the model and its input."""
    if options.networks:
        return [(name, "networks", partial(network, name)) for name in options.networks.split(",")]
    layers = list(LAYERS)
    if options.rows:
        shapes = dict.fromkeys((inputs, outputs) for _, inputs, outputs, kernel in LAYERS if not kernel)
        layers = [(rows, *shape, 0) for shape in shapes for rows in options.rows]
    named = [(f"{FAMILIES[shape[3]]} {shape[:3]}", FAMILIES[shape[3]], partial(layer, *shape)) for shape in layers]
    return [row for row in named if options.only in row[1]]


@contextmanager
def sparse_at_any_density() -> Iterator[None]:
    """Have every pruned weight stored and read sparse."""
    with (
        mock.patch.object(cpu, "prefer_dense", return_value=None),
        mock.patch.object(sys.modules[cpu.select.__module__], "unsure", return_value=False),
    ):
        yield


def timed(
    model: nn.Module, x: torch.Tensor, quantize: str, options: argparse.Namespace, peer: DeepSparse | None
) -> dict[str, float]:
    """Least ms of each engine."""
    more = {"data": mcc.Data(calibration=[x]), "target": options.target, "threads": 1, "measure": "never"}
    more |= {"dynamic_shapes": {"input": {0: "rows"}}} if options.rows else {}
    steps = "fold-batch-norm; keep-zeros" + (f"; {quantize}" if quantize else "")
    with nullcontext() if options.networks else sparse_at_any_density():
        sparse = mcc.compile(model, (x,), passes=steps, **more)
    dense, session = mcc.compile(model, (x,), passes=quantize or (), **more), reference(model, x)
    given, name = x.numpy(), session.get_inputs()[0].name
    engines = {
        "sparse": partial(sparse, given), "dense": partial(dense, given),
        "ONNX Runtime fp32": partial(session.run, None, {name: given}),
    }  # fmt: skip
    best = {engine: timing.min_ms for engine, timing in interleave(engines, options.runs).items()}
    if peer is None:
        return best
    with torch.no_grad():
        peer.load(model, x, model(x).numpy())
    times: list[float] = []
    for _ in range(PEER_TURNS):
        times += peer.ask(runs=max(1, options.runs // PEER_TURNS))
        turn = time.perf_counter()
        sparse(given)
        best["sparse"] = min(best["sparse"], (time.perf_counter() - turn) * 1e3)
    return best | {"DeepSparse fp32": min(times) * 1e3}


if __name__ == "__main__":
    main()
