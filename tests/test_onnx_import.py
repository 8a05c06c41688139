"""ONNX models against ONNX Runtime: operators one by one, shapes as integers, refusals by name."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from networks import mlp
from onnx import helper
from onnx_models import make_model, mlp_model

import mcc
from mcc.errors import CaptureError
from mcc.onnx_import import import_onnx

N = helper.make_node
X = {"x": ("float32", ["batch", 4, 6, 6])}
RANDOM = np.random.default_rng(0)


def f(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def i(*values):
    return np.array(values, np.int64)


# a position for each token of every row
TOKENS = [
    N("Shape", ["x"], ["dims"]), N("Slice", ["dims", "zero", "one"], ["n"]), N("Concat", ["n", "six"], ["t"], axis=0),
    N("Expand", ["places", "t"], ["p"]),
]  # fmt: skip
POSITIONS = {"zero": i(0), "one": i(1), "six": i(6), "places": np.array([[1, 3, 0, 8, 2, 5]], np.int64)}

OPERATORS = {
    "Conv": ([N("Conv", ["x", "w", "b"], ["y"], pads=[1, 0, 2, 1], strides=[2, 1])], {"w": f(5, 4, 3, 3), "b": f(5)}),
    "Conv same": ([N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2], group=2)], {"w": f(6, 2, 3, 3)}),
    "ConvTranspose": ([N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])], {"w": f(4, 3, 3, 3)}),
    "MaxPool": ([N("MaxPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1])], {}),
    "AveragePool": ([N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], {}),
    "GlobalAveragePool": ([N("GlobalAveragePool", ["x"], ["y"])], {}),
    "BatchNormalization": ([N("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"])], {"g": f(4), "b": f(4), "m": f(4), "v": f(4) ** 2 + 1}),
    "LayerNormalization": ([N("LayerNormalization", ["x", "g", "b"], ["y"], axis=-1)], {"g": f(6), "b": f(6)}),
    "InstanceNormalization": ([N("InstanceNormalization", ["x", "g", "b"], ["y"])], {"g": f(4), "b": f(4)}),
    "MatMul with a stored matrix": ([N("MatMul", ["x", "w"], ["y"])], {"w": f(6, 5)}),
    "Reshape from a computed shape": ([
        N("Shape", ["x"], ["s"]), N("Gather", ["s", "zero"], ["n"]), N("Unsqueeze", ["n", "axes"], ["u"]),
        N("Concat", ["u", "rest"], ["target"], axis=0), N("Reshape", ["x", "target"], ["y"]),
    ], {"zero": np.array(0, np.int64), "axes": i(0), "rest": i(-1, 6)}),
    "Slice": ([N("Slice", ["x", "s", "e", "a", "t"], ["y"])], {"s": i(-1, 1), "e": i(-100, 5), "a": i(3, 2), "t": i(-1, 2)}),
    "Split": ([N("Split", ["x", "n"], ["a", "b"], axis=1), N("Sub", ["b", "c"], ["y"]), N("ReduceMean", ["a", "axes"], ["c"], keepdims=1)][::-1][1:] and
              [N("Split", ["x", "n"], ["a", "b"], axis=1), N("ReduceMean", ["a", "axes"], ["c"], keepdims=1), N("Sub", ["b", "c"], ["y"])], {"n": i(1, 3), "axes": i(1)}),
    "Transpose": ([N("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], {}),
    "Pad": ([N("Pad", ["x", "p", "v"], ["y"])], {"p": i(0, 0, 1, 2, 0, 0, 0, 1), "v": np.array(1.5, np.float32)}),
    "Resize": ([N("Resize", ["x", "", "s"], ["y"], mode="linear")], {"s": np.array([1, 1, 2, 2], np.float32)}),
    "Clip": ([N("Clip", ["x", "lo", "hi"], ["y"])], {"lo": np.array(-0.5, np.float32), "hi": np.array(0.5, np.float32)}),
    "Softmax": ([N("Softmax", ["x"], ["y"], axis=1)], {}),
    "Gelu": ([N("Gelu", ["x"], ["y"])], {}),
    "HardSigmoid": ([N("HardSigmoid", ["x"], ["y"], alpha=0.25)], {}),
    "Where": ([N("Greater", ["x", "t"], ["c"]), N("Where", ["c", "x", "t"], ["y"])], {"t": np.array(0.1, np.float32)}),
    "Pow and Div": ([N("Pow", ["x", "two"], ["p"]), N("Div", ["p", "t"], ["y"])], {"two": np.array(2, np.float32), "t": np.array(3, np.float32)}),
    "ArgMax": ([N("ArgMax", ["x"], ["y"], axis=1, keepdims=0)], {}),
    "Cast": ([N("Cast", ["x"], ["y"], to=7)], {}),
    "Expand": ([N("ReduceMax", ["x", "axes"], ["m"]), N("Shape", ["x"], ["s"]), N("Expand", ["m", "s"], ["y"])], {"axes": i(1)}),
    "TopK": ([N("TopK", ["x", "k"], ["y", "places"], axis=1)], {"k": i(2)}),
    "Quantize and dequantize": ([
        N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ], {"s": np.array(0.03, np.float32), "z": np.array(100, np.uint8)}),
    "DepthToSpace": ([N("DepthToSpace", ["x"], ["y"], blocksize=2)], {}),
    "DepthToSpace by columns": ([N("DepthToSpace", ["x"], ["y"], blocksize=2, mode="CRD")], {}),
    "SpaceToDepth": ([N("SpaceToDepth", ["x"], ["y"], blocksize=3)], {}),
    "Einsum": ([N("Einsum", ["x", "w"], ["y"], equation="bchw,wk->bckh")], {"w": f(6, 5)}),
    "Mean": ([N("Relu", ["x"], ["r"]), N("Mean", ["x", "r", "c"], ["y"])], {"c": f(6)}),
    "ReduceL1 and ReduceSumSquare": ([N("ReduceL1", ["x", "a"], ["l"]), N("ReduceSumSquare", ["x", "a"], ["s"]), N("Sub", ["l", "s"], ["y"])], {"a": i(1)}),
    "Selu, Celu, Softsign": ([N("Selu", ["x"], ["a"]), N("Celu", ["a"], ["b"], alpha=0.7), N("Softsign", ["b"], ["y"])], {}),
    "Selu of its own numbers": ([N("Selu", ["x"], ["y"], alpha=1.5, gamma=2.0)], {}),
    "ThresholdedRelu": ([N("ThresholdedRelu", ["x"], ["y"], alpha=0.3)], {}),
    "ArgMin": ([N("ArgMin", ["x"], ["y"], axis=2, keepdims=0)], {}),
    "Tan to Acos": ([N("Tanh", ["x"], ["t"]), N("Tan", ["t"], ["a"]), N("Asin", ["t"], ["b"]), N("Acos", ["t"], ["c"]), N("Sum", ["a", "b", "c"], ["y"])], {}),
    "Atan to Atanh": ([N("Tanh", ["x"], ["t"]), N("Atan", ["x"], ["a"]), N("Sinh", ["t"], ["b"]), N("Cosh", ["t"], ["c"]), N("Asinh", ["x"], ["d"]), N("Acosh", ["c"], ["e"]), N("Atanh", ["t"], ["g"]), N("Sum", ["a", "b", "c", "d", "e", "g"], ["y"])], {}),
    "GatherND": ([N("GatherND", ["x", "i"], ["y"])], {"i": np.array([[0, 1], [0, -1]], np.int64)}),
    "GatherND of every image": ([N("Shape", ["x"], ["s"]), N("Slice", ["s", "zero", "one"], ["n"]), N("Concat", ["n", "two"], ["t"], axis=0), N("Expand", ["i", "t"], ["j"]), N("GatherND", ["x", "j"], ["y"], batch_dims=1)], {"i": i(3, 1).reshape(1, 2), "zero": i(0), "one": i(1), "two": i(2)}),
    "ScatterND": ([N("ScatterND", ["x", "i", "u"], ["y"])], {"i": np.array([[0, 1], [0, -1]], np.int64), "u": f(2, 6, 6)}),
    "ScatterND that adds": ([N("ScatterND", ["x", "i", "u"], ["y"], reduction="add")], {"i": np.array([[0, 1], [0, 1]], np.int64), "u": f(2, 6, 6)}),
    "ScatterElements": ([N("ScatterElements", ["x", "i", "u"], ["y"], axis=2)], {"i": np.array([[[[4, -1, 0]]]], np.int64), "u": f(1, 1, 1, 3)}),
    "OneHot": ([N("ArgMax", ["x"], ["a"], axis=1, keepdims=0), N("OneHot", ["a", "d", "v"], ["y"], axis=1)], {"d": np.array(4, np.int64), "v": f(2)}),
    "GridSample": ([N("Slice", ["x", "s", "e", "a"], ["g"]), N("Transpose", ["g"], ["h"], perm=[0, 2, 3, 1]), N("GridSample", ["x", "h"], ["y"], padding_mode="border")], {"s": i(1), "e": i(3), "a": i(1)}),
    "Hardmax": ([N("Hardmax", ["x"], ["y"], axis=1)], {}),
    "ReduceProd": ([N("ReduceProd", ["x", "a"], ["y"])], {"a": i(1, 3)}),
    "ReduceLogSumExp": ([N("ReduceLogSumExp", ["x", "a"], ["y"], keepdims=0)], {"a": i(-1)}),
    "Shrink and LpNormalization": ([N("Shrink", ["x"], ["s"], lambd=0.3, bias=0.1), N("LpNormalization", ["s"], ["y"], axis=1, p=1)], {}),
    "LRN": ([N("LRN", ["x"], ["y"], size=3, alpha=0.1)], {}),
    "IsInf": ([N("Div", ["x", "z"], ["d"]), N("IsInf", ["d"], ["y"], detect_negative=0)], {"z": np.zeros(6, np.float32)}),
    "Attention": ([N("Attention", ["x", "x", "x"], ["y"], is_causal=1)], {}),
    "Attention with a mask and shared heads": ([N("Slice", ["x", "s", "e", "c"], ["k"]), N("Attention", ["x", "k", "k", "m"], ["y"], scale=0.3)], {"m": f(6, 6), "s": i(0), "e": i(2), "c": i(1)}),
    "RotaryEmbedding": ([*TOKENS, N("RotaryEmbedding", ["x", "c", "s", "p"], ["y"])], {"c": f(9, 3), "s": f(9, 3), **POSITIONS}),
    "RotaryEmbedding of neighbours": ([*TOKENS, N("RotaryEmbedding", ["x", "c", "s", "p"], ["y"], interleaved=1, rotary_embedding_dim=4)], {"c": f(9, 2), "s": f(9, 2), **POSITIONS}),
    "Tile, Flatten, LeakyRelu": ([N("Tile", ["x", "r"], ["t"]), N("Flatten", ["t"], ["l"]), N("LeakyRelu", ["l"], ["y"], alpha=0.2)], {"r": i(1, 2, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_equals_onnx_runtime_at_another_batch(name):
    nodes, weights = OPERATORS[name]
    newest = any(n.op_type in ("Attention", "RotaryEmbedding") for n in nodes)
    proto = make_model(nodes, X, ["y"], weights, 23 if newest else 20)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    artifact = mcc.compile(proto, measure="never", tuning="model")
    for batch in (1, 3):
        x = f(batch, 4, 6, 6)
        (expected,) = session.run(None, {"x": x})
        found = artifact(x)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("given", [False, True])
def test_recurrent_layers_equal_onnx_runtime_for_any_number_of_steps(kind, direction, given):
    gates, directions, inputs, hidden = {"LSTM": 4, "GRU": 3}[kind], 1 + (direction == "bidirectional"), 5, 7
    weights = {
        "w": f(directions, gates * hidden, inputs), "r": f(directions, gates * hidden, hidden) / 3,
        "b": f(directions, 2 * gates * hidden),
    }  # fmt: skip
    names = ["x", "w", "r", *(["b", "", "h", *(["c"] if kind == "LSTM" else [])] if given else [])]
    weights |= {} if given else {"b": None}
    states = {n: ("float32", [directions, "batch", hidden]) for n in ("h", "c") if n in names}
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    node = N(kind, names, ["y", "last"], hidden_size=hidden, direction=direction, **options)
    proto = make_model(
        [node], {"x": ("float32", ["steps", "batch", inputs])} | states, ["y", "last"],
        {n: a for n, a in weights.items() if a is not None},
    )  # fmt: skip
    artifact = mcc.compile(proto, measure="never", tuning="model")
    assert {row.op for row in artifact.report.layers} == {"linear", kind.lower()}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for steps, batch in ((1, 1), (6, 3)):
        feeds = {"x": f(steps, batch, inputs)} | {n: f(directions, batch, hidden) for n in states}
        for found, expected in zip(artifact(**feeds), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_direction_do_not_take_the_name_of_another_tensor():
    proto = make_model(
        [N("LSTM", ["x", "w", "r"], ["h"], hidden_size=4), N("Add", ["h", "w_0"], ["y"])],
        {"x": ("float32", ["steps", "batch", 5])}, ["y"], {"w": f(1, 16, 5), "r": f(1, 16, 4), "w_0": f(4)},
    )  # fmt: skip
    x = f(3, 2, 5)
    expected = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    found = mcc.compile(proto, measure="never", tuning="model")(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options", "reason"), [
    ("GRU", {}, "applies its reset gate before the product"), ("LSTM", {"clip": 3.0}, "has one of clip"),
    ("LSTM", {"activations": ["Relu", "Tanh", "Tanh"]}, "has other activations"),
])  # fmt: skip
def test_recurrent_layers_of_other_forms_are_refused(kind, options, reason):
    weights = {"w": f(1, 12 if kind == "GRU" else 16, 5), "r": f(1, 12 if kind == "GRU" else 16, 4)}
    node = N(kind, ["x", "w", "r"], ["y"], hidden_size=4, **options)
    with pytest.raises(CaptureError, match=reason):
        import_onnx(make_model([node], {"x": ("float32", ["s", "n", 5])}, ["y"], weights))


def test_names_of_inputs_and_dims_are_the_files():
    artifact = mcc.compile(mlp_model(mlp(12, 4)), measure="never", tuning="model")
    assert [(s.name, s.shape) for s in artifact.inputs] == [("x", ("batch", 12))]


def test_stored_matrices_are_layers_that_passes_see():
    proto = make_model(
        [N("MatMul", ["x", "w"], ["h"]), N("Relu", ["h"], ["y"])], {"x": ("float32", ["n", 12])}, ["y"], {"w": f(12, 8)}
    )
    artifact = mcc.compile(proto, passes="prune-weights{ratio=0.9}", measure="never", tuning="model")
    assert artifact.report.passes[1].edits == 1
    assert artifact.report.layers[0].op == "linear + relu"


def test_two_inputs_of_which_one_is_integer():
    proto = make_model(
        [N("Gather", ["table", "ids"], ["e"], axis=0), N("Add", ["e", "x"], ["y"])],
        {"ids": ("int64", ["n", 3]), "x": ("float32", ["n", 3, 5])}, ["y"], {"table": f(7, 5)},
    )  # fmt: skip
    ids, x = np.array([[0, 6, 2]]), f(1, 3, 5)
    expected = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"ids": ids, "x": x})[0]
    np.testing.assert_allclose(mcc.compile(proto, measure="never", tuning="model")(ids=ids, x=x), expected)


def test_names_that_are_taken_or_no_identifiers_are_left():
    nodes = [N("Sub", ["x.1", "inputs_0"], ["a"]), N("Mul", ["a", "lambda"], ["y"])]
    proto = make_model(nodes, {name: ("float32", [3]) for name in ("x.1", "inputs_0", "lambda")}, ["y"])
    artifact = mcc.compile(proto, measure="never", tuning="model")
    assert [spec.name for spec in artifact.inputs] == ["inputs_0", "inputs_1", "inputs_2"]
    a, b, c = f(3), f(3), f(3)
    np.testing.assert_allclose(artifact(a, b, c), (a - b) * c, rtol=1e-6)


def test_float_initializers_are_parameters_and_statistics_are_not():
    nodes, weights = OPERATORS["BatchNormalization"]
    module, _, _ = import_onnx(make_model(nodes, X, ["y"], weights))
    assert {n for n, _ in module.named_parameters()} == {"g", "b"}
    assert {n for n, _ in module.named_buffers()} == {"m", "v"}


def test_unknown_operators_are_refused_by_name():
    with pytest.raises(CaptureError, match="ONNX operators that are not supported: Det, NonZero"):
        import_onnx(make_model([N("NonZero", ["x"], ["a"]), N("Det", ["x"], ["y"])], X, ["y"]))


def test_an_operator_of_another_domain_is_not_taken_for_onnxs():
    node = N("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2)
    with pytest.raises(CaptureError, match=r"com\.microsoft\.Attention"):
        import_onnx(make_model([node], X, ["y"], {"w": f(6, 18), "b": f(18)}))


def test_an_unsupported_form_of_an_operator_is_refused():
    proto = make_model(
        [N("Resize", ["x", "", "s"], ["y"], mode="cubic")], X, ["y"], {"s": np.array([1, 1, 2, 2], np.float32)}
    )
    with pytest.raises(CaptureError, match="ONNX Resize cubic with half_pixel is not supported"):
        mcc.compile(proto, tuning="model")


@pytest.mark.parametrize("data", [b"", b"nonsense" * 20])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(CaptureError, match="cannot read .* as ONNX"):
        mcc.compile(str(path))
    with pytest.raises(CaptureError, match="cannot read .* as ONNX"):
        mcc.compile(tmp_path / "none.onnx")


def test_torch_tensors_run_through_an_onnx_artifact():
    artifact = mcc.compile(mlp_model(mlp(12, 4)), measure="never", tuning="model")
    assert artifact(torch.zeros(2, 12)).shape == (2, 4)


def test_initializers_that_are_listed_as_inputs_are_none():
    proto = make_model(
        [N("MatMul", ["x", "w"], ["y"])], {"x": ("float32", ["n", 6]), "w": ("float32", [6, 5])}, ["y"],
        {"w": f(6, 5), "unread": f(3)},
    )  # fmt: skip
    proto.graph.input.append(helper.make_tensor_value_info("unread", 1, [3]))
    artifact, x = mcc.compile(proto, measure="never", tuning="model"), f(4, 6)
    assert [s.name for s in artifact.inputs] == ["x"]
    expected = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(artifact(x), expected, rtol=1e-5, atol=1e-5)
