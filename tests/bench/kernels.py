"""Single layers of real networks, each as percent of the multiply-add peak that one core was measured to reach.

    python tests/bench/kernels.py [--target cpu:avx2] [--precision fp32,int8] [--threads 2] [--runs 20] [--only depthwise]

The peak is that of the target's own instruction sequence: fused multiply-add for fp32, `dot4` for int8. A layer stands
before another one, so that in int8 it writes codes, as in a network. With more threads the time on one over that on so
many is printed too, both timed in turns, and its mean over the layers that take longer than `SHORT`: below that the
hand-over to the other core, and its cache, count as much as the multiply-adds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from torch import nn

import mcc
from mcc import compiler
from mcc.backends.cpu import KernelTime
from mcc.target import parse_target

READER = 8  # outputs of the layer that reads
TURNS = 3
SHORT = 0.02  # ms


@dataclass(frozen=True)
class Shape:
    """A layer: a linear of (rows, inputs, outputs) where `kernel` is 0, else a convolution of a square image."""

    size: int
    inputs: int
    outputs: int
    kernel: int = 0
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        if not self.kernel:
            return f"linear {self.size}x{self.inputs} -> {self.outputs}"
        kind = "depthwise" if self.groups == self.inputs > 1 else "conv"
        groups = f" groups {self.groups}" if 1 < self.groups < self.inputs else ""
        return f"{kind} {self.kernel}x{self.kernel}/{self.stride} {self.size}^2 {self.inputs} -> {self.outputs}{groups}"

    @property
    def family(self) -> str:
        """By which figures are averaged."""
        if not self.kernel:
            return "linear"
        return "depthwise" if self.groups == self.inputs > 1 else "conv"

    def module(self) -> nn.Module:
        """The layer with a relu, and a small one that reads the result."""
        if not self.kernel:
            return nn.Sequential(nn.Linear(self.inputs, self.outputs), nn.ReLU(), nn.Linear(self.outputs, READER))
        conv = nn.Conv2d(
            self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2, groups=self.groups
        )  # fmt: skip
        return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(self.outputs, READER, 1))

    def example(self) -> torch.Tensor:
        """An input; images lie with their channels first, and the transpose is not counted."""
        if not self.kernel:
            return torch.randn(self.size, self.inputs)
        return torch.randn(1, self.inputs, self.size, self.size)


SHAPES = (
    # transformers: BERT-base, MiniLM, ViT-S, GPT-2 prefill
    Shape(128, 768, 768), Shape(128, 768, 3072), Shape(128, 3072, 768), Shape(128, 384, 384), Shape(128, 384, 1536),
    Shape(128, 1536, 384), Shape(197, 384, 1536), Shape(197, 1536, 384), Shape(512, 768, 768), Shape(512, 768, 2304),
    Shape(64, 784, 256),
    # ResNet-18 and -50
    Shape(224, 3, 64, 7, 2), Shape(56, 64, 64, 3), Shape(28, 128, 128, 3), Shape(14, 256, 256, 3),
    Shape(7, 512, 512, 3), Shape(56, 128, 128, 3, 2), Shape(28, 256, 256, 3, 2), Shape(56, 64, 256, 1),
    Shape(56, 256, 64, 1), Shape(28, 128, 512, 1), Shape(28, 512, 128, 1), Shape(14, 256, 1024, 1),
    Shape(14, 1024, 256, 1), Shape(7, 512, 2048, 1), Shape(7, 2048, 512, 1), Shape(56, 256, 512, 1, 2),
    # CIFAR, EfficientNet, MobileNet, ResNeXt, U-Net, ConvNeXt
    Shape(32, 16, 16, 3), Shape(16, 32, 32, 3), Shape(8, 64, 64, 3), Shape(56, 24, 144, 1), Shape(14, 96, 576, 1),
    Shape(14, 576, 96, 1), Shape(7, 960, 160, 1), Shape(7, 320, 1280, 1), Shape(28, 40, 240, 1),
    Shape(112, 24, 24, 3), Shape(128, 32, 32, 3), Shape(64, 64, 64, 3), Shape(14, 768, 384, 3), Shape(14, 192, 192, 5),
    Shape(56, 128, 128, 3, 1, 32),
    Shape(112, 32, 32, 3, 1, 32), Shape(56, 144, 144, 3, 1, 144), Shape(28, 192, 192, 3, 2, 192),
    Shape(14, 576, 576, 3, 1, 576), Shape(7, 960, 960, 3, 1, 960), Shape(28, 240, 240, 5, 1, 240),
    Shape(56, 96, 96, 7, 1, 96),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What was measured of a layer.

    Attributes:
        milliseconds: on one thread.
        percent: of the peak, on one thread.
        speedup: the time on one thread over that on several.
    """

    milliseconds: float
    percent: float
    speedup: float


def measured(shape: Shape, precision: str, options: argparse.Namespace) -> Result:
    """Time one layer, the numbers of threads in turns."""
    torch.manual_seed(0)
    x = shape.example()
    graph = mcc.capture(shape.module().eval(), (x,))
    compiling = compiler.Options(parse_target(options.target), mcc.Data(calibration=[x]), verify=False)
    steps = compiler.resolve_passes("quantize" if precision == "int8" else "")
    profiler = compiler.layer_profiler(graph, (x,), steps, compiling)
    best: dict[int, KernelTime] = {}
    for threads in [1, options.threads] * TURNS if options.threads > 1 else [1]:
        (row,) = [row for row in profiler.measure(options.runs, threads) if row.layer == "0"]
        best[threads] = min(row, best.get(threads, row), key=lambda r: r.milliseconds)
    percent = best[1].percent_of_peak
    assert percent is not None
    return Result(best[1].milliseconds, percent, best[1].milliseconds / best[options.threads].milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default="", help="a part of the layer's text")
    options = parser.parse_args()
    print(f"target {parse_target(options.target)}, one thread, least of {options.runs} runs")
    for precision in options.precision.split(","):
        families: dict[str, list[Result]] = {}
        for shape in (s for s in SHAPES if options.only in str(s)):
            found = measured(shape, precision, options)
            families.setdefault(shape.family, []).append(found)
            scaled = f", {found.speedup:.2f} times as fast on {options.threads} threads" if options.threads > 1 else ""
            microseconds = found.milliseconds * 1e3
            print(f"{precision} {shape}: {microseconds:.0f} us, {found.percent:.0f} %{scaled}", flush=True)
        for family, results in families.items():
            mean = statistics.geometric_mean(r.percent for r in results)
            print(f"{precision} {family}: geometric mean {mean:.1f} % over {len(results)} shapes")
            if options.threads > 1:
                long = [r.speedup for r in results if r.milliseconds > SHORT]
                print(
                    f"{precision} {family}: speedup {statistics.geometric_mean(r.speedup for r in results):.2f}, "
                    f"{statistics.geometric_mean(long):.2f} over {len(long)} that take longer than {SHORT * 1e3:.0f} us"
                )


if __name__ == "__main__":
    main()
