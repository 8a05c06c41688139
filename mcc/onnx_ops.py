"""ONNX operators as PyTorch calls: ONNX_OPS maps an operator's name to a function of its attributes and inputs.

Shapes stay Python integers: a small integer vector is a `Sizes`, so that arithmetic on shapes never becomes tensor ops
and exported graphs keep symbolic dims. Operators follow https://onnx.ai/onnx/operators/ (opset 13 to 24).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcc import formats  # noqa: F401 (registers the ops)
from mcc.onnx_places import PLACES, Attributes, from_start, refusal
from mcc.onnx_quantizers import CODES
from mcc.onnx_recurrent import gru, lstm

Operator = Callable[..., Any]
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
_NO_END = (1 << 63) - 1


class Sizes(list[Any]):
    """A vector of ints and symbolic ints; `scalar` says that it has rank 0."""

    def __init__(self, values: Sequence[Any], *, scalar: bool = False) -> None:
        super().__init__(values)
        self.scalar = scalar


def as_tensor(value: Any) -> Any:
    """A `Sizes` as a tensor."""
    if not isinstance(value, Sizes):
        return value
    if all(isinstance(s, int) for s in value):
        made = torch.tensor(list(value), dtype=torch.int64)
    elif any(isinstance(s, float) for s in value):
        made = torch.tensor(list(value), dtype=torch.float32)
    else:
        made = torch.stack([torch.full((), s, dtype=torch.int64) for s in value])
    return made.reshape(()) if value.scalar else made


def _ints(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sizes | list | tuple) else value.tolist()


def _plain(function: Operator) -> Operator:
    return lambda attributes, *inputs: function(*map(as_tensor, inputs))


def _folded(function: Operator) -> Operator:
    def rule(attributes: Attributes, first: Any, *rest: Any) -> Tensor:
        result: Tensor = as_tensor(first)
        for other in rest:
            result = function(result, as_tensor(other))
        return result

    return rule


def _arithmetic(on_sizes: Operator, on_tensors: Operator) -> Operator:
    def rule(attributes: Attributes, a: Any, b: Any) -> Any:
        if isinstance(a, Sizes) and isinstance(b, Sizes):
            count = max(len(a), len(b))
            left, right = (list(v) * count if len(v) == 1 else list(v) for v in (a, b))
            pairs = zip(left, right, strict=True)
            return Sizes([on_sizes(x, y) for x, y in pairs], scalar=a.scalar and b.scalar)
        return on_tensors(as_tensor(a), as_tensor(b))

    return rule


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _cast(attributes: Attributes, x: Any) -> Any:
    kind = _DTYPES.get(attributes["to"])
    if kind is None:
        raise refusal(f"Cast to type {attributes['to']}")
    if isinstance(x, Sizes) and not kind.is_floating_point and kind is not torch.bool:
        return x
    return as_tensor(x).to(kind)


def _shape(attributes: Attributes, x: Tensor) -> Sizes:
    return Sizes(list(x.shape)[attributes.get("start", 0) : attributes.get("end")])


def _concat(attributes: Attributes, *inputs: Any) -> Any:
    if all(isinstance(x, Sizes) for x in inputs):
        return Sizes([s for x in inputs for s in x])
    return torch.cat([as_tensor(x) for x in inputs], attributes["axis"])


def _gather(attributes: Attributes, x: Any, indices: Any) -> Any:
    if isinstance(x, Sizes) and isinstance(indices, Sizes):
        return Sizes([x[i] for i in indices], scalar=indices.scalar)
    x = as_tensor(x)
    axis = attributes.get("axis", 0) % x.dim()
    if isinstance(indices, Sizes):
        places = [i + x.shape[axis] if isinstance(i, int) and i < 0 else i for i in indices]
        return x.select(axis, places[0]) if indices.scalar else x.index_select(axis, as_tensor(Sizes(places)))
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(indices, x)
    wrapped = from_start(indices, x.shape[axis])
    return x[(slice(None),) * axis + (wrapped,)]


def _slice(attributes: Attributes, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    first, last = _ints(starts), _ints(ends)
    dims = _ints(axes) if axes is not None else list(range(len(first)))
    strides = _ints(steps) if steps is not None else [1] * len(first)
    if isinstance(x, Sizes):
        return Sizes(list(x)[slice(first[0], last[0] if abs(last[0]) < _NO_END else None, strides[0])])
    for start, end, axis, step in zip(first, last, dims, strides, strict=True):
        if step < 0:
            places = list(range(x.shape[axis]))[slice(start, None if end < -x.shape[axis] else end, step)]
            x = x.index_select(axis, torch.tensor(places))
        else:
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return x


def _squeeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    if isinstance(x, Sizes):
        return Sizes(x, scalar=True)
    return x.squeeze(tuple(_ints(axes))) if axes is not None else x.squeeze()


def _unsqueeze(attributes: Attributes, x: Any, axes: Any) -> Any:
    if isinstance(x, Sizes) and x.scalar:
        return Sizes(x)
    x = as_tensor(x)
    for axis in sorted(a % (x.dim() + len(_ints(axes))) for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _reshape(attributes: Attributes, x: Any, shape: Any) -> Any:
    sizes = _ints(shape)
    if isinstance(x, Sizes) and len(sizes) == 1:
        return Sizes(x)
    x = as_tensor(x)
    keep = not attributes.get("allowzero")
    return x.reshape([x.shape[i] if keep and isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)])


def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1) % max(x.dim(), 1)
    return x.flatten(1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def _expand(attributes: Attributes, x: Any, shape: Any) -> Tensor:
    x, sizes = as_tensor(x), _ints(shape)
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    new = len(sizes) - x.dim()
    expanded: Tensor = x.expand(
        [x.shape[i - new] if i >= new and isinstance(s, int) and s == 1 else s for i, s in enumerate(sizes)]
    )
    return expanded


def _gemm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    x = x.t() if attributes.get("transA") else x
    weight = weight if attributes.get("transB") else weight.t()
    if alpha == 1 and beta == 1 and (bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0])):
        return F.linear(x, weight, bias)
    product: Tensor = alpha * F.linear(x, weight)
    return product if bias is None else product + beta * bias


def _window(attributes: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads (before each dim, then after)."""
    dims = x.dim() - 2
    strides, dilations = attributes.get("strides", [1] * dims), attributes.get("dilations", [1] * dims)
    pads, auto = attributes.get("pads", [0] * 2 * dims), attributes.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [
            max(
                (-(-x.shape[i + 2] // strides[i]) - 1) * strides[i]
                + (kernel[i] - 1) * dilations[i]
                + 1
                - x.shape[i + 2],
                0,
            )
            for i in range(dims)
        ]
        less = [t // 2 for t in total]
        more = [t - low for t, low in zip(total, less, strict=True)]
        pads = less + more if auto == b"SAME_UPPER" else more + less
    return list(strides), list(dilations), list(pads)


def _padded(x: Tensor, pads: list[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input with uneven padding done, and what even padding is left to the op."""
    dims = len(pads) // 2
    if pads[:dims] == pads[dims:]:
        return x, pads[:dims]
    amounts = [v for i in reversed(range(dims)) for v in (pads[i], pads[i + dims])]
    return F.pad(x, amounts, value=value), [0] * dims


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, pads = _window(attributes, x, weight.shape[2:])
    x, even = _padded(x, pads)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, weight, bias, strides, even, dilations, attributes.get("group", 1))


def _conv_transpose(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = x.dim() - 2
    strides, dilations, pads = _window(attributes, x, weight.shape[2:])
    if (
        dims != 2
        or "output_shape" in attributes
        or attributes.get("auto_pad", b"NOTSET") != b"NOTSET"
        or pads[:2] != pads[2:]
    ):
        raise refusal("ConvTranspose with output_shape, auto_pad, uneven pads or other than two dims")
    extra = attributes.get("output_padding", [0] * dims)
    return F.conv_transpose2d(x, weight, bias, strides, pads[:2], extra, attributes.get("group", 1), dilations)


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    strides, dilations, pads = _window(attributes, x, kernel)
    x, even = _padded(x, pads, -math.inf)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    result: Tensor = function(x, kernel, strides, even, dilations, bool(attributes.get("ceil_mode")))
    return result


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    strides, dilations, pads = _window(attributes, x, kernel)
    counted = bool(attributes.get("count_include_pad"))
    if set(dilations) != {1} or (pads[: len(pads) // 2] != pads[len(pads) // 2 :] and not counted):
        raise refusal("AveragePool with dilation, or with uneven pads that do not count")
    x, even = _padded(x, pads)
    function = (F.avg_pool1d, F.avg_pool2d)[x.dim() - 3]
    return function(x, kernel, strides, even, bool(attributes.get("ceil_mode")), counted)


def _pad(attributes: Attributes, x: Tensor, pads: Any, value: Any = None, axes: Any = None) -> Tensor:
    amounts = _ints(pads)
    dims = [a % x.dim() for a in _ints(axes)] if axes is not None else list(range(x.dim()))
    by_dim = {d: (amounts[i], amounts[i + len(dims)]) for i, d in enumerate(dims)}
    flat = [v for d in reversed(range(x.dim())) for v in by_dim.get(d, (0, 0))]
    mode = attributes.get("mode", b"constant").decode()
    if mode == "constant":
        return F.pad(x, flat, value=float(value[0]) if value is not None else 0.0)
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


def _resize(attributes: Attributes, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    mode = attributes.get("mode", b"nearest").decode()
    transform = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    exact_nearest = (transform, attributes.get("nearest_mode")) == ("asymmetric", b"floor")
    if x.dim() != 4 or mode not in ("nearest", "linear") or (mode == "nearest" and not exact_nearest):
        raise refusal(f"Resize {mode} with {transform}")
    options = (
        {"mode": "nearest"}
        if mode == "nearest"
        else {"mode": "bilinear", "align_corners": transform == "align_corners"}
    )
    if sizes:
        return F.interpolate(x, size=_ints(sizes)[2:], **options)
    return F.interpolate(x, scale_factor=list(scales)[2:], recompute_scale_factor=False, **options)


def _reduction(function: Operator) -> Operator:
    def rule(attributes: Attributes, x: Any, axes: Any = None) -> Tensor:
        x = as_tensor(x)
        dims = _ints(axes) if axes is not None else attributes.get("axes", [])
        dims = dims or list(range(x.dim()))
        result: Tensor = function(x, dims, bool(attributes.get("keepdims", 1)))
        return result

    return rule


def _quantize(attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    low, high = CODES[attributes["codes"].decode()]
    dtype = torch.int16 if low < -128 else torch.int8 if low < 0 else torch.uint8
    if scale.dim() > 1:
        raise refusal("QuantizeLinear in blocks")
    codes: Tensor = torch.ops.mcc.quantize(x, scale, zero_point, _axis(attributes, x, scale), low, high, dtype)
    return codes


def _dequantize(attributes: Attributes, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    axis = _axis(attributes, codes, scale)
    if scale.dim() == codes.dim() == 2 and axis == 0:  # blocks of rows
        return _dequantize({"axis": 1}, *(t.t() for t in (codes, scale, zero_point))).t()
    if scale.dim() > 1 and (codes.dim() > 2 or axis != 1):
        repeats = codes.shape[axis] // scale.shape[axis]  # type: ignore[index]  # blocks have an axis
        scale, zero_point = (t.repeat_interleave(repeats, axis) for t in (scale, zero_point))
        return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale
    values: Tensor = torch.ops.mcc.dequantize(codes, scale, zero_point, 0 if scale.dim() > 1 else axis)
    return values.to(scale.dtype)


def _axis(attributes: Attributes, codes: Tensor, scale: Tensor) -> int | None:
    return None if scale.dim() == 0 else int(attributes.get("axis", 1)) % codes.dim()


def _depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes["blocksize"]
    if attributes.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, size)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, size, size, channels // size**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // size**2, height * size, width * size)


def _space_to_depth(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes["blocksize"]
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // size, size, width // size, size)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * size**2, height // size, width // size)


def _mean(attributes: Attributes, *inputs: Tensor) -> Tensor:
    total: Tensor = _folded(torch.add)(attributes, *inputs)
    return total / len(inputs)


def _scaled_elu(attributes: Attributes, x: Tensor) -> Tensor:
    scaled: Tensor = attributes.get("gamma", 1.0507) * F.elu(x, attributes.get("alpha", 1.67326))
    return scaled


def _split(attributes: Attributes, x: Tensor, sizes: Any = None) -> Any:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, _ints(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // attributes.get("num_outputs", attributes["outputs"])), axis)


def _clip(attributes: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = (v[0] if isinstance(v, Sizes) else v for v in (low, high))
    low, high = (attributes.get(key) if v is None else v for key, v in (("min", low), ("max", high)))
    return x if low is None and high is None else torch.clamp(x, low, high)


def _range(attributes: Attributes, start: Any, end: Any, step: Any) -> Tensor:
    first, last, stride = (v[0] if isinstance(v, Sizes) else v.item() for v in (start, end, step))
    return torch.arange(first, last, stride)


def _constant_of_shape(attributes: Attributes, shape: Any) -> Tensor:
    value = attributes.get("value")
    filled = torch.zeros(1) if value is None else torch.from_numpy(value.copy())
    return torch.full(_ints(shape), filled.item(), dtype=filled.dtype)


def _top_k(attributes: Attributes, x: Tensor, count: Any) -> Any:
    return torch.topk(x, _ints(count)[0], attributes.get("axis", -1), bool(attributes.get("largest", 1)))


def _layer_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = x.shape[attributes.get("axis", -1) :]
    return F.layer_norm(x, dims, weight, bias, attributes.get("epsilon", 1e-5))


def _product(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:  # noqa: FBT001 (a reduction's arguments)
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(dim, keepdim)
    return x


def _is_infinite(attributes: Attributes, x: Tensor) -> Tensor:
    signs = [
        s for s, name in ((math.inf, "detect_positive"), (-math.inf, "detect_negative")) if attributes.get(name, 1)
    ]
    return torch.isinf(x) if len(signs) != 1 else x == signs[0]


def _shrink(attributes: Attributes, x: Tensor) -> Tensor:
    bias, edge = attributes.get("bias", 0.0), attributes.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, 0.0))


def _normalized(attributes: Attributes, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, attributes.get("p", 2), attributes.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


def _local_response_norm(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes["size"]
    if size % 2 == 0:
        raise refusal("LRN over an even number of channels")
    return F.local_response_norm(
        x, size, attributes.get("alpha", 1e-4), attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    )


_POINTWISE: dict[str, Operator] = {
    "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Softplus": F.softplus, "Sqrt": torch.sqrt, "Tanh": torch.tanh, "HardSwish": F.hardswish, "Mish": F.mish,
    "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not, "And": torch.logical_and, "Or": torch.logical_or, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "MatMul": torch.matmul, "Where": torch.where,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x), "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
}  # fmt: skip

ONNX_OPS: dict[str, Operator] = {
    **{name: _plain(function) for name, function in _POINTWISE.items()},
    "Max": _folded(torch.maximum), "Min": _folded(torch.minimum), "Sum": _folded(torch.add),
    "Add": _arithmetic(operator.add, torch.add), "Sub": _arithmetic(operator.sub, torch.sub),
    "Mul": _arithmetic(operator.mul, torch.mul), "Div": _arithmetic(operator.floordiv, _divide),
    "Mod": lambda a, x, y: torch.remainder(as_tensor(x), as_tensor(y)),
    "Identity": lambda a, x: x, "Dropout": lambda a, x, *rest: F.dropout(x, 0.5, False),
    "Cast": _cast, "Shape": _shape, "Concat": _concat, "Gather": _gather, "Slice": _slice, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Reshape": _reshape, "Flatten": _flatten, "Expand": _expand, "Gemm": _gemm, "Conv": _conv,
    "ConvTranspose": _conv_transpose, "MaxPool": _max_pool, "AveragePool": _average_pool, "Pad": _pad,
    "Resize": _resize,
    "GlobalAveragePool": lambda a, x: F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(tuple(range(2,
    x.dim())), True),
    "GlobalMaxPool": lambda a, x: x.amax(list(range(2, x.dim())), True),
    "ReduceSum": _reduction(lambda x, d, k: x.sum(d, k)), "ReduceMean": _reduction(lambda x, d, k: x.mean(d, k)),
    "ReduceMax": _reduction(lambda x, d, k: x.amax(d, k)), "ReduceMin": _reduction(lambda x, d, k: x.amin(d, k)),
    "ReduceL2": _reduction(lambda x, d, k: x.square().sum(d, k).sqrt()),
    "Transpose": lambda a, x: x.permute(a.get("perm", list(range(x.dim()))[::-1])),
    "Tile": lambda a, x, counts: x.repeat(_ints(counts)), "ConstantOfShape": _constant_of_shape, "Range": _range,
    "Softmax": lambda a, x: F.softmax(x, a.get("axis", -1)), "LogSoftmax": lambda a, x: F.log_softmax(x, a.get("axis",
    -1)),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)), "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Clip": _clip, "Split": _split, "TopK": _top_k, "CumSum": lambda a, x, d: torch.cumsum(x, int(_ints(d)[0])),
    "Trilu": lambda a, x, k=None: (torch.triu if a.get("upper", 1) else torch.tril)(x,
    0 if k is None else int(_ints(k)[0])),
    "ArgMax": lambda a, x: torch.argmax(x, a.get("axis", 0), bool(a.get("keepdims", 1))),
    "GatherElements": lambda a, x, i: torch.gather(x, d := a.get("axis", 0), from_start(i, x.shape[d])),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": lambda a, x, w, b, m, v: F.batch_norm(x, m, v, w, b, False, 0.1, a.get("epsilon", 1e-5)),
    "GroupNormalization": lambda a, x, w, b: F.group_norm(x, a["num_groups"], w, b, a.get("epsilon", 1e-5)),
    "InstanceNormalization": lambda a, x, w, b: F.instance_norm(x, None, None, w, b, True, 0.0, a.get("epsilon", 1e-5)),
    "QuantizeLinear": _quantize, "DequantizeLinear": _dequantize, "LSTM": lstm, "GRU": gru,
    "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "Mean": _mean,
    "Einsum": lambda a, *inputs: torch.einsum(a["equation"].decode(), *inputs),
    "ReduceL1": _reduction(lambda x, d, k: x.abs().sum(d, k)),
    "ReduceSumSquare": _reduction(lambda x, d, k: x.square().sum(d, k)),
    "ReduceLogSum": _reduction(lambda x, d, k: x.sum(d, k).log()),
    "Selu": lambda a, x: F.selu(x) if set(a) <= {"outputs"} else _scaled_elu(a, x),
    "Celu": lambda a, x: F.celu(x, a.get("alpha", 1.0)), "Softsign": lambda a, x: x / (1 + x.abs()),
    "ThresholdedRelu": lambda a, x: torch.where(x > a.get("alpha", 1.0), x, 0.0),
    "Xor": lambda a, x, y: torch.ne(x, y), "ArgMin": lambda a, x: torch.argmax(-x, a.get("axis", 0),
    bool(a.get("keepdims", 1))),
    "ReduceProd": _reduction(_product), "ReduceLogSumExp": _reduction(torch.logsumexp), "IsInf": _is_infinite,
    "BitShift": lambda a, x, n: x << n if a["direction"] == b"LEFT" else x >> n, "Shrink": _shrink,
    "LpNormalization": _normalized, "LRN": _local_response_norm, **PLACES,
    "RMSNormalization": lambda a, x, w: F.rms_norm(x, x.shape[a.get("axis", -1) :], w, a.get("epsilon", 1e-5)),
    "Swish": lambda a, x: F.silu(x) if a.get("alpha", 1.0) == 1 else x * torch.sigmoid(a["alpha"] * x),
}  # fmt: skip

STATIC_INPUTS: dict[str, tuple[int, ...]] = {
    "Resize": (1, 2, 3), "Pad": (1, 2, 3), "Clip": (1, 2), "Range": (0, 1, 2), "CumSum": (1,), "Trilu": (1,),
    "TopK": (1,), "OneHot": (1,),
    "Dropout": (1, 2),
}  # fmt: skip
"""Inputs that must be Python numbers while the graph is traced."""

BUFFER_INPUTS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4), "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2),
}  # fmt: skip
"""Numbers that no optimizer may move."""
