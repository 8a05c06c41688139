"""mcc.compile: every kind of model, passes in every form, lazy capture, torch.compile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from networks import Attention, Residual, TiedLanguageModel, mlp
from torch import nn

import mcc
from mcc import ops
from mcc.compiler import Deferred, known_passes, resolve_passes
from mcc.errors import CaptureError, DataError, SpecError, TargetError, VerificationError
from mcc.fixed_shapes import fix_shapes
from mcc.passes import FoldBatchNorm, PruneWeights, Quantize
from mcc.report import Report

QUICK = {"measure": "never", "tuning": "model"}


def test_a_module_an_exported_program_a_graph_and_an_onnx_model_give_the_same_answers(tmp_path):
    from onnx_models import mlp_model

    model, x = mlp(12, 16, 4).eval(), torch.randn(2, 12)
    proto = mlp_model(model)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with torch.no_grad():
        expected = model(x)
    for source, inputs in (
        (model, (x,)), (torch.export.export(model, (x,)), None), (mcc.capture(model, (x,)), None), (path, None), (str(path), None), (proto, None),
    ):  # fmt: skip
        torch.testing.assert_close(mcc.compile(source, inputs, **QUICK)(x), expected)


@pytest.mark.parametrize(("model", "make", "dims"), [
    (Residual(), lambda n: torch.randn(n, 3, 9, 7), {0: "batch"}),
    (Attention(), lambda n: torch.randn(n, n + 4, 32), {0: "batch", 1: "length"}),
    (TiedLanguageModel(), lambda n: torch.randint(0, 50, (n, n + 2)), {0: "batch", 1: "length"}),
])  # fmt: skip
def test_models_with_dynamic_dims_equal_eager(model, make, dims):
    artifact = mcc.compile(model.eval(), (make(2),), dynamic_shapes=(dims,), **QUICK)
    for n in (1, 3, 7):
        with torch.no_grad():
            torch.testing.assert_close(artifact(make(n) * 0 + 1), model(make(n) * 0 + 1), rtol=1e-4, atol=1e-5)


def test_without_example_inputs_the_first_call_compiles():
    model = mlp(12, 4).eval()
    deferred = mcc.compile(model, passes=[PruneWeights(ratio=0.5)], **QUICK)
    assert isinstance(deferred, Deferred)
    assert deferred.artifact is None
    x = np.ones((3, 12), np.float32)
    first = deferred(x)
    assert isinstance(first, np.ndarray)
    compiled = deferred.artifact
    assert np.array_equal(deferred(x), first)
    assert deferred.artifact is compiled


@pytest.mark.parametrize("passes", [
    [FoldBatchNorm(), Quantize()], "fold-batch-norm; quantize", ["fold-batch-norm", Quantize()], "recipe.yaml",
])  # fmt: skip
def test_passes_come_as_objects_text_or_a_recipe(tmp_path, monkeypatch, passes):
    (tmp_path / "recipe.yaml").write_text("- fold-batch-norm\n- quantize\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_passes(passes) == (FoldBatchNorm(), Quantize())


def test_the_artifact_records_its_passes_in_full_and_they_parse_again():
    artifact = mcc.compile(mlp(12, 4), (torch.randn(2, 12),), passes="prune-weights{ratio=0.5}", **QUICK)
    assert resolve_passes(artifact.passes) == (PruneWeights(ratio=0.5),)


def test_measuring_each_pass_fills_its_row():
    artifact = mcc.compile(
        mlp(12, 4), (torch.randn(2, 12),), passes="eliminate-identity", measure="each", tuning="model"
    )
    assert all(row.latency_ms > 0 for row in artifact.report.passes)
    assert Report.from_json(artifact.report.as_json()) == artifact.report


def test_a_pass_of_fifteen_lines_works_in_compile():
    @dataclass(frozen=True)
    class ReplaceHardswishByRelu(mcc.Rewrite):
        """Replace hardswish(x) by relu(x)."""

        guarantee = mcc.Lossy()

        def match(self, node):
            return mcc.Match(node) if node.op is ops.OPS["hardswish"] else mcc.Reject.other_op(node)

        def rewrite(self, match, rewriter):
            return rewriter.call(ops.RELU, match.node.operand(0))

    x = torch.randn(3, 4)
    artifact = mcc.compile(nn.Sequential(nn.Hardswish()), (x,), passes=[ReplaceHardswishByRelu()], **QUICK)
    assert torch.equal(artifact(x), torch.relu(x))
    assert artifact.passes == "replace-hardswish-by-relu"


def test_passes_of_other_packages_are_found_by_entry_point(monkeypatch):
    class Point:
        def load(self):
            return PruneWeights

    monkeypatch.setattr("mcc.compiler.entry_points", lambda group: [Point()] if group == "mcc.passes" else [])
    assert known_passes()["prune-weights"] is PruneWeights


def test_torch_compile_runs_static_shapes():
    model, x = mlp(12, 16, 4).eval(), torch.randn(5, 12)
    with torch.inference_mode():
        expected = model(x)
        found = torch.compile(model, backend="mcc", dynamic=False)(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"passes": "quantise"}, SpecError, "unknown pass 'quantise'"),
    ({"passes": [3]}, SpecError, "3 is not a pass"),
    ({"passes": "quantize"}, DataError, "quantize needs data.calibration"),
    ({"target": "cpu:arm"}, TargetError, "unknown target 'cpu:arm'\n  remedy  use one of cpu, cpu:avx2"),
])  # fmt: skip
def test_wrong_requests_are_refused_before_any_work(options, error, message):
    with pytest.raises(error, match=message):
        mcc.compile(mlp(4, 3), (torch.randn(2, 4),), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(CaptureError, match="cannot compile a int"):
        mcc.compile(3, (torch.randn(2, 4),))


def test_a_wrong_kernel_is_caught_by_verification(monkeypatch):
    from mcc.backends.cpu.kernels.dense import DenseFloat

    right = DenseFloat.lower

    def wrong(self, region, target, tile):
        lowered = right(self, region, target, tile)
        lowered.packed["bias"][0] += 1
        return lowered

    monkeypatch.setattr(DenseFloat, "lower", wrong)
    with pytest.raises(VerificationError, match="the artifact differs from its graph: output linear_0"):
        mcc.compile(mlp(12, 4), (torch.randn(2, 12),), **QUICK)


class RandomInEvalMode(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def test_a_model_whose_capture_computes_something_else_is_refused():
    with pytest.raises(VerificationError, match=r"captured graph differs from the model: output .* should be") as info:
        mcc.compile(RandomInEvalMode(), (torch.ones(4, 4),), **QUICK)
    assert "verify=False" in str(info.value)


def test_an_encoding_that_changes_a_weight_is_named(monkeypatch):
    from mcc import encode

    right = encode.encode_sparse
    monkeypatch.setattr(encode, "encode_sparse", lambda values, mask: right(values * 1.01, mask))
    with pytest.raises(VerificationError, match="encoded graph differs from the compressed one"):
        mcc.compile(mlp(64, 32, 4).eval(), (torch.randn(2, 64),), passes=[PruneWeights(ratio=0.9)], **QUICK)


class ReadsAParameterOfTheCaller(nn.Module):
    def forward(self, x, weight):
        return x @ weight


def test_torch_compile_reads_a_parameter_that_is_an_argument_at_every_call():
    compiled = torch.compile(ReadsAParameterOfTheCaller(), backend="mcc", dynamic=False)
    x = torch.randn(2, 3)
    for _ in range(2):
        weight = nn.Parameter(torch.randn(3, 4))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, weight), x @ weight)


class Sizes(nn.Module):
    """Reads its batch in every way: as a size, in a reshape, in a range, and in what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        batch = x.shape[0]
        y = self.conv(x).relu().reshape(batch, 8, -1).mean(-1)
        return self.linear(y.view(batch, -1)) + torch.arange(batch).reshape(batch, 1), y.new_ones(2 * batch, 3)


def test_a_model_compressed_once_is_compiled_for_any_batch_and_for_one_image():
    torch.manual_seed(0)
    model, x = Sizes().eval(), torch.randn(4, 3, 8, 8)
    data = mcc.Data(calibration=[(x,)])
    compressed = mcc.compress(
        model, (x,), passes="prune-weights{ratio=0.6}; quantize", data=data, dynamic_shapes=({0: "batch"},)
    )
    single = compressed.fixed(x[:1])
    whole, one = mcc.compile(compressed, **QUICK), mcc.compile(single, **QUICK)
    assert (whole.inputs[0].shape, one.inputs[0].shape) == (("batch", 3, 8, 8), (1, 3, 8, 8))
    for y in (torch.randn(2, 3, 8, 8), x):
        for found, expected in zip(whole(y), compressed.graph(y), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for found, expected in zip(one(x[2:3]), whole(x[2:3]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "sym_size" not in str(single.graph)
    for artifact in (whole, one):
        assert artifact.passes == compressed.passes
        assert [row.text for row in artifact.report.passes][1:-1] == ["prune-weights{ratio=0.6}", "quantize"]


@pytest.mark.parametrize("given", [
    {"passes": "quantize{activations=None}"}, {"example_inputs": (torch.zeros(2, 12),)},
    {"keyword_inputs": {"input": torch.zeros(2, 12)}}, {"dynamic_shapes": ({0: "batch"},)},
])  # fmt: skip
def test_a_compressed_model_takes_no_more_passes_or_inputs(given):
    pruned = mcc.compress(mlp(12, 16, 4).eval(), (torch.randn(2, 12),), passes=[PruneWeights(ratio=0.5)])
    with pytest.raises(SpecError, match="a compressed model has its passes and its inputs"):
        mcc.compile(pruned, **given, **QUICK)


def test_a_module_is_not_compressed_without_inputs():
    with pytest.raises(CaptureError, match="a module is captured with example inputs"):
        mcc.compress(mlp(12, 16, 4).eval(), passes="prune-weights")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(1, 2, 8, 8),), "input x is f32[batch, 3, 8, 8], the example f32[1, 2, 8, 8]"),
        (
            (torch.zeros(1, 3, 8, 8, dtype=torch.float64),),
            "input x is f32[batch, 3, 8, 8], the example f64[1, 3, 8, 8]",
        ),
        ((torch.zeros(3, 8, 8),), "input x is f32[batch, 3, 8, 8], the example f32[3, 8, 8]"),
        ((), "the graph takes 1 inputs, 0 were given"),
    ],
)
def test_shapes_that_a_graph_does_not_take_are_not_fixed(example, message):
    graph = mcc.capture(Sizes().eval(), (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: "batch"},))
    with pytest.raises(CaptureError) as caught:
        fix_shapes(graph, example)
    assert message in str(caught.value)


def test_one_dim_is_fixed_to_one_size():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    graph = mcc.capture(Add(), (torch.zeros(4, 3), torch.zeros(4, 3)), dynamic_shapes=({0: "batch"}, {0: "batch"}))
    assert str(fix_shapes(graph, (torch.zeros(2, 3), torch.zeros(2, 3)))).splitlines()[0] == "%x: f32[2, 3]"
    with pytest.raises(CaptureError, match="input y is"):
        fix_shapes(graph, (torch.zeros(2, 3), torch.zeros(5, 3)))


class Twice(nn.Module):
    """Its second input is twice as long as its first."""

    def forward(self, x, y):
        return x + y.reshape(x.shape[0], 2, -1).sum(1)


@pytest.mark.parametrize(("rows", "fits"), [((3, 6), True), ((1, 2), True), ((3, 7), False), ((3, 3), False)])
def test_dims_that_are_expressions_are_fixed_together(rows, fits):
    s = torch.export.Dim("s")
    graph = mcc.capture(Twice(), (torch.zeros(4, 3), torch.zeros(8, 3)), dynamic_shapes=({0: s}, {0: 2 * s}))
    example = tuple(torch.randn(n, 3) for n in rows)
    if fits:
        torch.testing.assert_close(fix_shapes(graph, example)(*example), Twice()(*example))
    else:
        with pytest.raises(CaptureError):
            fix_shapes(graph, example)


def test_a_size_that_the_model_was_not_traced_for_is_not_fixed():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] > 3 else x * 3

    dims = ({0: torch.export.Dim("s", min=4, max=9)},)
    graph = mcc.capture(Branch(), (torch.zeros(5, 3),), dynamic_shapes=dims)
    assert fix_shapes(graph, (torch.zeros(9, 3),)).inputs[0].shape == (9, 3)
    for rows in (3, 10):
        with pytest.raises(CaptureError, match="input x is"):
            fix_shapes(graph, (torch.zeros(rows, 3),))
