"""Weights as codes of a table: which table, which codes, what is stored, what is not taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import TiedLanguageModel
from torch import nn

import mcc
from mcc.cost import graph_size
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.passes import FineTune, FoldBatchNorm, PruneWeights, Quantize, QuantizeCodebook
from mcc.passes.quantize_codebook import k_means, normal_float
from mcc.pipeline import Pipeline
from mcc.target import missing_features, parse_target

TARGETS = [t for t in ("cpu:avx2", "cpu:avx512vnni") if not missing_features(parse_target(t))]
QUICK = {"measure": "never", "tuning": "model"}
# of the paper's appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
WAYS = [
    QuantizeCodebook(), QuantizeCodebook("fp4", group_size=32), QuantizeCodebook("k-means", 3, group_size=None),
    QuantizeCodebook("k-means", 2), QuantizeCodebook("k-means", 4, vector=2), QuantizeCodebook("k-means", 2, vector=2),
]  # fmt: skip


def run(model, x, *steps, data=None):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx2"), data or Data(calibration=[x])).run(graph, (x,))


def test_the_weight_becomes_entries_of_a_table_and_then_codes(golden):
    graph, _ = run(nn.Sequential(nn.Linear(128, 10), nn.ReLU()), torch.randn(2, 128), QuantizeCodebook())
    golden("codebook_layer", str(graph))


def test_the_normal_floats_are_those_of_the_paper():
    torch.testing.assert_close(normal_float()[:, 0], torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", WAYS, ids=str)
def test_the_artifact_reads_codes_of_no_more_than_their_bits(tmp_path, step, target):
    """Against NumPy: every vector of weights is the entry that is nearest to it in units of its group's scale."""
    model = nn.Linear(128, 64).eval()
    x = torch.randn(7, 128)
    graph, _ = run(model, x, step)
    scale, table = (graph.tensor(f"weight_{part}").double().numpy() for part in ("scale", "table"))
    assert table.shape == (1 << step.bits, step.vector)
    in_scales = model.weight.detach().double().numpy().reshape(*scale.shape, -1) / scale[..., None]
    vectors = in_scales.reshape(-1, step.vector)
    nearest = ((vectors[:, None] - table) ** 2).sum(-1).min(1)
    found = graph.node("weight_quantized")
    with torch.no_grad():
        values = found.fx.target(model.weight, graph.tensor("weight_scale"), graph.tensor("weight_table"))
    apart = (values.double().numpy().reshape(in_scales.shape) / scale[..., None]).reshape(vectors.shape) - vectors
    np.testing.assert_allclose((apart**2).sum(-1), nearest, rtol=1e-4, atol=1e-6)
    artifact = mcc.compile(model, (x,), passes=[step], dynamic_shapes=({0: "batch"},), target=target, **QUICK)
    artifact.save(tmp_path / "m.mcc")
    loaded = mcc.load(tmp_path / "m.mcc")
    for batch in (1, 7, 0):
        torch.testing.assert_close(loaded(x[:batch]), graph(x)[:batch], rtol=1e-4, atol=1e-5)
    (row,) = loaded.report.layers
    assert row.kernel.startswith("low_bit_dense")
    assert row.reason == ""
    codes = 128 * 64 // step.vector * step.bits // 8
    assert row.stored_bytes == codes + scale.size * 2 + 4 * 64  # and a bias


def test_tables_fitted_to_the_weights_have_smaller_errors():
    """Of normal weights: k-means below NF4 below int4 with the same scales, and pairs below two single bits."""
    torch.manual_seed(0)
    model, x = nn.Linear(512, 128, bias=False), torch.eye(512)
    nn.init.normal_(model.weight)

    def error(step):
        graph, _ = run(model, x, step)
        with torch.no_grad():
            return float((graph(x) - model(x)).norm() / model.weight.norm())

    four = [QuantizeCodebook("k-means"), QuantizeCodebook(), Quantize("int4", None, 64)]
    assert error(four[0]) < error(four[1]) < error(four[2])
    assert error(QuantizeCodebook("k-means", 4, vector=2)) < error(QuantizeCodebook("k-means", 2))


def test_k_means_of_few_and_of_equal_vectors():
    for vectors in (torch.zeros(8, 1), torch.zeros(3, 2), torch.tensor([[1.0], [2.0]])):
        centres = k_means(vectors, 8, seed=0)
        assert centres.shape == (8, vectors.shape[1])
        assert centres.isfinite().all()
        assert all((centres - v).norm(dim=1).min() < 1e-6 for v in vectors)
    assert torch.equal(k_means(torch.randn(100, 2), 4, 1), k_means(torch.randn(100, 2), 4, 1)) is False
    same = torch.randn(100, 2)
    assert torch.equal(k_means(same, 4, 1), k_means(same, 4, 1))


def test_zero_weights_and_tiny_ones_stay_what_they_are():
    model = nn.Linear(64, 8, bias=False)
    model.weight.data[0] = 0.0
    model.weight.data[1] *= 1e-30
    graph, _ = run(model, torch.eye(64), QuantizeCodebook())
    with torch.no_grad():
        found = graph(torch.eye(64)).T
    assert (found[0] == 0).all()
    for row in range(1, 8):
        assert (found[row] - model.weight[row]).norm() <= 0.12 * model.weight[row].norm()


@pytest.mark.parametrize("kind", ["nf4", "k-means"])
@pytest.mark.parametrize("size", [1e-8, 2e-5, 1.0, 3e5])
def test_weights_of_any_size_keep_their_digits(kind, size):
    torch.manual_seed(0)
    model = nn.Linear(64, 8, bias=False)
    model.weight.data = torch.randn(8, 64) * size
    graph, _ = run(model, torch.eye(64), QuantizeCodebook(kind))
    with torch.no_grad():
        assert (graph(torch.eye(64)).T - model.weight).norm() <= 0.12 * model.weight.norm()
    artifact = mcc.compile(graph, (torch.eye(64),), **QUICK)
    torch.testing.assert_close(artifact(torch.eye(64)), graph(torch.eye(64)), rtol=1e-4, atol=1e-6 * size)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_a_layer_called_twice_has_its_codes_once():
    graph, rows = run(Twice(), torch.randn(2, 64), QuantizeCodebook())
    assert rows[1].edits == 2
    assert [n.name for n in graph.nodes if n.op is not None and n.op.name == "mcc.fake_codebook"] == [
        "fc_weight_quantized"
    ]


def test_pruned_weights_stay_zero_where_an_entry_is_zero_and_training_goes_on():
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(90, 64)
    data = Data(calibration=[x], train=[(x, (x[:, 0] > 0).long())] * 20)
    steps = PruneWeights(ratio=0.5), QuantizeCodebook(group_size=32), FineTune(epochs=1, learning_rate=0.01)
    graph, _ = run(model, x, *steps, data=data)
    node, mask = graph.node("weight_0_quantized"), graph.tensor("0.weight_mask")
    with torch.no_grad():
        values = node.fx.target(
            graph.tensor("0.weight") * mask, *(graph.tensor(f"0.weight_{p}") for p in ("scale", "table"))
        )
    assert (values[~mask] == 0).all()
    assert not torch.equal(graph.tensor("0.weight"), model[0].weight)
    artifact = mcc.compile(graph, (x,), **QUICK)
    torch.testing.assert_close(artifact(x), graph(x), rtol=1e-4, atol=1e-5)
    assert "no sparse kernel reads codes of a table" in str(artifact.report)
    codes = 64 * 32 // 2 + 2 * 2 * 32 + 64  # with scales and the table
    assert graph_size(graph).stored_bytes >= codes


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.conv = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Conv1d(1, 1, 3)

    def forward(self, x):
        return self.conv(self.bn(self.fc(x)).unsqueeze(1))


def test_what_is_not_taken_is_listed_with_the_reason():
    x = torch.randn(4, 64)
    _, rows = run(Normed(), x, QuantizeCodebook(), FoldBatchNorm(), Quantize(activations=None))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("conv", "conv1d is not linear")]
    assert "encoded: fold before that" in rows[2].declined[0].reason
    assert ("fc", "its weight is already quantized") in [(d.layer, d.reason) for d in rows[3].declined]
    for model, step, reason in (
        (nn.Linear(63, 8), QuantizeCodebook("k-means", vector=2, group_size=None), "its 63 inputs are no pairs"),
        (nn.Linear(64, 8), QuantizeCodebook(group_size=128), "its 64 inputs are no multiple of 128"),
    ):
        with pytest.raises(PassError, match=reason):
            run(model, torch.randn(2, model.in_features), step)
    _, rows = run(TiedLanguageModel(), torch.randint(0, 50, (2, 6)), QuantizeCodebook(group_size=None))
    assert ("embed", "its weight is read by embedding as well") in [(d.layer, d.reason) for d in rows[1].declined]
    with pytest.raises(PassError, match="no entry stands for it"):
        run(nn.Linear(64, 8), x, PruneWeights(ratio=0.5), QuantizeCodebook("k-means"))
    for options, message in (
        ({"kind": "nf3"}, "kind='nf3'"), ({"bits": 3}, "nf4 has 4 bits a weight"), ({"vector": 3}, "vector=3"),
        ({"group_size": 40}, "group_size=40"), ({"group_size": "64"}, "group_size='64'"),
        ({"kind": "k-means", "bits": 3, "vector": 2, "group_size": 32}, "pairs of 3 bits in groups of 32"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=message):
            QuantizeCodebook(**options)
