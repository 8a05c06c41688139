"""ada-round: every weight on one of the two codes next to it, outputs closer than by rounding, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from networks import ConvBatchNorm, Shared
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import AdaRound, FoldBatchNorm, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

STEP = AdaRound(iterations=300, batch=16, learning_rate=0.02)


def run(model, x, *steps, calibration=None, seed=0):
    graph = mcc.capture(model.eval(), (x,))
    data = Data(calibration=[x] if calibration is None else calibration)
    return Pipeline(steps, parse_target("cpu:avx512vnni"), data, seed).run(graph, (x,))


def alike(*shape, seed=0):
    """Inputs whose features depend on each other, so that errors of one weight can make up for those of another."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(*shape, generator=generator) + 2 * common


LAYERS = {
    "linear": (lambda: nn.Linear(24, 7), (64, 24)),
    "linear over tokens": (lambda: nn.Linear(24, 7), (9, 11, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3), (12, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, 2, 1), (12, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (12, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (12, 6, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 5, 2, 2), (12, 6, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_weight_is_on_a_code_next_to_it_and_outputs_are_closer(name):
    make, shape = LAYERS[name]
    model, x = make(), alike(*shape)
    step = Quantize(weights="int3", activations=None)
    rounded, _ = run(model, x, step)
    learned, rows = run(model, x, step, STEP)
    assert str(learned) == str(rounded)
    weight, scale = model.weight.detach(), rounded.tensor("weight_scale").float()
    scale = scale[..., None] if scale.dim() > 1 else scale
    axis = 1 if isinstance(model, nn.ConvTranspose2d) else 0
    codes = learned.tensor("weight").detach().movedim(axis, 0).flatten(1) / scale.flatten()[:, None]
    wanted = (weight.movedim(axis, 0).flatten(1) / scale.flatten()[:, None]).clamp(-4, 3)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert ((codes - wanted).abs() <= 1 + 1e-5).all()
    with torch.no_grad():
        exact = model(x)
        errors = [float((graph(x) - exact).square().mean()) for graph in (rounded, learned)]
    assert errors[1] < 0.9 * errors[0]
    assert rows[-1].notes[0].startswith("mean error of a layer's output, relative: ")


def test_layers_behind_others_see_what_those_give():
    """The error of the last output falls though each layer is learned alone."""
    model, x = (
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)),
        alike(256, 24),
    )
    step = Quantize(weights="int3", activations=None)
    test = alike(256, 24, seed=1)
    rounded, _ = run(model, x, step)
    learned, _ = run(model, x, step, STEP)
    with torch.no_grad():
        errors = [float((graph(test) - model(test)).square().mean()) for graph in (rounded, learned)]
    assert errors[1] < 0.7 * errors[0]


def test_behind_a_relu_only_what_it_lets_through_counts():
    """All outputs are negative: nothing has to be learned, and nothing is."""
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.rand(32, 8)
    model[0].bias.data.fill_(-100.0)
    _, rows = run(model, x, Quantize(weights="int4", activations=None), STEP)
    assert rows[-1].edits == 0
    assert [(d.layer, d.reason) for d in rows[-1].declined] == [("0", "nearest rounding has the least error")]


def test_pruned_weights_stay_zero():
    model, x = nn.Linear(32, 8), alike(64, 32)
    graph, _ = run(model, x, PruneWeights(ratio=0.5), Quantize(weights="int4"), STEP)
    mask = next(t for n, t in graph.module.named_buffers() if n.endswith("mask"))
    assert int((~mask).sum()) == 128
    plain, _ = run(nn.Linear(32, 8), x, PruneWeights(ratio=0.5), Quantize(weights="int4"))
    assert str(graph) == str(plain)  # the mask still stands between the weight and its quantizer


def test_the_artifact_computes_what_was_learned():
    model, x = ConvBatchNorm(), torch.randn(4, 3, 8, 8)
    steps = [FoldBatchNorm(), Quantize(weights="int4"), AdaRound(iterations=30)]
    artifact = mcc.compile(model.eval(), (x,), passes=steps, data=Data(calibration=[x]), measure="never")
    assert artifact(x).shape == (4, 4, 8, 8)


def test_the_same_seed_gives_the_same_weights():
    model, x = nn.Linear(24, 7), alike(64, 24)
    first, second, other = (
        run(model, x, Quantize(weights="int3"), STEP, seed=s)[0].tensor("weight") for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_rows_of_no_batch_are_missed_where_no_batch_has_any():
    model, x = nn.Linear(8, 4), torch.randn(5, 8)
    graph = mcc.capture(model, (x,), dynamic_shapes=({0: "batch"},))
    for calibration, wanted in (([x[:0], x], None), ([x[:0]], "no calibration batch has a row"), ([], "is empty")):
        pipeline = Pipeline(
            (Quantize(weights="int4", activations=None), AdaRound(iterations=5)), parse_target("cpu:avx2"),
            Data(calibration=calibration),
        )  # fmt: skip
        if wanted is None:
            pipeline.run(graph, (x,))
        else:
            with pytest.raises(DataError, match=wanted):
                pipeline.run(graph, (x,))


def test_shared_and_float_weights_are_declined_by_name():
    x = torch.randn(6, 8)
    with pytest.raises(PassError, match="no layer's weight can be rounded: .*its weight is not quantized, or encoded"):
        run(nn.Linear(8, 4), x, STEP)
    x = torch.randn(6, 12)
    with pytest.raises(PassError, match="its weight is shared"):
        run(Shared(), x, Quantize(weights="int4"), STEP)


@pytest.mark.parametrize("option", ["iterations", "batch", "learning_rate", "regularization"])
def test_options_are_positive(option):
    with pytest.raises(SpecError, match=f"ada-round: {option}=0"):
        AdaRound(**{option: 0})
