"""reconstruct: parts of a network give again what they gave; zeros, scales and what others read stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Attention, ConvBatchNorm, Residual, Shared, TiedLanguageModel, mlp
from torch import Tensor, nn

import mcc
from mcc import ops
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.parts import parts
from mcc.passes import EqualizeLayers, FoldBatchNorm, PruneWeights, Quantize, Reconstruct
from mcc.pipeline import Pipeline
from mcc.report import Declined
from mcc.target import parse_target

PRUNE = PruneWeights(ratio=0.5)
INT2 = Quantize(weights="int2", activations=None)


def run(model, x, *steps, calibration=None, seed=0):
    batch = {0: "batch"} if isinstance(x, Tensor) else None
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=(batch,))
    data = Data(calibration=[(x,)] if calibration is None else calibration)
    return Pipeline(steps, parse_target("cpu:avx512vnni"), data, seed).run(graph, (x,))


def alike(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose features depend on each other, so that weights can make up for those that are gone."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(*shape, generator=generator) + 2 * common


class Gated(nn.Module):
    """A stem, two residual branches, of which one has two layers side by side, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.mix, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(x + self.mix(x))


def cut(model: nn.Module, x: Tensor, comparable=lambda _: True):
    """What the parts behind all layers end with, and the tensors that each trains."""
    graph = mcc.capture(model.eval(), (x,))
    found = parts(graph, [n for n in graph.nodes if n.op in ops.LAYERS], comparable)
    return [(p.end, [layer.layer for layer in p.layers], list(p.parameters)) for p in found]


def test_a_residual_branch_ends_with_its_addition():
    assert cut(Gated(), torch.randn(3, 12)) == [
        ("stem", ["stem"], ["stem.bias", "stem.weight"]),
        ("add", ["gate", "up", "down"],
         ["down.bias", "down.weight", "gate.bias", "gate.weight", "up.bias", "up.weight"]),
        ("add_1", ["mix"], ["mix.bias", "mix.weight"]),
        ("head", ["head"], ["head.bias", "head.weight"]),
    ]  # fmt: skip


def test_a_layer_of_a_chain_goes_with_its_norm_and_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU())
    assert cut(model, torch.randn(2, 3, 9, 9)) == [
        ("relu_2", ["0"], ["0.bias", "0.weight", "1.bias", "1.weight"]),
        ("conv2d_3", ["3"], ["3.bias", "3.weight"]),
    ]


def test_a_graph_is_cut_where_values_can_be_compared():
    model = mlp(6, 5, 4, 3)
    assert [end for end, _, _ in cut(model, torch.randn(2, 6), lambda n: n.name == "linear_2")] == ["linear_2"]
    assert [layers for _, layers, _ in cut(model, torch.randn(2, 6), lambda n: n.name == "linear_4")] == [
        ["0", "2", "4"]
    ]


def test_pieces_that_a_layer_is_split_into_are_all_within_a_part():
    found = cut(nn.Sequential(nn.Linear(32, 32), Attention()), torch.randn(2, 9, 32))
    assert [layers for _, layers, _ in found] == [["0"], ["1.qkv", "1.out"], ["1.up", "1.down"]]


def test_tensors_that_other_parts_read_are_not_trained():
    found = cut(TiedLanguageModel(), torch.randint(0, 10, (2, 5)))
    assert [names for _, _, names in found] == [["mix.bias", "mix.weight"], []]
    assert all(not names for _, _, names in cut(Shared(), torch.randn(3, 12)))


class Tied(nn.Module):
    """A head tied to the embedding, which no slice is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(x).tanh())


@pytest.mark.parametrize("compress", [PRUNE, INT2], ids=["half pruned", "int2"])
def test_a_compressed_weight_that_is_tied_stays(compress):
    x = torch.randint(0, 11, (24, 5))
    torch.manual_seed(0)
    plain, _ = run(Tied(), x, compress)
    torch.manual_seed(0)
    learned, rows = run(Tied(), x, compress, Reconstruct())
    assert Declined("embed", "its weight is read elsewhere too, or is no parameter") in rows[-1].declined
    torch.testing.assert_close(learned.tensor("embed.weight"), plain.tensor("embed.weight"), rtol=0, atol=0)
    assert not torch.equal(learned.tensor("mix.weight"), plain.tensor("mix.weight"))


def test_targets_are_those_of_equalized_layers():
    model, batches = mlp(24, 32, 16, 5), [(alike(64, 24, seed=i),) for i in range(10)]
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight *= (1.5 * torch.randn(len(layer.weight), 1)).exp()
    steps = (EqualizeLayers(), Quantize(weights="int4", activations=None))
    plain, _ = run(model, batches[0][0], *steps, calibration=batches)
    learned, _ = run(model, batches[0][0], *steps, Reconstruct(), calibration=batches)
    unseen = alike(64, 24, seed=100)
    with torch.no_grad():
        before, after = ((g(unseen) - model(unseen)).norm() for g in (plain, learned))
    assert after < before


def test_a_layer_that_only_an_output_reads_is_named():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.aside, self.head = nn.Linear(24, 16), nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.trunk(x).relu()
            z = self.aside(y)
            return self.head(y).relu(), z

    _, rows = run(Two(), alike(32, 24), PRUNE, Reconstruct())
    (declined,) = rows[-1].declined
    assert declined.layer == "aside"
    assert "only an output reads it" in declined.reason


def test_frozen_models_are_trained_and_stay_frozen():
    model, x = mlp(24, 16, 5).requires_grad_(False), alike(64, 24)
    learned, rows = run(model, x, PRUNE, Reconstruct())
    assert rows[-1].edits == 4
    for _, parameter in learned.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_a_part_without_gradients_is_named():
    _, rows = run(TiedLanguageModel(), torch.randint(0, 10, (6, 5)), PRUNE, Reconstruct())
    assert "mix" in [d.layer for d in rows[-1].declined]
    assert any("its part cannot be trained: derivative" in d.reason for d in rows[-1].declined)


def test_layers_in_half_precision_are_named():
    with pytest.raises(PassError, match="computes in float16, too coarse to train in"):
        run(mlp(24, 16, 5).half(), alike(8, 24).half(), PRUNE, Reconstruct())


def test_a_bias_of_zeros_takes_up_what_pruning_moved():
    model, x = nn.Linear(16, 5), alike(64, 16) + 3
    nn.init.zeros_(model.bias)
    learned, _ = run(model, x, PRUNE, Reconstruct())
    assert learned.tensor("bias").abs().max() > 1e-2


MODELS = {
    "linear": (lambda: nn.Linear(24, 7), (64, 24)),
    "chain": (lambda: mlp(24, 32, 16, 5), (64, 24)),
    "gated": (lambda: Gated(), (64, 12)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (24, 6, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (24, 6, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 5, 2, 2), (24, 6, 5, 5)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compress", [PRUNE, INT2], ids=["half pruned", "int2"])
def test_unseen_data_gives_outputs_closer_to_the_models(name, compress):
    make, shape = MODELS[name]
    model = make()
    batches = [(alike(*shape, seed=i),) for i in range(20)]
    unseen = alike(*shape, seed=100)
    plain, _ = run(model, batches[0][0], compress, calibration=batches)
    learned, rows = run(model, batches[0][0], compress, Reconstruct(), calibration=batches)
    assert str(learned) == str(plain)
    assert rows[-1].edits
    with torch.no_grad():
        before, after = ((g(unseen) - model(unseen)).norm() for g in (plain, learned))
    assert after < 0.9 * before  # seen: 0.32 to 0.82


def test_a_pruned_layer_reaches_the_least_squares_of_its_mask():
    model, x = nn.Linear(16, 5), alike(200, 16)
    learned, _ = run(model, x, PRUNE, Reconstruct(iterations=3000, learning_rate=0.1))
    mask = learned.tensor("weight_mask").numpy()
    with torch.no_grad():
        wanted, found = model(x).double().numpy(), learned(x).double().numpy()
    for i in range(5):
        columns = np.concatenate([x.double().numpy()[:, mask[i]], np.ones((200, 1))], 1)
        _, least, *_ = np.linalg.lstsq(columns, wanted[:, i], rcond=None)
        assert np.square(found[:, i] - wanted[:, i]).sum() < 1.01 * least[0]


def test_zeros_scales_and_statistics_stay():
    x = alike(32, 3, 16, 16)
    steps = (FoldBatchNorm(), PruneWeights(ratio=0.7), Quantize())
    plain, _ = run(ConvBatchNorm(), x, *steps)
    torch.manual_seed(0)
    learned, _ = run(ConvBatchNorm(), x, *steps, Reconstruct())
    assert str(learned) == str(plain)
    trained = {name for name, _ in learned.named_parameters()}
    for name, tensor in learned.module.state_dict().items():
        if name not in trained:
            torch.testing.assert_close(tensor, plain.tensor(name), rtol=0, atol=0)
    assert not torch.equal(learned.tensor("conv.weight"), plain.tensor("conv.weight"))


def test_attention_is_one_part_whose_error_falls():
    model, x = Attention(), alike(24, 9, 32)
    batches = [(alike(24, 9, 32, seed=i),) for i in range(9)]
    _, rows = run(model, x, PRUNE, Reconstruct(), calibration=batches)
    (note,) = [n for n in rows[-1].notes if "parts give" in n]
    before, after = (float(word) for word in note.replace(",", "").split() if "e-" in word)
    assert after < 0.95 * before


def test_parts_see_what_trained_parts_before_them_give():
    model, x = mlp(24, 32, 32, 5), alike(256, 24)
    graph = mcc.capture(model.eval(), (x,))
    pruned, _ = Pipeline((PRUNE,), parse_target("cpu:avx2"), Data(calibration=[(x,)])).run(graph, (x,))
    learned, _ = run(model, x, PRUNE, Reconstruct(iterations=600))
    last = [n for n in learned.nodes if n.op is ops.LINEAR][-1]
    with torch.no_grad():
        wanted, found = model(x), learned(x)
        name = str(last.weight.fx.target)
        alone = learned.copy()
        alone.set_tensor(name, pruned.tensor(name))
        alone.set_tensor(name.replace("weight", "bias"), pruned.tensor(name.replace("weight", "bias")))
        assert (found - wanted).norm() < (alone(x) - wanted).norm() < (pruned(x) - wanted).norm()


def test_a_seed_gives_the_same_weights():
    batches = [(alike(16, 24, seed=i),) for i in range(10)]
    first, again, other = (
        run(mlp_of_seed(), batches[0][0], PRUNE, Reconstruct(), calibration=batches, seed=seed)[0].module.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def mlp_of_seed() -> nn.Module:
    torch.manual_seed(3)
    return mlp(24, 16, 5)


def test_batches_may_differ_in_rows_and_have_none():
    batches = [(alike(rows, 24),) for rows in (7, 0, 1, 13)]
    _, rows = run(mlp(24, 16, 5), alike(4, 24), PRUNE, Reconstruct(), calibration=batches)
    assert rows[-1].edits


def test_a_part_that_does_not_gain_stays_as_it_was():
    model, x = mlp(24, 16, 5), alike(200, 24)
    plain, _ = run(model, x, PRUNE)
    changed, rows = run(model, x, PRUNE, Reconstruct(iterations=1, learning_rate=1000.0))
    assert rows[-1].edits == 0
    assert rows[-1].declined == tuple(Declined(name, "what its part gives comes no closer") for name in ("0", "2"))
    for name, tensor in changed.module.state_dict().items():
        torch.testing.assert_close(tensor, plain.tensor(name), rtol=0, atol=0)


def test_a_float_model_is_refused():
    with pytest.raises(PassError, match="no layer is compressed: .*: its weight is neither pruned nor quantized"):
        run(Residual(), torch.randn(2, 3, 6, 6), Reconstruct())


@pytest.mark.parametrize(
    ("batch", "says"),
    [(torch.full((5, 24), torch.nan), "not finite"), (torch.zeros(0, 24), "no calibration batch has a row")],
)
def test_data_without_an_error_is_refused(batch, says):
    with pytest.raises(DataError, match=says):
        run(mlp(24, 16, 5), alike(4, 24), PRUNE, Reconstruct(), calibration=[(batch,)])


@pytest.mark.parametrize("option", [{"iterations": 0}, {"learning_rate": 0.0}])
def test_options_are_positive(option):
    with pytest.raises(SpecError, match="it is positive"):
        Reconstruct(**option)
