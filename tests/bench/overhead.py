"""What a call costs beside its kernels: artifacts of few and of many small layers, least time by number of kernels.

    python tests/bench/overhead.py

A layer of 16 x 16 weights is computed in some 20 ns, which counts as overhead here.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

import mcc

COUNTS = (1, 2, 5, 10, 20, 50, 100)
WIDTH, CALLS, REPEATS = 16, 200, 50


def microseconds(count: int) -> float:
    """Least microseconds of one call of a chain of `count` layers."""
    torch.manual_seed(0)
    layers = [part for _ in range(count) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    artifact = mcc.compile(nn.Sequential(*layers).eval(), (torch.randn(1, WIDTH),), verify=False, threads=1)
    x = np.zeros((1, WIDTH), np.float32)
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            artifact(x)
        found.append((time.perf_counter() - started) / CALLS * 1e6)
    return min(found)


def main() -> None:
    times = [microseconds(count) for count in COUNTS]
    for count, least in zip(COUNTS, times, strict=True):
        print(f"{count} kernels: {least:.2f} us a call")
    slope, start = np.polyfit(COUNTS, times, 1)
    print(f"fitted: {start:.2f} us + {slope:.3f} us a kernel")


if __name__ == "__main__":
    main()
