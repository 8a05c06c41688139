"""CIFAR-10 ResNets with channels or whole blocks removed and trained on: accuracy, MACs, bytes and latency.

    MCC_DATA=... python tests/bench/pruning.py [--model ResNet-56] [--epochs 12] [--only blocks] [--threads 1] [--seed 0]

Top-1 of the 10,000 test images through the loaded artifact; training takes `--epochs` over all 50,000 training images,
shifted and flipped, with the dense network for a teacher. Latency: batch 1, in turns with the dense artifact. Needs the
extra models.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accuracy import Augmented, answers
from torch import Tensor

import mcc
from mcc.benchmark import interleave

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from real_models import RESNETS, cifar, resnet

TRAINED = "; fine-tune{{epochs={}, optimizer='sgd', learning_rate=0.05, weight_decay=0.0001, distill=0.9, teacher='captured'}}"
WAYS = {
    "ResNet-20": (
        "prune-channels{ratio=0.5, of='macs', scope='global', saliency='taylor', align=4}",
        "prune-blocks{ratio=0.2, of='macs', saliency='taylor'}; prune-channels{ratio=0.4, of='macs', scope='global', "
        "saliency='taylor', align=8}",
    ),
    "ResNet-56": (
        "prune-blocks{of='macs', ratio=0.6, saliency='taylor'}",
        "prune-channels{ratio=0.6, of='macs', scope='global', saliency='taylor', align=8}",
    ),
}


def loaded(artifact: mcc.Artifact) -> tuple[mcc.Artifact, int]:
    """The artifact saved and loaded again, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mcc"
        artifact.save(path)
        return mcc.load(path), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ResNet-56", choices=RESNETS)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "MCC_DATA" not in os.environ:
        parser.error("set MCC_DATA to the folder with cifar10_jpeg_train.npz")
    torch.set_num_threads(options.threads)
    data = Path(os.environ["MCC_DATA"])
    images, labels = cifar(data, "test", 10_000)
    train, targets = cifar(data, "train", 50_000)
    model = resnet(data, options.model)
    shapes = {"dynamic_shapes": ({0: "batch"},), "measure": "never", "threads": options.threads}
    dense, size = loaded(mcc.compile(model, (images[:2],), **shapes))
    print(f"\n{options.model}, seed {options.seed}, {options.epochs} epochs\n")
    print("| way | MACs | top-1 | file bytes | batch 1, ms | dense over it | minutes |\n|---|--:|--:|--:|--:|--:|--:|")
    macs = dense.report.passes[-1].size.macs / 2
    print(f"| dense | {macs:,.0f} | {accuracy(dense, images, labels):.2f} % | {size:,} | | | |", flush=True)
    for way in [w for w in WAYS[options.model] if options.only in w]:
        started = time.perf_counter()
        more = mcc.Data(train=Augmented(train, targets, options.seed))
        passes = way + TRAINED.format(options.epochs)
        pruned, size = loaded(mcc.compile(model, (images[:2],), passes=passes, data=more, seed=options.seed, **shapes))
        minutes = (time.perf_counter() - started) / 60
        image = images[:1].numpy()
        times = interleave({"dense": partial(dense, image), "pruned": partial(pruned, image)}, options.runs)
        median = {engine: timing.median_ms for engine, timing in times.items()}
        macs = pruned.report.passes[-1].size.macs / 2
        print(
            f"| `{way}` | {macs:,.0f} | {accuracy(pruned, images, labels):.2f} % | {size:,} | {median['pruned']:.3f} | "
            f"{median['dense'] / median['pruned']:.2f} | {minutes:.0f} |",
            flush=True,
        )


def accuracy(artifact: mcc.Artifact, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose label is the largest output."""
    return 100 * float((answers(artifact, images, 100) == labels).float().mean())


if __name__ == "__main__":
    main()
