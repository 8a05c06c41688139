"""The worked example: a 784-256-128-10 network on MNIST, pruned, quantized, compiled, and measured beside its peers.

Run it with `make demo`, or: python examples/mnist_mlp.py [--epochs 12]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mcc
from mcc.benchmark import Timing, interleave, onnxruntime_engine
from mcc.passes import FineTune, PruneWeights, Quantize

SEED = 0
BATCHES = (1, 64)
THREADS = (1, 2)
CALLS = tuple((batch, threads) for batch in BATCHES for threads in THREADS)
BATCH = 128
Engine = Callable[[Any], Any]


@dataclass
class Digits:
    """MNIST, pixels normalized by the mean and deviation of the training set.

    Attributes:
        train: [60000, 784] float32, and labels.
        test: [10000, 784] float32, and labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, path: Path) -> Digits:
        """Read the committed .npz."""
        with np.load(path, allow_pickle=False) as data:
            images = [
                torch.from_numpy(data[k].reshape(-1, 784).astype(np.float32) / 255) for k in ("x_train", "x_test")
            ]
            labels = [torch.from_numpy(data[k].astype(np.int64)) for k in ("y_train", "y_test")]
        mean, deviation = images[0].mean(), images[0].std()
        train, test = ((x - mean) / deviation for x in images)
        return cls((train, labels[0]), (test, labels[1]))


class Batches:
    """The training set in batches, in an order that depends on the seed and the epoch alone."""

    def __init__(self, digits: Digits, seed: int) -> None:
        self.images, self.labels = digits.train
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for start in range(0, len(self) * BATCH, BATCH):
            chosen = order[start : start + BATCH]
            yield self.images[chosen], self.labels[chosen]


def make_network() -> nn.Sequential:
    """The three-layer network of the survey."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def train(network: nn.Module, digits: Digits, epochs: int) -> None:
    """Train from scratch."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    batches = Batches(digits, SEED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(batches))
    for _ in track(range(epochs), description="training the dense network"):
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def accuracy(run: Engine, digits: Digits) -> float:
    """Fraction of the 10,000 test images that are classified right."""
    images, labels = digits.test
    with torch.no_grad():
        right = sum(
            int((run(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        )
    return right / len(images)


def recipes(epochs: int) -> dict[str, list[mcc.Pass]]:
    """What each row does to the trained network."""
    tune = FineTune(epochs=epochs, learning_rate=1e-3)
    return {
        "mcc dense fp32": [],
        "mcc pruned 50 %": [PruneWeights(ratio=0.5), tune],
        **{
            f"mcc pruned {percent} %": [PruneWeights(ratio=percent / 100, schedule="cubic"), tune]
            for percent in (80, 90, 95)
        },
        "mcc pruned 90 % + int8": [PruneWeights(ratio=0.9, schedule="cubic"), tune, Quantize()],
        "mcc int8": [Quantize()],
    }


def onnx_model(network: nn.Sequential) -> onnx.ModelProto:
    """The dense network as ONNX, for the peers."""
    nodes, weights, value = [], [], "x"
    for i, layer in enumerate(network):
        result = f"h{i}" if i + 1 < len(network) else "y"
        if isinstance(layer, nn.Linear):
            weights += [numpy_helper.from_array(p.detach().numpy(), f"{n}{i}") for n, p in layer.named_parameters()]
            nodes.append(helper.make_node("Gemm", [value, f"weight{i}", f"bias{i}"], [result], transB=1))
        else:
            nodes.append(helper.make_node("Relu", [value], [result]))
        value = result
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 784])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def onnxruntime_int8(model: onnx.ModelProto, digits: Digits, folder: Path) -> onnx.ModelProto:
    """ONNX Runtime's own static quantization: per channel, calibrated on the same images as ours."""

    class Calibration(ort_quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration(digits))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    path = folder / "int8.onnx"
    ort_quantization.quantize_static(model, path, Calibration(), per_channel=True)
    return onnx.load(path)


def calibration(digits: Digits) -> list[Tensor]:
    """1,280 training images."""
    return list(digits.train[0][:1280].split(BATCH))


def as_torch(run: Engine) -> Engine:
    """An ONNX Runtime engine that takes and gives PyTorch tensors."""
    return lambda x: torch.from_numpy(run(x.numpy())[0])


def nonzeros(artifact: mcc.Artifact) -> int:
    """Parameters of the compressed network, zero weights not counted."""
    return artifact.report.passes[-1].size.parameters


def stored_weights(artifact: mcc.Artifact) -> int:
    """Bytes of all weights in the file, indices and scales included."""
    return artifact.report.passes[-1].size.stored_bytes


def measure(
    engines: dict[str, dict[tuple[int, int], Engine]], digits: Digits
) -> dict[str, dict[tuple[int, int], Timing]]:
    """Latencies of all engines, in turns, by batch and thread count."""
    results: dict[str, dict[tuple[int, int], Timing]] = {name: {} for name in engines}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for batch in BATCHES:
            image = digits.test[0][:batch].contiguous()
            array = image.numpy()

            def call(
                name: str, at: tuple[int, int] = (batch, threads), image: Tensor = image, array: np.ndarray = array
            ) -> Callable[[], Any]:
                run, value = engines[name][at], image if name == "torch eager" else array
                return lambda: run(value)

            with torch.inference_mode():
                for name, timing in interleave(
                    {name: call(name) for name in engines}, 2000 if batch == 1 else 600
                ).items():
                    results[name][batch, threads] = timing
    return results


def check_without_torch(path: Path, digits: Digits) -> None:
    """Load an artifact in a process that cannot import torch, and compare its outputs with this one's."""
    image = digits.test[0][:64].numpy()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", image)
        script = (
            "import sys, json; sys.modules['torch'] = None\n"
            "import numpy, mcc\n"
            f"y = mcc.load({str(path)!r})(numpy.load({folder + '/x.npy'!r}))\n"
            "print(json.dumps(y.tolist()))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = np.array(json.loads(done.stdout), np.float32)
    if not np.array_equal(found, mcc.load(path)(image)):
        raise SystemExit("the torch-free process computed something else")


def for_any_batch(engines: dict[int, Engine]) -> dict[tuple[int, int], Engine]:
    """Engines by their threads, as those of each call."""
    return {(batch, threads): engines[threads] for batch, threads in CALLS}


def saved_and_loaded(artifacts: dict[int, mcc.Artifact], path: Path) -> dict[tuple[int, int], Engine]:
    """An engine for each call: the artifact for its batch, saved and loaded again."""
    paths = {batch: path if batch > 1 else path.with_stem(f"{path.stem}_for_one") for batch in artifacts}
    for batch, artifact in artifacts.items():
        artifact.save(paths[batch])
    return {(batch, threads): mcc.load(paths[batch], threads=threads) for batch, threads in CALLS}


def ratios(slower: dict[tuple[int, int], Timing], faster: dict[tuple[int, int], Timing]) -> str:
    """How many times as fast one engine is as another on one thread, by medians and by minima."""
    texts = []
    for batch in BATCHES:
        a, b = slower[batch, 1], faster[batch, 1]
        texts.append(f"{a.median_ms / b.median_ms:.2f} ({a.min_ms / b.min_ms:.2f}) at batch {batch}")
    return " and ".join(texts)


def main() -> None:
    """Train, compress, compile, save, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of training the dense network")
    parser.add_argument("--tune-epochs", type=int, default=8, help="of fine-tuning after pruning")
    parser.add_argument("--out", type=Path, default=Path("build/mnist"), help="folder for the artifacts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=220)
    started = time.perf_counter()
    digits = Digits.load(Path(__file__).parent / "data" / "mnist.npz")
    network = make_network()
    train(network, digits, options.epochs)
    console.print(f"seed {SEED}; dense network trained in {time.perf_counter() - started:.0f} s")

    proto = onnx_model(network)
    proto_bytes = proto.ByteSize()  # ONNX Runtime's quantizer moves the weights out of the model it is given
    engines: dict[str, dict[tuple[int, int], Engine]] = {"torch eager": dict.fromkeys(CALLS, network)}
    engines["ONNX Runtime fp32"] = for_any_batch({t: onnxruntime_engine(proto, t) for t in THREADS})
    int8 = onnxruntime_int8(proto, digits, options.out)
    engines["ONNX Runtime int8"] = for_any_batch({t: onnxruntime_engine(int8, t) for t in THREADS})
    facts: dict[str, tuple[int, int, float]] = {
        "torch eager": (sum(p.numel() for p in network.parameters()), 0, accuracy(network, digits)),
        "ONNX Runtime fp32": (235_146, proto_bytes, accuracy(as_torch(engines["ONNX Runtime fp32"][1, 1]), digits)),
        "ONNX Runtime int8": (235_146, int8.ByteSize(), accuracy(as_torch(engines["ONNX Runtime int8"][1, 1]), digits)),
    }
    for name, passes in recipes(options.tune_epochs).items():
        data = mcc.Data(calibration=calibration(digits), train=Batches(digits, SEED))
        example = (digits.test[0][:64].clone(),)
        compressed = mcc.compress(
            network, example, passes=passes, data=data, dynamic_shapes={"input": {0: "batch"}}, seed=SEED
        )
        artifact, for_one = mcc.compile(compressed), mcc.compile(compressed.fixed(example[0][:1]))
        path = options.out / f"{name.removeprefix('mcc ').replace(' % ', '_').replace(' %', '').replace(' ', '_')}.mcc"
        engines[name] = saved_and_loaded({1: for_one, 64: artifact}, path)
        facts[name] = (nonzeros(artifact), path.stat().st_size, accuracy(engines[name][64, 1], digits))
        text = "; ".join(map(str, passes)) or "none"
        console.print(f"{name}: passes {text}; weights {stored_weights(artifact):,} bytes; saved as {path}")
    check_without_torch(options.out / "pruned_90.mcc", digits)
    console.print("pruned_90.mcc gives equal outputs in a process without torch")

    timings = measure(engines, digits)
    console.print(table(facts, timings))
    for peer, name in (
        ("ONNX Runtime fp32", "mcc dense fp32"), ("ONNX Runtime fp32", "mcc pruned 90 %"),
        ("mcc dense fp32", "mcc pruned 90 %"),
    ):  # fmt: skip
        console.print(f"{name}: times as fast as {peer} on one thread: {ratios(timings[peer], timings[name])}")
    console.print(f"target {mcc.parse_target('cpu')}; {time.perf_counter() - started:.0f} s in all")


def table(facts: dict[str, tuple[int, int, float]], timings: dict[str, dict[tuple[int, int], Timing]]) -> Table:
    """One row an engine; latencies as median (minimum) in microseconds."""
    result = Table(title="latency in us: median (minimum)")
    columns = [f"batch {b}, {t} thread{'s' if t > 1 else ''}" for t in THREADS for b in BATCHES]
    for column in ("engine", "non-zero parameters", "file bytes", "test accuracy", *columns):
        result.add_column(column, justify="left" if column == "engine" else "right")
    for name, (parameters, size, correct) in facts.items():
        cells = [timings[name][b, t] for t in THREADS for b in BATCHES]
        times = [f"{c.median_ms * 1e3:.1f} ({c.min_ms * 1e3:.1f})" for c in cells]
        result.add_row(name, f"{parameters:,}", f"{size:,}" if size else "", f"{correct:.2%}", *times)
    return result


if __name__ == "__main__":
    main()
