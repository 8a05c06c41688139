"""prune-weights: exact ratios, patterns of layer names, tied weights, masks that survive training, the cubic schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, Shared, mlp
from torch import nn

import mcc
from mcc import ops
from mcc.cost import graph_size
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.masks import Pattern
from mcc.passes import FineTune, KeepZeros, PruneWeights, Quantize
from mcc.passes.prune_weights import CubicPruning
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps, data=None):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    return Pipeline(steps, parse_target("cpu:avx2"), data or Data()).run(graph, (x,))


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 12, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        for _ in range(count)
    ]


def regression(seed=1):
    """Of eight inputs the last four count; labels are what they give."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(24, 64, 8, generator=generator)
    return [(x, x[:, 4:].sum(1, keepdim=True)) for x in inputs]


def squared(found, wanted):
    return (found - wanted).square().mean()


def test_movement_keeps_what_grows_and_magnitude_what_is_large():
    kept = {}
    for saliency in ("movement", "magnitude"):
        model = nn.Linear(8, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, 3.0, 3.0, 3.0, 0.1, 0.1, 0.1, 0.1]]))
        step = PruneWeights(ratio=0.5, schedule="cubic", saliency=saliency)
        data = Data(train=regression(), loss=squared)
        graph, _ = run(
            model, torch.randn(2, 8), step, FineTune(epochs=1, optimizer="sgd", learning_rate=2e-3), data=data
        )
        kept[saliency] = graph.tensor("weight_mask")[0].tolist()
        assert [name for name, _ in graph.module.named_buffers()] == ["weight_mask"]
    assert kept == {"movement": [False] * 4 + [True] * 4, "magnitude": [True] * 4 + [False] * 4}


def test_movement_takes_a_schedule():
    with pytest.raises(SpecError, match="saliency='movement' at once\n  remedy  schedule='cubic'"):
        PruneWeights(saliency="movement")


def test_a_mask_stands_between_the_weight_and_its_layer(check_rewrite):
    check_rewrite(nn.Linear(4, 3), PruneWeights(ratio=0.5), inputs=(torch.randn(2, 4),), before="""
        %input_1: f32[2, 4]
        %linear: f32[2, 3] = linear(%input_1, @weight, @bias)
        return %linear
    """, after="""
        %input_1: f32[2, 4]
        %weight_masked: f32[3, 4] = mul.Tensor(@weight, @weight_mask)
        %linear: f32[2, 3] = linear(%input_1, %weight_masked, @bias)
        return %linear
    """)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0.05, 0.95), scope=st.sampled_from(["global", "layer"]))
def test_exactly_the_ratio_of_least_magnitude_goes(ratio, scope):
    model = mlp(13, 11, 7)
    graph, _ = run(model, torch.randn(2, 13), PruneWeights(ratio=ratio, scope=scope))
    masks = {n: graph.tensor(f"{n}.weight_mask") for n in ("0", "2")}
    weights = {n: graph.tensor(f"{n}.weight").detach().abs() for n in ("0", "2")}
    for group in [("0", "2")] if scope == "global" else [("0",), ("2",)]:
        kept = torch.cat([masks[n].flatten() for n in group])
        magnitude = torch.cat([weights[n].flatten() for n in group])
        assert int((~kept).sum()) == round(ratio * kept.numel())
        assert magnitude[~kept].max() <= magnitude[kept].min()


def test_equal_magnitudes_still_give_the_exact_count():
    model = nn.Linear(10, 10)
    model.weight.data.fill_(0.5)
    graph, _ = run(model, torch.randn(2, 10), PruneWeights(ratio=0.3))
    assert int(graph.tensor("weight_mask").sum()) == 70


def test_every_layer_keeps_a_weight():
    model = mlp(6, 6, 6)
    model[2].weight.data *= 1e-6
    graph, _ = run(model, torch.randn(2, 6), PruneWeights(ratio=0.5))
    assert int(graph.tensor("2.weight_mask").sum()) == 1


def test_layers_are_chosen_by_name_and_the_others_are_listed():
    _, rows = run(Residual(), torch.randn(2, 3, 8, 8), PruneWeights(include=("c*", "head"), exclude=("c1",)))
    assert rows[1].edits == 2
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("c1", "excluded by 'c1'")]


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(PassError, match="pattern 'hed' matches no layer\n  remedy  layers of this model: c1, c2, head"):
        run(Residual(), torch.randn(2, 3, 8, 8), PruneWeights(exclude=("hed",)))


def test_a_shared_weight_is_masked_once():
    graph, rows = run(Shared(), torch.randn(2, 12), PruneWeights(ratio=0.5))
    assert rows[1].edits == 1
    assert [n.op.name for n in graph.nodes].count("mul.Tensor") == 1


def test_pruning_again_only_adds_zeros():
    model = mlp(12, 12, 3)
    once, _ = run(model, torch.randn(2, 12), PruneWeights(ratio=0.5))
    first = once.tensor("0.weight_mask").clone()
    twice, _ = Pipeline((PruneWeights(ratio=0.8),), parse_target("cpu:avx2"), Data()).run(once, (torch.randn(2, 12),))
    second = twice.tensor("0.weight_mask")
    assert [n.op.name for n in twice.nodes].count("mul.Tensor") == 2
    assert not bool((second & ~first).any())


def test_zeros_stay_zero_through_training_and_quantization():
    data = Data(train=batches(), calibration=[x for x, _ in batches()])
    model = mlp(12, 16, 3)
    graph, rows = run(model, torch.randn(2, 12), PruneWeights(ratio=0.75), FineTune(epochs=2), Quantize(), data=data)
    assert rows[-1].size.parameters <= round(0.25 * (12 * 16 + 16 * 3)) + 19
    quantized = graph.node("weight_0_quantized")
    weights = torch.ops.mcc.fake_quantize(
        graph.tensor("0.weight").detach() * graph.tensor("0.weight_mask"), graph.tensor("0.weight_scale"),
        graph.tensor("0.weight_zero_point"), *(quantized.argument(i) for i in range(3, 6)),
    )  # fmt: skip
    assert bool((weights[~graph.tensor("0.weight_mask")] == 0).all())


def test_the_cubic_schedule_reaches_its_ratio_by_and_by():
    graph, _ = run(mlp(12, 16, 3), torch.randn(2, 12), PruneWeights(ratio=0.01))
    schedule = CubicPruning(0.8, "global", Pattern(), ("0.weight", "2.weight"))
    sparsities = []
    for step in range(11):
        schedule.advance(graph, step / 10)
        masks = [graph.tensor(f"{n}.weight_mask") for n in ("0", "2")]
        sparsities.append(1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
    assert sparsities == sorted(sparsities)
    assert sparsities[5] == pytest.approx(0.8 * (1 - (1 - 0.67) ** 3), abs=0.01)
    assert sparsities[8:] == pytest.approx([0.8] * 3, abs=0.005)


def test_a_cubic_schedule_needs_a_fine_tune_after_it():
    with pytest.raises(PassError, match=r"prune-weights\{schedule='cubic'\} needs one of fine-tune after it"):
        run(mlp(4, 3), torch.randn(2, 4), PruneWeights(schedule="cubic"))


def test_cubic_pruning_ends_at_the_ratio_after_training():
    data = Data(train=batches())
    graph, rows = run(
        mlp(12, 16, 3), torch.randn(2, 12), PruneWeights(ratio=0.75, schedule="cubic"), FineTune(epochs=3), data=data
    )
    assert graph.schedules == ()
    assert graph_size(graph).parameters == round(0.25 * (12 * 16 + 16 * 3)) + 19
    assert rows[1].size.parameters == 12 * 16 + 16 * 3 + 19


def test_masks_of_torch_are_masks():
    """torch.nn.utils.prune leaves a hook that multiplies; a parametrization does the same."""
    model, x = mlp(16, 12, 8, 4), torch.randn(2, 16)
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.75)
    torch.nn.utils.prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)

    class Halved(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    torch.nn.utils.parametrize.register_parametrization(model[4], "weight", Halved())
    graph, _ = run(model, x, Quantize(weights="int8", activations=None))
    assert [graph.tensor(f"{n}.weight_mask").dtype for n in ("0", "2")] == [torch.bool] * 2
    assert "%mul_0: f32[12, 16] = mul.Tensor(@0.weight_orig, @0.weight_mask)" in str(graph)
    assert graph_size(graph).parameters < 12 * 16 / 4 + 8 * 12 / 2 + 8 * 4 + 12 + 8 + 4 + 1
    artifact = mcc.compile(model, (x,), tuning="model")
    torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_only_looks_like_a_mask_stays_as_it_is():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.learned = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4, 4))
            self.register_buffer("fixed", torch.full((4, 4), 0.5))

        def forward(self, x):
            return x @ (self.weight * self.fixed) + torch.nn.functional.linear(x, self.weight * self.learned)

    graph = mcc.capture(Gate().eval(), (torch.randn(2, 4),))
    assert graph.tensor("fixed").dtype is graph.tensor("learned").dtype is torch.float32


@pytest.mark.parametrize("first", [PruneWeights(ratio=0.9), PruneWeights(ratio=0.9, scope="layer")])
@pytest.mark.parametrize(
    "second", [PruneWeights(ratio=0.5, scope=s) for s in ("global", "layer", "output")] + [KeepZeros(least=0.1)]
)
def test_what_is_pruned_stays_pruned(first, second):
    model, x = mlp(16, 12, 4), torch.randn(2, 16)
    before, _ = run(model, x, first)
    graph, rows = run(model, x, first, second)
    for name in ("0", "2"):
        assert not (graph.tensor(f"{name}.weight_mask") & ~before.tensor(f"{name}.weight_mask")).any()
    assert rows[2].largest_error is not None


def test_masks_of_torch_are_the_ones_that_later_passes_change():
    model, x = mlp(16, 12, 4), torch.randn(2, 16)
    for name in ("0", "2"):
        torch.nn.utils.prune.l1_unstructured(model[int(name)], "weight", 0.5)
    graph, _ = run(model, x, PruneWeights(ratio=0.6, scope="layer"))
    assert sum(n.op is ops.MUL for n in graph.nodes) == 2
    assert graph.tensor("0.weight_mask").double().mean() == pytest.approx(0.4, abs=0.01)


def test_wanda_tells_the_dims_of_one_value_apart():
    class Both(nn.Module):
        def __init__(self, width) -> None:
            super().__init__()
            self.c, self.l = nn.Conv1d(6, 4, 1), nn.Linear(width, 4)

        def forward(self, x):
            return self.c(x).sum((1, 2)) + self.l(x).sum((1, 2))

    for width in (8, 6):
        model, x = Both(width), torch.randn(64, 6, width) * torch.arange(1, 7).reshape(6, 1) ** 2
        data = Data(calibration=[x])
        graph, _ = run(model, x[:2], PruneWeights(saliency="wanda", scope="output"), data=data)
        scores = model.c.weight.detach().abs() * x.square().mean((0, 2)).sqrt().reshape(6, 1)
        assert torch.equal(
            graph.tensor("c.weight_mask").flatten(1), (scores >= scores.sort(1).values[:, 3:4]).flatten(1)
        )


def test_zeros_of_a_checkpoint_become_masks_where_there_are_enough():
    model = mlp(16, 12, 4)
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(12, 16) > 0.6)
    graph, rows = run(model, torch.randn(2, 16), KeepZeros())
    assert torch.equal(graph.tensor("0.weight_mask"), model[0].weight != 0)
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("2", "0% of its weights are zero, less than 30%")]
    data = Data(train=batches_of(16, 4))
    graph, _ = run(model, torch.randn(2, 16), KeepZeros(), FineTune(), data=data)
    assert bool(((graph.tensor("0.weight") * graph.tensor("0.weight_mask"))[model[0].weight == 0] == 0).all())
    with pytest.raises(PassError, match="0% of its weights are zero"):
        run(mlp(4, 3), torch.randn(2, 4), KeepZeros())


def batches_of(inputs, classes):
    return [(torch.randn(8, inputs), torch.randint(0, classes, (8,))) for _ in range(3)]
