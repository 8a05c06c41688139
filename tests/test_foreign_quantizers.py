"""Models that other tools have quantized: QDQ and QLinear ONNX files, packed weights, PyTorch's export flow."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from onnx import helper
from onnx_models import make_model
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn

import mcc
from mcc.compiler import load_graph
from mcc.errors import CaptureError
from mcc.frontend import capture

N = helper.make_node
RANDOM = np.random.default_rng(0)
TORCH = torch.ops.quantized_decomposed


def f(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def scale(value):
    return np.array(value, np.float32)


def compiled(model, *inputs):
    return mcc.compile(model, inputs, measure="never", tuning="model")


def session(proto):
    """ONNX Runtime without its own fusions, whose kernels round otherwise."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def assert_equal_but_for_ties(found, expected):
    """Two ways to divide by a scale round some value in a few thousand to neighbouring codes, which others then read."""
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected)


class Network(nn.Module):
    """A residual, a pool, a concatenation, depthwise, strided and transposed convolutions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.d, self.p = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1, stride=2)
        self.up, self.fc = nn.ConvTranspose2d(16, 8, 2, 2), nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.a(x))
        y = nn.functional.max_pool2d(torch.relu(self.b(x) + x), 2)
        y = nn.functional.relu6(self.d(y))
        z = torch.cat([y, y.sigmoid()], 1)[:, 3:19]
        return self.fc(torch.relu(self.p(y)).mean((2, 3))), self.up(z).mean((2, 3))


class Batches(CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"x": f(4, 3, 16, 16)} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        Network().eval(), (torch.zeros(4, 3, 16, 16),), str(path), dynamic_shapes=({0: batch},), verbose=False
    )
    return path


UNSIGNED, SIGNED, WIDE = QuantType.QUInt8, QuantType.QInt8, QuantType.QInt16
FORMS = {
    "QDQ, a scale for each channel": (QuantFormat.QDQ, True, UNSIGNED, SIGNED),
    "QDQ, signed activations": (QuantFormat.QDQ, False, SIGNED, SIGNED),
    "QDQ, unsigned weights": (QuantFormat.QDQ, False, UNSIGNED, UNSIGNED),
    "QDQ, activations of 16 bits": (QuantFormat.QDQ, True, WIDE, SIGNED),
    "QLinear operators": (QuantFormat.QOperator, True, UNSIGNED, SIGNED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_network_that_onnx_runtime_quantized_gives_what_its_file_says(name, float_file, tmp_path):
    kind, per_channel, activations, weights = FORMS[name]
    path = tmp_path / "quantized.onnx"
    quantize_static(
        float_file, path, Batches(), quant_format=kind, per_channel=per_channel, activation_type=activations,
        weight_type=weights,
        # without VNNI ONNX Runtime's QLinear kernels saturate sums of two products of 8 bits, mcc's do not
        reduce_range=kind is QuantFormat.QOperator,
    )  # fmt: skip
    artifact, peer = compiled(path), session(onnx.load(path))
    for batch in (1, 3):
        x = f(batch, 3, 16, 16)
        for expected, found in zip(peer.run(None, {"x": x}), artifact(x), strict=True):
            assert_equal_but_for_ties(found, expected)
    rows = {row.layer: row for row in artifact.report.layers if row.layer in "abdpfcup"}
    assert {row.stored for row in rows.values()} <= {"int8", "float32"}
    if activations is WIDE:
        assert rows["a"].reason == "activations decoded: no kernel reads int16 codes"
    elif weights is SIGNED:
        # depthwise layers with codes to 127 compute in float where no instruction adds four products exactly
        floats = {"up"} if mcc.parse_target("cpu").exact_dot4 else {"up", "d"}
        assert all("int8" in row.kernel for layer, row in rows.items() if layer not in floats), rows


def test_quantize_and_dequantize_are_the_quantizers_that_passes_know():
    proto = make_model(
        [
            N("QuantizeLinear", ["x", "xs", "xz"], ["xq"]), N("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            N("DequantizeLinear", ["w_quantized", "ws", "wz"], ["wd"], axis=0),
            N("DequantizeLinear", ["b_quantized", "bs"], ["bd"], axis=0),
            N("Gemm", ["xd", "wd", "bd"], ["y"], transB=1),
        ],
        {"x": ("float32", ["n", 4])}, ["y"],
        {
            "xs": scale(0.5), "xz": np.array(-3, np.int8), "ws": scale([0.5, 0.25]), "wz": np.zeros(2, np.int8),
            "w_quantized": np.array([[1, -128, 3, 4], [5, 6, 7, 127]], np.int8), "bs": scale([0.25, 0.125]),
            "b_quantized": np.array([8, -8], np.int32),
        },
    )  # fmt: skip
    graph = load_graph(proto, (), {}, None)
    assert str(graph).splitlines() == [
        "%x: f32[n, 4]",
        "%inputs_0_quantized: f32[n, 4] = mcc.fake_quantize(%x, @xs, @xs_zero_point_unsigned, axis=None, low=0, high=255)",
        "%w_quantized_1: f32[2, 4] = mcc.fake_quantize(@w, @w_scale, @w_zero_point, axis=0, low=-128, high=127)",
        "%linear: f32[n, 2] = linear(%inputs_0_quantized, %w_quantized_1, @b)",
        "return %linear",
    ]
    assert {name for name, _ in graph.named_parameters()} == {"w", "b"}
    assert graph.tensor("w").tolist() == [[0.5, -64, 1.5, 2], [1.25, 1.5, 1.75, 31.75]]
    assert graph.tensor("b").tolist() == [2, -1]
    assert int(graph.tensor("xs_zero_point_unsigned")) == 125


def test_codes_that_are_moved_or_pooled_are_read_as_codes():
    proto = make_model(
        [
            N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("MaxPool", ["q"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
            N("Reshape", ["m", "shape"], ["r"]), N("DequantizeLinear", ["r", "s", "z"], ["d"]),
            N("DequantizeLinear", ["w_quantized", "ws"], ["wd"]), N("MatMul", ["d", "wd"], ["y"]),
        ],
        {"x": ("float32", ["n", 4, 6, 6])}, ["y"],
        {
            "s": scale(0.03), "z": np.array(100, np.uint8), "shape": np.array([0, 36], np.int64),
            "w_quantized": RANDOM.integers(-127, 128, (36, 5)).astype(np.int8), "ws": scale(0.01),
        },
    )  # fmt: skip
    artifact, x = compiled(proto), f(3, 4, 6, 6)
    np.testing.assert_allclose(artifact(x), session(proto).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5)
    assert [(row.op, row.kernel.split()[0]) for row in artifact.report.layers] == [("linear", "dense_int8")]


def test_codes_that_are_dequantized_otherwise_stay_codes():
    proto = make_model(
        [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "t", "z"], ["y"])],
        {"x": ("float32", ["n", 4])}, ["y", "q"], {"s": scale(0.03), "t": scale(0.05), "z": np.array(7, np.uint8)},
    )  # fmt: skip
    x = f(3, 4)
    for found, expected in zip(compiled(proto)(x), session(proto).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matrices_of_four_bits_keep_their_bits(packed, symmetric):
    proto = make_model(
        [
            N("MatMul", ["x", "first"], ["h"]), N("Add", ["c", "h"], ["a"]), N("Relu", ["a"], ["r"]),
            N("MatMul", ["r", "second"], ["y"]),
        ],
        {"x": ("float32", ["n", 96])}, ["y"], {"first": f(96, 64), "c": f(64), "second": f(64, 40)},
    )  # fmt: skip
    form = QuantFormat.QOperator if packed else QuantFormat.QDQ
    proto.opset_import[0].version = 21
    options = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, quant_format=form)
    quantizer = MatMulNBitsQuantizer(proto, algo_config=options)
    quantizer.process()
    quantized = quantizer.model.model
    before = quantized.SerializeToString()
    artifact, x = compiled(quantized), f(5, 96)
    assert quantized.SerializeToString() == before
    np.testing.assert_allclose(artifact(x), session(quantized).run(None, {"x": x})[0], rtol=1e-4, atol=1e-4)
    assert [(r.op, r.kernel.split()[0], r.stored) for r in artifact.report.layers] == [
        ("linear + relu", "low_bit_dense", "int4 in groups of 32"), ("linear", "low_bit_dense", "int4 in groups of 32"),
    ]  # fmt: skip


def test_scales_that_are_chosen_when_values_come_are_refused():
    nodes = [N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])]
    with pytest.raises(CaptureError, match="DynamicQuantizeLinear") as caught:
        load_graph(make_model(nodes, {"x": ("float32", ["n", 4])}, ["y"]), (), {}, None)
    assert "activations='dynamic'" in caught.value.remedy


class Exported(nn.Module):
    """What PyTorch's export flow leaves: codes as buffers, scales as numbers and buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("0", (8, 3, 3, 3)), ("1", (8, 1, 3, 3)), ("2", (10, 72))):
            codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            self.register_buffer(f"_frozen_param{name}", codes)
            self.register_buffer(f"_scale_{name}", torch.rand(shape[0], generator=generator) / 100 + 1e-3)
            self.register_buffer(f"_zero_point_{name}", torch.zeros(shape[0], dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(10, generator=generator))

    def forward(self, x):
        def activation(x, scale, zero):
            limits = (0, 255, torch.uint8)
            codes = TORCH.quantize_per_tensor(x, scale, zero, *limits)
            return TORCH.dequantize_per_tensor(codes, scale, zero, *limits)

        def weight(name):
            parts = (getattr(self, f"{part}{name}") for part in ("_frozen_param", "_scale_", "_zero_point_"))
            return TORCH.dequantize_per_channel(*parts, 0, -128, 127, torch.int8)

        x = torch.relu(torch.conv2d(activation(x, 0.02, 128), weight("0")))
        x = nn.functional.max_pool2d(activation(x, 0.01, 0), 2)
        x = torch.conv2d(activation(x, 0.01, 0), weight("1"), groups=8)
        x = activation(x, 0.01, 130).flatten(1)
        return nn.functional.linear(activation(x, 0.01, 130), weight("2"), self.bias)


def test_pytorchs_export_flow_becomes_int8_kernels():
    model, x = Exported(), torch.from_numpy(f(3, 3, 12, 12))
    artifact = mcc.compile(model, (x,), dynamic_shapes=({0: "batch"},), measure="never", tuning="model")
    for batch in (1, 7):
        x = torch.from_numpy(f(batch, 3, 12, 12))
        assert_equal_but_for_ties(artifact(x), model(x).detach())
    # which kernel reads the codes of the depthwise layer depends on the CPU
    first, _, last = (row.kernel.split()[0] for row in artifact.report.layers)
    assert (first, last) == ("conv2d_int8", "dense_int8")
    assert {row.stored for row in artifact.report.layers} == {"int8"}
    # what is quantized alike before and behind a pool or a reshape is so once
    quantizers = [n.name for n in capture(model, (x,)).nodes if n.op is mcc.ops.FAKE_QUANTIZE]
    assert len(quantizers) == 3 + 3


def test_an_exported_program_may_be_given_itself():
    model, x = Exported(), torch.from_numpy(f(3, 3, 12, 12))
    artifact = compiled(torch.export.export(model, (x,)), x)
    assert_equal_but_for_ties(artifact(x), model(x).detach())


def test_tensors_that_bring_their_own_ops_are_refused_by_name():
    kind = type("Int8Tensor", (nn.Parameter,), {"__module__": "torchao.quantization"})
    model = nn.Linear(4, 3)
    model.weight = torch.Tensor._make_subclass(kind, model.weight.detach())
    with pytest.raises(CaptureError, match="weight is a Int8Tensor of torchao"):
        capture(model, (torch.zeros(2, 4),))


def test_a_recognized_network_prunes_and_trains():
    model, x = Exported(), torch.from_numpy(f(3, 3, 12, 12))
    graph = capture(model, (x,))
    assert len(list(graph.named_parameters())) == 4
    artifact = mcc.compile(graph, (x,), passes="prune-weights{ratio=0.5}", measure="never", tuning="model")
    assert artifact.report.passes[1].edits == 3


def codes(*shape, kind=np.int8):
    bounds = np.iinfo(kind)
    return RANDOM.integers(bounds.min, bounds.max, shape, endpoint=True).astype(kind)


TWO = np.array([0.02, 0.05, 0.01, 0.03, 0.04, 0.06], np.float32)
WEIGHTS = {"w_quantized": codes(6, 6), "s": scale(0.02), "t": TWO, "s_zero": scale(2.5), "w": f(6, 6), "b": f(6)}
FILES = {
    "two scales of the same codes": ([
        N("DequantizeLinear", ["w_quantized", "s"], ["v"]), N("MatMul", ["x", "v"], ["h"]),
        N("DequantizeLinear", ["w_quantized", "t"], ["u"], axis=1), N("MatMul", ["h", "u"], ["y"]),
    ], ["y"]),
    "a float tensor of the name that the weight would get": ([
        N("DequantizeLinear", ["w_quantized", "t"], ["v"], axis=0), N("Gemm", ["x", "v"], ["h"], transB=1),
        N("Gemm", ["h", "w"], ["y"], transB=1),
    ], ["y"]),
    "a tensor of the name that a zero point would get": ([
        N("QuantizeLinear", ["x", "s"], ["q"]), N("DequantizeLinear", ["q", "s"], ["d"]), N("Add", ["d", "s_zero"], ["y"]),
    ], ["y"]),
    "the weight and the product are outputs": ([
        N("DequantizeLinear", ["w_quantized", "s"], ["v"]), N("MatMul", ["x", "v"], ["p"]), N("Add", ["p", "b"], ["y"]),
    ], ["y", "v", "p"]),
    "a float weight is an output": ([N("MatMul", ["x", "w"], ["y"])], ["y", "w"]),
    "a weight is quantized in the file": ([
        N("QuantizeLinear", ["w", "s"], ["q"]), N("DequantizeLinear", ["q", "s"], ["v"]), N("MatMul", ["x", "v"], ["y"]),
    ], ["y"]),
    "a scale of zero": ([
        N("DequantizeLinear", ["w_quantized", "z"], ["v"], axis=0), N("Gemm", ["x", "v"], ["y"], transB=1),
    ], ["y"]),
    "a matrix that is read as it is and transposed": ([
        N("DequantizeLinear", ["w_quantized", "t"], ["v"], axis=1), N("MatMul", ["x", "v"], ["h"]),
        N("Transpose", ["v"], ["vt"]), N("MatMul", ["h", "vt"], ["y"]),
    ], ["y"]),
    "an addition of codes without a zero point": ([
        N("QuantizeLinear", ["x", "s", "z8"], ["q"]),
        N("QLinearAdd", ["q", "s", "z8", "q", "s", "z8", "s"], ["a"], domain="com.microsoft"),
        N("DequantizeLinear", ["a", "s", "z8"], ["y"]),
    ], ["y"]),
    "QGemm with a factor and a row as its bias": ([
        N("QuantizeLinear", ["x", "s", "z8"], ["q"]),
        N("QGemm", ["q", "s", "z8", "w_quantized", "t", "z6", "c"], ["y"], domain="com.microsoft", alpha=0.5, transB=1),
    ], ["y"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_unusual_files_give_what_they_say(name):
    nodes, outputs = FILES[name]
    more = {
        "z": np.where(np.arange(6) == 2, 0, TWO).astype(np.float32), "z8": np.array(-3, np.int8),
        "z6": np.zeros(6, np.int8), "c": RANDOM.integers(-500, 500, (1, 6)).astype(np.int32),
    }  # fmt: skip
    read = {n for node in nodes for n in node.input} | set(outputs)
    weights = {n: a for n, a in (WEIGHTS | more).items() if n in read}
    proto = make_model(nodes, {"x": ("float32", ["n", 6])}, outputs, weights)
    artifact, x = compiled(proto), f(5, 6)
    found = artifact(x)
    for one, expected in zip(found if len(outputs) > 1 else [found], session(proto).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("node", "weights", "reason"), [
    (N("MatMulNBits", ["x", "B", "s"], ["y"], domain="com.microsoft", N=3, K=40, block_size=32, bits=4),
     {"B": np.zeros((3, 2, 16), np.uint8), "s": np.ones(6, np.float32)}, "40 inputs in blocks of 32"),
    (N("MatMulNBits", ["x", "B", "s", "z"], ["y"], domain="com.microsoft", N=3, K=64, block_size=32, bits=4),
     {"B": np.zeros((3, 2, 16), np.uint8), "s": np.ones(6, np.float32), "z": np.ones(6, np.float32)}, "float32 zero points"),
    (N("QuantizeLinear", ["x", "s", "x"], ["y"]), {"s": scale(0.1)}, "computes its scale"),
    (N("QuantizeLinear", ["x", "s", "z"], ["y"]), {"s": scale(0.1), "z": np.array(3, np.uint16)}, "uint16 codes"),
])  # fmt: skip
def test_forms_that_no_quantizer_stands_for_are_refused(node, weights, reason):
    with pytest.raises(CaptureError, match=reason):
        load_graph(make_model([node], {"x": ("float32", ["n", 64])}, ["y"], weights), (), {}, None)


@pytest.mark.parametrize("form", ["per channel, counted from the end", "a float weight", "a transposed weight"])
def test_other_weights_of_pytorchs_flow(form):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.randint(-127, 128, (6, 6), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(6) / 50)
            self.register_buffer("zero", torch.zeros(6, dtype=torch.int64))
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            limits = (-128, 127, torch.int8)
            if form == "a float weight":
                kept = TORCH.quantize_per_tensor(self.w, 0.02, 0, *limits)
                return nn.functional.linear(x, TORCH.dequantize_per_tensor(kept, 0.02, 0, *limits))
            axis = -2 if form.startswith("per channel") else 0
            weight = TORCH.dequantize_per_channel(self.codes, self.scale, self.zero, axis, *limits)
            return nn.functional.linear(x, weight) if axis else torch.mm(x, weight.t())

    torch.manual_seed(0)
    model, x = Layer(), torch.randn(5, 6)
    artifact = compiled(model, x)
    torch.testing.assert_close(artifact(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert [row.stored for row in artifact.report.layers] == ["int8"]
