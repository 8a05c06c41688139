"""smooth-quant: the same values out, spread moved into the weights, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Attention, TiedLanguageModel, mlp
from torch import Tensor, nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import PruneWeights, Quantize, SmoothQuant
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps, calibration=None):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx512vnni"), Data(calibration=calibration or [x])).run(graph, (x,))


class RmsNormWrittenOut(nn.Module):
    """As Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class BeforeTwo(nn.Module):
    """A norm that two linear layers read, and, if asked, a residual."""

    def __init__(self, norm: nn.Module, residual: bool) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.residual = norm, nn.Linear(12, 12), nn.Linear(12, 12, bias=False), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.a(y) + self.b(y)
        return z + y if self.residual else z


def uneven(count, width=12, seed=0):
    """Rows whose channels differ by powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * 2.0 ** torch.arange(width).remainder(6)


NORMS = {
    "layer norm": lambda: nn.LayerNorm(12),
    "without bias": lambda: nn.LayerNorm(12, bias=False),
    "rms norm": lambda: nn.RMSNorm(12),
    "written out": lambda: RmsNormWrittenOut(12),
}


def test_a_norm_that_linear_layers_alone_read_keeps_its_place(check_rewrite):
    x = torch.randn(9, 12)
    text = """
        %input_1: f32[9, 12]
        %layer_norm_0: f32[9, 12] = layer_norm(%input_1, normalized_shape=[12], weight=@0.weight, bias=@0.bias)
        %linear_1: f32[9, 3] = linear(%layer_norm_0, @1.weight, @1.bias)
        return %linear_1
    """
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3))
    check_rewrite(model, SmoothQuant(), inputs=(x,), data=Data(calibration=[x]), before=text, after=text)


def test_a_norm_that_a_residual_reads_too_is_made_twice(check_rewrite):
    x = torch.randn(9, 12)
    model = BeforeTwo(nn.LayerNorm(12), residual=True)
    check_rewrite(model, SmoothQuant(alpha=0.7), inputs=(x,), data=Data(calibration=[x]), before="""
        %x: f32[9, 12]
        %norm: f32[9, 12] = layer_norm(%x, normalized_shape=[12], weight=@norm.weight, bias=@norm.bias)
        %a: f32[9, 12] = linear(%norm, @a.weight, @a.bias)
        %b: f32[9, 12] = linear(%norm, @b.weight)
        %add: f32[9, 12] = add.Tensor(%a, %b)
        %add_1: f32[9, 12] = add.Tensor(%add, %norm)
        return %add_1
    """, after="""
        %x: f32[9, 12]
        %norm_smoothed: f32[9, 12] = layer_norm(%x, normalized_shape=[12], weight=@norm.weight_smoothed, bias=@norm.bias_smoothed)
        %norm: f32[9, 12] = layer_norm(%x, normalized_shape=[12], weight=@norm.weight, bias=@norm.bias)
        %a: f32[9, 12] = linear(%norm_smoothed, @a.weight, @a.bias)
        %b: f32[9, 12] = linear(%norm_smoothed, @b.weight)
        %add: f32[9, 12] = add.Tensor(%a, %b)
        %add_1: f32[9, 12] = add.Tensor(%add, %norm)
        return %add_1
    """)  # fmt: skip


@pytest.mark.parametrize("kind", NORMS)
@settings(max_examples=12)
@given(alpha=st.floats(0, 1), residual=st.booleans(), masked=st.booleans(), seed=st.integers(0, 99))
def test_the_graph_computes_what_it_did(kind, alpha, residual, masked, seed):
    torch.manual_seed(seed)
    model, x = BeforeTwo(NORMS[kind](), residual), uneven(40, seed=seed)
    before = (PruneWeights(ratio=0.5),) if masked else ()
    expected, _ = run(model, x, *before) if masked else (mcc.capture(model.eval(), (x,)), None)
    graph, rows = run(model, x, *before, SmoothQuant(alpha=alpha))
    assert rows[-1].edits == 1
    torch.testing.assert_close(graph(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NORMS)
def test_at_one_half_inputs_and_weights_reach_equally_far(kind):
    model, x = BeforeTwo(NORMS[kind](), residual=False), uneven(40)
    graph, _ = run(model, x, SmoothQuant())
    linear = next(n for n in graph.nodes if n.op.name == "linear")
    columns = torch.stack([graph.tensor(f"{n}.weight").abs().amax(0) for n in "ab"]).amax(0)
    graph.module.graph.output_node().args = ((linear.operand(0).fx,),)
    graph.module.recompile()
    torch.testing.assert_close(graph.module(x).abs().amax(0), columns, rtol=1e-4, atol=1e-6)


def test_outliers_cost_less_after_smoothing():
    model, x = BeforeTwo(nn.LayerNorm(12), residual=True), torch.randn(400, 12)
    with torch.no_grad():
        model.norm.weight[3] = 60.0
    calibration, unseen = x[:200], x[200:]
    plain, _ = run(model, calibration, Quantize(observer="min-max"))
    smoothed, _ = run(model, calibration, SmoothQuant(), Quantize(observer="min-max"))
    with torch.no_grad():
        expected = model(unseen)
    assert (smoothed(unseen) - expected).norm() < 0.7 * (plain(unseen) - expected).norm()


def test_channels_that_are_never_seen_or_never_read_keep_their_scale():
    model, x = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3)), torch.randn(9, 12)
    with torch.no_grad():
        model[0].weight[2] = model[0].bias[2] = 0
        model[1].weight[:, 5] = 0
    column, gain = model[1].weight[:, 2].clone(), model[0].weight[5].clone()
    graph, _ = run(model, x, SmoothQuant())
    assert torch.equal(graph.tensor("1.weight")[:, 2], column)
    assert torch.equal(graph.tensor("0.weight")[5], gain)


def test_an_attention_block_is_smoothed_where_norms_stand():
    _, rows = run(Attention(), torch.randn(2, 7, 32), SmoothQuant())
    assert rows[1].edits == 2
    assert [(d.layer, d.reason) for d in rows[1].declined] == [
        ("out", "it reads reshape, which has no gain for each channel"),
        ("down", "it reads glu, which has no gain for each channel"),
    ]


class SharedBehindNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.other = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.other(self.norm(x)) + self.layer(self.norm(self.layer(x)))


def test_shared_weights_and_gains_are_not_changed_for_others():
    x = torch.randn(5, 12)
    graph, rows = run(SharedBehindNorm(), x, SmoothQuant())
    assert {(d.layer, d.reason) for d in rows[1].declined} == {
        ("layer", "it reads an input, which has no gain for each channel"), ("layer", "its weight is shared"),
    }  # fmt: skip
    assert rows[1].edits == 1
    assert "@norm.weight_smoothed" in str(graph)


@pytest.mark.parametrize(("model", "x", "message"), [
    (mlp(12, 8, 4), torch.randn(2, 12), "no linear layer can be smoothed: 0: it reads an input, which has no gain"),
    (TiedLanguageModel(), torch.randint(0, 50, (2, 6)), "no linear layer can be smoothed: mix: it reads add.Tensor"),
    (nn.Sequential(nn.LayerNorm(12, elementwise_affine=False), nn.Linear(12, 2)), torch.randn(2, 12),
     "the gain of %layer_norm_0 is not a stored vector"),
])  # fmt: skip
def test_a_model_without_norms_before_linear_layers_is_refused(model, x, message):
    with pytest.raises(PassError, match=message):
        run(model, x, SmoothQuant())


def test_wrong_options_and_data_are_refused_in_words():
    with pytest.raises(SpecError, match="smooth-quant: alpha=1.5"):
        SmoothQuant(alpha=1.5)
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3))
    with pytest.raises(DataError, match="the calibration data is empty"):
        run(model, torch.randn(2, 12), SmoothQuant(), calibration=iter(()))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float16])
def test_a_vector_of_another_type_is_no_gain(kind):
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)
            self.register_buffer("keep", torch.arange(12).remainder(3).to(kind))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x * self.keep).float())

    with pytest.raises(PassError, match="no linear layer can be smoothed: fc: "):
        run(Kept(), torch.randn(4, 12), SmoothQuant())
