"""Capture: what becomes of a model, the traps of torch.export, and what is refused."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, Branches, ConvBatchNorm, Residual, Shared, TiedLanguageModel, mlp
from torch import nn

import mcc
from mcc.errors import ArtifactError, CaptureError, UnsupportedOpError
from mcc.frontend import _check_asserts, capture

IDS = {"ids": {0: "batch", 1: "length"}}


def test_a_graph_is_whole_aten_ops_under_module_names(golden):
    golden("residual", str(capture(Residual(), (torch.randn(2, 3, 8, 8),), dynamic_shapes={"x": {0: "batch"}})))


def test_wrappers_ties_and_in_place_writes_are_normalized(golden):
    golden(
        "tied_language_model", str(capture(TiedLanguageModel(), (torch.randint(0, 50, (2, 6)),), dynamic_shapes=IDS))
    )


def test_attention_keeps_its_ops_whole(golden):
    shapes = {"x": {0: "batch", 1: "length"}}
    golden("attention", str(capture(Attention(), (torch.randn(2, 6, 32),), dynamic_shapes=shapes)))


@pytest.mark.parametrize(("model", "make"), [
    (Residual(), lambda n: (torch.randn(n, 3, 8, 8),)),
    (Attention(), lambda n: (torch.randn(n, n + 3, 32),)),
    (TiedLanguageModel(), lambda n: (torch.randint(0, 50, (n, n + 2)),)),
])  # fmt: skip
def test_a_graph_equals_eager_at_other_sizes(model, make):
    dims = {0: "batch"} if isinstance(model, Residual) else {0: "batch", 1: "length"}
    graph = capture(model, make(2), dynamic_shapes=(dims,))
    model.eval()
    for n in (1, 3, 7):
        inputs = make(n)
        assert torch.equal(graph(*inputs), model(*inputs))


def test_a_batch_of_one_is_widened_so_that_it_stays_dynamic():
    graph = capture(mlp(4, 3), (torch.randn(1, 4),), dynamic_shapes={"input": {0: "batch"}})
    assert graph(torch.randn(5, 4)).shape == (5, 3)


def test_parameters_keep_their_names_and_a_checkpoint_loads():
    model = Residual()
    graph = capture(model, (torch.randn(2, 3, 8, 8),))
    assert graph.module.load_state_dict(model.state_dict()).missing_keys == []


def test_tied_weights_stay_one_tensor_after_a_copy():
    graph = capture(TiedLanguageModel(), (torch.randint(0, 50, (2, 6)),), dynamic_shapes=IDS).copy()
    assert graph.tensor("embed.weight") is graph.tensor("head.weight")
    assert [name for name, _ in graph.named_parameters()].count("head.weight") == 0


def test_a_graph_has_its_own_weights():
    model = mlp(4, 3)
    graph = capture(model, (torch.randn(2, 4),))
    graph.tensor("0.weight").data.zero_()
    assert model[0].weight.abs().sum() > 0


def test_training_mode_equals_eager_in_outputs_gradients_and_statistics():
    model = Residual()
    model.drop.p = 0.0
    graph = capture(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"x": {0: "batch"}}).train()
    eager, x = copy.deepcopy(model).train(), torch.randn(5, 3, 8, 8)
    graph(x).square().mean().backward()
    eager(x).square().mean().backward()
    ours = dict(graph.named_parameters())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad)
    for name, buffer in eager.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(graph.tensor(name), buffer)
    graph.eval()
    eager.eval()
    torch.testing.assert_close(graph(x), eager(x))


def test_capture_leaves_the_models_mode_alone():
    model = Residual().train()
    model.b1.eval()
    capture(model, (torch.randn(2, 3, 8, 8),))
    assert model.training
    assert not model.b1.training


def test_nested_outputs_and_keyword_inputs_have_a_signature():
    graph = capture(Branches(), (torch.randn(2, 6),), keyword_inputs={"scale": torch.ones(5)})
    assert graph.signature.inputs == ("x", "scale")
    assert graph.signature.output_tree == {"z": "mul", "rest": ("a", "x", "mul_1")}


def test_a_shared_module_is_named_once_a_call():
    names = [n.name for n in capture(Shared(), (torch.randn(2, 12),)).nodes]
    assert names == ["layer_linear", "relu", "layer_linear_1"]


def test_an_exported_program_is_captured_too():
    model = mlp(4, 3).eval()
    program = torch.export.export(model, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    assert torch.equal(capture(program)(x), model(x))


def test_repropagating_keeps_symbolic_dims():
    graph = capture(ConvBatchNorm(), (torch.randn(2, 3, 8, 8),), dynamic_shapes={"x": {0: "batch"}})
    text = str(graph)
    assert str(graph.copy().repropagate()) == text


def test_an_op_outside_the_table_is_refused_by_name_module_and_line():
    class Histogram(nn.Module):
        def forward(self, x):
            return torch.histc(x, 4)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Histogram()

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(
        UnsupportedOpError, match=r"op not in the op table: histc \(in inner test_frontend.py:\d+\)\n"
    ) as caught:
        capture(Outer(), (torch.randn(8),))
    assert "keep it outside the compiled model" in str(caught.value)


def test_a_dim_that_the_model_fixes_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 8)

    with pytest.raises(CaptureError, match="could not capture Fixed"):
        capture(Fixed(), (torch.randn(2, 8),), dynamic_shapes={"x": {0: "batch"}})


def test_a_named_dim_takes_the_models_own_bounds():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 4)

        def forward(self, x):
            return x + self.table.weight[: x.shape[1]]

    graph = capture(Positions(), (torch.randn(2, 5, 4),), dynamic_shapes={"x": {1: "length"}})
    assert graph(torch.randn(2, 9, 4)).shape == (2, 9, 4)


class ViewsAndWrites(nn.Module):
    """Views of views, and writes to any of them, in an order that a seed draws."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x):
        rng = random.Random(self.seed)
        values = [x * 1.0]
        for _ in range(rng.randint(2, 6)):
            value, start = rng.choice(values), rng.randrange(2)
            if rng.random() < 0.5 and value.dim() > 1 and value.shape[0] > 1:
                where = [start, slice(start, None), (slice(None), slice(1, None)), slice(None, None, 2)]
                values.append(value[rng.choice(where)])
            else:
                rng.choice([lambda v: v.mul_(2), lambda v: v.add_(1), lambda v: v.fill_(1.5), lambda v: v.zero_()])(
                    value
                )
        return tuple(value + 1 for value in values)


@given(st.integers(0, 10**6))
def test_writes_reach_every_view_of_what_they_write_to(seed):
    model, x = ViewsAndWrites(seed).eval(), torch.randn(4, 5)
    for found, expected in zip(capture(model, (x,))(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_a_copy_before_a_write_is_kept():
    class Cloned(nn.Module):
        def forward(self, x):
            y = x.clone()
            y.mul_(2)
            return x + y

    x = torch.randn(2, 4)
    torch.testing.assert_close(capture(Cloned(), (x,))(x), 3 * x)


def test_a_batch_norm_without_momentum_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(CaptureError, match=r"0: BatchNorm\(momentum=None\)"):
        capture(model, (torch.randn(2, 4),))


def test_something_that_is_no_model_is_refused():
    with pytest.raises(CaptureError, match="cannot capture a int"):
        capture(3)


class Combined(nn.Module):
    """Ops that are written out in others."""

    def forward(self, x, y):
        z = torch.addcmul(x, x, y) + torch.addcdiv(x, y, x.abs() + 1, value=0.5)
        z = (z * 1).addcmul_(x, y, value=2)
        return torch.lerp(x, z, 0.3) + torch.lerp(x, z, 0.8) + torch.lerp(z, y, x.sigmoid())


def test_combined_arithmetic_is_written_out():
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    graph = capture(Combined(), inputs)
    assert {n.op.family for n in graph.nodes} == {"pointwise"}
    torch.testing.assert_close(graph(*inputs), Combined()(*inputs))


@pytest.mark.parametrize(("function", "operands"), [
    (lambda x, y: torch.lerp(x, y, 1.0), (torch.full((4,), 1e8), torch.arange(1.0, 5))),
    (lambda x, y: torch.addcmul(x, y, y, value=1e-30), (torch.randn(4), torch.full((4,), 1e30))),
    (lambda x, y: torch.addcmul(x, y, x, value=2.5), (torch.randint(-9, 9, (4,)), torch.randint(-9, 9, (4,)))),
])  # fmt: skip
def test_it_is_computed_in_the_order_that_torch_has(function, operands):
    class Called(nn.Module):
        def forward(self, x, y):
            return function(x, y)

    expected = function(*operands)
    found = capture(Called(), operands)(*operands)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Einsum(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation = equation

    def forward(self, *operands):
        return torch.einsum(self.equation, *operands)


EQUATIONS = [
    ("ij,jk->ik", [(2, 3), (3, 4)]), ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]), ("bij,kj->bki", [(2, 3, 4), (5, 4)]),
    ("bhij, bjhd -> bihd", [(2, 3, 4, 5), (2, 5, 3, 6)]), ("nctkv,vw->nctkw", [(2, 3, 4, 5, 6), (6, 7)]),
    ("abcd,cdef->abef", [(2, 3, 4, 5), (4, 5, 6, 7)]), ("i,j->ij", [(3,), (4,)]), ("i,i->", [(5,), (5,)]),
    ("ij->ji", [(2, 3)]), ("ijk->j", [(2, 3, 4)]), ("ij,ij->ij", [(2, 3), (2, 3)]), ("ij,jk", [(2, 3), (3, 4)]),
    ("...ij,...jk->...ik", [(2, 5, 3, 4), (2, 5, 4, 6)]), ("...d,de", [(2, 3, 4), (4, 5)]), ("bi,bj,bk->bijk", [(2, 3), (2, 4), (2, 5)]),
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]), ("ij,kj->i", [(2, 3), (4, 3)]), ("bqhd,bkhd->bhqk", [(2, 5, 3, 4), (2, 7, 3, 4)]),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS, ids=lambda e: e if isinstance(e, str) else "")
def test_einsum_is_written_out(equation, shapes):
    operands = tuple(torch.randn(shape) for shape in shapes)
    graph = capture(Einsum(equation), operands)
    assert "einsum" not in {n.op.name for n in graph.nodes}
    torch.testing.assert_close(graph(*operands), torch.einsum(equation, *operands), rtol=1e-5, atol=1e-5)


def test_einsum_of_varying_dims_stays_so():
    shapes = ({0: "batch", 1: "rows"}, {0: "batch"})
    graph = capture(
        Einsum("brxy,bxyc->brc"),
        (torch.randn(2, 3, 4, 5), torch.randn(2, 4, 5, 6)),
        dynamic_shapes={"operands": shapes},
    )
    operands = torch.randn(5, 7, 4, 5), torch.randn(5, 4, 5, 6)
    torch.testing.assert_close(graph(*operands), torch.einsum("brxy,bxyc->brc", *operands), rtol=1e-5, atol=1e-5)


def test_the_diagonal_that_an_einsum_takes_is_named():
    with pytest.raises(UnsupportedOpError, match="einsum"):
        capture(Einsum("ii->i"), (torch.randn(3, 3),))


class Differences(nn.Module):
    """Neighbours' differences as masks of packed sequences use them."""

    def forward(self, ids):
        starts = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1
        return torch.diff(starts, append=starts[:, :1]), starts.cumsum(-1)


def test_a_composite_op_is_written_out_in_ops_of_the_table():
    graph = capture(Differences(), (torch.randint(0, 9, (2, 6)),), dynamic_shapes=IDS)
    assert {n.op.name for n in graph.nodes if n.op.family != "size"} == {
        "slice.Tensor", "sub.Tensor", "cat", "ne.Scalar", "ne.Tensor", "cumsum",
    }  # fmt: skip
    ids = torch.randint(0, 9, (3, 11))
    for found, wanted in zip(graph(ids), Differences()(ids), strict=True):
        assert torch.equal(found, wanted)


def test_differences_of_differences():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.diff(x, n=2, dim=0)

    x = torch.randn(6, 3)
    assert torch.equal(capture(Twice(), (x,))(x), torch.diff(x, n=2, dim=0))


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, scale=1.0, *, negated=False, mask=None):
        y = self.layer(x) * scale
        y = -y if negated else y
        return y if mask is None else y * mask


def test_numbers_and_none_by_name_are_choices_and_no_inputs():
    model, x = Choosing(), torch.randn(2, 4)
    given = {"scale": 2.0, "negated": True, "mask": None}
    graph = capture(model, (x,), keyword_inputs=given)
    assert [node.name for node in graph.inputs] == ["x"]
    assert torch.equal(graph(x), model(x, **given))
    assert "forward" not in vars(model)
    artifact = mcc.compile(model, (x,), keyword_inputs=given, tuning="model", measure="never")
    torch.testing.assert_close(artifact(x), model(x, **given))
    deferred = mcc.compile(model, tuning="model", measure="never")
    for _ in range(2):
        torch.testing.assert_close(deferred(x, negated=True), model(x, negated=True))
    with pytest.raises(ArtifactError, match=r"compiled for \{'negated': True\}, and is called with \{\}"):
        deferred(x)


def test_a_condition_on_values_is_left_to_the_model():
    class Checked(nn.Module):
        def forward(self, x, lengths):
            torch._check(lengths.max().item() <= x.shape[1])
            return x.cumsum(1)

    x = torch.randn(2, 6)
    assert torch.equal(capture(Checked(), (x, torch.tensor([3, 6])))(x, torch.tensor([3, 6])), x.cumsum(1))


def test_a_condition_on_dims_that_torch_cannot_prove_is_tried():
    class Checked(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            torch._check((x.shape[0] * x.shape[1]) % self.factor == 0)
            return x * 2

    def program(factor):
        return torch.export.export(
            Checked(factor), (torch.randn(4, 6),), strict=False, prefer_deferred_runtime_asserts_over_guards=True,
            dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("columns", min=1)}},
        )  # fmt: skip

    asked = {(0, 0): "rows", (0, 1): "columns"}
    with pytest.raises(
        CaptureError, match=r"it needs Eq\(Mod\(columns\*rows, 6\), 0\), which \w+ = \d+, \w+ = \d+ breaks"
    ):
        _check_asserts(program(6), asked, "Checked")
    _check_asserts(program(1), asked, "Checked")


class Cache(nn.Module):
    """Keys before the first token, in the two ways that libraries write none, and what is written after joining."""

    def forward(self, x):
        legacy = torch.cat([torch.tensor([]), x], 1)
        y = torch.cat([x.new_zeros(x.shape[0], 0, 3), x], 1)
        y[:, :1] += 1
        return legacy + 0 * y, y, torch.cat([x, x.new_zeros(x.shape[0], 1, 3)], 1)


def test_joining_what_is_empty_joins_nothing():
    x = torch.randn(2, 4, 3)
    graph = capture(Cache(), (x,), dynamic_shapes=({0: "batch"},))
    assert [n.op.name for n in graph.nodes].count("cat") == 1
    for found, expected in zip(graph(x), Cache()(x), strict=True):
        assert torch.equal(found, expected)
