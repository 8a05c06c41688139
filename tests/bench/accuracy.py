"""Trained models on held-out real data: what each way of quantizing keeps, beside the peers' own quantizers.

    MCC_DATA=... python tests/bench/accuracy.py [--only ResNet-20,MiniLM] [--epochs 2] [--seed 0] [--target cpu:avx2]

Prints a Markdown table for each model. ResNet-20 and ResNet-56: top-1 of the 10,000 test images of CIFAR-10; calibrated with 1,000
training images, `--thousand` says which; training with quantizers takes `--epochs` over all 50,000 (about six minutes each
on one core), none with 0. Of classifiers it also says how many answers each of mcc's ways has right that a peer has wrong,
and the other way round, with the probability that so uneven a split comes by chance (two-sided sign test). "several
networks" is ResNet-20 trained on for an epoch with `--networks` seeds (four minutes each on one core).
EfficientNet-Lite0: top-1 of 500 ImageNet images, calibrated with 50 of them. MiniLM: 200 sentences of SST-2 that
calibration, 64 others, did not see: distance of all embeddings from eager's, relative to their norm, and Spearman's
correlation of the similarities of all pairs with those of eager. Needs the extras bench and models.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import peers
from scipy.stats import binomtest
from torch import Tensor, nn

import mcc

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from real_models import RESNETS, cifar, efficientnet_lite0, imagenet, minilm, rank_correlation, resnet, sentences
from zoo import import_torchvision

Batches = list[tuple[Tensor, ...]]
Run = Callable[..., Any]
BATCH = {0: "batch"}
TRAINED = "quantize{{weights='{}', activations='{}'}}; fine-tune{{epochs={}, optimizer='sgd', learning_rate=0.02, distill=0.9}}"


class Augmented:
    """Training images shifted by up to four pixels and flipped, anew in each epoch."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, batch: int = 128) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for picked in order.split(self.batch)[: len(self)]:
            top, left = torch.randint(9, (2,), generator=self.generator).tolist()
            shifted = F.pad(self.images[picked], (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]
            flipped = torch.rand(len(picked), generator=self.generator) < 0.5
            yield torch.where(flipped[:, None, None, None], shifted.flip(3), shifted), self.labels[picked]


def compiled(model: nn.Module, passes: str, batches: Batches, options: argparse.Namespace, train: Any = None) -> Run:
    """The artifact, saved and loaded again."""
    data = mcc.Data(calibration=batches, train=train)
    shapes = tuple(BATCH for _ in batches[0])
    artifact = mcc.compile(
        model, batches[0], passes=passes, data=data, dynamic_shapes=shapes, measure="never", tuning="model",
        seed=options.seed, target=options.target,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "model.mcc")
        return mcc.load(Path(folder) / "model.mcc")


def table(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, tuple[str, ...]]]) -> None:
    print(f"\n{title}\n\n| way | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns), flush=True)
    for name, figures in rows:
        print(f"| {name} | " + " | ".join(figures) + " |", flush=True)


def engines(model: nn.Module, batches: Batches) -> Iterator[tuple[str, Run]]:
    """The peers' static int8 quantizers with the same calibration data; one that fails is a line of the result."""
    proto = torch.onnx.export(model, batches[0], dynamo=True, verbose=False).model_proto
    for name, make in peers(proto, [tuple(x.numpy() for x in b) for b in batches], "int8", 1).items():
        try:
            engine = make()
        except Exception as error:  # noqa: BLE001 (a peer that cannot be measured is a line of the result)
            print(f"{name}: {(str(error) or repr(error)).splitlines()[0]}")
            continue
        yield f"{name}, static int8", lambda *xs, run=engine: torch.as_tensor(run(*(x.numpy() for x in xs))[0])


def answers(run: Run, images: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(x).argmax(1) for x in images.split(batch)])


class Classified:
    """The answers that each way gives for labelled images."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.exact = answers(model, images, batch)
        self.ours: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}

    def row(self, name: str, found: Tensor) -> tuple[str, tuple[str, str]]:
        """How many answers are right, and how many are eager's."""
        right, same = (100 * float((found == wanted).double().mean()) for wanted in (self.labels, self.exact))
        return name, (f"{right:.2f} %", f"{same:.2f} %")

    def of_passes(self, passes: str, run: Run) -> tuple[str, tuple[str, str]]:
        """The row of a list of passes."""
        self.ours[f"`{passes}`"] = found = answers(run, self.images, self.batch)
        return self.row(f"`{passes}`", found)

    def of_peer(self, name: str, run: Run) -> tuple[str, tuple[str, str]]:
        """The row of another engine."""
        self.theirs[name] = found = answers(run, self.images, self.batch)
        return self.row(name, found)

    def compare(self) -> None:
        """Print of each list of passes and each engine what only one of them has right."""
        ours, theirs = ({k: v == self.labels for k, v in part.items()} for part in (self.ours, self.theirs))
        compare("Answers that only one of two has right", ours, theirs)


def compare(title: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Print of each two what only one of them has right, given which answers are."""
    columns = ("right where the other is wrong", "wrong where the other is right", "p")
    rows = ((f"{a} beside {b}", _sign_test(ours[a], theirs[b])) for a in ours for b in theirs)
    table(title, columns, rows)


def _sign_test(ours: Tensor, theirs: Tensor) -> tuple[str, str, str]:
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return str(gained), str(lost), f"{p:.2f}"


def cifar_resnet(data: Path, options: argparse.Namespace, name: str) -> None:
    model = resnet(data, name)
    images, labels = cifar(data, "test", 10_000)
    train, train_labels = cifar(data, "train", 50_000)
    batches = [(x,) for x in train[1000 * options.thousand :][:1000].split(100)]

    found = Classified(model, images, labels, 100)

    def rows() -> Iterator[tuple[str, tuple[str, ...]]]:
        yield found.row("eager", found.exact)
        for tail in ("", "; integer-only", "; correct-bias", "; reconstruct"):
            passes = "fold-batch-norm; quantize" + tail
            yield found.of_passes(passes, compiled(model, passes, batches, options))
        for passes in (
            "fold-batch-norm", "fold-batch-norm; quantize{weight_range='halved'}",
            *("fold-batch-norm; quantize{weights='int4'}" + tail for tail in ("", "; ada-round", "; reconstruct")),
            *("quantize{weights='int2', activations=None}" + tail for tail in ("", "; reconstruct")),
        ):  # fmt: skip
            yield found.row(f"`{passes}`", answers(compiled(model, passes, batches, options), images, 100))
        for name, run in engines(model, batches):
            yield found.of_peer(name, run)
        for weights, activations in (("int4", "int4"), ("int2", "int8")) if options.epochs else ():
            passes = TRAINED.format(weights, activations, options.epochs)
            augmented = Augmented(train, train_labels, options.seed)
            trained = compiled(model, passes, batches, options, augmented)
            yield found.row(f"`{passes}`", answers(trained, images, 100))

    table(f"{name}, CIFAR-10 (a JPEG copy)", ("top-1", "as eager"), rows())
    found.compare()


def several_networks(data: Path, options: argparse.Namespace) -> None:
    """ResNet-20 trained on for an epoch with a seed each: what one network gains or loses by luck, several do not."""
    images, labels = cifar(data, "test", 10_000)
    train, train_labels = cifar(data, "train", 50_000)
    right: dict[str, list[Tensor]] = {}
    for seed in range(options.networks):
        model = _trained_on(resnet(data, "ResNet-20"), Augmented(train, train_labels, seed), seed)
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:1000]
        batches = [(x,) for x in train[chosen].split(100)]
        found = Classified(model, images, labels, 100)

        def rows(
            model: nn.Module = model, batches: Batches = batches, found: Classified = found
        ) -> Iterator[tuple[str, tuple[str, ...]]]:
            yield found.row("eager", found.exact)
            for passes in ("fold-batch-norm; quantize", "fold-batch-norm; quantize{observer='min-max'}"):
                yield found.of_passes(passes, compiled(model, passes, batches, options))
            for name, run in engines(model, batches):
                yield found.of_peer(name, run)

        table(f"ResNet-20 trained on, seed {seed}", ("top-1", "as eager"), rows())
        for name, answered in ({"eager": found.exact} | found.ours | found.theirs).items():
            right.setdefault(name, []).append(answered == labels)
    all_right = {name: torch.cat(parts) for name, parts in right.items()}
    means = ((name, (f"{100 * float(part.double().mean()):.2f} %",)) for name, part in all_right.items())
    table(f"Mean of {options.networks} networks", ("top-1",), means)
    ours = {name: part for name, part in all_right.items() if name in found.ours}
    theirs = {name: part for name, part in all_right.items() if name not in found.ours}
    compare("All their answers that only one of two has right", ours, theirs)


def _trained_on(model: nn.Module, batches: Augmented, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def efficientnet(data: Path, options: argparse.Namespace) -> None:
    model = efficientnet_lite0()
    images, labels = imagenet(data)
    batches = [(x,) for x in images[::10].split(10)]

    found = Classified(model, images, labels, 10)

    def rows() -> Iterator[tuple[str, tuple[str, ...]]]:
        yield found.row("eager", found.exact)
        folded = "fold-batch-norm"
        yield found.row(f"`{folded}`", answers(compiled(model, folded, batches, options), images, 10))
        for passes in ("fold-batch-norm; quantize", "fold-batch-norm; quantize; correct-bias"):
            yield found.of_passes(passes, compiled(model, passes, batches, options))
        for name, run in engines(model, batches):
            yield found.of_peer(name, run)

    table("EfficientNet-Lite0, 500 ImageNet images", ("top-1", "as eager"), rows())
    found.compare()


def sentence_encoder(data: Path, options: argparse.Namespace) -> None:
    model = minilm()
    ids, mask = sentences(data, 264)
    batches = list(zip(ids[:64].split(8), mask[:64].split(8), strict=True))
    held_out = list(zip(ids[64:].split(8), mask[64:].split(8), strict=True))
    with torch.no_grad():
        exact = torch.cat([model(*b) for b in held_out])

    def figures(run: Run) -> tuple[str, ...]:
        found = torch.cat([run(*b) for b in held_out])
        apart = float((found - exact).norm() / exact.norm())
        return f"{apart:.3f}", f"{rank_correlation(found @ found.T, exact @ exact.T):.4f}"

    def rows() -> Iterator[tuple[str, tuple[str, ...]]]:
        for passes in (
            "quantize", "smooth-quant{alpha=0.7}; quantize{observer='percentile-99.999'}",
            "quantize{activations='dynamic'}", "smooth-quant{alpha=0.6}; quantize{activations='dynamic'}",
            "quantize{weights='int4', activations='dynamic', group_size=32}",
            "gptq{group_size=32}; quantize{activations='dynamic'}", "gptq{group_size=32}",
            "gptq{bits=3, group_size=32}",
        ):  # fmt: skip
            yield f"`{passes}`", figures(compiled(model, passes, batches, options))
        for name, run in engines(model, batches):
            yield name, figures(run)

    table("MiniLM sentence encoder, 200 sentences of SST-2", ("error", "ranks"), rows())


MODELS = {
    **{name: partial(cifar_resnet, name=name) for name in RESNETS},
    "several networks": several_networks,
    "EfficientNet-Lite0": efficientnet,
    "MiniLM": sentence_encoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thousand", type=int, default=0)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--target", default="cpu")
    options = parser.parse_args()
    if not os.environ.get("MCC_DATA"):
        raise SystemExit("set MCC_DATA to the folder of real data")
    import_torchvision()  # transformers imports it where it is installed, and fails where it does not load
    torch.set_num_threads(1)
    print(f"target {mcc.parse_target(options.target)}, seed {options.seed}")
    for name in options.only.split(","):
        MODELS[name](Path(os.environ["MCC_DATA"]), options)


if __name__ == "__main__":
    main()
