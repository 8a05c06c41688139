"""prune-channels, prune-heads, prune-neurons, prune-blocks: exact ratios and budgets, order by saliency, honest refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Attention, Residual, mlp
from torch import nn

import mcc
from mcc import ops
from mcc.cost import graph_size
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import FineTune, PruneBlocks, PruneChannels, PruneHeads, PruneNeurons, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target


class Chain(nn.Module):
    """Three convolutions with batch norms and a head; one is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.c, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 10)

    def forward(self, x):
        x = F.relu(self.an(self.a(x)))
        return self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


def run(model, x, *steps, data=None):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    return Pipeline(steps, parse_target("cpu:avx2"), data or Data()).run(graph, (x,))


def images():
    return torch.randn(2, 3, 8, 8)


def labelled(count=4, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, *shape, generator=generator), torch.randint(0, 10, (16,), generator=generator))
        for _ in range(count)
    ]


def test_channels_go_from_every_tensor_that_has_them(check_rewrite):
    check_rewrite(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)), PruneChannels(ratio=0.5),
    inputs=(torch.randn(2, 3, 4, 4),), before="""
        %input_1: f32[2, 3, 4, 4]
        %conv2d_0: f32[2, 8, 4, 4] = conv2d(%input_1, @0.weight, @0.bias)
        %relu_1: f32[2, 8, 4, 4] = relu(%conv2d_0)
        %conv2d_2: f32[2, 2, 4, 4] = conv2d(%relu_1, @2.weight, @2.bias)
        return %conv2d_2
    """, after="""
        %input_1: f32[2, 3, 4, 4]
        %conv2d_0: f32[2, 4, 4, 4] = conv2d(%input_1, @0.weight, @0.bias)
        %relu_1: f32[2, 4, 4, 4] = relu(%conv2d_0)
        %conv2d_2: f32[2, 2, 4, 4] = conv2d(%relu_1, @2.weight, @2.bias)
        return %conv2d_2
    """)  # fmt: skip


def test_heads_go_and_baked_sizes_are_mended():
    graph, rows = run(Attention(), torch.randn(2, 5, 32), PruneHeads(ratio=0.5))
    assert graph.tensor("qkv.weight").shape == (48, 32)
    assert graph.tensor("out.weight").shape == (32, 16)
    assert [n.shape[3] for n in graph.nodes if n.op is ops.RESHAPE and len(n.shape) == 5] == [2]
    assert rows[1].edits == 2


def test_both_halves_of_a_gate_lose_the_same_neurons():
    graph, _ = run(Attention(), torch.randn(2, 5, 32), PruneNeurons(ratio=0.25))
    assert graph.tensor("up.weight").shape == (96, 32)
    assert graph.tensor("down.weight").shape == (32, 48)


@settings(max_examples=15)
@given(st.floats(0.4, 0.85), st.sampled_from([1, 3, 8]), st.sampled_from(["layer", "global"]))
def test_the_ratio_of_indices_is_met_up_to_alignment(ratio, align, scope):
    graph, _ = run(Chain(), images(), PruneChannels(ratio=ratio, align=align, scope=scope))
    left = {"a": graph.tensor("a.weight").shape[0], "c": graph.tensor("c.weight").shape[0]}
    sizes = {"a": 16, "c": 24}
    assert all(n % align == 0 or n == sizes[k] for k, n in left.items())
    if align == 1 and scope == "layer":
        assert left == {k: max(s - round(ratio * s), s - int(0.9 * s)) for k, s in sizes.items()}
    assert graph.tensor("b.weight").shape == (left["a"], 1, 3, 3)


@pytest.mark.parametrize("of", ["macs", "bytes"])
def test_a_budget_is_met_and_not_by_far(of):
    before, _ = run(Chain(), images())
    graph, rows = run(Chain(), images(), PruneChannels(ratio=0.6, of=of))
    old, new = (getattr(graph_size(g), "macs" if of == "macs" else "stored_bytes") for g in (before, graph))
    assert 0.25 * old < new <= 0.4 * old
    assert f"{of} fall by" in rows[1].notes[0]


def test_a_budget_that_cannot_be_met_is_refused_with_what_can():
    with pytest.raises(PassError, match=r"macs cannot fall by 99%, only by \d+%"):
        run(Chain(), images(), PruneChannels(ratio=0.99, of="macs", largest=0.5))


def test_what_goes_is_chosen_by_what_is_measured():
    """Latency that is what multiply-adds are leaves what a budget of these leaves."""
    graph = mcc.capture(Chain().eval(), (images(),), dynamic_shapes=({0: "batch"},))
    target, step = parse_target("cpu:avx2"), PruneChannels(ratio=0.6, of="latency", align=4)
    timed = Pipeline((step,), target, Data(), measure_latency=lambda state, _: float(graph_size(state).macs))
    found, rows = timed.run(graph, (images(),))
    wanted, _ = Pipeline((PruneChannels(ratio=0.6, of="macs", align=4),), target, Data()).run(graph, (images(),))
    assert [found.tensor(f"{n}.weight").shape for n in "abc"] == [wanted.tensor(f"{n}.weight").shape for n in "abc"]
    assert "latency fall by" in rows[1].notes[0]


def test_latency_is_that_of_an_artifact_on_this_machine():
    """A tenth is asked of what nine tenths fewer neurons give: how busy the machine is does not matter."""
    model = mlp(64, 8192, 64)
    artifact = mcc.compile(model, (torch.randn(1, 64),), passes=[PruneNeurons(ratio=0.1, of="latency")], tuning="model")
    assert "latency fall by" in str(artifact.report)
    with pytest.raises(PassError, match="latency cannot be measured here"):
        run(model, torch.randn(2, 64), PruneNeurons(of="latency"))


def one_weak_channel(model):
    """Channel 5 of the first convolution has a thousandth of the others' weights, gain and readers."""
    with torch.no_grad():
        for tensor in (model.a.weight, model.b.weight, model.b.bias, model.an.weight, model.an.bias):
            tensor[5] *= 1e-3
        model.c.weight[:, 5] *= 1e-3
    return model


@pytest.mark.parametrize("saliency", ["l1", "l2", "batch-norm", "activation", "taylor", "fisher"])
def test_every_saliency_finds_a_channel_that_does_nothing(saliency):
    model, data = one_weak_channel(Chain()), Data(calibration=[x for x, _ in labelled()], train=labelled())
    graph, _ = run(model, images(), PruneChannels(ratio=1 / 16, saliency=saliency, include=("a",)), data=data)
    kept = [i for i in range(16) if i != 5]
    assert torch.equal(graph.tensor("a.weight"), model.a.weight[kept])


def test_the_geometric_median_goes():
    """Of filters spread on a line the one in the middle is the most replaceable."""
    model = Chain()
    with torch.no_grad():
        model.c.weight.copy_((torch.arange(24.0) - 9.3).reshape(24, 1, 1, 1).expand_as(model.c.weight))
    graph, _ = run(model, images(), PruneChannels(ratio=1 / 24, saliency="fpgm", include=("c",)))
    rows = model.c.weight.flatten(1)
    gone = torch.cdist(rows, rows).sum(1).argmin()
    assert torch.equal(graph.tensor("c.weight"), model.c.weight[[i for i in range(24) if i != gone]])


def test_equal_saliencies_go_in_order_and_the_ratio_is_met():
    """Fresh batch norms have gains of one."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1))
    step = PruneChannels(saliency="batch-norm", scope="global", ratio=0.5)
    graph, _ = run(model, images(), step)
    assert torch.equal(graph.tensor("0.weight"), model[0].weight[8:])


def test_what_removes_nothing_says_so():
    for options in ({"align": 32}, {"ratio": 0.01}, {"largest": 0.01}):
        with pytest.raises(PassError, match="nothing goes: 16 channels of a"):
            run(Chain(), images(), PruneChannels(**options))


def test_frozen_parameters_have_saliencies_and_stay_frozen():
    model = Chain().requires_grad_(False)
    for saliency in ("taylor", "fisher"):
        graph, _ = run(model, images(), PruneChannels(saliency=saliency), data=Data(train=labelled()))
        assert not any(p.requires_grad for _, p in graph.named_parameters())


def test_a_loss_that_does_not_fit_is_an_error_of_the_data():
    wrong = [(x, labels[:3]) for x, labels in labelled()]
    with pytest.raises(DataError, match="the loss does not take the graph's output and labels"):
        run(Chain(), images(), PruneChannels(saliency="taylor"), data=Data(train=wrong))


def test_random_is_seeded():
    model = Chain()
    first, second = (run(model, images(), PruneChannels(saliency="random"))[0] for _ in range(2))
    assert torch.equal(first.tensor("a.weight"), second.tensor("a.weight"))


def test_patterns_choose_groups_and_what_they_leave_is_listed():
    graph, rows = run(Chain(), images(), PruneChannels(exclude=("c",)))
    assert graph.tensor("c.weight").shape[0] == 24
    assert graph.tensor("a.weight").shape[0] == 8
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("c", "24 channels: excluded by 'c'")]


def test_refusals_say_what_is_wrong():
    for step, message in (
        (PruneHeads(), "no head can go"), (PruneChannels(include=("nothing",)), "pattern 'nothing' matches no layer"),
    ):  # fmt: skip
        with pytest.raises(PassError, match=message):
            run(Chain(), images(), step)
    for options in ({"ratio": 1.0}, {"align": 0}, {"of": "flops"}, {"saliency": "magic"}, {"scope": "all"}):
        with pytest.raises(SpecError, match="prune-channels"):
            PruneChannels(**options)
    with pytest.raises(DataError, match="data.train"):
        run(Chain(), images(), PruneChannels(saliency="taylor"))


def test_pruned_then_quantized_then_trained_runs_as_an_artifact():
    model, data = Chain(), Data(calibration=[x for x, _ in labelled()], train=labelled())
    steps = [
        PruneChannels(ratio=0.5),
        FineTune(distill=0.5, teacher="captured"),
        PruneWeights(ratio=0.5),
        Quantize(),
        FineTune(),
    ]
    artifact = mcc.compile(
        model, (images(),), passes=steps, data=data, dynamic_shapes=({0: "batch"},), tuning="model", measure="never"
    )
    for batch in (1, 7):
        assert artifact(torch.randn(batch, 3, 8, 8)).shape == (batch, 10)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_zeros_stay_zero_in_any_order(order):
    """Masks, quantizers and smaller tensors compose; every step is verified by the pipeline."""
    steps = [PruneWeights(ratio=0.6), Quantize(), FineTune()]
    model, data = Chain(), Data(calibration=[x for x, _ in labelled()], train=labelled())
    chosen = [PruneChannels(ratio=0.25), *(steps[i] for i in order)]
    graph, rows = run(model, images(), *chosen, data=data)
    assert all(row.largest_error is not None for row in rows[1:] if not row.text.startswith("fine-tune"))
    for name in ("a", "c"):
        mask, weight = graph.tensor(f"{name}.weight_mask"), graph.tensor(f"{name}.weight")
        assert mask.shape == weight.shape
        assert (~mask).any()


def test_channels_can_go_from_masked_and_fake_quantized_weights():
    data = Data(calibration=[x for x, _ in labelled()], train=labelled())
    graph, rows = run(Chain(), images(), PruneWeights(ratio=0.5), Quantize(), PruneChannels(ratio=0.5), data=data)
    assert graph.tensor("a.weight_mask").shape == graph.tensor("a.weight").shape == (8, 3, 3, 3)
    assert graph.tensor("a.weight_scale").shape == (8,)
    assert rows[3].largest_error is not None


class Blocks(nn.Module):
    """Four residual blocks; the second does almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4))
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.blocks[1][2].weight *= 1e-3
            self.blocks[1][2].bias *= 1e-3

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("saliency", ["influence", "taylor"])
def test_the_block_that_does_least_goes_first(saliency):
    model, rows = Blocks(), labelled(shape=(8,))
    data = Data(calibration=[x for x, _ in rows], train=rows)
    graph, report = run(model, torch.randn(2, 8), PruneBlocks(ratio=0.25, saliency=saliency), data=data)
    assert not any(n.layer.startswith("blocks.1.") for n in graph.nodes)
    assert report[1].notes == ("blocks fall by 25.0%: blocks.1",)
    x = torch.randn(7, 8)
    del model.blocks[1]
    torch.testing.assert_close(graph(x), model(x))


def test_blocks_go_until_the_macs_are_met_and_what_cannot_is_said():
    data = Data(calibration=[x for x, _ in labelled(shape=(8,))])
    before, _ = run(Blocks(), torch.randn(2, 8))
    graph, _ = run(Blocks(), torch.randn(2, 8), PruneBlocks(ratio=0.4, of="macs"), data=data)
    assert graph_size(graph).macs <= 0.6 * graph_size(before).macs
    with pytest.raises(PassError, match="macs cannot fall by 99%"):
        run(Blocks(), torch.randn(2, 8), PruneBlocks(ratio=0.99, of="macs"), data=data)
    with pytest.raises(PassError, match="pattern 'x' matches no block"):
        run(Blocks(), torch.randn(2, 8), PruneBlocks(include=("x",)), data=data)


class Nested(nn.Module):
    """A block inside a block; which side the shortcut is on differs."""

    def __init__(self, swapped) -> None:
        super().__init__()
        self.g, self.f, self.k, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.swapped = swapped

    def forward(self, x):
        h = self.g(x)
        inner = h + self.f(h)
        y = x + inner if self.swapped else inner + x
        return self.out(y + 30 * self.k(y))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("ratio", "left"), [(0.3, None), (0.6, None), (0.99, {"out"})])
def test_nested_blocks_go_from_the_right_side(swapped, ratio, left):
    x = torch.randn(16, 8)
    graph, rows = run(Nested(swapped), x[:2], PruneBlocks(ratio=ratio), data=Data(calibration=[x]))
    assert rows[1].largest_error is not None
    layers = {n.layer for n in graph.nodes if n.op is ops.LINEAR}
    assert left is None or layers == left
    assert "k" in layers or ratio == 0.99


def test_blocks_in_a_row_go_together():
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = x + self.a(x)
            x = self.b(x) + x
            return x + self.c(x)

    x = torch.randn(16, 8)
    graph, _ = run(Row(), x[:2], PruneBlocks(ratio=0.99), data=Data(calibration=[x]))
    assert torch.equal(graph(x), x)


def test_a_shortcut_that_changes_the_value_keeps_its_block():
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.skip = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)

        def forward(self, x):
            return self.a(x) + self.skip(x)

    data = Data(calibration=[images()])
    with pytest.raises(PassError, match="neither side is what the other is computed from"):
        run(Halving(), images(), PruneBlocks(), data=data)
    graph, _ = run(Residual(), images(), PruneBlocks(ratio=0.5), data=data)
    assert not any(n.layer == "c2" for n in graph.nodes)
