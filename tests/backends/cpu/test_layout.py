"""Channels last: what turns, what stays, and that the graph computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import mcc
from mcc import ops
from mcc.backends.cpu.layout import layout
from mcc.backends.cpu.lowering import Lowering
from mcc.backends.cpu.measure import measure
from mcc.backends.tune import Tuner
from mcc.errors import ArtifactError
from mcc.graph import Graph
from mcc.target import parse_target

GOLDEN = Path(__file__).parents[2] / "golden"


def turned(model: nn.Module, *inputs: torch.Tensor, **options: object) -> Graph:
    graph = mcc.capture(model.eval(), inputs, **options)
    result = layout(Lowering(graph, parse_target("cpu"), Tuner("model", measure))).graph
    with torch.no_grad():
        torch.testing.assert_close(result(*inputs), graph(*inputs), rtol=1e-4, atol=1e-5)
    assert result.signature == graph.signature
    return result


def permutes(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.op.name in ("permute", "transpose.int")]


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(8, 8, (1, 3), stride=(1, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip


def test_a_network_turns_as_a_whole():
    graph = turned(Classifier(), torch.randn(2, 3, 9, 12))
    assert str(graph) == (GOLDEN / "channels_last.txt").read_text()


class Squeezed(nn.Module):
    """Squeeze and excitation, a concat of branches, a split, a scale of each channel and one of rank three."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.down, self.up, self.last = nn.Linear(16, 4), nn.Linear(4, 16), nn.Conv2d(24, 6, 1)
        self.scale, self.gain = nn.Parameter(torch.rand(16, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1))

    def forward(self, x):
        y = F.silu(self.depthwise(self.stem(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        y = y * gate[:, :, None, None] * self.scale
        left, right = y.chunk(2, 1)
        return self.last(torch.cat([left, right, left], 1)) * self.gain


class NextBlock(nn.Module):
    """ConvNeXt's: the model has permutes of its own around a norm and two linears."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.LayerNorm(16)
        self.up, self.down, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        for _ in range(2):
            y = self.down(F.gelu(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
            x = x + self.scale * y
        return x


class Upsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        low = F.avg_pool2d(F.pad(y, (1, 1, 0, 0)), 2, padding=1, count_include_pad=False)
        back = F.interpolate(low, size=y.shape[2:], mode="bilinear", align_corners=False)
        return self.b(torch.cat([y, back], 1)), F.interpolate(y, scale_factor=2.0, mode="nearest")


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.linear = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(self.patch(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("model", "size", "left"), [
    (Classifier(), (2, 3, 9, 12), 1),  # the image alone
    (Squeezed(), (2, 3, 9, 7), 2),  # the image and the result
    (NextBlock(), (1, 16, 6, 5), 2),
    (Upsampled(), (2, 3, 8, 6), 3),  # two results
    (Patches(), (2, 3, 8, 12), 1),  # flattening an image turns nothing
    (nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), (2, 3, 4, 4), 0),  # no convolution: nothing turns
    (nn.Sequential(nn.Conv2d(3, 4, 2), nn.Softmax(1), nn.Flatten(2)), (2, 3, 4, 4), 2),
])  # fmt: skip
def test_only_the_borders_are_transposed(model, size, left):
    assert len(permutes(turned(model, torch.randn(size)))) == left


def test_a_varying_batch_stays_so():
    graph = turned(Squeezed(), torch.randn(2, 3, 9, 7), dynamic_shapes=({0: "batch"},))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 9, 7)
        with torch.no_grad():
            assert graph(x).shape == (batch, 6, 9, 7)


def test_a_pointwise_convolution_of_varying_width_is_a_linear_layer_of_its_pixels():
    graph = turned(nn.Conv2d(3, 8, 1), torch.randn(1, 3, 9, 9), dynamic_shapes=({3: "width"},))
    assert [n.op.name for n in graph.nodes if n.op is not ops.SYM_SIZE] == ["permute", "linear", "permute"]


@pytest.mark.parametrize(("dilation", "kernel", "padding"), [
    (2, [3, 3], [2, 2, 2, 2]),  # all taps are read
    (7, [3, 1], [7, 0, 7, 0]),  # the image is 7 wide: its neighbours at that distance are padding
    (9, [1, 1], [0, 0, 0, 0]),
])  # fmt: skip
def test_taps_that_read_only_padding_are_left_out(dilation, kernel, padding):
    model = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation)
    graph = turned(model, torch.randn(2, 16, 9, 7))
    (conv,) = [n for n in graph.nodes if n.op is ops.CONV2D_NHWC]
    assert list(conv.operand(1).shape[2:]) == kernel
    assert conv.argument(4) == padding


class AnySize(nn.Module):
    """What a detector is made of: strides, pools, groups, single channels, a sequence and a sum over scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.alone = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 5, 2, 2, groups=16)
        self.wide, self.point = nn.Conv2d(16, 24, 3, padding=2, dilation=2), nn.Conv2d(24, 16, 1)
        self.head = nn.Conv1d(16, 5, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 3, 2, 1, output_padding=1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.interpolate(self.up(F.avg_pool2d(x, 2)), scale_factor=2.0)[:, :, ::2, ::2] + x
        x = x + F.interpolate(F.interpolate(x, scale_factor=2.0, mode="bilinear"), size=x.shape[2:], mode="bilinear")
        x = x + self.grouped(F.max_pool2d(x, 3, 1, 1))
        y = self.point(F.silu(self.wide(F.relu(self.alone(x)))))
        y = F.avg_pool2d(x, 2) + y
        return self.head(y.mean(2)), F.adaptive_avg_pool2d(y, 1)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["fold-batch-norm", "fold-batch-norm; quantize"])
def test_images_of_any_size_run_on_the_own_kernels(passes):
    torch.manual_seed(0)
    model = AnySize().eval()
    x = torch.randn(2, 3, 32, 48)
    sizes = {0: "batch", 2: 4 * torch.export.Dim("height", min=1), 3: 4 * torch.export.Dim("width", min=1)}
    options = {"dynamic_shapes": (sizes,), "data": mcc.Data(calibration=[x]), "measure": "never", "tuning": "model"}
    artifact = mcc.compile(model, (x,), passes=passes, **options)
    assert all(row.kernel != "op library" for row in artifact.report.layers)
    for shape in ((2, 3, 32, 48), (1, 3, 4, 4), (1, 3, 100, 12), (5, 3, 8, 44), (0, 3, 8, 8)):
        images = torch.randn(shape)
        with torch.no_grad():
            for found, expected in zip(artifact(images), model(images), strict=True):
                assert found.shape == expected.shape
                apart = (found - expected).norm() / max(expected.norm(), 1e-6)
                # untrained: sums of an image cancel, and without exact dot products neighbouring weights share a range
                assert apart < (0.1 if "quantize" in passes else 1e-5)
    with pytest.raises(ArtifactError, match=r"input x is float32\[1, 3, 6, 8\], the artifact takes float32\[.*4\*"):
        artifact(torch.randn(1, 3, 6, 8))


@pytest.mark.parametrize(
    "model", [Classifier(), Squeezed(), NextBlock(), Upsampled(), Patches()], ids=lambda m: type(m).__name__
)
def test_artifacts_equal_their_models(model):
    x = torch.randn(3, 16 if isinstance(model, NextBlock) else 3, 16, 12)
    artifact = mcc.compile(model.eval(), (x,), measure="never", tuning="model")
    with torch.no_grad():
        for found, expected in zip(pytree.tree_leaves(artifact(x)), pytree.tree_leaves(model(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Then(nn.Module):
    """A convolution and something that is done to what it gives."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 16, 3), then

    def forward(self, x):
        return self.then(torch.relu(self.conv(x)))


@pytest.mark.parametrize("then", [
    lambda y: y.mean(2), lambda y: y.mean([1]), lambda y: y.sum((-1,)), lambda y: y.amax((2, 3)), lambda y: y.amax(1),
    lambda y: y.mean((0, 2)), lambda y: y.mean((1, 3), keepdim=True), lambda y: y.amin((0, 1)), lambda y: y.softmax(1),
    lambda y: F.pad(y, (1, 1, 2, 0), "reflect"), lambda y: F.pad(y, (1, -1, 2, 0, 1, 0), value=3.0),
    lambda y: torch.cat([y, y * 2], 0), lambda y: torch.cat([y, y * 2], -1), lambda y: y[:, 1:5, ::2], lambda y: y[:, 3],
    lambda y: (y, y * 2, y.flatten(2)), lambda y: y.permute(0, 3, 1, 2) + 1, lambda y: F.group_norm(y, 4),
    lambda y: y.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2),
])  # fmt: skip
def test_what_follows_a_convolution_computes_the_same(then):
    x, model = torch.randn(2, 3, 9, 8), Then(then).eval()
    artifact = mcc.compile(model, (x,), measure="never", tuning="model")
    with torch.no_grad():
        for found, expected in zip(pytree.tree_leaves(artifact(x)), pytree.tree_leaves(model(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
