"""The stages of the CPU backend: what fuses, what is chosen, and what is said of the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import Branches, Residual, mlp
from torch import nn

import mcc
from mcc.backends import cpu
from mcc.backends.cpu.fuse import fuse
from mcc.backends.cpu.hoist import hoist
from mcc.backends.cpu.integerize import integerize
from mcc.backends.cpu.kernels.dense import DenseFloat
from mcc.backends.cpu.layout import layout
from mcc.backends.cpu.lowering import Lowering
from mcc.backends.cpu.measure import measure
from mcc.backends.cpu.select import select
from mcc.backends.cpu.tokens import attend_by_tokens
from mcc.backends.tune import Tuner
from mcc.compiler import Options, compile_graph
from mcc.data import Data
from mcc.encode import encode
from mcc.passes import FoldBatchNorm, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}


def regions(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    graph, _ = Pipeline(steps, parse_target("cpu"), Data(calibration=[x])).run(graph, (x,))
    encoded, _ = encode(graph, partial(cpu.prefer_dense, target=parse_target("cpu")))
    lowering = fuse(integerize(layout(hoist(Lowering(encoded, parse_target("cpu"), Tuner("model", measure))))))
    return {r.anchor.layer: r for r in lowering.regions.values()}


def compiled(model, x, *steps, **options):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    settings = Options(data=Data(calibration=[x]), measure="never", tuning="model", **options)
    return compile_graph(graph, (x,), tuple(steps), settings)


def test_activation_and_requantize_fuse_and_a_chain_stays_in_codes():
    found = regions(mlp(12, 16, 16, 4), torch.randn(2, 12), Quantize())
    assert [found[k].text for k in ("0", "2", "4")] == [
        "linear + relu + requantize",
        "linear + relu + requantize",
        "linear",
    ]
    assert all(r.activation is not None for r in found.values())


def test_a_value_that_is_read_twice_ends_its_region():
    found = regions(Residual(), torch.randn(2, 3, 8, 8), FoldBatchNorm())
    assert found["c1"].text == "mcc.conv2d_nhwc + relu"


def test_a_quantized_residual_stays_in_codes():
    found = regions(Residual(), torch.randn(2, 3, 8, 8), FoldBatchNorm(), Quantize())
    assert found["c1"].text == "mcc.conv2d_nhwc + relu + requantize"
    added = [r for r in found.values() if r.operands]
    assert [r.operand_dtypes for r in added] == [("uint8",)]


def test_a_quantizer_moves_up_through_pools_and_concats():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.c(nn.functional.max_pool2d(torch.cat([torch.relu(self.a(x)), self.b(x)], 1), 3, 2, 1))

    x = torch.randn(2, 3, 9, 9)
    found = regions(Pooled(), x, Quantize())
    assert [found[k].text.removeprefix("mcc.conv2d_nhwc") for k in "abc"] == [
        " + relu + requantize",
        " + requantize",
        "",
    ]
    compiled(Pooled().eval(), x, Quantize())  # verified


def test_an_output_ends_its_region():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return y, torch.relu(y)

    assert regions(Two(), torch.randn(2, 4))["a"].text == "linear"


@pytest.mark.parametrize(
    ("activation", "text"),
    [
        (nn.ReLU6(), "linear + clamp"),
        (nn.Hardtanh(), "linear + clamp"),
        (nn.GELU(), "linear + gelu"),
        (nn.GELU("tanh"), "linear + gelu_tanh"),
        (nn.SiLU(), "linear + silu"),
        (nn.Hardswish(), "linear + hardswish"),
        (nn.Softplus(), "linear"),
    ],
)
def test_which_activations_fuse(activation, text):
    assert regions(nn.Sequential(nn.Linear(4, 4), activation), torch.randn(2, 4))["0"].text == text


def test_a_grouped_sparse_convolution_has_a_kernel_and_a_depthwise_one_is_stored_dense():
    x = torch.randn(4, 8, 10, 10)
    grouped = compiled(nn.Conv2d(8, 16, 3, groups=2), x, PruneWeights(ratio=0.95)).report
    assert [row.kernel.split()[0] for row in grouped.layers] == ["sparse_conv2d"]
    depthwise = compiled(nn.Conv2d(8, 8, 3, groups=8), x, PruneWeights(ratio=0.95)).report
    assert depthwise.passes[-1].declined[0].reason == "stored dense: the groups have 1 input channels each"


@pytest.mark.parametrize(("target", "steps", "kernel"), [
    ("cpu:avx2", [], "sparse_slabs"), ("cpu:avx2", [Quantize()], "dense_int8"),
    ("cpu:avx512", [Quantize(activations="dynamic")], "dense_per_token"),
    ("cpu:avx512", [Quantize(activations=None)], "sparse_slabs"),
])  # fmt: skip
def test_codes_are_read_sparse_at_lower_densities_than_floats(target, steps, kernel):
    """At density 0.32: between the limits of integers and of floats."""
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(64, 256)
    prune = PruneWeights(ratio=0.68, scope="layer")
    artifact = mcc.compile(
        model, (x,), passes=[prune, *steps], data=Data(calibration=[x]), measure="never", tuning="model", verify=False,
        target=target,
    )  # fmt: skip
    assert [row.kernel.split()[0] for row in artifact.report.layers] == [kernel]
    reasons = [d.reason for row in artifact.report.passes for d in row.declined]
    assert bool(reasons) == (kernel != "sparse_slabs")


@pytest.mark.parametrize(("ratio", "sparse_seconds", "kernel", "timed"), [
    (0.6, 1.0, "sparse_slabs", True), (0.6, 0.9, "sparse_slabs", True), (0.6, 1.2, "dense_f32", True),
    (0.65, 1.2, "dense_f32", True), (0.9, 1.2, "sparse_slabs", False), (0.2, 0.1, "dense_f32", False),
])  # fmt: skip
def test_near_the_limit_the_kernel_that_is_faster_here_reads_a_sparse_weight(
    ratio, sparse_seconds, kernel, timed, tmp_path
):
    """Of 64 rows on AVX2 sparse weights gain up to a density of 0.5."""
    target = parse_target("cpu:avx2")
    seen = []

    def measure_by_form(lowered, region, target):
        seen.append(region.weight.sparse is not None)
        return lambda: sparse_seconds if region.weight.sparse is not None else 1.0

    graph = mcc.compress(nn.Linear(256, 128), (torch.randn(64, 256),), passes=[PruneWeights(ratio=ratio)]).graph
    encoded, _ = encode(graph, partial(cpu.prefer_dense, target=target, tuning="measure"))
    tuner = Tuner("measure", measure_by_form, tmp_path / "tune.sqlite")
    (choice,) = select(fuse(integerize(layout(hoist(Lowering(encoded, target, tuner)))))).choices.values()
    assert choice.kernel.name == kernel
    assert (len(set(seen)) == 2) == timed
    reason = "weight decoded at build time: dense_f32 takes 1000000.0 us, sparse_slabs 1200000.0"
    assert choice.reason == (reason if timed and kernel == "dense_f32" else "")


@pytest.mark.parametrize(("pattern", "kernel", "text"), [
    ("16x1", "sparse_blocks", "sparse float32 in blocks of 16x1"),
    ("4x4", "sparse_blocks", "sparse float32 in blocks of 4x4"), ("", "sparse_dense", "sparse float32"),
    ("1:4", "sparse_n_of_m", "1:4 of float32"),
])  # fmt: skip
def test_weights_pruned_by_a_pattern_are_stored_and_read_by_it(pattern, kernel, text):
    torch.manual_seed(0)
    x = torch.randn(9, 64)
    prune = PruneWeights(ratio=0.75, pattern=pattern)
    row = compiled(nn.Linear(64, 48), x, prune, target="cpu:avx2", verify=False).report.layers[0]
    assert (row.kernel.split()[0], row.stored) == (kernel, text)


@pytest.mark.parametrize("codes", [False, True])
def test_a_sparse_convolution_with_a_residual_is_one_kernel(codes):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1)

        def forward(self, x):
            x = self.a(x).relu()
            return (x + self.b(x)).relu()

    x = torch.randn(4, 16, 10, 10)
    steps = [PruneWeights(ratio=0.95, scope="layer"), *([Quantize()] if codes else [])]
    artifact = mcc.compile(
        Block().eval(), (x,), passes=steps, data=Data(calibration=[x]), measure="never", tuning="model",
        target="cpu:avx512",
    )  # fmt: skip
    rows = {row.layer: row for row in artifact.report.layers}
    assert {row.kernel.split()[0] for row in rows.values()} == {"sparse_codes_conv2d" if codes else "sparse_conv2d"}
    assert rows["b"].op.endswith("+ add + relu")


@pytest.mark.parametrize(("pattern", "rows", "kernel"), [
    ("", 40, "sparse_slabs"), ("", 1, "sparse_dense"), ("16x1", 40, "sparse_slabs"), ("16x1", 1, "sparse_blocks"),
    ("2:4", 40, "sparse_n_of_m"),
])  # fmt: skip
def test_a_sparse_layer_takes_in_a_residual(pattern, rows, kernel):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(48, 48)

        def forward(self, x):
            return (x.sin() + self.a(x)).relu()

    torch.manual_seed(0)
    prune = PruneWeights(ratio=0.5 if pattern == "2:4" else 0.9, scope="layer", pattern=pattern)
    x = torch.randn(rows, 48)
    artifact = mcc.compile(Block(), (x,), passes=[prune], measure="never", tuning="model", target="cpu:avx2")
    (row,) = artifact.report.layers
    assert (row.kernel.split()[0], row.op) == (kernel, "linear + add + relu")


def test_a_depthwise_convolution_between_sparse_ones_is_not_transposed():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 1), nn.ReLU6(), nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.ReLU6(), nn.Conv2d(32, 24, 1)
    )
    x, include = torch.randn(4, 16, 13, 11), ("0", "4")
    artifact = compiled(model.eval(), x, PruneWeights(ratio=0.9, scope="layer", include=include))
    kernels = {row.layer: row.kernel.split()[0] for row in artifact.report.layers}
    assert kernels == {"0": "sparse_conv2d", "2": "depthwise_planes", "4": "sparse_conv2d"}
    alone = compiled(model.eval(), x).report
    assert {row.layer: row.kernel.split()[0] for row in alone.layers}["2"] == "depthwise"


@pytest.mark.parametrize(("layer", "shape", "reason"), [
    (nn.Conv2d(16, 64, 16, stride=16), (1, 16, 64, 64), "its stride would cut each channel into 256 planes"),
    (nn.Conv2d(64, 64, 1), (1, 64, 2, 2),
     "at density 0.25 the dense kernel is faster (sparse gains below 0.12 for 4 pixels)"),
])  # fmt: skip
def test_convolutions_better_read_dense_are_stored_dense(layer, shape, reason):
    report = compiled(layer, torch.randn(shape), PruneWeights(ratio=0.75, scope="layer")).report
    assert report.passes[-1].declined[0].reason == f"stored dense: {reason}"


def test_codes_beside_a_depthwise_convolution_stay_with_channels_last():
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU6(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 32, 1))
    x = torch.randn(4, 16, 13, 11)
    prune = PruneWeights(ratio=0.95, scope="layer", include=("0", "3"), pattern="4x1")  # which no kernel permutes
    artifact = mcc.compile(
        model.eval(), (x,), passes=[prune, Quantize()],
        data=Data(calibration=[x]), measure="never", tuning="model", verify=False,
    )  # fmt: skip
    reasons = {d.layer: d.reason for row in artifact.report.passes for d in row.declined}
    assert reasons["0"].startswith("stored dense: 2 beside it has single channels")
    assert reasons["3"].startswith("stored dense: 2 beside it has single channels")


def test_layers_of_either_layout_read_the_same_codes():
    """A dense convolution beside a sparse one goes on reading codes."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.sparse, self.dense = nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.sparse(x) + self.dense(x)

    x = torch.randn(4, 8, 13, 11)
    prune = PruneWeights(ratio=0.95, scope="layer", include=("sparse",), pattern="4x1")
    artifact = mcc.compile(
        Fork().eval(), (x,), passes=[prune, Quantize()],
        data=Data(calibration=[x]), measure="never", tuning="model", target="cpu:avx512",
    )  # fmt: skip
    kernels = {row.layer: row.kernel.split()[0] for row in artifact.report.layers}
    assert kernels == {"first": "conv2d_int8", "sparse": "sparse_conv2d", "dense": "conv2d_int8"}


def test_groups_of_a_sparse_convolution_do_not_reach_each_other():
    """What fills up sets of outputs multiplies an input of their own group."""
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 9)
    artifact = compiled(nn.Conv2d(32, 32, 1, groups=2), x, PruneWeights(ratio=0.9))
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["sparse_conv2d"]
    x[:, 0] = torch.inf
    assert artifact(x)[:, 16:].isfinite().all()


def test_an_embedding_tied_to_two_of_four_weights_shares_a_dense_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids).relu())

    report = compiled(Tied(), torch.randint(0, 100, (2, 9)), PruneWeights(ratio=0.5, pattern="2:4")).report
    assert [row.kernel.split()[0] for row in report.layers] == ["lookup", "dense_f32"]
    assert report.passes[-1].declined[0].reason == "stored dense: no embedding reads rows of 2:4"


def test_a_layer_left_to_the_op_library_is_in_the_report_with_the_reason():
    row = compiled(nn.Conv3d(6, 6, 3, groups=2), torch.randn(2, 6, 9, 9, 9)).report.layers[0]
    assert (row.kernel, row.reason) == ("op library", "there is no own kernel for conv3d yet")


class Sums(nn.Module):
    """Additions after layers: of an input, of another layer, of the layer itself, and one that broadcasts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(20, 20) for _ in range(4))

    def forward(self, x, row):
        y = torch.relu(self.a(x) + x)
        z = self.b(y) + self.c(y)
        t = self.d(z)
        return (t + t) + row


def test_an_addition_goes_into_the_layer_that_is_computed_last():
    model, x, row = Sums().eval(), torch.randn(5, 20), torch.randn(1, 20)
    artifact = mcc.compile(model, (x, row), measure="never", tuning="model")
    with torch.no_grad():
        torch.testing.assert_close(artifact(x, row), model(x, row), rtol=1e-4, atol=1e-5)
    texts = {r.layer: r.op for r in artifact.report.layers}
    assert texts == {"a": "linear + add + relu", "b": "linear", "c": "linear + add", "d": "linear"}


@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (0, 12)])
@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Quantize(),),
        (Quantize(activations=None),),
        (PruneWeights(ratio=0.9),),
        (PruneWeights(ratio=0.9), Quantize()),
    ],
)
def test_an_artifact_runs_at_any_batch_and_equals_its_graph(shape, steps):
    x = torch.randn(64, 12)
    artifact = compiled(mlp(12, 33, 5), x, *steps)
    y = artifact(torch.randn(shape))
    assert y.shape == (shape[0], 5)


def test_outputs_have_memory_of_their_own():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("constant", torch.ones(3))

        def forward(self, x):
            return x, x.reshape(2, 6), self.constant, x + 1

    x = torch.randn(3, 4)
    artifact = mcc.compile(Views(), (x,), measure="never", tuning="model")
    same, view, constant, _ = artifact(x)
    for output, expected in ((same, x), (view, x.reshape(2, 6)), (constant, torch.ones(3))):
        assert torch.equal(output, expected)
        output.zero_()
    assert torch.equal(artifact(x)[2], torch.ones(3))
    assert x.abs().sum() > 0


def test_one_value_returned_twice_and_used_inside():
    x, scale = torch.randn(4, 6), torch.ones(5)
    artifact = mcc.compile(Branches(), (x, scale), measure="never", tuning="model")
    found, expected = artifact(x, scale=scale), Branches.forward(artifact_model := Branches(), x, scale)
    del artifact_model, expected
    assert set(found) == {"z", "rest"}
    torch.testing.assert_close(found["rest"][2], found["rest"][0] * found["rest"][0])


def test_equal_compilations_give_equal_bytes(tmp_path):
    x = torch.randn(16, 12)
    model = mlp(12, 33, 5)
    for name in ("a", "b"):
        compiled(model, x, PruneWeights(ratio=0.9)).with_manifest(report={}).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_layer_of_no_rows_divides_by_none_of_them():
    """TVM knew that there are rows inside a loop over them, and moved a division by their number before it."""

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(784, 70)

        def forward(self, x, y):
            return self.layer(x) + y

    example = torch.randn(5, 3, 784), torch.randn(5, 3, 70)
    artifact = mcc.compile(Added().eval(), example, dynamic_shapes=({1: "tokens"},) * 2, verify=False, **QUICK)
    assert artifact(torch.ones(5, 0, 784), torch.ones(5, 0, 70)).shape == (5, 0, 70)


def test_the_tuner_times_each_candidate_once_and_remembers_the_winner(tmp_path):
    timed = []

    def count(lowered, region, target):
        timed.append(lowered)
        seconds = float(len(timed))
        return lambda: seconds

    graph = mcc.capture(mlp(40, 70), (torch.randn(3, 40),))
    for _ in range(2):
        tuner = Tuner("measure", count, tmp_path / "tune.sqlite")
        lowering = fuse(integerize(Lowering(graph, parse_target("cpu"), tuner)))
        (region,) = lowering.regions.values()
        kernel = DenseFloat()
        assert tuner.choose(kernel, region, parse_target("cpu")) == kernel.tiles(region, parse_target("cpu"))[0]
    assert len(timed) == len(kernel.tiles(region, parse_target("cpu"))[:3])


def test_tiles_that_were_timed_beyond_the_candidates_count_too(tmp_path):
    """What `mcc tune` timed is there for every later compilation."""
    target = parse_target("cpu")
    graph = mcc.capture(mlp(40, 70), (torch.randn(3, 40),))
    (region,) = fuse(integerize(Lowering(graph, target, Tuner("model", measure)))).regions.values()

    class ManyTiles(DenseFloat):
        def tiles(self, region, target):
            return ("1x1", "2x1", "3x1", "4x1", "5x1")

    seconds = iter([5.0, 4.0, 3.0, 1.0, 2.0])
    thorough = Tuner("measure", lambda *_: partial(float, next(seconds)), tmp_path / "tune.sqlite", candidates=None)
    assert thorough.choose(ManyTiles(), region, target) == "4x1"
    assert Tuner("measure", measure, tmp_path / "tune.sqlite").choose(ManyTiles(), region, target) == "4x1"


@pytest.mark.parametrize("size", [70, 2000])  # of the weights few bytes, or so many that they are read from memory
def test_a_measured_time_is_a_time(size):
    graph = mcc.capture(mlp(40, size), (torch.randn(3, 40),))
    tuner = Tuner("measure", measure, None)
    lowering = fuse(integerize(Lowering(graph, parse_target("cpu"), tuner)))
    (region,) = lowering.regions.values()
    target = parse_target("cpu")
    assert 0 < measure(DenseFloat().lower(region, target, "4x2"), region, target)() < 1


class Attends(nn.Module):
    """Attention of tokens, split into heads and joined again."""

    def __init__(self, heads, key_heads, causal):
        super().__init__()
        self.heads, self.key_heads, self.causal = heads, key_heads, causal

    def forward(self, query, key, value, mask=None):
        parts = ((query, self.heads), (key, self.key_heads), (value, self.key_heads))
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in parts)
        options = {"is_causal": self.causal, "enable_gqa": self.heads != self.key_heads}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)


def floats(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize(("heads", "causal", "sizes", "mask"), [
    ((4, 4), False, (7, 7, 32), None), ((4, 2), True, (13, 13, 24), None), ((3, 1), True, (50, 70, 17), None),
    ((2, 2), False, (5, 33, 16), lambda rows, keys: torch.rand(2, 1, rows, keys) > 0.3),
    ((2, 2), False, (6, 16, 64), lambda rows, keys: torch.rand(1, keys) > 0.3),
    ((3, 1), False, (20, 9, 64), lambda rows, keys: torch.randn(rows, keys)),
    ((4, 4), False, (1, 7, 32), None), ((18, 2), False, (1, 33, 64), lambda rows, keys: torch.randn(rows, keys)),
    ((2, 1), False, (1, 1, 16), lambda rows, keys: torch.rand(2, 1, rows, keys) > 0.5),
    ((3, 3), False, (1, 70, 20), None), ((2, 2), True, (1, 5, 32), None),
])  # fmt: skip
def test_attention_reads_and_writes_tokens_where_they_lie(heads, causal, sizes, mask):
    rows, keys, depth = sizes
    inputs = [floats(2, rows, heads[0] * depth), floats(2, keys, heads[1] * depth), floats(2, keys, heads[1] * depth)]
    inputs += [] if mask is None else [mask(rows, keys)]
    model = Attends(*heads, causal).eval()
    artifact = mcc.compile(model, tuple(inputs), measure="never", tuning="model")
    single = rows == 1 and not causal and depth % parse_target("cpu").vector_lanes == 0
    kernel = "attention_step" if single else "attention"
    assert [(r.op, r.kernel) for r in artifact.report.layers] == [("attention", kernel)]
    torch.testing.assert_close(artifact(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def repeated(x, how):
    """Keys [batch, 2, tokens, size] for 6 heads, as models write it."""
    if how == "repeat_interleave":
        return x.repeat_interleave(3, dim=1)
    batch, heads, tokens, size = x.shape
    wide = x[:, :, None] if how == "expand" else x.unsqueeze(1)
    if how == "expand":
        return wide.expand(batch, heads, 3, tokens, size).reshape(batch, heads * 3, tokens, size)
    return wide.expand(batch, 3, heads, tokens, size).reshape(batch, heads * 3, tokens, size)


@pytest.mark.parametrize(("how", "heads"), [("repeat_interleave", 2), ("expand", 2), ("tile", 6)])
@pytest.mark.parametrize("rows", [1, 5])
def test_keys_of_shared_heads_are_read_before_they_are_repeated(how, heads, rows):
    """But not where the same heads follow one another: those are shared in another order."""

    class Model(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, repeated(k, how), repeated(v, how))

    inputs = floats(2, 6, rows, 32), floats(2, 2, 9, 32), floats(2, 2, 9, 32)
    graph = mcc.capture(Model(), inputs)
    attend_by_tokens(graph, parse_target("cpu:avx2"))
    (node,) = (n for n in graph.nodes if n.op is not None and n.op.name == "mcc.attention")
    assert node.operand(1).shape[1] == node.operand(2).shape[1] == heads
    artifact = mcc.compile(Model(), inputs, measure="never", tuning="model")
    torch.testing.assert_close(artifact(*inputs), Model()(*inputs), rtol=1e-4, atol=1e-5)


def test_attention_of_varying_batch_and_length():
    model, dims = Attends(2, 2, causal=True).eval(), {0: "batch", 1: "length"}
    artifact = mcc.compile(model, (floats(2, 6, 64),) * 3, dynamic_shapes=(dims, dims, dims), measure="never")
    for batch, length in ((1, 1), (3, 17), (1, 130)):
        x, y, z = (floats(batch, length, 64) for _ in range(3))
        torch.testing.assert_close(artifact(x, y, z), model(x, y, z), rtol=1e-4, atol=1e-5)


def test_attention_that_the_kernel_cannot_take_is_in_the_report_with_the_reason():
    for x, reason in ((floats(2, 5, 8), "its values have fewer than"),):
        row = mcc.compile(Attends(2, 2, causal=False), (x, x, x), measure="never", tuning="model").report.layers[0]
        assert row.kernel == "op library"
        assert reason in row.reason


class NormBeforeLayers(nn.Module):
    """The norm's value goes to layers alone, or to a residual too."""

    def __init__(self, residual):
        super().__init__()
        self.norm, self.a, self.b, self.residual = nn.LayerNorm(40), nn.Linear(40, 40), nn.Linear(40, 40), residual

    def forward(self, x):
        y = self.norm(x)
        z = self.a(y) * self.b(y)
        return z + y if self.residual else z


@pytest.mark.parametrize(("residual", "calls"), [(False, 0), (True, 1)])
def test_a_quantizer_takes_in_the_norm_before_it_unless_the_floats_are_read(residual, calls):
    model, x = NormBeforeLayers(residual).eval(), torch.randn(3, 7, 40)
    graph, _ = Pipeline((Quantize(),), parse_target("cpu"), Data(calibration=[x])).run(mcc.capture(model, (x,)), (x,))
    encoded, _ = encode(graph, partial(cpu.prefer_dense, target=parse_target("cpu")))
    rows = cpu.profiler(encoded, parse_target("cpu"), "model", [x.numpy()]).measure(1)
    assert sum(row.kernel == "op library" and row.op.startswith("quantize") for row in rows) == calls
    compiled(model, x, Quantize())  # verified


class Gated(nn.Module):
    """What gates one layer by another, numbers on the way."""

    def __init__(self, how):
        super().__init__()
        self.up, self.gate, self.how = nn.Linear(20, 36), nn.Linear(20, 36), how

    def forward(self, x):
        return self.how(self.up(x), self.gate(x))


@pytest.mark.parametrize(("how", "wanted"), [
    (lambda up, gate: nn.functional.silu(gate) * up, {"linear", "linear + silu + mul"}),
    (lambda up, gate: up * torch.sigmoid(gate) / 4 + up, {"linear", "linear + sigmoid + mul + scale + add"}),
    (lambda up, gate: gate * torch.sigmoid(1.702 * gate) - up, {"linear", "linear + scale + silu + scale"}),
    (lambda up, gate: up * up + gate * 2, {"linear", "linear + scale + add"}),
    (lambda up, gate: up * gate[:, :1] + gate, {"linear"}),
])  # fmt: skip
def test_gates_and_numbers_are_taken_in_by_the_layer_before(how, wanted):
    model, x = Gated(how).eval(), torch.randn(3, 5, 20)
    artifact = mcc.compile(model, (x,), dynamic_shapes=({0: "batch"},), **QUICK)
    assert {row.op for row in artifact.report.layers} == wanted
    for batch in (3, 1, 0):
        other = torch.randn(batch, 5, 20)
        with torch.no_grad():
            torch.testing.assert_close(artifact(other), model(other), rtol=1e-4, atol=1e-5)
    coded = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]), **QUICK)
    with torch.no_grad():
        assert float((coded(x) - model(x)).norm()) <= 0.05 * float(model(x).norm())


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(4, 32), nn.GroupNorm(32, 32), nn.InstanceNorm1d(32, affine=True)], ids=str
)
def test_norms_of_sequences_run_between_convolutions_as_those_of_images(norm):
    model, x = nn.Sequential(nn.Conv1d(5, 32, 3), norm, nn.GELU(), nn.Conv1d(32, 7, 3)).eval(), torch.randn(2, 5, 19)
    artifact = mcc.compile(model, (x,), dynamic_shapes=({0: "batch"},), **QUICK)
    for batch in (2, 1, 7):
        other = torch.randn(batch, 5, 19)
        with torch.no_grad():
            torch.testing.assert_close(artifact(other), model(other), rtol=1e-4, atol=1e-4)
