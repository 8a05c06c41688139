"""Ops outside the table: written out in ops that it has, as graphs and as artifacts that equal eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mcc
from mcc.errors import CaptureError, UnsupportedOpError
from mcc.frontend import capture


class Applied(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


class Several(nn.Module):
    """Several functions of the same tensors."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *given):
        return tuple(function(*given) for function in self.functions)


def tensors():
    generator = torch.Generator().manual_seed(1)
    image, rows = torch.randn(2, 6, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return image, rows, rows.flip(0) + 0.3, torch.randint(0, 5, (2, 7), generator=generator)


def rotated(rows, angles):
    pairs = torch.view_as_complex(rows.reshape(2, 5, 6, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def written_by_mask(rows):
    rows = rows.clone()
    rows[rows < 0] = 0.5
    return rows


def written_in_columns(rows, other):
    rows = rows.clone()
    rows[:, :, torch.tensor([0, 3])] = other[:, :, :2]
    return rows


# of an image, two tensors of rows, and indices
FUNCTIONS = {
    "windows": [
        lambda i, a, b, k: F.unfold(i, (2, 3), dilation=2, padding=(1, 0), stride=2),
        lambda i, a, b, k: F.fold(i.reshape(2, 96, 4), (4, 4), 4, padding=2, stride=4),
        lambda i, a, b, k: F.fold(a.repeat(1, 12, 3).reshape(2, 54, 40)[..., :36], (6, 6), 3, padding=1),
        lambda i, a, b, k: i.unfold(2, 3, 2), lambda i, a, b, k: F.adaptive_max_pool2d(i, (3, 1)),
        lambda i, a, b, k: F.max_pool2d(i, 2, return_indices=True)[0], lambda i, a, b, k: F.pixel_unshuffle(i, 2),
        lambda i, a, b, k: F.channel_shuffle(i, 3), lambda i, a, b, k: i.as_strided((2, 3, 4), (5, 1, 3), 2),
        lambda i, a, b, k: torch.diagonal(i, 1, -2, -1), lambda i, a, b, k: F.local_response_norm(i, 3),
    ],
    "resizing": [
        lambda i, a, b, k: F.interpolate(a, scale_factor=2, mode="linear"),
        lambda i, a, b, k: F.interpolate(a, size=23, mode="linear", align_corners=True),
        lambda i, a, b, k: F.interpolate(i, size=(11, 13), mode="nearest-exact"),
        lambda i, a, b, k: F.interpolate(i, size=(5, 3), mode="bilinear", antialias=True),
        lambda i, a, b, k: F.interpolate(i, scale_factor=0.5, mode="bicubic", antialias=True),
        lambda i, a, b, k: F.grid_sample(i, a[:, :4, :8].reshape(2, 4, 4, 2).tanh(), align_corners=False),
        lambda i, a, b, k: F.interpolate(i[:, None], scale_factor=2, mode="trilinear"),
    ],
    "functions of numbers": [
        lambda i, a, b, k: a.trunc() + a.frac(), lambda i, a, b, k: a.tanh().asin() + b.tanh().acos() * a.tan(),
        lambda i, a, b, k: torch.atan2(a, b), lambda i, a, b, k: a.sinh() + b.cosh() - a.asinh(),
        lambda i, a, b, k: torch.fmod(a * 5, 1.5) + torch.fmod(b, a.abs() + 1),
        lambda i, a, b, k: a.exp2() + (b.abs() + 0.1).log2() + (a.abs() + 0.1).log10() + a.expm1() + b.erfc(),
        lambda i, a, b, k: torch.hypot(a, b) + torch.copysign(a, b), lambda i, a, b, k: torch.fmax(a, (b - 0.5).log()),
        lambda i, a, b, k: ((k ^ 3) << 2) >> 1, lambda i, a, b, k: torch.logical_xor(a > 0, b > 0),
        lambda i, a, b, k: (a / torch.zeros_like(a)).isinf(), lambda i, a, b, k: F.softshrink(a) + F.hardshrink(b),
        lambda i, a, b, k: F.threshold(a, 0.1, 0.5), lambda i, a, b, k: torch.nan_to_num((a - 0.5).log()),
        lambda i, a, b, k: F.huber_loss(a, b), lambda i, a, b, k: F.cosine_similarity(a, b, dim=-1),
        lambda i, a, b, k: torch.cdist(a, b), lambda i, a, b, k: torch.clamp(a, b - 1, b),
    ],
    "orderings": [
        lambda i, a, b, k: a.min(1), lambda i, a, b, k: a.argmin(-1, keepdim=True), lambda i, a, b, k: k.min(1)[0],
        lambda i, a, b, k: (a.max(), a.min()), lambda i, a, b, k: (a > 2).any(1), lambda i, a, b, k: (a > -2).all((1, 2)),
        lambda i, a, b, k: a.kthvalue(3, 1), lambda i, a, b, k: a.median(1, keepdim=True)[0],
        lambda i, a, b, k: torch.bucketize(a, torch.linspace(-1, 1, 9), right=True), lambda i, a, b, k: a.argsort(-1),
        lambda i, a, b, k: torch.histc(a, 8, -1, 1), lambda i, a, b, k: a.prod(1) + a.cumprod(1)[:, -1],
        lambda i, a, b, k: a.logsumexp(1), lambda i, a, b, k: F.one_hot(k, 5),
    ],
    "products": [
        lambda i, a, b, k: torch.tensordot(a, b, dims=([2], [2])), lambda i, a, b, k: torch.inner(a, b),
        lambda i, a, b, k: torch.kron(a[0, :2, :2], b[1]), lambda i, a, b, k: torch.addmv(a[0, :, 0], a[1], b[0, 0]),
        lambda i, a, b, k: torch.addbmm(a[0, :, :5], a, b.mT, alpha=2), lambda i, a, b, k: torch.outer(a[0, 0], b[0, 1]),
        lambda i, a, b, k: torch.linalg.cross(a[..., :3], b[..., :3]),
    ],
    "writes": [
        lambda i, a, b, k: torch.zeros(2, 7).scatter(1, k, 2.0), lambda i, a, b, k: a[0].index_add(0, k[0] % 5, b[1].repeat(2, 1)[:7]),
        lambda i, a, b, k: torch.zeros(5, 12).scatter_add(0, k[:, :5].T.repeat(1, 6), b[0]),
        lambda i, a, b, k: written_by_mask(a), lambda i, a, b, k: written_in_columns(a, b),
        lambda i, a, b, k: a.index_fill(1, torch.tensor([0, 3]), 2.0),
        lambda i, a, b, k: a.index_put((torch.tensor([0, 1, 1]), torch.tensor([2, -1, 2])), b[0, 0]),
        lambda i, a, b, k: a.scatter(2, a.argsort(2), b),
        lambda i, a, b, k: a.sum().scatter(0, k[0, 0] * 0, b[0, 0, 0]),
    ],
    "moves": [
        lambda i, a, b, k: i.movedim(1, -1), lambda i, a, b, k: a.tile(2, 1, 1, 1), lambda i, a, b, k: torch.rot90(i, 1, (2, 3)),
        lambda i, a, b, k: torch.meshgrid(a[0, 0], b[0, :, 0], indexing="ij"), lambda i, a, b, k: torch.diag_embed(a),
        lambda i, a, b, k: torch.tensor_split(a, 3, dim=-1)[1], lambda i, a, b, k: torch.take_along_dim(a[..., 0], k % 5, 1),
        lambda i, a, b, k: a[:, torch.triu_indices(5, 5)[0]], lambda i, a, b, k: torch.block_diag(a[0], b[1]),
    ],
    "complex numbers": [
        lambda i, a, b, k: rotated(a, b[0, :, :6]), lambda i, a, b, k: torch.fft.fft(torch.fft.fft(a), dim=-2).real,
        lambda i, a, b, k: torch.fft.irfft2(torch.fft.rfft2(i, norm="ortho") * (2 - 1j), s=(8, 8), norm="ortho"),
        lambda i, a, b, k: torch.fft.irfft(torch.fft.rfft(a[:, :, :7]), n=7), lambda i, a, b, k: torch.fft.ifft(a).imag,
        lambda i, a, b, k: (torch.complex(a, b) / torch.complex(b, a)).abs(), lambda i, a, b, k: torch.exp(1j * a).conj().angle(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_artifact_computes_what_is_written_out(kind):
    model, given = Several(FUNCTIONS[kind]), tensors()
    artifact = mcc.compile(model, given, tuning="model", measure="never")
    other = tuple(t.flip(0) for t in given)
    for found, wanted in zip(_flat(artifact(*other)), _flat(model(*other)), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def _flat(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize(("module", "given"), [
    (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1), (torch.randn(2, 6, 9),)),
    (nn.ConvTranspose3d(4, 3, 2, stride=2), (torch.randn(2, 4, 3, 4, 5),)),
    (nn.ConvTranspose3d(4, 3, 3, stride=2, padding=1, output_padding=1), (torch.randn(1, 4, 3, 4, 2),)),
    (nn.LSTMCell(12, 7), (torch.randn(3, 12),)), (nn.GRUCell(12, 7), (torch.randn(3, 12),)),
    (nn.RNN(12, 7, num_layers=2, batch_first=True), (torch.randn(2, 3, 12),)),
    (nn.Bilinear(5, 4, 3), (torch.randn(2, 5), torch.randn(2, 4))),
    (nn.EmbeddingBag(5, 4, mode="mean"), (torch.randint(0, 5, (3, 7)),)),
])  # fmt: skip
def test_layers_outside_the_table(module, given):
    artifact = mcc.compile(module, given, tuning="model", measure="never")
    for found, wanted in zip(_flat(artifact(*given)), _flat(module(*given)), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_of_a_row_is_a_layer():
    graph = capture(nn.Sequential(nn.ConvTranspose1d(6, 4, 3)), (torch.randn(2, 6, 9),))
    assert "conv_transpose2d.input" in [n.op.name for n in graph.nodes]


def test_what_is_written_out_trains():
    model = Applied(lambda x: F.unfold(torch.fft.rfft(x).real, 3).logsumexp(1))
    x = torch.randn(2, 3, 6, 8)
    graph = capture(model, (x,))
    gradients = [torch.func.grad(lambda y, f=f: f(y).sum())(x) for f in (model, graph)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_sizes_that_vary_stay_so():
    model = Applied(lambda x: F.unfold(x, 3, padding=1).movedim(1, 2))
    graph = capture(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"given": ({0: "batch"},)})
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("function", [
    lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), lambda x: F.interpolate(x, scale_factor=2),
    lambda x: x.min(1)[0] + x.any(1), lambda x: torch.fft.rfft(x.transpose(1, 2)).abs(), lambda x: F.unfold(x[:, None], 3),
    lambda x: x.diagonal(0, 1, 2), lambda x: x.unfold(1, 3, 2), lambda x: torch.cdist(x, x), lambda x: x.logsumexp(1),
    lambda x: F.interpolate(x[:, :, None, None], scale_factor=2.0, mode="trilinear"), lambda x: F.channel_shuffle(x[..., None], 3),
])  # fmt: skip
def test_a_batch_that_varies_stays_so(function):
    model = Applied(function)
    artifact = mcc.compile(
        model, (torch.randn(4, 6, 5),), dynamic_shapes={"given": ({0: "batch"},)}, tuning="model", measure="never"
    )
    for batch in (1, 3, 7):
        x = torch.randn(batch, 6, 5)
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-4)


def test_arithmetic_on_sizes_that_no_row_has_is_named():
    model = Applied(lambda x: F.interpolate(x, size=(11, 13), mode="nearest-exact"))
    with pytest.raises(UnsupportedOpError, match="truediv"):
        capture(model, (torch.randn(4, 3, 5, 5),), dynamic_shapes={"given": ({2: "height"},)})


@pytest.mark.parametrize("write", [
    lambda y: y.diagonal().add_(1), lambda y: y.unfold(1, 2, 2).mul_(2), lambda y: y.as_strided((2,), (1,)).mul_(2),
    lambda y: y.mT.add_(1),
])  # fmt: skip
def test_a_write_through_a_view_that_is_written_out_is_refused(write):
    def function(x):
        y = x * 1
        write(y)
        return y + 1

    with pytest.raises(CaptureError, match="writes into a view"):
        capture(Applied(function), (torch.randn(4, 4),))


def test_a_view_taken_before_a_write_sees_it():
    def function(x):
        y = x * 1
        view = y.diagonal()
        y.mul_(2)
        return view + 1

    x = torch.randn(4, 4)
    assert torch.equal(capture(Applied(function), (x,))(x), function(x))


def test_made_tensors_may_be_written_into():
    def function(x):
        room = torch.empty(4, 4)
        room.zero_()
        room += torch.linspace(0, 1, 4)
        return room + x

    x = torch.randn(4, 4)
    assert torch.equal(capture(Applied(function), (x,))(x), function(x))


def test_what_training_makes_random_stays_so():
    graph = capture(nn.Sequential(nn.Linear(4, 64), nn.AlphaDropout()), (torch.randn(2, 4),)).train()
    x = torch.randn(2, 4)
    assert not torch.equal(graph(x), graph(x))
    with pytest.raises(UnsupportedOpError, match="rnn_tanh"):
        capture(nn.RNN(4, 5, num_layers=2, dropout=0.5), (torch.randn(3, 2, 4),))


def test_numbers_at_the_edges():
    """Rows of infinities, of nothing that is a number, small and large ones."""
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[inf, inf], [-inf, -inf], [nan, 1.0], [1e-8, 89.0], [8192.0, 5.0], [1e20, 1e20], [0.0, -0.0]])
    model = Several([
        lambda x: x.min(1), lambda x: x.argmin(1), lambda x: x.max(1), lambda x: x.argmax(1), lambda x: x.any(1),
        lambda x: x != x, lambda x: x.bool(), lambda x: x.log2().floor(), torch.expm1, torch.sinh, torch.cosh, torch.erfc,
        torch.asinh, torch.signbit, lambda x: torch.copysign(x + 1, x), lambda x: torch.hypot(x, x),
        lambda x: torch.atan2(x, -x), lambda x: x.round().nan_to_num(0, 1e9, -1e9).to(torch.int64).argmin(1),
    ])  # fmt: skip
    artifact = mcc.compile(model, (torch.randn(7, 2),), tuning="model", measure="never")
    for found, wanted in zip(_flat(artifact(rows)), _flat(model(rows)), strict=True):
        assert found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_complex_types_and_shapes_are_pytorchs():
    model = Several([
        lambda a, k: torch.view_as_real(torch.complex(a, a).to(torch.complex128)), lambda a, k: (k * 1j).imag,
        lambda a, k: torch.view_as_real((a > 0) * (2 + 1j)), lambda a, k: torch.view_as_real(k * (0.5 + 1j)),
        lambda a, k: torch.view_as_real(torch.cat([torch.complex(a, a), k], 1)),
        lambda a, k: torch.view_as_real(torch.add(torch.complex(a, a), torch.complex(a, k.float()), alpha=2)),
        lambda a, k: torch.view_as_real(torch.complex(a[:1], a)).flip(0), lambda a, k: (torch.complex(a, a) * 0j).real,
        lambda a, k: torch.fft.irfft(torch.complex(a, a), n=1), lambda a, k: (a / torch.complex(a * 1e19, a)).imag,
        lambda a, k: (2 - torch.complex(a, a)).imag,
    ])  # fmt: skip
    given = torch.randn(3, 4), torch.randint(-5, 5, (3, 4))
    graph = capture(model, given)
    for found, wanted in zip(graph(*given), model(*given), strict=True):
        assert found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted)


def test_transforms_of_one_size_share_their_matrices():
    graph = capture(Applied(lambda x: torch.fft.fft(torch.fft.fft(x).real).real), (torch.randn(2, 6),))
    assert [name for name, _ in graph.module.named_buffers(remove_duplicate=True)] == ["cosines", "sines"]
    with pytest.raises(CaptureError, match="a Fourier transform of 100000 elements"):
        capture(Applied(lambda x: torch.fft.rfft(x).real), (torch.randn(100_000),))


def test_the_size_of_zero_has_a_slope():
    graph = capture(Applied(lambda x: torch.fft.rfft(x).abs().sum()), (torch.randn(2, 6),))
    x = torch.zeros(2, 6, requires_grad=True)
    graph(x).backward()
    assert torch.equal(x.grad, torch.zeros(2, 6))


@pytest.mark.parametrize(("function", "reason"), [
    (lambda z: z.real, "input given_0 is complex"),
    (lambda z: torch.view_as_real(torch.view_as_complex(z) @ torch.view_as_complex(z)), "no rule for aten.matmul"),
    (lambda z: torch.view_as_real(torch.zeros(3, 3, dtype=torch.complex64) + z[..., 0]), "no rule for aten.zeros"),
])  # fmt: skip
def test_complex_numbers_without_a_rule_are_named(function, reason):
    z = torch.randn(3, 3, 2)
    given = torch.view_as_complex(z) if "input" in reason else z
    with pytest.raises(CaptureError, match=reason):
        capture(Applied(function), (given,))


def test_places_outside_are_not_written():
    model = Applied(lambda x, i: torch.zeros(2, 3).index_put((i,), x))
    artifact = mcc.compile(model, (torch.randn(2, 3), torch.tensor([0, 1])), tuning="model", measure="never")
    x = torch.randn(2, 3)
    assert torch.equal(artifact(x, torch.tensor([5, -2])), torch.stack([x[1], torch.zeros(3)]))


def test_layers_stay_whole_beside_what_is_written_out():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(1), nn.Linear(16, 2)
    )
    names = [n.op.name for n in capture(model, (torch.randn(1, 3, 8, 8),)).nodes]
    assert {"conv2d", "batch_norm", "silu", "linear"} <= set(names)


class Rotary(nn.Module):
    """Rotary embedding by a stored complex table, as Llama's first code has it."""

    def __init__(self):
        super().__init__()
        table = torch.polar(torch.ones(16, 4), torch.outer(torch.arange(16.0), torch.rand(4)))
        self.register_buffer("table", table, persistent=False)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        turned = torch.view_as_complex(self.proj(x).reshape(*x.shape[:-1], 4, 2)) * self.table[: x.shape[1]]
        return torch.view_as_real(turned).flatten(-2)


def test_a_stored_complex_table_is_two_real_ones():
    model = Rotary()
    graph = capture(model, (torch.randn(2, 6, 8),), dynamic_shapes={"x": {1: "length"}})
    assert not any(b.is_complex() for _, b in graph.module.named_buffers())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(graph(x), model(x))


class Filter(nn.Module):
    """A filter that is learned in frequencies, as in GFNet and Fourier neural operators."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * self.weight, s=(8, 8), norm="ortho")


def test_a_complex_parameter_is_trained_as_two_real_ones():
    model, x = Filter(), torch.randn(2, 3, 8, 8)
    graph = capture(model, (x,))
    assert [name for name, _ in graph.named_parameters()] == ["weight_real", "weight_imaginary"]
    graph(x).square().sum().backward()
    model(x).square().sum().backward()
    found = torch.complex(*(graph.tensor(f"weight_{part}").grad for part in ("real", "imaginary")))
    torch.testing.assert_close(found, model.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [
    lambda x: x.nonzero(), lambda x: torch.linalg.inv(x @ x.T), lambda x: F.max_pool2d(x[None], 2, return_indices=True),
    lambda x: torch.rand(3) + x[0, :3],
])  # fmt: skip
def test_what_cannot_be_written_out_is_named(function):
    with pytest.raises(UnsupportedOpError, match="not in the op table"):
        capture(Applied(function), (torch.randn(6, 8),))
