"""Products of two computed matrices and softmax, against float64; products with stored matrices are layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import COMPILER, EMULATOR
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import NEON, TARGETS, run_function
from torch import nn

import mcc
from mcc.backends.cpu.kernels.matmul import matmul_function, matmul_shape
from mcc.backends.cpu.kernels.softmax import SoftmaxShape, softmax_function

QUICK = {"measure": "never", "tuning": "model"}
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 64, 97])


class Product(nn.Module):
    def __init__(self, turned=False):
        super().__init__()
        self.turned = turned

    def forward(self, a, b):
        return torch.matmul(a, b.transpose(-1, -2) if self.turned else b)


class Softmax(nn.Module):
    def __init__(self, logarithm=False):
        super().__init__()
        self.logarithm = logarithm

    def forward(self, x):
        return torch.log_softmax(x, -1) if self.logarithm else torch.softmax(x, -1)


def run(function, target, inputs, shape):
    call = [*(np.ascontiguousarray(x) for x in inputs), np.full(shape, 77, np.float32)]
    return run_function(function.with_attr("global_symbol", "kernel"), target, [call])[0]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


@st.composite
def products(draw):
    rows, inner, columns = draw(SIZES), draw(SIZES), draw(SIZES)
    outer = draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3))
    left = [1 if draw(st.booleans()) else d for d in outer]
    right = [d if a == 1 else draw(st.sampled_from([1, d])) for a, d in zip(left, outer, strict=True)]
    right = right[draw(st.integers(0, len(right))) :] if all(d == 1 for d in right) else right
    return (*left, rows, inner), (*right, inner, columns), draw(st.booleans())


def check_product(case, target):
    a_shape, b_shape, turned = case
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(s).astype(np.float32) for s in (a_shape, b_shape))
    expected = a.astype(np.float64) @ b
    given = np.swapaxes(b, -1, -2) if turned else b
    function = matmul_function(matmul_shape(a.shape, given.shape, turned=turned), target)
    close(run(function, target, (a, given), expected.shape), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(products(), st.sampled_from(TARGETS))
def test_a_product_of_any_shape_equals_numpys(case, target):
    check_product(case, target)


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_right_on_arm(turned):
    check_product(((2, 7, 33), (33, 19), turned), NEON)


@pytest.mark.parametrize("turned", [False, True])
def test_sizes_of_a_product_may_vary(turned):
    module = Product(turned)

    def inputs(batch, rows, columns):
        right = (batch, columns, 33) if turned else (batch, 33, columns)
        return torch.randn(batch, rows, 33), torch.randn(right)

    dims = ({0: "batch", 1: "rows"}, {0: "batch", (1 if turned else 2): "columns"})
    artifact = mcc.compile(module, inputs(2, 5, 19), dynamic_shapes=dims, **QUICK)
    assert [row.kernel for row in artifact.report.layers] == ["matmul"]
    for sizes in ((0, 5, 3), (1, 1, 1), (7, 70, 100), (3, 13, 16), (2, 0, 5)):
        a, b = inputs(*sizes)
        close(artifact(a, b).numpy(), module(a.double(), b.double()).numpy())


def test_what_is_no_matrix_of_rows_is_left_to_the_op_library():
    for a, b in (((3, 9), (9,)), ((2, 9), (9, 5)), ((9,), (9, 20))):
        module = Product()
        artifact = mcc.compile(module, (torch.randn(a), torch.randn(b)), **QUICK)
        (row,) = artifact.report.layers
        assert (row.kernel, row.reason) == (
            "op library",
            "its operands are no float32 matrices, or have fewer than four rows",
        )


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("target", [*TARGETS, NEON], ids=str)
def test_softmax_of_rows_with_what_is_hidden(target, logarithm):
    if target is NEON and not (COMPILER and EMULATOR):
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    for width in (16, 17, 97, 1000):
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 10
        x[1, ::3], x[2, 5], x[4] = -torch.inf, torch.nan, -torch.inf
        expected = Softmax(logarithm)(x.double()).numpy()
        found = run(softmax_function(SoftmaxShape(x.shape, logarithm), target), target, (x.numpy(),), x.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_the_width_of_a_softmax_may_vary():
    artifact = mcc.compile(Softmax(), (torch.randn(2, 5, 33),), dynamic_shapes=({0: "batch", 2: "width"},), **QUICK)
    for shape in ((0, 5, 3), (3, 5, 1), (1, 5, 7), (2, 5, 64), (1, 5, 200)):
        x = torch.randn(shape)
        torch.testing.assert_close(artifact(x), torch.softmax(x, -1))


class Matrices(nn.Module):
    """Products that models write with stored matrices: x @ w, addmm as in GPT-2, mm with a transpose."""

    def __init__(self):
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(32))
        self.second, self.tied = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(40, 16))

    def forward(self, x):
        y = torch.relu(torch.addmm(self.bias, x, self.first)) @ self.second
        return torch.mm(y, self.tied.t())


def test_products_with_stored_matrices_are_layers_that_passes_see():
    torch.manual_seed(0)
    model, x = Matrices(), torch.randn(5, 24)
    artifact = mcc.compile(model, (x,), passes="prune-weights{ratio=0.9}", dynamic_shapes=({0: "n"},), **QUICK)
    assert artifact.report.passes[1].edits == 3
    assert [row.op for row in artifact.report.layers] == ["linear + relu", "linear", "linear"]
    plain = mcc.compile(model, (x,), dynamic_shapes=({0: "n"},), **QUICK)
    for n in (1, 7):
        x = torch.randn(n, 24)
        close(plain(x).detach().numpy(), model.double()(x.double()).detach().numpy())
        model.float()


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_a_stored_weight(wrap):
    torch.manual_seed(0)
    model, x = wrap(nn.Conv2d(4, 8, 3)).eval(), torch.randn(2, 4, 9, 9)
    artifact = mcc.compile(model, (x,), **QUICK)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["conv2d_f32"]
    torch.testing.assert_close(artifact(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"beta": 0}, {"alpha": 0}, {"beta": 2, "alpha": 0.5}])
def test_factors_of_addmm_count(options):
    class Added(Matrices):
        def forward(self, x):
            return torch.addmm(self.bias, x, self.first, **options)

    torch.manual_seed(0)
    model, x = Added(), torch.randn(5, 24)
    torch.testing.assert_close(mcc.compile(model, (x,), **QUICK)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (-2, -1), (-1, -2)])
def test_only_what_swaps_rows_and_columns_is_a_transpose(dims):
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.w.permute(dims) + (x @ self.w.transpose(dims[0], dims[0]))

    torch.manual_seed(0)
    model, x = Permuted(), torch.randn(5, 8)
    artifact = mcc.compile(model, (x,), **QUICK)
    torch.testing.assert_close(artifact(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert {row.op for row in artifact.report.layers} <= {"linear", "linear + add"}


@pytest.mark.parametrize("shape", [(1,), (1, 8), (5, 8), (3, 5, 8)], ids=str)
def test_a_bias_that_is_no_vector_of_outputs_is_added(shape):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias).tanh()

    model, x = Odd().eval(), torch.randn(3, 5, 12)
    artifact = mcc.compile(model, (x,), measure="never", tuning="model")
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-5)
