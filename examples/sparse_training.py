"""Five ways to a sparse network, compared on MNIST: zeros at once, by a schedule, by movement, and masks that move.

Run it with: python examples/sparse_training.py [--epochs 6] [--ratios 0.95,0.98]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mnist_mlp import SEED, Batches, Digits, accuracy, calibration, make_network, train
from rich.console import Console
from rich.table import Table
from torch import nn

import mcc

# label, whether it starts from the trained network, passes before the fine-tune
WAYS = (
    ("magnitude, at once", True, "prune-weights{{ratio={}}}"),
    ("magnitude, cubic schedule", True, "prune-weights{{ratio={}, schedule='cubic'}}"),
    ("movement, cubic schedule", True, "prune-weights{{ratio={}, schedule='cubic', saliency='movement'}}"),
    ("masks that move (RigL)", True, "rigl{{ratio={}}}"),
    ("untrained, fixed masks", False, "prune-weights{{ratio={}, scope='erk'}}"),
    ("untrained, masks that move (RigL)", False, "rigl{{ratio={}}}"),
)


def sparse(network: nn.Module, passes: str, digits: Digits) -> mcc.Artifact:
    """The network with the passes applied, compiled."""
    return mcc.compile(
        network, (digits.test[0][:64].clone(),), passes=passes, seed=SEED, dynamic_shapes={"input": {0: "batch"}},
        data=mcc.Data(train=Batches(digits, SEED), calibration=calibration(digits)), measure="never",
    )  # fmt: skip


def main() -> None:
    """Train, prune each way, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="of training; untrained networks get as many twice")
    parser.add_argument("--ratios", default="0.95,0.98", help="of weights that are zero")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = Digits.load(Path(__file__).parent / "data" / "mnist.npz")
    trained, untrained = make_network(), make_network()
    train(trained, digits, options.epochs)
    console = Console(width=120)
    console.print(f"seed {SEED}; the dense network reaches {accuracy(trained, digits):.2%} of the 10,000 test images")
    ratios = [float(r) for r in options.ratios.split(",")]
    table = Table("way", *(f"{r:.0%} zeros" for r in ratios))
    for label, from_trained, way in WAYS:
        found = []
        for ratio in ratios:
            epochs, rate = (options.epochs, 1e-3) if from_trained else (2 * options.epochs, 2e-3)
            passes = f"{way.format(ratio)}; fine-tune{{epochs={epochs}, learning_rate={rate}}}"
            artifact = sparse(trained if from_trained else untrained, passes, digits)
            found.append(f"{accuracy(artifact, digits):.2%}")
        table.add_row(label, *found)
    console.print(table)


if __name__ == "__main__":
    main()
