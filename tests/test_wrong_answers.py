"""Models that once compiled to a wrong answer, or failed with another library's error."""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from networks import mlp
from torch import nn

import mcc
from mcc.backends.cpu.integerize import integerize
from mcc.backends.cpu.kernels.dense import DenseFloat
from mcc.backends.cpu.lowering import Lowering
from mcc.backends.tune import Tuner
from mcc.data import Data
from mcc.errors import ArtifactError, CaptureError, DataError
from mcc.passes import FineTune, FoldBatchNorm, PruneWeights, Quantize
from mcc.rewrite import Exact, Rewrite
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}
ADD = torch.ops.aten.add.Tensor


def close(model: nn.Module, x: torch.Tensor, *passes: mcc.Pass, **options: object) -> None:
    artifact = mcc.compile(model, (x,), passes=passes, **QUICK, **options)
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-4)


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        for name in ("one", "two"):
            self.register_buffer(name, torch.rand(64, 64) < 0.1)
        self.register_buffer("row", torch.rand(1, 64) < 0.5)


class TwoMasksOfOneWeight(Masks):
    def forward(self, x):
        linear = nn.functional.linear
        return linear(x, self.weight * self.one) - linear(torch.tanh(x), self.weight * self.two)


class NestedMasks(Masks):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.one * self.two)


class BroadcastMask(Masks):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.row)


class ReturnedMaskedWeight(Masks):
    def forward(self, x):
        return self.weight * self.one + x


@pytest.mark.parametrize("kind", [TwoMasksOfOneWeight, NestedMasks, BroadcastMask, ReturnedMaskedWeight])
def test_masks_that_a_model_has_of_its_own(kind):
    close(kind().eval(), torch.randn(64, 64))


def test_pruning_a_weight_that_the_model_masks():
    model, x = NestedMasks().eval(), torch.randn(5, 64)
    artifact = mcc.compile(model, (x,), passes=[PruneWeights(ratio=0.5)], **QUICK)
    assert artifact.report.passes


class WritesToAPart(nn.Module):
    def forward(self, x):
        y = x + 1
        a, _ = y.chunk(2, 1)
        a.mul_(2)
        return y


class ReadsAPartAfterAWrite(nn.Module):
    def forward(self, x):
        y = x + 1
        a, _ = y.chunk(2, 1)
        y.mul_(2)
        return a


def test_a_write_that_chunk_shares_is_refused():
    with pytest.raises(CaptureError, match="view"):
        mcc.capture(WritesToAPart(), (torch.randn(2, 4),))


def test_a_part_that_was_cut_before_a_write_is_read_as_it_is_after_it():
    x = torch.randn(2, 4)
    assert torch.equal(mcc.capture(ReadsAPartAfterAWrite(), (x,))(x), ReadsAPartAfterAWrite()(x))


@dataclass(frozen=True)
class SwapAdd(Rewrite):
    guarantee = Exact()

    def pattern(self, x, y):
        return ADD(x, y)

    def replacement(self, x, y):
        return ADD(y, x)


class ScaledAdd(nn.Module):
    def forward(self, x):
        return torch.add(x, x.tanh(), alpha=3)


def test_a_pattern_leaves_calls_with_other_keywords_alone():
    artifact = mcc.compile(ScaledAdd(), (torch.randn(3, 4),), passes=[SwapAdd()], **QUICK)
    assert artifact.report.passes[0].edits == 0


def test_a_checkpoint_of_another_model_is_not_resumed(tmp_path):
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    data = Data(train=[(x, y)], loss=nn.functional.cross_entropy)
    step = FineTune(epochs=1, checkpoint=str(tmp_path / "c.pt"))
    mcc.compile(mlp(8, 16, 3), (x,), passes=[step], data=data, **QUICK)
    torch.manual_seed(1)
    with pytest.raises(DataError, match="another training run"):
        mcc.compile(mlp(8, 16, 3), (x,), passes=[step], data=data, **QUICK)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_a_tied_head_is_quantized_and_its_embedding_is_not():
    tokens = torch.randint(0, 50, (2, 7))
    mcc.compile(TiedHead().eval(), (tokens,), passes=[Quantize(activations=None)], **QUICK)


def trained_norm(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def test_batch_norm_over_another_axis_than_the_layer_s_is_not_folded():
    model = nn.Sequential(nn.Linear(6, 6), trained_norm(nn.BatchNorm1d(6))).eval()
    close(model, torch.randn(3, 6, 6), FoldBatchNorm())


@pytest.mark.parametrize(
    "model",
    [
        nn.BatchNorm2d(3, track_running_stats=False),
        trained_norm(nn.InstanceNorm2d(3, track_running_stats=True)),
        nn.InstanceNorm2d(3, affine=True),
    ],
)
def test_norms_with_and_without_running_statistics(model):
    close(model.eval(), torch.randn(4, 3, 5, 5))


class OwnScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.x_scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        return self.fc(x) * self.x_scale


def test_quantizing_keeps_a_parameter_that_bears_the_scale_s_name():
    model, x = OwnScale().eval(), torch.randn(16, 8)
    artifact = mcc.compile(model, (x,), passes=[Quantize()], data=Data(calibration=[x]), **QUICK)
    with torch.no_grad():
        assert (artifact(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_log_sigmoid_of_large_inputs():
    close(nn.LogSigmoid(), torch.tensor([-100.0, -1e4, 0.0, 100.0]))


class Lookup(nn.Module):
    def forward(self, x, i):
        return x[i]


def test_an_index_outside_reads_the_last_element():
    x = torch.randn(5, 3)
    artifact = mcc.compile(Lookup(), (x, torch.tensor([0, 1])), **QUICK)
    assert torch.equal(artifact(x, torch.tensor([-1, 100_000])), x[[4, 4]])


class TakesADict(nn.Module):
    def forward(self, batch):
        return batch["a"] + batch["b"] * 2


def test_nested_inputs_are_verified():
    batch = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    artifact = mcc.compile(TakesADict(), (batch,), passes=["eliminate-identity"], **QUICK)
    torch.testing.assert_close(artifact(batch), batch["a"] + batch["b"] * 2)


class ReturnsNone(nn.Module):
    def forward(self, x):
        return x + 1, None


def test_outputs_and_parameters_that_no_artifact_can_hold_are_refused():
    with pytest.raises(CaptureError, match="output 1 of the model is None"):
        mcc.capture(ReturnsNone(), (torch.randn(2),))
    with pytest.raises(CaptureError, match="weight is bfloat16"):
        mcc.capture(nn.Linear(4, 4).bfloat16(), (torch.randn(2, 4).bfloat16(),))


def test_a_number_in_place_of_a_tensor():
    artifact = mcc.compile(mlp(4, 8, 2), (torch.randn(1, 4),), **QUICK)
    with pytest.raises(ArtifactError, match="the artifact takes float32"):
        artifact(1.0)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not remembered"):
        mcc.compile(mlp(64, 64, 64), (torch.randn(8, 64),), measure="never")


def test_a_graph_left_in_training_mode_is_compiled_for_inference():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), torch.randn(3, 4)
    graph = mcc.capture(model, (x,)).train()
    torch.testing.assert_close(mcc.compile(graph, (x,), passes=["fold-constants"], **QUICK)(x), model(x))


def test_a_saved_artifact_has_the_mode_of_any_new_file(tmp_path):
    artifact = mcc.compile(mlp(4, 8, 2), (torch.randn(1, 4),), **QUICK)
    artifact.save(tmp_path / "a.mcc")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "a.mcc").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


class Expands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 1024))

    def forward(self, x):
        return x + self.row.expand(2048, 1024)


def test_an_expanded_parameter_is_stored_as_it_is(tmp_path):
    artifact = mcc.compile(Expands(), (torch.randn(2048, 1024),), **QUICK)
    artifact.save(tmp_path / "a.mcc")
    assert (tmp_path / "a.mcc").stat().st_size < 1 << 20


class ReturnsAliases(nn.Module):
    def forward(self, x):
        y = x.tanh()
        return y, y.type_as(x), y[:, :8], y.view(-1)


def test_outputs_share_no_memory():
    outputs = mcc.compile(ReturnsAliases(), (torch.randn(2, 8),), **QUICK)(torch.randn(2, 8).numpy())
    for i, a in enumerate(outputs):
        assert not any(np.shares_memory(a, b) for b in outputs[i + 1 :])


def test_infinite_activations_name_their_node():
    x = torch.full((4, 8), float("inf"))
    with pytest.raises(DataError, match="%x is infinite"):
        mcc.compile(OwnScale(), (torch.randn(4, 8),), passes=[Quantize()], data=Data(calibration=[x]), **QUICK)


class DropsInPlaceFromAView(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(torch.flatten(torch.relu(x), 1), 0.5, self.training, inplace=True) * 2


def test_a_write_into_a_view_that_alone_is_read_after_is_taken():
    close(DropsInPlaceFromAView().eval(), torch.randn(2, 3, 4))


class Difference(nn.Module):
    def forward(self, x, y):
        return x - 2 * y


def test_one_tensor_given_as_two_example_inputs():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    artifact = mcc.compile(Difference(), (x, x), **QUICK)
    torch.testing.assert_close(artifact(x, y), x - 2 * y)


class Applied(nn.Module):
    """A function of a layer's value, and a tensor it may read."""

    def __init__(self, layer, then, tensor=None):
        super().__init__()
        self.layer, self.then = layer, then
        self.register_buffer("t", tensor)

    def forward(self, x):
        return self.then(self, self.layer(x))


@pytest.mark.parametrize("then", [
    lambda s, y: torch.relu(y).flatten(1), lambda s, y: torch.relu(y).flatten(2).transpose(1, 2),
    lambda s, y: torch.relu(y).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).flatten(2),
], ids=["flatten", "tokens", "shuffle"])  # fmt: skip
def test_a_quantized_model_of_varying_batch_with_reshapes(then):
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(Applied(nn.Conv2d(3, 8, 3), then), nn.LazyLinear(5)).eval()
    model(x)
    options = {"data": Data(calibration=[x]), "dynamic_shapes": ({0: "batch"},)}
    artifact = mcc.compile(model, (x,), passes=[Quantize()], **options, **QUICK)
    assert artifact(x[:3]).shape == model(x[:3]).shape


@pytest.mark.parametrize(("layer", "shape", "then", "tensor"), [
    (nn.Linear(8, 16), (1, 5, 8), lambda s, y: y + s.t[:, :5], torch.randn(1, 9, 16)),
    (nn.Conv2d(3, 5, 3), (1, 3, 6, 6), lambda s, y: y + s.t, torch.randn(1, 5, 4, 4)),
    (nn.Conv2d(3, 5, 3), (2, 3, 6, 6), lambda s, y: y + s.t, torch.randn(2, 1, 1, 1, 1)),
    (nn.Linear(8, 16), (2, 8), lambda s, y: (y, s.t * 2), torch.randn(3)),
    (nn.Conv2d(3, 5, 3), (2, 3, 6, 6), lambda s, y: y.amax(), torch.randn(1)),
    (nn.Conv2d(3, 5, 3), (2, 3, 6, 6), lambda s, y: torch.sum(y, dim=None, keepdim=True), torch.randn(1)),
])  # fmt: skip
def test_layers_with_constants_and_reductions_after_them(layer, shape, then, tensor):
    close(Applied(layer, then, tensor).eval(), torch.randn(shape))


def test_a_float64_convolution_is_left_to_the_op_library():
    close(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).double().eval(), torch.randn(2, 3, 9, 8, dtype=torch.float64))


def test_codes_whose_sums_int32_cannot_hold_are_read_as_floats():
    layer, x = nn.Conv2d(2048, 2, 9), torch.rand(1, 2048, 9, 9)
    nn.init.constant_(layer.weight, 0.01)
    artifact = mcc.compile(nn.Sequential(layer).eval(), (x,), passes=[Quantize()], data=Data(calibration=[x]), **QUICK)
    row = artifact.report.layers[0]
    # without VNNI the codes are half as large, and the sums fit
    assert "beyond int32" in row.reason or row.kernel.startswith("conv2d_int8")


class Masked(nn.Module):
    def forward(self, q, k, v, mask):
        return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def left_padded(lowest):
    mask = torch.full((16, 16), lowest).triu(1)
    mask[:, :3] = lowest
    return mask


@pytest.mark.parametrize("mask", [
    left_padded(torch.finfo(torch.float32).min), left_padded(float("-inf")), left_padded(-1e9), left_padded(-1.0) == 0,
], ids=["finfo.min", "-inf", "-1e9", "bool"])  # fmt: skip
@pytest.mark.parametrize("keys", [11, 16])
def test_attention_rows_that_see_no_key(mask, keys):
    mask = mask[:keys, :keys].contiguous()
    q, k, v = (torch.randn(2, 3, keys, 16) for _ in range(3))
    artifact = mcc.compile(Masked(), (q, k, v, mask), **QUICK)
    torch.testing.assert_close(artifact(q, k, v, mask), Masked()(q, k, v, mask), rtol=1e-4, atol=1e-5)


class WritesToItsInput(nn.Module):
    def forward(self, x):
        return x.add_(1).mul(2)


def test_a_model_that_writes_to_its_input_leaves_the_example_as_it_was():
    x = torch.ones(2, 5)
    artifact = mcc.compile(WritesToItsInput(), (x,), **QUICK)
    assert torch.equal(x, torch.ones(2, 5))
    assert torch.equal(artifact(x), torch.full((2, 5), 4.0))


@pytest.mark.parametrize("activation", [
    nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardsigmoid(), nn.Hardswish(),
], ids=str)  # fmt: skip
def test_a_nan_stays_a_nan_through_an_epilogue(activation):
    model, x = nn.Sequential(nn.Conv2d(3, 16, 1), activation).eval(), torch.randn(1, 3, 4, 4)
    artifact = mcc.compile(model, (x,), **QUICK)
    x[0, 1, 1, 2] = float("nan")
    assert torch.equal(artifact(x).isnan(), model(x).isnan())


class JoinedAlong(nn.Module):
    """An image made larger, joined to another along any dim."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)

    def forward(self, x):
        larger = torch.nn.functional.interpolate
        return torch.cat([larger(self.a(x), scale_factor=2), self.b(larger(x, scale_factor=2))], self.dim)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("passes", ["", "quantize"])
def test_an_enlarged_image_may_be_joined_along_any_dim(dim, passes):
    x = torch.randn(2, 3, 6, 6)
    model = JoinedAlong(dim).eval()
    artifact = mcc.compile(model, (x,), passes=passes, data=mcc.Data(calibration=[x]), **QUICK)
    with torch.no_grad():
        assert (artifact(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_a_size_next_to_a_conv1d():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Conv1d(8, 8, 3)

        def forward(self, x):
            return self.m(x) / x.shape[0]

    model, x = Scaled().eval(), torch.randn(3, 8, 9)
    artifact = mcc.compile(model, (x,), dynamic_shapes=({0: "b"},), **QUICK)
    torch.testing.assert_close(artifact(x[:2]), model(x[:2]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "x"), [
    (nn.LSTM(8, 3), torch.randn(5, 2, 8)), (nn.GRU(8, 8).double(), torch.randn(3, 2, 8).double()),
])  # fmt: skip
def test_a_recurrence_that_no_kernel_takes_is_refused_in_words(layer, x):
    with pytest.raises(mcc.MccError, match="use float32, and 4 units or more"):
        mcc.compile(layer.eval(), (x,), **QUICK)


def test_gelu_of_very_negative_values_is_zero_in_codes_too():
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(32))
        layer.bias.copy_(torch.linspace(-1e6, 1.0, 32))
    model, x = nn.Sequential(layer, nn.GELU(), nn.Linear(32, 8)).eval(), torch.randn(4, 32).clamp(-1, 1)
    artifact = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]), tuning="model")
    with torch.no_grad():
        assert (artifact(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_a_cache_that_cannot_be_read_does_not_time_twice(tmp_path):
    (tmp_path / "file").write_text("")
    timed = []
    tuner = Tuner("measure", lambda *_: timed.append(1) or (lambda: 1.0), tmp_path / "file" / "tune.sqlite")
    graph = mcc.capture(nn.Linear(40, 70), (torch.randn(3, 40),))
    (region,) = integerize(Lowering(graph, parse_target("cpu"), tuner)).regions.values()
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner.choose(DenseFloat(), region, parse_target("cpu"))
    assert len(timed) == 3


@pytest.mark.parametrize("passes", ["", "quantize", "quantize{weights='int4', activations=None, group_size=32}"])
def test_a_varying_batch_of_as_many_tokens_as_a_block_has_rows(passes):
    model, x = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96)).eval(), torch.randn(2, 64, 96)
    data = mcc.Data(calibration=[x])
    artifact = mcc.compile(model, (x,), passes=passes, data=data, dynamic_shapes=({0: "batch"},), **QUICK)
    for batch in (1, 3, 0):
        y = torch.randn(batch, 64, 96)
        with torch.no_grad():
            expected = model(y)
        # at four bits a sixth of the norm is what rounding does to random weights
        assert (artifact(y) - expected).norm() <= (0.2 if passes else 1e-5) * expected.norm()
