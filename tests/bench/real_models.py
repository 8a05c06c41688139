"""Real models under mcc and its peers, in turns, with equal threads; needs MCC_DATA and the extras bench and models.

Run it with `make bench`, or: python tests/bench/real_models.py [--threads 1] [--runs 60]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mcc
from mcc.benchmark import interleave, onnxruntime_engine, openvino_engine

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from real_models import cifar, efficientnet_lite0, imagenet, minilm, resnet20, sentences
from zoo import import_torchvision

PEERS = {"ONNX Runtime": onnxruntime_engine, "OpenVINO f32": openvino_engine}
Case = tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[Any], str]


def cases(data: Path) -> dict[str, Case]:
    """Models with example inputs, calibration batches and the passes that quantize them."""
    images, _ = cifar(data, "train", 256)
    photos, _ = imagenet(data, 50)
    ids, mask = sentences(data, 64)
    pairs = list(zip(ids.split(8), mask.split(8), strict=True))
    return {
        "ResNet-20": (resnet20(data), (images[:1],), list(images.split(64)), "fold-batch-norm; quantize"),
        "EfficientNet-Lite0": (
            efficientnet_lite0(),
            (photos[:1],),
            list(photos.split(10)),
            "fold-batch-norm; quantize",
        ),
        "MiniLM, 64 tokens": (minilm(), (ids[:1], mask[:1]), pairs, "quantize"),
    }


def engines(case: Case, threads: int, failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Every engine that can run the model, as a call; those that cannot are named in `failed`."""
    model, inputs, calibration, passes = case
    arrays = [x.numpy() for x in inputs]
    found: dict[str, Callable[[], Any]] = {"torch eager": lambda: model(*inputs)}
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    for name, make in PEERS.items():
        try:
            run = make(program.model_proto, threads)
            run(*arrays)
        except Exception as error:  # noqa: BLE001 (a peer that cannot be measured is a line of the result)
            failed[name] = str(error).splitlines()[0]
            continue
        found[name] = lambda run=run: run(*arrays)
    plain = "fold-batch-norm" if "batch" in passes else ""
    data = mcc.Data(calibration=calibration)
    for name, text in (("mcc fp32", plain), ("mcc int8", passes)):
        artifact = mcc.compile(model, inputs, passes=text, data=data, threads=threads, measure="never")
        found[name] = lambda artifact=artifact: artifact(*arrays)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    if not os.environ.get("MCC_DATA"):
        raise SystemExit("set MCC_DATA to the folder of real data")
    import_torchvision()  # transformers imports it where it is installed, and fails where it does not load
    torch.set_num_threads(options.threads)
    console, failed = Console(width=140), dict[str, str]()
    table = Table(
        title=f"median (minimum) ms, batch 1, {options.threads} thread(s), {options.runs} runs of each in turns"
    )
    columns = ("torch eager", *PEERS, "mcc fp32", "mcc int8")
    for column in ("model", *columns):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, case in cases(Path(os.environ["MCC_DATA"])).items():
        with torch.inference_mode():
            timings = interleave(engines(case, options.threads, failed), options.runs)
        cells = [
            f"{timings[c].median_ms:.3f} ({timings[c].min_ms:.3f})" if c in timings else "not measured" for c in columns
        ]
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"target {mcc.parse_target('cpu')}, numpy {np.__version__}")
    for peer, reason in failed.items():
        console.print(f"{peer}: {reason}")


if __name__ == "__main__":
    main()
