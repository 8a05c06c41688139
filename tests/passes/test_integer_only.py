"""integer-only: between quantizers there are integers and fixed-point multiplications, the same in graph and artifact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, Residual, Shared, mlp
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError
from mcc.fixed_point import LARGEST, bits_behind_the_point, rescale
from mcc.passes import PASSES, CorrectBias, FoldBatchNorm, FoldConstants, IntegerOnly, Quantize
from mcc.pipeline import Pipeline
from mcc.spec import parse_passes
from mcc.target import missing_features, parse_target

NAMES = {p.pass_name(): p for p in PASSES}
PASSES_TEXT = "fold-batch-norm; quantize; integer-only"
TARGETS = [t for t in ("cpu:avx2", "cpu:avx512", "cpu") if not missing_features(parse_target(t))]


def run(model, x, *steps, target="cpu:avx512vnni", **options):
    graph = mcc.capture(model.eval(), (x,), **options)
    return Pipeline(steps, parse_target(target), Data(calibration=[x])).run(graph, (x,))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.c1(x).relu()
        return self.fc((x + self.c2(x)).relu().mean((2, 3)))


def test_layers_and_what_lies_between_become_integers(golden):
    x = torch.rand(2, 3, 6, 6)
    quantized, _ = run(Small(), x, Quantize())
    graph, rows = run(Small(), x, Quantize(), IntegerOnly())
    golden("integer_only", f"{quantized}\n\nbecomes\n\n{graph}")
    assert rows[-1].edits == 3
    for name in ("c1.weight", "c2.weight", "fc.weight", "c1.bias", "c2.bias", "fc.bias"):
        tensor = graph.tensor(f"{name}_integers")
        assert (tensor == tensor.round()).all()


NUMBERS = st.floats(-3e7, 3e7, width=32)
SCALES = st.floats(2.0**-30, 4.0, width=32)


@given(NUMBERS, SCALES, st.integers(0, 8))
def test_rescale_rounds_the_exact_product_once(number, scale, bits):
    whole = np.float32(round(number))
    wanted = Fraction(round(Fraction(float(whole)) * Fraction(scale) * 2**bits), 2**bits)
    found = rescale(torch.tensor([whole]), torch.tensor(scale), None, bits)
    assert found.item() == float(max(min(wanted, LARGEST), -LARGEST))


def test_halves_go_to_the_even_neighbour():
    x = torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0])
    assert str(rescale(x, torch.tensor(0.5), None, 0).tolist()) == "[0.0, 2.0, 2.0, 0.0, -2.0]"
    assert rescale(x, torch.tensor([0.5] * 5), 0, 1).tolist() == [0.5, 1.5, 2.5, -0.5, -1.5]


def test_the_graph_is_what_multipliers_and_shifts_of_integers_compute():
    """A layer by NumPy's integers: int64 sums, a multiplier of 24 bits, a shift that rounds half to even."""
    torch.manual_seed(1)
    model, x = mlp(19, 11, 4), torch.randn(64, 19)
    graph, _ = run(model, x, Quantize(), IntegerOnly())
    step = graph.node("input_1_integers").operand(0)
    codes = graph_codes(x.numpy() * np.float32(step.argument(1)), graph.node("input_1_integers"))
    sums = codes @ integers(graph, "0.weight").T + integers(graph, "0.bias")
    hidden = shifted(sums, graph.tensor("linear_0_factor").numpy())
    hidden = graph_codes(np.maximum(hidden, 0), graph.node("relu_1_integers"))
    sums = hidden @ integers(graph, "2.weight").T + integers(graph, "2.bias")
    with torch.no_grad():
        found = graph(x).numpy()
    np.testing.assert_array_equal(found, sums.astype(np.float32) * graph.tensor("linear_2_unit").numpy())


def integers(graph, name):
    return graph.tensor(f"{name}_integers").numpy().astype(np.int64)


def graph_codes(values, quantizer):
    """Codes less their zero point."""
    zero, (low, high) = int(quantizer.operand(2).tensor), quantizer.fx.args[4:6]
    return np.clip(np.rint(values).astype(np.int64) + zero, low, high) - zero


def shifted(sums, scales):
    fractions, exponents = np.frexp(scales)
    multipliers, shifts = (fractions * 2**24).astype(np.int64), 24 - exponents.astype(np.int64)
    products = sums * multipliers
    down, rest = products >> shifts, products & ((np.int64(1) << shifts) - 1)
    half = np.int64(1) << (shifts - 1)
    return down + ((rest > half) | ((rest == half) & (down % 2 == 1)))


class Pools(nn.Module):
    """Averages of windows, of all pixels, of an odd number of them; pads, slices, a pad that is a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 13, 3), nn.Conv2d(13, 26, 3, 2, 1), nn.Conv2d(26, 7, 1)
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        x = F.avg_pool2d(self.a(F.pad(x, (1, 1, 2, 0))).relu(), 2)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, 7))
        x = F.hardtanh(self.b(x) + short, -0.4, 0.7)
        return self.fc(F.avg_pool2d(F.relu6(self.c(x)), (2, 4)).mean((2, 3)))


class Joined(nn.Module):
    """Concatenation, a sum of a value with itself, two quantizers of one value, depthwise and grouped layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 17, 3, bias=False), nn.Conv2d(17, 17, 3, padding=1, groups=17)
        self.g, self.e, self.out = nn.Conv2d(34, 6, 3, groups=2), nn.Conv2d(34, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        x = (x + x).relu()
        both = torch.cat([x, self.d(x)], 1)
        pooled = F.max_pool2d(both.clamp(min=0), 2)
        return self.out((self.g(pooled) + self.e(pooled)).permute(0, 2, 3, 1))


class Shuffled(nn.Module):
    """Channels taken apart, one half through a layer, joined and mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 20, 3), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.out = nn.Conv2d(20, 4, 1)

    def forward(self, x):
        kept, changed = self.a(x).relu().chunk(2, 1)
        both = torch.cat([kept, self.c(self.b(changed).relu()).relu()], 1)
        batch, _, height, width = both.shape
        return self.out(both.view(batch, 2, 10, height, width).transpose(1, 2).reshape(batch, 20, height, width))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv1d(5, 19, 3, padding=1), nn.Conv1d(19, 4, 5), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.b(F.max_pool1d(self.a(x).relu(), 2)).mean(2))


MODELS = {
    "residual": (Small, (4, 3, 9, 9)),
    "batch norms": (Residual, (4, 3, 8, 8)),
    "pools": (Pools, (5, 3, 16, 17)),
    "joined": (Joined, (3, 3, 11, 9)),
    "shuffled": (Shuffled, (3, 3, 9, 10)),
    "sequence": (Sequence, (6, 5, 24)),
    "a layer called twice": (Shared, (7, 12)),
    "linear": (lambda: mlp(37, 31, 29, 3), (6, 37)),
    "rows of rows": (lambda: mlp(20, 33, 8), (2, 3, 20)),
    "a sparse layer": (lambda: mlp(130, 64, 10), (9, 130)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_artifact_has_the_integers_of_the_graph(name, target):
    make, shape = MODELS[name]
    torch.manual_seed(2)
    model, x = make().eval(), torch.randn(*shape)
    passes = ("prune-weights{ratio=0.9}; " if "sparse" in name else "") + PASSES_TEXT
    data, dims = Data(calibration=[x]), ({0: "batch"},)
    graph, rows = run(model, x, *parse_passes(passes, NAMES), target=target, dynamic_shapes=dims)
    artifact = mcc.compile(
        model, (x,), passes=passes, target=target, data=data, dynamic_shapes=dims, measure="never", tuning="model"
    )
    assert not rows[-1].declined
    assert not [note for note in rows[-1].notes if "computes in float" in note]
    for batch in (0, 1, 7):
        z = 1.5 * torch.randn(batch, *shape[1:])
        with torch.no_grad():
            np.testing.assert_array_equal(artifact(z.numpy()), graph(z).numpy())
    kernels = {row.kernel.split()[0] for row in artifact.report.layers}
    assert all("int8" in kernel or "sparse" in kernel for kernel in kernels)


@pytest.mark.parametrize("name", MODELS)
def test_integers_give_what_the_quantized_network_gives_but_for_few_steps(name):
    make, shape = MODELS[name]
    torch.manual_seed(3)
    model, x = make().eval(), torch.randn(*shape)
    quantized, _ = run(model, x, FoldBatchNorm(), Quantize())
    graph, _ = run(model, x, FoldBatchNorm(), Quantize(), IntegerOnly())
    with torch.no_grad():
        exact, wanted, found = model(x), quantized(x), graph(x)
    # a rounding that goes the other way moves a code by one, of which quantization moves all by up to a half
    assert (found - wanted).norm() < 0.5 * (wanted - exact).norm()


def test_what_stays_in_float_is_named():
    x = torch.randn(2, 6, 32)
    graph, rows = run(Attention(), x, Quantize(), IntegerOnly())
    assert any("scaled_dot_product_attention has no integer form" in d.reason for d in rows[-1].declined)
    assert any(note.startswith("%add computes in float: ") for note in rows[-1].notes)
    assert "softmax" not in str(graph)


class Heads(nn.Module):
    """A sum and a mean that no quantizer reads, names that the pass might give, bounds that are infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3)

    def forward(self, x):
        both = self.one(x) + self.two(x)
        return both, both.clamp(0.0, float("inf")).mean((2, 3)), both.clamp_min(0.25)


def test_outputs_that_no_quantizer_reads_are_equal_too():
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(4, 3, 8, 8)
    graph, rows = run(model, x, Quantize(), IntegerOnly(), target="cpu")
    artifact = mcc.compile(model, (x,), passes="quantize; integer-only", data=Data(calibration=[x]), measure="never")
    assert not rows[-1].notes
    with torch.no_grad():
        for wanted, found, exact in zip(graph(x), artifact(x.numpy()), model(x), strict=True):
            np.testing.assert_array_equal(found, wanted.numpy())
            assert (wanted - exact).norm() < 0.02 * exact.norm()


class TwoScales(nn.Module):
    """One value that two layers read, one of them a part of it that is a `share` as large."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.parts = share, nn.ModuleList(nn.Conv2d(3, 6, 1) for _ in range(2))
        self.whole, self.little = nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
        for part in self.parts:
            part.bias.data += 5

    def forward(self, x):
        y = self.parts[0](x) + self.parts[1](x)
        return self.whole(y.mean((2, 3))), self.little(y.clamp(-self.share, self.share))


@pytest.mark.parametrize("share", [1.0, 0.1, 0.001])
def test_values_read_in_steps_of_all_sizes_stay_within_bounds(share):
    torch.manual_seed(0)
    model, x = TwoScales(share).eval(), torch.randn(8, 3, 6, 6)
    quantized, _ = run(model, x, Quantize())
    graph, rows = run(model, x, Quantize(), IntegerOnly())
    assert any("scales of what reads it are from" in note for note in rows[-1].notes) == (share == 0.001)
    with torch.no_grad():
        for exact, wanted, found in zip(model(x), quantized(x), graph(x), strict=True):
            assert (found - wanted).norm() < 0.5 * (wanted - exact).norm() + 1e-5 * wanted.norm()


def test_codes_of_sixteen_bits_are_not_taken():
    with pytest.raises(PassError, match="0: it reads no codes of up to ten bits with one scale"):
        run(mlp(8, 4), torch.randn(2, 8), Quantize(activations="int16"), IntegerOnly())


def test_nothing_that_changes_weights_comes_behind():
    for last in (CorrectBias(), IntegerOnly()):
        with pytest.raises(PassError, match=f"{last} comes behind integer-only, and would change what that leaves"):
            run(mlp(8, 4), torch.randn(2, 8), Quantize(), IntegerOnly(), last)
    run(mlp(8, 4), torch.randn(2, 8), Quantize(), IntegerOnly(), FoldConstants())


def test_sums_that_float32_may_not_hold_are_named():
    model = nn.Linear(4096, 2)
    model.weight.data.uniform_(0.5, 1)
    _, rows = run(model, torch.rand(3, 4096), Quantize(), IntegerOnly())
    assert rows[-1].notes[0].startswith("sums of linear may have more than 24 bits")


def test_without_quantizers_there_is_nothing_to_do():
    with pytest.raises(PassError, match="no layer reads codes: 0: its weight is not of codes with scales"):
        run(mlp(8, 4), torch.randn(2, 8), IntegerOnly())


def test_bits_behind_the_point_leave_room_for_sums():
    assert [bits_behind_the_point(n) for n in (1, 4, 5, 64, 1024, 1025)] == [8, 8, 7, 4, 0, None]
